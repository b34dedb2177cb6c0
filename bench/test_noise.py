"""Normals: evalp_fast, the same compiled by Inductor, and torch.randn.

On the CPU the compiled form is to stay within twice `torch.randn`'s nanoseconds per element.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import DEVICE, Problem, check_normal, inductor, size
from evalp_fast.kernels.philox import Stream, normal, uniform

ROWS, WIDTH = size(1 << 13, 1 << 21), 128


def ours(index: Tensor) -> Tensor:
    """`[ROWS, WIDTH]` of seed 0."""
    return normal(0, index, 0, Stream.PROPOSAL, WIDTH)


def box_muller(index: Tensor) -> Tensor:
    """The same normals in float64, from the float32 uniforms of the same words."""
    pairs = uniform(0, index, 0, Stream.PROPOSAL, WIDTH).double().unflatten(1, (-1, 2))
    radius, angle = torch.sqrt(-2.0 * torch.log(pairs[..., 0])), 2.0 * math.pi * pairs[..., 1]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(1)


PROVIDERS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "evalp_fast": lambda: ours,
    "evalp_fast compiled": lambda: inductor(ours),
    "torch.randn": lambda: lambda index: torch.randn(index.shape[0], WIDTH, device=DEVICE),
}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_normal(provider: str, measured: Any) -> None:
    def check(numbers: Tensor, index: Tensor) -> None:
        check_normal(numbers)
        if provider != "torch.randn":
            torch.testing.assert_close(numbers.double(), box_muller(index), rtol=0, atol=2e-6)

    inputs = [(torch.arange(k * ROWS, (k + 1) * ROWS, device=DEVICE),) for k in range(2)]
    measured(Problem(inputs, check, ROWS * WIDTH, 4.0), PROVIDERS[provider]())
