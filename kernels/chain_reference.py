"""What `latent_chain.py` computes, in plain torch: specification and oracle of the tests."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .energy import EnergyParameters, mlp_energy_and_gradient_reference
from .langevin import langevin_step_reference
from .metropolis import mala_accept_reference


class ChainResult(NamedTuple):
    """The end of N chains, on the device.

    Attributes:
        samples: `[N, D]`.
        acceptance: `[N]`, the share of proposals that were accepted (1 where nothing is adjusted).
        energy: `[N]`, f at the samples, without scale and prior.
        trajectory: `[n_steps // thin, N, D]`, the state after every `thin` steps, or None.
    """

    samples: Tensor
    acceptance: Tensor
    energy: Tensor
    trajectory: Tensor | None


class ChainOptions(NamedTuple):
    """What a chain does with its energy; see `langevin_chain`."""

    n_steps: int
    step_size: float
    temperature: float
    adjusted: bool
    prior_precision: float
    energy_scale: float
    precision: str
    activation: str
    seed: int | Tensor
    first_step: int | Tensor
    thin: int
    return_trajectory: bool


class ChainState(NamedTuple):
    """Where N chains stand: positions `[N, D]`, f `[N]`, energy_scale·∇f `[N, D]`, accepted steps `[N]`."""

    x: Tensor
    value: Tensor
    gradient: Tensor
    accepted: Tensor


def chain_start_reference(z: Tensor, parameters: EnergyParameters, options: ChainOptions) -> ChainState:
    """The state before the first step."""
    value, gradient = mlp_energy_and_gradient_reference(z, parameters, options.precision, options.activation)
    return ChainState(z, value, options.energy_scale * gradient, torch.zeros_like(value))


def chain_step_reference(
    state: ChainState,
    parameters: EnergyParameters,
    index: Tensor,
    step: int | Tensor,
    options: ChainOptions,
) -> ChainState:
    """Step number `step`, by the references of its parts."""
    noise: dict[str, Any] = {
        "temperature": options.temperature,
        "seed": options.seed,
        "index": index,
        "step": step,
        "prior_precision": options.prior_precision,
    }
    moved = langevin_step_reference(state.x, state.gradient, options.step_size, **noise)
    assert isinstance(moved, Tensor)
    _, value, gradient, _ = chain_start_reference(moved, parameters, options)
    if not options.adjusted:
        return ChainState(moved, value, gradient, state.accepted)
    scale = options.energy_scale
    outcome = mala_accept_reference(
        state.x,
        scale * state.value,
        state.gradient,
        moved,
        scale * value,
        gradient,
        options.step_size,
        **noise,
    )
    assert isinstance(outcome.x, Tensor)
    assert isinstance(outcome.grad, Tensor)
    value = torch.where(outcome.accepted, value, state.value)
    return ChainState(outcome.x, value, outcome.grad, state.accepted + outcome.accepted)


def langevin_chain_reference(
    z: Tensor, parameters: EnergyParameters, index: Tensor, options: ChainOptions
) -> ChainResult:
    """What `langevin_chain` computes, in plain torch: `chain_step_reference`, n_steps times."""
    state = chain_start_reference(z, parameters, options)
    states = []
    for t in range(options.n_steps):
        state = chain_step_reference(state, parameters, index, options.first_step + t, options)
        if options.return_trajectory and (t + 1) % options.thin == 0:
            states.append(state.x)
    steps = options.n_steps
    share = state.accepted / steps if options.adjusted and steps else torch.ones_like(state.accepted)
    trajectory = None
    if options.return_trajectory:
        trajectory = torch.stack(states) if states else z.new_empty(0, *z.shape)
    return ChainResult(state.x, share, state.value, trajectory)


__all__ = [
    "ChainOptions",
    "ChainResult",
    "ChainState",
    "chain_start_reference",
    "chain_step_reference",
    "langevin_chain_reference",
]
