"""One Langevin step and one Metropolis acceptance: evalp_fast, the textbook's lines, torchebm's step."""

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from bench import checks
from bench.harness import Call, Problem, Provider, Work, Workload, absent, by_inductor, input_sets
from bench.machine import DEVICE
from bench.sizes import SWEEP, Scale, pick
from evalp_fast.kernels.langevin import langevin_step, mala_accept
from evalp_fast.kernels.philox import Stream, normal

WIDTH, STEP_SIZE = 64, 0.1


def textbook(x: Tensor, grad: Tensor) -> Tensor:
    """The update rule."""
    return x - 0.5 * STEP_SIZE * grad + math.sqrt(STEP_SIZE) * torch.randn_like(x)


def our_step(index: Tensor) -> Call:
    """The public function."""
    return lambda x, grad: langevin_step(x, grad, STEP_SIZE, seed=0, index=index, step=0)


def torchebm_step(_: Any) -> Call:
    """torchebm's Euler-Maruyama step, whose step size is half of ours."""
    integrators: Any = importlib.import_module("torchebm.integrators")
    integrator = integrators.EulerMaruyamaIntegrator(device=DEVICE)

    def step(x: Tensor, grad: Tensor) -> Tensor:
        return integrator.step({"x": x}, step_size=STEP_SIZE / 2, drift=lambda x, t: -grad, noise_scale=1.0)[
            "x"
        ]

    return step


def step_problem(n: int) -> Problem:
    """One step of n chains."""

    def setup() -> Workload:
        index = torch.arange(n, device=DEVICE)

        def check(provider: Provider, moved: Tensor, x: Tensor, grad: Tensor) -> None:
            moved, x, grad = (checks.ends(t).double() for t in (moved, x, grad))
            noise = (moved - x + 0.5 * STEP_SIZE * grad) / math.sqrt(STEP_SIZE)
            checks.standard_normal(noise)
            if provider.name == "evalp_fast":
                exact = normal(0, checks.ends(index), 0, Stream.LANGEVIN, WIDTH).double()
                torch.testing.assert_close(noise, exact, rtol=1e-5, atol=2e-5)

        inputs = input_sets(
            lambda: (torch.randn(n, WIDTH, device=DEVICE), torch.randn(n, WIDTH, device=DEVICE))
        )
        return Workload(index, inputs, check)

    return Problem(
        "langevin",
        f"step, {n:,} x {WIDTH}",
        {"batch": n, "width": WIDTH},
        n,
        setup,
        (
            Provider("evalp_fast", our_step),
            Provider("torch eager", lambda _: textbook),
            *by_inductor(textbook),
            Provider("torchebm", torchebm_step, missing=absent("torchebm.integrators")),
        ),
        Work(bytes=12.0 * n * WIDTH, normals=n * WIDTH),
        unit="steps of a chain",
        clock="device",
    )


def proposals(n: int) -> tuple[Tensor, ...]:
    """x, energy and gradient of chains on a standard normal, and those of their proposals."""
    x = torch.randn(n, WIDTH, device=DEVICE)
    proposal = textbook(x, x)
    energies = [0.5 * t.square().sum(dim=1) for t in (x, proposal)]
    return x, energies[0], x.clone(), proposal, energies[1], proposal.clone()


def our_acceptance(index: Tensor) -> Call:
    """The public function."""

    def call(
        x: Tensor, energy: Tensor, grad: Tensor, proposal: Tensor, new_energy: Tensor, new_grad: Tensor
    ) -> Any:
        return mala_accept(
            x, energy, grad, proposal, new_energy, new_grad, STEP_SIZE, seed=0, index=index, step=0
        )

    return call


def textbook_acceptance(
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


def check_acceptance(_: Provider, result: tuple[Tensor, ...], *state: Tensor) -> None:
    """The ratios against float64, the share that is accepted, and that what was decided was done."""
    x, energy, grad, accepted, log_ratio = (checks.ends(t) for t in result)
    state = tuple(checks.ends(t) for t in state)
    exact = textbook_acceptance(*(t.double() for t in state))[-1]
    torch.testing.assert_close(log_ratio.double(), exact, rtol=1e-4, atol=1e-3)
    chance = exact.exp().clamp_max(1.0)
    deviation = float((chance * (1 - chance)).sum().sqrt())
    assert abs(float(accepted.sum() - chance.sum())) < 6 * deviation, "the share of accepted steps is off"
    for new, old, proposed in zip((x, energy, grad), state[:3], state[3:], strict=True):
        moved = accepted.reshape(-1, *[1] * (new.ndim - 1))
        assert torch.equal(new, torch.where(moved, proposed, old)), "what was accepted was not done"


def acceptance_problem(n: int) -> Problem:
    """One acceptance of n chains."""
    return Problem(
        "langevin",
        f"Metropolis acceptance, {n:,} x {WIDTH}",
        {"batch": n, "width": WIDTH},
        n,
        lambda: Workload(torch.arange(n, device=DEVICE), input_sets(lambda: proposals(n)), check_acceptance),
        (
            Provider("evalp_fast", our_acceptance),
            Provider("torch eager", lambda _: textbook_acceptance),
            *by_inductor(textbook_acceptance),
        ),
        # 16 read and 8 written; what the selection reads again is in the cache.
        Work(bytes=24.0 * n * WIDTH),
        unit="steps of a chain",
        clock="device",
    )


def problems(scale: Scale) -> list[Problem]:
    """A step, and an acceptance."""
    rows = SWEEP if scale == "sweep" else pick(scale, (1 << 13,), (1 << 16,), (1 << 20,))
    return [step_problem(n) for n in rows] + [acceptance_problem(n) for n in rows]


def test_langevin(case: Any, timed: Any) -> None:
    timed(case)
