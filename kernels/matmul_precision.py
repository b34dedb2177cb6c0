"""TF32 of torch's own products and convolutions on CUDA, on or off within a block."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def _if_told(read: Callable[[], T]) -> T | None:
    """A setting as the older functions tell it, which raise where it was set by the newer attributes."""
    try:
        return read()
    except RuntimeError:
        return None


@contextlib.contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """Within the block float32 products and convolutions on CUDA run in TF32 (`"tf32"`), else in float32.

    Convolutions too: cuDNN takes TF32 by default, which would make `"ieee"` untrue of a decoder. Afterwards
    torch's settings have the values that they had, by whichever of its functions they were given; those that
    followed `torch.backends.fp32_precision` keep theirs if that is changed later. They are those of the
    process: threads that want different ones at a time get in each other's way. A process that has not used
    CUDA keeps its settings.
    """
    if not torch.cuda.is_initialized():
        yield
        return
    backends: Any = torch.backends
    cuda, cudnn = backends.cuda.matmul, backends.cudnn
    newer = (cuda, cudnn.conv, cudnn.rnn, backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in newer]
    products = _if_told(torch.get_float32_matmul_precision)
    allowed = _if_told(lambda: cuda.allow_tf32), _if_told(lambda: cudnn.allow_tf32)
    # Both, as Inductor of some versions reads the older, and raises where the newer say otherwise.
    cuda.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    for setting in newer[:3]:
        setting.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        for owner, value in zip((cuda, cudnn), allowed, strict=True):
            if value is not None:
                owner.allow_tf32 = value
        if products is not None:
            torch.set_float32_matmul_precision(products)
        for setting, value in zip(newer, before, strict=True):
            setting.fp32_precision = value


__all__ = ["matmul_precision"]
