"""Matrix products in the precision that the caller asks for; everything else stays in float32."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Precision = Literal["ieee", "tf32", "bf16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


def check_precision(precision: str | None) -> None:
    """Raise `ValueError` unless `precision` is None (the default, `"ieee"`) or one of `PRECISIONS`."""
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def linear(x: Tensor, weight: Tensor, bias: Tensor, precision: Precision | None = None) -> Tensor:
    """`x @ weight.T + bias` with the product in `precision`; result and bias are in `x`'s dtype.

    `"bf16"` rounds both operands to bfloat16. `"tf32"` is float32 here: on CUDA the caller enters
    `matmul_precision`, because torch keeps that choice in a global setting.
    """
    if precision == "bf16":
        return F.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype) + bias
    return F.linear(x, weight, bias)


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
