"""Matrix products in the precision that the caller asks for; everything else stays in float32."""

import contextlib
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from evalp_fast.kernels.mlp_device import Precision

PRECISIONS: tuple[str, ...] = get_args(Precision)


def check_precision(precision: str | None) -> None:
    """Raise `ValueError` unless `precision` is None (the default, `"ieee"`) or one of `PRECISIONS`."""
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


class RoundedCopies:
    """bfloat16 copies of a module's matrices, made anew when those have changed."""

    def __init__(self) -> None:
        self._of: tuple[tuple[int, int], ...] = ()
        self._copies: tuple[Tensor, ...] = ()

    def __call__(self, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The copies; the float32 weights themselves where autograd records, or a compiler traces."""
        recorded = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        if recorded or torch.compiler.is_compiling():
            return weights
        now = tuple((weight.data_ptr(), weight._version) for weight in weights)
        if now != self._of:
            self._of, self._copies = now, tuple(weight.detach().bfloat16() for weight in weights)
        return self._copies


@contextlib.contextmanager
def matmul_precision(precision: Precision | None) -> Iterator[None]:
    """Within the block float32 products and convolutions on CUDA run in TF32 (`"tf32"`), else in float32.

    Convolutions too: cuDNN takes TF32 by default, which would make `"ieee"` untrue of a decoder.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
