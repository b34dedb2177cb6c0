"""Affine coupling on a CPU, without gradients: few passes over rows that stay in the caches between them."""

import torch
from torch import Tensor

from .processor import CACHE_BYTES, keep_freed_memory

_BYTES = 8  # of a core's cache for each element that is worked on at a time: a tensor takes half of it
_ROWS = 64  # a part is a multiple of them: of fewer torch would cut a row's sum between threads


def clamped_log_scale(s: Tensor, clamp: float | None, inverse: bool) -> Tensor:
    """clamp·tanh(s/clamp), or s without a clamp; of the inverse its negative."""
    sign = -1.0 if inverse else 1.0
    if clamp is None:
        return -s if inverse else s
    if clamp > 4.0:
        return (s / clamp).tanh_().mul_(sign * clamp)
    # By way of the sigmoid, which torch has four times as fast as tanh; its error is 1e-7 of the clamp.
    share = torch.sigmoid(s if clamp == 2.0 else s * (2.0 / clamp))
    return torch.add(s.new_tensor(-sign * clamp), share, alpha=2.0 * sign * clamp)


def affine_coupling_on_cpu(
    x: Tensor, log_scale: Tensor, shift: Tensor, mask: Tensor | None, clamp: float | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """`affine_coupling_reference` of float32 tensors: same arguments, and the same results up to rounding."""
    keep_freed_memory()
    count = x.shape[0]
    y, log_det = torch.empty_like(x), x.new_empty(count)
    at_once = CACHE_BYTES // _BYTES * torch.get_num_threads()
    rows = at_once * count // max(x.numel(), 1) // _ROWS * _ROWS or max(count, 1)
    by_row = mask is not None and mask.ndim == x.ndim and mask.shape[0] > 1
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        own = mask[part] if mask is not None and by_row else mask
        _write_rows(y[part], log_det[part], x[part], log_scale[part], shift[part], own, clamp, inverse)
    return y, log_det


def _write_rows(
    y: Tensor,
    log_det: Tensor,
    x: Tensor,
    s: Tensor,
    shift: Tensor,
    mask: Tensor | None,
    clamp: float | None,
    inverse: bool,
) -> None:
    log_scale = clamped_log_scale(s if mask is None else torch.where(mask, s, 0.0), clamp, inverse)
    scale = torch.exp(log_scale)
    if inverse:
        torch.sub(x, shift, out=y).mul_(scale)
    else:
        torch.addcmul(shift, x, scale, out=y)
    if mask is not None:
        torch.where(mask, y, x, out=y)
    torch.sum(log_scale.flatten(1), dim=1, out=log_det)


__all__ = ["affine_coupling_on_cpu", "clamped_log_scale"]
