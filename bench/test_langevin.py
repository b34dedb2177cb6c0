"""Langevin step and Metropolis acceptance: evalp_fast, the textbook's lines in torch, torchebm's step."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import DEVICE, Problem, check_normal, inductor, input_sets, size
from evalp_fast.kernels.langevin import langevin_step, mala_accept
from evalp_fast.kernels.philox import Stream, normal

ROWS, WIDTH, STEP_SIZE = size(1 << 13, 1 << 20), 64, 0.1
INDEX = torch.arange(ROWS, device=DEVICE)


def ours(x: Tensor, grad: Tensor) -> Tensor:
    """The public function."""
    return langevin_step(x, grad, STEP_SIZE, seed=0, index=INDEX, step=0)  # pyright: ignore[reportReturnType]


def textbook(x: Tensor, grad: Tensor) -> Tensor:
    """The update rule."""
    return x - 0.5 * STEP_SIZE * grad + math.sqrt(STEP_SIZE) * torch.randn_like(x)


def torchebm_step() -> Callable[[Tensor, Tensor], Tensor]:
    """torchebm's Euler-Maruyama step, whose step size is half of ours."""
    integrators = pytest.importorskip("torchebm.integrators", reason="torchebm is not installed")
    integrator = integrators.EulerMaruyamaIntegrator(device=DEVICE)

    def step(x: Tensor, grad: Tensor) -> Tensor:
        drift = lambda x, t: -grad  # noqa: E731
        return integrator.step({"x": x}, step_size=STEP_SIZE / 2, drift=drift, noise_scale=1.0)["x"]

    return step


STEPS: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {
    "evalp_fast": lambda: ours,
    "eager": lambda: textbook,
    "compile": lambda: inductor(textbook),
    "torchebm": torchebm_step,
}


@pytest.mark.parametrize("provider", STEPS)
def test_langevin_step(provider: str, measured: Any) -> None:
    def check(moved: Tensor, x: Tensor, grad: Tensor) -> None:
        drifted = x.double() - 0.5 * STEP_SIZE * grad.double()
        check_normal((moved - drifted) / math.sqrt(STEP_SIZE))
        if provider == "evalp_fast":
            exact = drifted + math.sqrt(STEP_SIZE) * normal(0, INDEX, 0, Stream.LANGEVIN, WIDTH).double()
            torch.testing.assert_close(moved.double(), exact, rtol=1e-6, atol=2e-6)

    inputs = input_sets(
        lambda: (torch.randn(ROWS, WIDTH, device=DEVICE), torch.randn(ROWS, WIDTH, device=DEVICE))
    )
    with torch.no_grad():
        measured(Problem(inputs, check, ROWS * WIDTH, 12.0), STEPS[provider]())


def proposals() -> tuple[Tensor, ...]:
    """x, energy and gradient of chains on a standard normal, and those of their proposals."""
    x = torch.randn(ROWS, WIDTH, device=DEVICE)
    proposal = textbook(x, x)
    energies = [0.5 * t.square().sum(dim=1) for t in (x, proposal)]
    return x, energies[0], x.clone(), proposal, energies[1], proposal.clone()


def accepted_by_ours(*state: Tensor) -> tuple[Any, ...]:
    """The public function."""
    x, energy, grad, proposal, proposal_energy, proposal_grad = state
    return mala_accept(
        x, energy, grad, proposal, proposal_energy, proposal_grad, STEP_SIZE, seed=0, index=INDEX, step=0
    )


def accepted_by_textbook(
    x: Tensor, energy: Tensor, grad: Tensor, proposal: Tensor, proposal_energy: Tensor, proposal_grad: Tensor
) -> tuple[Tensor, ...]:
    """The acceptance ratio with both proposal densities, and the selection."""
    forward = (proposal - x + 0.5 * STEP_SIZE * grad).square().sum(dim=1)
    backward = (x - proposal + 0.5 * STEP_SIZE * proposal_grad).square().sum(dim=1)
    log_ratio = energy - proposal_energy - (backward - forward) / (2 * STEP_SIZE)
    accepted = torch.log(torch.rand_like(log_ratio)) <= log_ratio
    moved = accepted[:, None]
    return (
        torch.where(moved, proposal, x),
        torch.where(accepted, proposal_energy, energy),
        torch.where(moved, proposal_grad, grad),
        accepted,
        log_ratio,
    )


ACCEPTANCES: dict[str, Callable[[], Callable[..., tuple[Any, ...]]]] = {
    "evalp_fast": lambda: accepted_by_ours,
    "eager": lambda: accepted_by_textbook,
    "compile": lambda: inductor(accepted_by_textbook),
}


def check_acceptance(result: tuple[Tensor, ...], *state: Tensor) -> None:
    """The ratios against float64, the share that is accepted, and that what was decided was done."""
    x, energy, grad, accepted, log_ratio = result
    exact = accepted_by_textbook(*(t.double() for t in state))[-1]
    torch.testing.assert_close(log_ratio.double(), exact, rtol=1e-4, atol=1e-3)
    chance = exact.exp().clamp_max(1.0)
    deviation = float((chance * (1 - chance)).sum().sqrt())
    assert abs(float(accepted.sum() - chance.sum())) < 6 * deviation
    for new, old, proposed in zip((x, energy, grad), state[:3], state[3:], strict=True):
        moved = accepted.reshape(-1, *[1] * (new.ndim - 1))
        assert torch.equal(new, torch.where(moved, proposed, old))


@pytest.mark.parametrize("provider", ACCEPTANCES)
def test_mala_accept(provider: str, measured: Any) -> None:
    # 16 read and 8 written; what the selection reads again is in the cache.
    problem = Problem(input_sets(proposals), check_acceptance, ROWS * WIDTH, 24.0)
    with torch.no_grad():
        measured(problem, ACCEPTANCES[provider]())
