"""Affine coupling on a CPU: the reference, by rows that stay in the caches from pass to pass.

That makes it twice as fast, and more, as all rows at once, from 16,384 rows of 64 on (2.0 to 2.4 times "torch
eager" in `python -m pytest bench/test_coupling.py --scale sweep`, AMD EPYC, 2 threads, torch 2.15,
2026-11-21).
"""

import torch
from torch import Tensor

from .coupling_reference import affine_coupling_reference

_ELEMENTS = 1 << 18  # of a tensor, at a time
_ROWS = 64  # a part is a multiple of them: of fewer torch would cut a row's sum between threads


def affine_coupling_on_cpu(
    x: Tensor, log_scale: Tensor, shift: Tensor, mask: Tensor | None, clamp: float | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """`affine_coupling_reference` of float32 tensors, without gradients: same arguments, and the same results
    but for the order of a row's sum where `log_scale` is not contiguous."""
    rows = _ELEMENTS * x.shape[0] // max(x.numel(), 1) // _ROWS * _ROWS
    if rows == 0 or rows >= x.shape[0]:
        return affine_coupling_reference(x, log_scale, shift, mask, clamp, inverse)
    y, log_det = torch.empty_like(x), x.new_empty(x.shape[0])
    by_row = mask is not None and mask.ndim == x.ndim and mask.shape[0] > 1
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        own = mask[part] if mask is not None and by_row else mask
        y[part], log_det[part] = affine_coupling_reference(
            x[part], log_scale[part], shift[part], own, clamp, inverse
        )
    return y, log_det


__all__ = ["affine_coupling_on_cpu"]
