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


class ChainState(NamedTuple):
    """Where N chains stand: positions `[N, D]`, f `[N]`, energy_scale·∇f `[N, D]`, accepted steps `[N]`."""

    x: Tensor
    value: Tensor
    gradient: Tensor
    accepted: Tensor


def chain_start_reference(
    z: Tensor,
    parameters: EnergyParameters,
    energy_scale: float = 1.0,
    precision: str = "ieee",
    activation: str = "leaky_relu",
) -> ChainState:
    """The state before the first step."""
    value, gradient = mlp_energy_and_gradient_reference(z, parameters, precision, activation)
    return ChainState(z, value, energy_scale * gradient, torch.zeros_like(value))


def chain_step_reference(
    state: ChainState,
    parameters: EnergyParameters,
    index: Tensor,
    step: int | Tensor,
    seed: int | Tensor,
    step_size: float,
    temperature: float = 1.0,
    adjusted: bool = False,
    prior_precision: float = 1.0,
    energy_scale: float = 1.0,
    precision: str = "ieee",
    activation: str = "leaky_relu",
) -> ChainState:
    """One step, by the references of its parts."""
    noise: dict[str, Any] = {"temperature": temperature, "seed": seed, "index": index, "step": step}
    moved = langevin_step_reference(
        state.x, state.gradient, step_size, prior_precision=prior_precision, **noise
    )
    assert isinstance(moved, Tensor)
    value, gradient = mlp_energy_and_gradient_reference(moved, parameters, precision, activation)
    gradient = energy_scale * gradient
    if not adjusted:
        return ChainState(moved, value, gradient, state.accepted)
    outcome = mala_accept_reference(
        state.x,
        energy_scale * state.value,
        state.gradient,
        moved,
        energy_scale * value,
        gradient,
        step_size,
        prior_precision=prior_precision,
        **noise,
    )
    assert isinstance(outcome.x, Tensor)
    assert isinstance(outcome.grad, Tensor)
    value = torch.where(outcome.accepted, value, state.value)
    return ChainState(outcome.x, value, outcome.grad, state.accepted + outcome.accepted)


def langevin_chain_reference(
    z: Tensor,
    parameters: EnergyParameters,
    index: Tensor,
    n_steps: int,
    step_size: float,
    temperature: float = 1.0,
    adjusted: bool = False,
    prior_precision: float = 1.0,
    energy_scale: float = 1.0,
    precision: str = "ieee",
    activation: str = "leaky_relu",
    seed: int | Tensor = 0,
    first_step: int | Tensor = 0,
    thin: int = 1,
    return_trajectory: bool = False,
) -> ChainResult:
    """What `langevin_chain` computes, in plain torch: `chain_step_reference`, n_steps times."""
    state = chain_start_reference(z, parameters, energy_scale, precision, activation)
    states = []
    for t in range(n_steps):
        state = chain_step_reference(
            state,
            parameters,
            index,
            first_step + t,
            seed,
            step_size,
            temperature,
            adjusted,
            prior_precision,
            energy_scale,
            precision,
            activation,
        )
        if return_trajectory and (t + 1) % thin == 0:
            states.append(state.x)
    share = state.accepted / n_steps if adjusted and n_steps else torch.ones_like(state.accepted)
    trajectory = None
    if return_trajectory:
        trajectory = torch.stack(states) if states else z.new_empty(0, *z.shape)
    return ChainResult(state.x, share, state.value, trajectory)


__all__ = [
    "ChainResult",
    "ChainState",
    "chain_start_reference",
    "chain_step_reference",
    "langevin_chain_reference",
]
