"""Matrix products in the precision that the caller asks for; everything else stays in float32."""

import contextlib
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from evalp_fast.kernels.mlp_device import Precision
from evalp_fast.kernels.weights_gpu import bfloat16_copies

PRECISIONS: tuple[str, ...] = get_args(Precision)


def check_precision(precision: str | None) -> None:
    """Raise `ValueError` unless `precision` is None (the default, `"ieee"`) or one of `PRECISIONS`."""
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def rounded(weights: tuple[Tensor, ...], precision: Precision | None) -> tuple[Tensor, ...]:
    """bfloat16 copies of a network's matrices with `"bf16"`; else, and where autograd records, themselves.

    On a CPU too themselves: its kernels keep copies in another order (`weights_cpu.py`). On a GPU
    `weights_gpu.py` keeps them; they are those of the weights as these are at each call, whoever wrote them.
    """
    recorded = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    if precision != "bf16" or recorded or weights[0].device.type == "cpu":
        return weights
    return bfloat16_copies(weights)


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
