"""Affine coupling and its gradients in plain torch: what the kernels of `coupling.py` compute."""

import torch
from torch import Tensor


def affine_coupling_reference(
    x: Tensor,
    log_scale: Tensor,
    shift: Tensor,
    mask: Tensor | None = None,
    clamp: float | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `affine_coupling` computes: specification and oracle of the tests."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    value, s, t = x.to(accumulate), log_scale.to(accumulate), shift.to(accumulate)
    if mask is not None:
        # First, so that what is masked out cannot put inf·0 into a gradient.
        s = torch.where(mask, s, 0.0)
    if clamp is not None:
        s = clamp * torch.tanh(s / clamp)
    if inverse:
        s = -s
        y = (value - t) * torch.exp(s)
    else:
        y = value * torch.exp(s) + t
    if mask is not None:
        y = torch.where(mask, y, value)
    return y.to(x.dtype), s.flatten(1).sum(1)


def affine_coupling_backward_reference(
    grad_y: Tensor,
    grad_log_det: Tensor,
    point: Tensor,
    log_scale: Tensor,
    mask: Tensor | None = None,
    clamp: float | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `x`, `log_scale` and `shift`. `point` is x of the forward map, y of the inverse.

    With s the clamped scale and h = 1 - (s/clamp)² its derivative (1 without a clamp):

        forward   dx = dy·exp(s)     dlog_scale =  (dx·x + dlog_det)·h     dshift = dy
        inverse   dx = dy·exp(-s)    dlog_scale = -(dy·y + dlog_det)·h     dshift = -dx

    so neither `shift` nor, in the inverse, `x` is kept for the backward pass.
    """
    accumulate = torch.promote_types(point.dtype, torch.float32)
    grad, value, s = grad_y.to(accumulate), point.to(accumulate), log_scale.to(accumulate)
    grad_sum = grad_log_det.to(accumulate).reshape(-1, *[1] * (point.ndim - 1))
    slope = torch.ones_like(s)
    if clamp is not None:
        bounded = torch.tanh(s / clamp)
        s, slope = clamp * bounded, 1.0 - bounded * bounded
    if mask is not None:
        s = torch.where(mask, s, 0.0)
    if inverse:
        grad_x = grad * torch.exp(-s)
        grad_s, grad_t = -(grad * value + grad_sum) * slope, -grad_x
    else:
        grad_x = grad * torch.exp(s)
        grad_s, grad_t = (grad_x * value + grad_sum) * slope, grad.clone()
    if mask is not None:
        grad_s, grad_t = torch.where(mask, grad_s, 0.0), torch.where(mask, grad_t, 0.0)
    return grad_x.to(point.dtype), grad_s.to(point.dtype), grad_t.to(point.dtype)


__all__ = ["affine_coupling_backward_reference", "affine_coupling_reference"]
