"""Multilayer perceptrons in plain torch, float32 or float64: what the references of flow and energy share."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A block in which autocast does not round: the precision is the caller's argument."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def linear(x: Tensor, weight: Tensor, precision: str, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T`, and the bias, in x's dtype. "bf16" rounds the operands to bfloat16, and the product."""
    if precision != "bf16":
        return F.linear(x, weight.to(x.dtype), bias)
    product = F.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype)
    return product if bias is None else product + bias


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation by its name; leaky ReLU has slope 0.01."""
    if activation == "relu":
        return F.relu(x)
    return F.silu(x) if activation == "silu" else F.leaky_relu(x)


def activation_slope(x: Tensor, activation: str) -> Tensor:
    """The derivative of the activation at x."""
    if activation == "silu":
        sigmoid = torch.sigmoid(x)
        return sigmoid * (1.0 + x * (1.0 - sigmoid))
    return torch.where(x > 0.0, 1.0, 0.0 if activation == "relu" else 0.01).to(x.dtype)


__all__ = ["activate", "activation_slope", "linear", "without_autocast"]
