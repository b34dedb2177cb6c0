"""Affine coupling with a soft clamp: evalp_fast, the textbook's line in torch, and that line by Inductor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import DEVICE, ON_CUDA, Problem, inductor, input_sets, size
from evalp_fast.kernels.coupling import affine_coupling

ROWS, WIDTH, CLAMP = size(1 << 13, 1 << 20), 64, 2.0
DTYPES = (torch.float32, torch.bfloat16) if ON_CUDA else (torch.float32,)

Map = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def ours(x: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The public function."""
    return affine_coupling(x, log_scale, shift, clamp=CLAMP)


def textbook(x: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The formula, with the log-determinant in float32 at least."""
    scale = CLAMP * torch.tanh(log_scale.to(torch.promote_types(x.dtype, torch.float32)) / CLAMP)
    return (x * torch.exp(scale) + shift).to(x.dtype), scale.sum(dim=1)


PROVIDERS: dict[str, Callable[[], Map]] = {
    "evalp_fast": lambda: ours,
    "eager": lambda: textbook,
    "compile": lambda: inductor(textbook),
}


def arguments(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, log_scale and shift."""
    return tuple(torch.randn(ROWS, WIDTH, device=DEVICE, dtype=dtype) for _ in range(3))


def close(values: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """Within one rounding to a 16-bit type, or what a float32 sum of a row may lose."""
    for value, wanted in zip(values, exact, strict=True):
        tolerance = (256 if value.dtype == torch.float32 else 1) * torch.finfo(value.dtype).eps
        torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("provider", PROVIDERS)
def test_coupling(provider: str, dtype: torch.dtype, measured: Any) -> None:
    def check(values: tuple[Tensor, ...], *inputs: Tensor) -> None:
        close(values, textbook(*(t.double() for t in inputs)))

    problem = Problem(input_sets(lambda: arguments(dtype)), check, ROWS * WIDTH, 4.0 * dtype.itemsize)
    with torch.no_grad():
        measured(problem, PROVIDERS[provider]())


def with_gradients(function: Map) -> Map:
    """Forward and backward: the gradients of y·(weights) and of the log-determinants."""

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in inputs[:3]]
        y, log_det = function(*leaves)
        return torch.autograd.grad((y, log_det), leaves, (inputs[3].to(y.dtype), torch.ones_like(log_det)))

    return call


@pytest.mark.parametrize("provider", PROVIDERS)
def test_coupling_with_gradients(provider: str, measured: Any) -> None:
    def check(values: tuple[Tensor, ...], *inputs: Tensor) -> None:
        close(values, with_gradients(textbook)(*(t.double() for t in inputs)))

    inputs = input_sets(lambda: (*arguments(torch.float32), torch.randn(ROWS, WIDTH, device=DEVICE)))
    # 16 bytes forward; 12 read and 8 written backward, the gradient of shift being that of y.
    measured(Problem(inputs, check, ROWS * WIDTH, 36.0), with_gradients(PROVIDERS[provider]()))
