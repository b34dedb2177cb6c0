"""The latent chain on the CPU: all steps of a few chains, whose network stays in the cache, then of the next.

The same as `chain_reference.langevin_chain_reference`, up to rounding, by the steps of `langevin.py` and
`metropolis.py` and the energy of `energy_cpu.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .chain_reference import ChainOptions
from .energy_cpu import energy_and_gradient_function
from .langevin import langevin_step
from .metropolis import mala_accept
from .mlp_cpu import chunk_rows, in_chunks


def langevin_chain_on_cpu(
    z: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...], index: Tensor, options: ChainOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Samples `[N, D]`, acceptance `[N]`, energies `[N]`, trajectory `[n_steps // thin, N, D]` or None."""

    with torch.no_grad():
        energy_and_gradient = energy_and_gradient_function(
            weights, biases, activation=options.activation, precision=options.precision
        )

        def step(z: Tensor, index: Tensor) -> tuple[Tensor, ...]:
            return _some_chains(z, energy_and_gradient, index, options)

        rows = chunk_rows(weights[0].shape[0], options.precision)
        samples, acceptance, energy, *states = in_chunks(step, (z, index), rows)
    return samples, acceptance, energy, states[0].transpose(0, 1) if states else None


def _some_chains(
    z: Tensor,
    energy_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    index: Tensor,
    options: ChainOptions,
) -> tuple[Tensor, ...]:
    """All steps of these chains. The trajectory `[N, states, D]` comes last, where it is asked for."""

    def energy_of(x: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = energy_and_gradient(x)
        return value, gradient if scale == 1.0 else scale * gradient

    scale = options.energy_scale
    x: Any = z
    value, gradient = energy_of(x)
    accepted = torch.zeros_like(value)
    states = []
    for number in range(options.n_steps):
        noise: dict[str, Any] = {
            "temperature": options.temperature,
            "seed": options.seed,
            "index": index,
            "step": options.first_step + number,
            "prior_precision": options.prior_precision,
        }
        moved: Any = langevin_step(x, gradient, options.step_size, **noise)
        moved_value, moved_gradient = energy_of(moved)
        if options.adjusted:
            scaled = scale * value, scale * moved_value
            outcome = mala_accept(
                x, scaled[0], gradient, moved, scaled[1], moved_gradient, options.step_size, **noise
            )
            x, gradient = outcome.x, outcome.grad
            value = torch.where(outcome.accepted, moved_value, value)
            accepted += outcome.accepted
        else:
            x, value, gradient = moved, moved_value, moved_gradient
        if options.return_trajectory and (number + 1) % options.thin == 0:
            states.append(x)
    share = accepted / options.n_steps if options.adjusted and options.n_steps else torch.ones_like(accepted)
    if not options.return_trajectory:
        return x, share, value
    trajectory = torch.stack(states, dim=1) if states else z.new_empty((len(z), 0, z.shape[1]))
    return x, share, value, trajectory


__all__ = ["langevin_chain_on_cpu"]
