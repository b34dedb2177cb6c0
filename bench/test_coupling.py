"""Affine coupling with a soft clamp: evalp_fast, the textbook's line in torch, and that line by Inductor."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import checks
from bench.harness import Problem, Provider, Work, Workload, by_inductor, input_sets
from bench.machine import DEVICE, ON_CUDA
from bench.sizes import SWEEP, Scale, pick
from evalp_fast.kernels.coupling import affine_coupling

WIDTH, CLAMP = 64, 2.0

Map = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def ours(x: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The public function."""
    return affine_coupling(x, log_scale, shift, clamp=CLAMP)


def textbook(x: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The formula, with the log-determinant in float32 at least."""
    scale = CLAMP * torch.tanh(log_scale.to(torch.promote_types(x.dtype, torch.float32)) / CLAMP)
    return (x * torch.exp(scale) + shift).to(x.dtype), scale.sum(dim=1)


def with_gradients(function: Map) -> Map:
    """Forward and backward: the gradients of y·(weights) and of the log-determinants."""

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in inputs[:3]]
        y, log_det = function(*leaves)
        return torch.autograd.grad((y, log_det), leaves, (inputs[3].to(y.dtype), torch.ones_like(log_det)))

    return call


def problems(scale: Scale) -> list[Problem]:
    """Forward in each dtype, and forward with backward in float32."""
    rows = SWEEP if scale == "sweep" else pick(scale, (1 << 13,), (1 << 16,), (1 << 20,))
    dtypes = (torch.float32, torch.bfloat16) if ON_CUDA else (torch.float32,)

    def problem(n: int, dtype: torch.dtype, gradients: bool) -> Problem:
        wrap: Callable[[Map], Map] = with_gradients if gradients else lambda function: function

        def setup() -> Workload:
            def check(provider: Provider, values: tuple[Tensor, ...], *inputs: Tensor) -> None:
                exact = wrap(textbook)(*(checks.ends(t).double() for t in inputs))
                checks.close([checks.ends(value) for value in values], exact)

            def arguments() -> tuple[Tensor, ...]:
                return tuple(
                    torch.randn(n, WIDTH, device=DEVICE, dtype=dtype) for _ in range(4 if gradients else 3)
                )

            return Workload(None, input_sets(arguments), check)

        # 16 bytes forward; 12 read and 8 written backward, the gradient of shift being that of y.
        per_element = (36.0 if gradients else 16.0) * dtype.itemsize / 4
        kind = "forward and backward" if gradients else "forward"
        return Problem(
            "coupling",
            f"{kind}, {n:,} x {WIDTH}, {str(dtype).removeprefix('torch.')}",
            {"batch": n, "width": WIDTH, "dtype": str(dtype)},
            n,
            setup,
            (
                Provider("evalp_fast", lambda _: wrap(ours)),
                Provider("torch eager", lambda _: wrap(textbook)),
                *by_inductor(textbook, wrap=wrap),
            ),
            Work(bytes=n * WIDTH * per_element),
            unit="rows",
            clock="device",
            gradients=gradients,
        )

    forward = [problem(n, dtype, False) for n in rows for dtype in dtypes]
    return forward + [problem(n, torch.float32, True) for n in rows]


def test_coupling(case: Any, timed: Any) -> None:
    timed(case)
