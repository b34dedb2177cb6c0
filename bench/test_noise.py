"""Normals: evalp_fast, the same compiled by Inductor, and torch.randn.

On the CPU the compiled form is to stay within twice `torch.randn`'s time.
"""

import math
from typing import Any

import torch
from torch import Tensor

from bench import checks
from bench.harness import Call, Problem, Provider, Work, Workload, compiled
from bench.machine import DEVICE
from bench.sizes import SWEEP, Scale, pick
from evalp_fast.kernels.philox import Stream, normal, uniform

WIDTH = 128


def ours(index: Tensor) -> Tensor:
    """`[rows, WIDTH]` of seed 0."""
    return normal(0, index, 0, Stream.PROPOSAL, WIDTH)


def box_muller(index: Tensor) -> Tensor:
    """The same normals in float64, from the float32 uniforms of the same words."""
    pairs = uniform(0, index, 0, Stream.PROPOSAL, WIDTH).double().unflatten(1, (-1, 2))
    radius, angle = torch.sqrt(-2.0 * torch.log(pairs[..., 0])), 2.0 * math.pi * pairs[..., 1]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(1)


def randn(_: Any) -> Call:
    """torch's own, whose stream is another."""
    return lambda index: torch.randn(index.shape[0], WIDTH, device=DEVICE)


def problems(scale: Scale) -> list[Problem]:
    """Rows of `WIDTH` normals."""
    rows = SWEEP if scale == "sweep" else pick(scale, (1 << 13,), (1 << 16,), (1 << 21,))

    def problem(n: int) -> Problem:
        def setup() -> Workload:
            def check(provider: Provider, numbers: Tensor, index: Tensor) -> None:
                checks.standard_normal(numbers)
                if provider.name.startswith("evalp_fast"):
                    error = (checks.ends(numbers).double() - box_muller(checks.ends(index))).abs().max()
                    assert float(error) <= 2e-6, f"a normal is off by {float(error):.3g}"

            inputs = [(torch.arange(k * n, (k + 1) * n, device=DEVICE),) for k in range(2)]
            return Workload(None, inputs, check)

        return Problem(
            "noise",
            f"normal, {n:,} x {WIDTH}",
            {"batch": n, "width": WIDTH},
            n * WIDTH,
            setup,
            (
                Provider("evalp_fast", lambda _: ours),
                Provider("evalp_fast compiled", lambda _: compiled(ours), compiles=True),
                Provider("torch.randn", randn),
            ),
            Work(bytes=4.0 * n * WIDTH, normals=n * WIDTH),
            unit="normals",
            clock="device",
        )

    return [problem(n) for n in rows]


def test_noise(case: Any, timed: Any) -> None:
    timed(case)
