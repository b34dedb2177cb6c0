"""The MLP energy on the CPU without gradients of its own: by chunks of rows, which stay in the cache.

The same functions as the references of `energy.py`, up to rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .mlp_cpu import activated_layer, chunk_rows, in_chunks, layer

_Tensors = tuple[Tensor, ...]


def _before_activation(gradient: Tensor, kept: Tensor, activation: str) -> Tensor:
    """The gradient before an activation from the one behind it, in one pass. `kept` is what came out of the
    activation, whose sign tells its slope; for SiLU what went in."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(gradient, kept)
    slope = 0.01 if activation == "leaky_relu" else 0.0
    return torch.ops.aten.leaky_relu_backward(gradient, kept, slope, True)


def _rounded(weights: _Tensors, precision: str) -> _Tensors:
    """The hidden layers' weights, in the type of the products."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return tuple(weight.to(dtype) for weight in weights[:-1])


def mlp_energy_on_cpu(
    z: Tensor, weights: _Tensors, biases: _Tensors, *, activation: str, precision: str
) -> Tensor:
    """What `mlp_energy` computes from float32 `z` `[N, D]`: `[N]`."""
    with torch.no_grad():
        hidden = _rounded(weights, precision), tuple(biases[:-1])

        def step(z: Tensor) -> tuple[Tensor]:
            for weight, bias in zip(*hidden, strict=True):
                z = activated_layer(z, weight, bias, activation)
            return (F.linear(z.to(torch.float32), weights[-1], biases[-1]).squeeze(1),)

        return in_chunks(step, (z,), chunk_rows(weights[0].shape[0], precision))[0]


def mlp_energy_and_gradient_on_cpu(
    z: Tensor, weights: _Tensors, biases: _Tensors, *, activation: str, precision: str
) -> tuple[Tensor, Tensor]:
    """What `mlp_energy_and_gradient` computes from float32 `z` `[N, D]`: `([N], [N, D])`."""
    with torch.no_grad():
        hidden = _rounded(weights, precision), tuple(biases[:-1])

        def step(z: Tensor) -> tuple[Tensor, Tensor]:
            kept = []
            for weight, bias in zip(*hidden, strict=True):
                if activation == "silu":
                    kept.append(layer(z, weight, bias))
                    z = F.silu(kept[-1])
                else:
                    z = activated_layer(z, weight, bias, activation)
                    kept.append(z)
            value = F.linear(z.to(torch.float32), weights[-1], biases[-1]).squeeze(1)
            gradient = weights[-1].to(z.dtype).expand_as(z)
            for weight, tensor in zip(reversed(hidden[0]), reversed(kept), strict=True):
                gradient = torch.mm(_before_activation(gradient, tensor, activation), weight)
            return value, gradient.to(torch.float32)

        value, gradient = in_chunks(step, (z,), chunk_rows(weights[0].shape[0], precision))
        return value, gradient


__all__ = ["mlp_energy_and_gradient_on_cpu", "mlp_energy_on_cpu"]
