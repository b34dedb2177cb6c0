"""The MLP energy on the CPU without gradients of its own: chunk by chunk, compiled after a while.

The same functions as the references of `energy.py`, up to rounding; `mlp_cpu.py` says why they are written
anew. The last layer, a single column, is summed outside what is compiled, by one call for both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import compiled_later
from .mlp_cpu import ACTIVATIONS, chunk_rows, in_chunks, layer

_Tensors = tuple[Tensor, ...]


def _hidden(z: Tensor, weights: _Tensors, biases: _Tensors, activation: str) -> Tensor:
    """The last hidden layer."""
    activate = ACTIVATIONS[activation][0]
    for weight, bias in zip(weights, biases, strict=True):
        z = activate(layer(z, weight, bias))
    return z


def _hidden_and_gradient(
    z: Tensor, weights: _Tensors, biases: _Tensors, out_weight: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """The last hidden layer, and the gradient of the energy in z."""
    activate, slope = ACTIVATIONS[activation]
    slopes = []
    for weight, bias in zip(weights, biases, strict=True):
        z = layer(z, weight, bias)
        slopes.append(slope(z))
        z = activate(z)
    gradient = out_weight
    for weight, factor in zip(reversed(weights), reversed(slopes), strict=True):
        gradient = torch.mm((gradient * factor).to(weight.dtype), weight).to(torch.float32)
    return z, gradient


_compiled_hidden = compiled_later(_hidden, dynamic=True)
_compiled_hidden_and_gradient = compiled_later(_hidden_and_gradient, dynamic=True)


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
            return (F.linear(_compiled_hidden(z, *hidden, activation), weights[-1], biases[-1]).squeeze(1),)

        return in_chunks(step, (z,), chunk_rows(weights[0].shape[0], precision))[0]


def mlp_energy_and_gradient_on_cpu(
    z: Tensor, weights: _Tensors, biases: _Tensors, *, activation: str, precision: str
) -> tuple[Tensor, Tensor]:
    """What `mlp_energy_and_gradient` computes from float32 `z` `[N, D]`: `([N], [N, D])`."""
    with torch.no_grad():
        hidden = _rounded(weights, precision), tuple(biases[:-1])

        def step(z: Tensor) -> tuple[Tensor, Tensor]:
            last, gradient = _compiled_hidden_and_gradient(z, *hidden, weights[-1], activation)
            return F.linear(last, weights[-1], biases[-1]).squeeze(1), gradient

        value, gradient = in_chunks(step, (z,), chunk_rows(weights[0].shape[0], precision))
        return value, gradient


__all__ = ["mlp_energy_and_gradient_on_cpu", "mlp_energy_on_cpu"]
