"""Langevin dynamics on any energy: unadjusted (ULA), or Metropolis-adjusted (MALA)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm

from evalp_fast.kernels.checks import check_bool, check_integer, check_positive
from evalp_fast.kernels.langevin import langevin_step, mala_accept
from evalp_fast.kernels.mlp_reference import without_autocast
from evalp_fast.samplers.base import Draws, Sampler

Energy = Callable[[Tensor], Tensor]
"""`x [N, ...]` to `U(x) [N]`; the law that is sampled is proportional to exp(-U/T)."""


class Chains(NamedTuple):
    """The end of N chains.

    Attributes:
        samples: `[N, ...]`.
        trajectory: `[n_steps // thin, N, ...]`, the state after every `thin` steps, or None.
        acceptance: `[N]`, the share of steps accepted (1 where nothing is adjusted).
        energy: `[n_steps // thin]`, the mean energy over the chains *before* each recorded step, or None.
    """

    samples: Tensor
    trajectory: Tensor | None
    acceptance: Tensor
    energy: Tensor | None


def energy_and_gradient(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """`(U(x) [N], ∇U(x))`, detached. Rows must not depend on each other.

    In inference mode too, of networks made outside of it. Autocast is the forward pass's alone, as torch
    advises: it would round the products of a backward pass whatever their precision is.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        value = energy(x)
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"energy must return shape {tuple(x.shape[:1])}, one value a row, got {tuple(value.shape)}"
            )
        with without_autocast(x.device):
            (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


def langevin(
    initial: Tensor,
    energy: Energy,
    *,
    n_steps: int,
    step_size: float,
    temperature: float = 1.0,
    adjusted: bool = False,
    clamp: tuple[float, float] | None = None,
    thin: int = 1,
    return_trajectory: bool = False,
    return_diagnostics: bool = False,
    seed: int = 0,
    index: Tensor | None = None,
    progress: bool = False,
) -> Chains:
    """Run `n_steps` of Langevin dynamics from `initial`.

    The update is `x ← x - (η/2)∇U(x) + √(ηT)·ξ` with η the `step_size` (Xiao et al., "VAEBM", ICLR 2021;
    LEBM writes s² for our η, and torchebm's η is half of ours). With `adjusted=True` each step is a
    proposal that is accepted with the Metropolis-Hastings probability, so that the law exp(-U/T) is exact
    at any step size (Roberts & Tweedie 1996); a proposal of non-finite energy is rejected.

    Args:
        initial: `[N, ...]` float32 or float64, the first states; not modified.
        energy: U.
        n_steps, step_size, temperature: as above; `n_steps=0` returns `initial`.
        clamp: `(low, high)` applied to the state after each step; not with `adjusted`, where it would
            change the law.
        thin: steps between two recorded states.
        return_trajectory, return_diagnostics: what is recorded.
        seed, index: the noise of chain i is that of `(seed, index[i])`; `index` is int64 `[N]`, by
            default 0..N-1.
        progress: show a progress bar.

    Returns:
        `Chains`, detached.

    Raises:
        ValueError: for an argument out of its range, where a chain starts at an energy of NaN (with
            `adjusted` also at an infinite one), or when the state is no longer finite.
    """
    check_positive("temperature", temperature)
    check_integer("n_steps", n_steps, 0)
    check_positive("step_size", step_size)
    check_integer("thin", thin, 1)
    check_bool("adjusted", adjusted)
    if adjusted and clamp is not None:
        raise ValueError("clamp changes the law that adjusted=True keeps exact: use one of the two")
    index = torch.arange(initial.shape[0], device=initial.device) if index is None else index
    x = initial.detach()
    accepted = torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
    states: list[Tensor] = []
    energies: list[Tensor] = []
    value, gradient = energy_and_gradient(energy, x)
    # An adjusted chain that starts there may accept nothing, and would end where it began.
    bad_start = ~value.isfinite() if adjusted else value.isnan()
    if bool(bad_start.any()):
        kind = "NaN or infinite" if adjusted else "NaN"
        raise ValueError(f"{int(bad_start.sum())} of {x.shape[0]} chains start where the energy is {kind}")
    for step in tqdm(range(n_steps), unit=" steps", disable=not progress, leave=False, delay=1.0):
        if return_diagnostics and (step + 1) % thin == 0:
            energies.append(value.mean())
        noise = {"seed": seed, "index": index, "step": step, "temperature": temperature}
        moved = cast(Tensor, langevin_step(x, gradient, step_size, clamp=clamp, **noise))
        moved_value, moved_gradient = energy_and_gradient(energy, moved)
        if adjusted:
            outcome = mala_accept(x, value, gradient, moved, moved_value, moved_gradient, step_size, **noise)
            x, value, gradient = cast(Tensor, outcome.x), outcome.energy, cast(Tensor, outcome.grad)
            accepted += outcome.accepted
        else:
            x, value, gradient = moved, moved_value, moved_gradient
        if return_trajectory and (step + 1) % thin == 0:
            states.append(x.clone())
    if not bool(x.isfinite().all()):
        bad = int((~x.flatten(1).isfinite().all(dim=1)).sum())
        raise ValueError(
            f"{bad} of {x.shape[0]} chains are no longer finite: lower step_size ({step_size}) or clamp"
        )
    return Chains(
        x,
        torch.stack(states) if states else x.new_empty((0, *x.shape)) if return_trajectory else None,
        accepted / n_steps if adjusted and n_steps else torch.ones_like(accepted),
        torch.stack(energies) if energies else value.new_empty(0) if return_diagnostics else None,
    )


@dataclass(frozen=True)
class LangevinSampler:
    """`langevin` as a sampler: chains that start from `initial`'s samples of the same numbers.

    Attributes:
        initial: the sampler of the first states.
        energy, n_steps, step_size, temperature, adjusted, clamp: as for `langevin`.
        transform: applied to the final states (a chain in noise space ends with the flow's pass).

    Diagnostics per sample: `acceptance`.
    """

    initial: Sampler
    energy: Energy
    n_steps: int = 60
    step_size: float = 0.1
    temperature: float = 1.0
    adjusted: bool = False
    clamp: tuple[float, float] | None = None
    transform: Callable[[Tensor], Tensor] | None = None

    def __call__(self, seed: int, index: Tensor) -> Draws:
        chains = langevin(
            self.initial(seed, index).samples,
            self.energy,
            n_steps=self.n_steps,
            step_size=self.step_size,
            temperature=self.temperature,
            adjusted=self.adjusted,
            clamp=self.clamp,
            seed=seed,
            index=index,
        )
        samples = chains.samples if self.transform is None else self.transform(chains.samples)
        return Draws(samples, {"acceptance": chains.acceptance})
