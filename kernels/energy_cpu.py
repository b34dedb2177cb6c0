"""The MLP energy on the CPU without gradients of its own: by chunks of rows, which stay in the cache.

The same functions as the references of `energy.py`, up to rounding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .mlp_cpu import Bound, activated_layer, chunk_rows, in_chunks, layer, layer_bound, stays_finite
from .weights_cpu import kept_matrices

_Tensors = tuple[Tensor, ...]


def _before_activation(gradient: Tensor, kept: Tensor, activation: str) -> Tensor:
    """The gradient before an activation from the one behind it, in one pass, which takes the place of `kept`.

    That is what came out of the activation, whose sign tells its slope; for SiLU what went in.
    """
    if activation == "silu":
        return torch.ops.aten.silu_backward.grad_input(gradient, kept, grad_input=kept)
    slope = 0.01 if activation == "leaky_relu" else 0.0
    return torch.ops.aten.leaky_relu_backward.grad_input(gradient, kept, slope, True, grad_input=kept)


def _last_layer(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """f `[N]`, in float32."""
    return layer(h.to(torch.float32), weight, bias).squeeze(1)


def _layers(weights: _Tensors, biases: _Tensors, precision: str) -> tuple[list[Tensor], list[Bound]]:
    """Each layer's matrix, the last one in float32; and the bounds of the others."""
    kept = [kept_matrices(weight, precision) for weight in weights[:-1]]
    bounds = [layer_bound(matrices, bias) for matrices, bias in zip(kept, biases[:-1], strict=True)]
    return [matrices.each[0] for matrices in (*kept, kept_matrices(weights[-1], "ieee"))], bounds


def mlp_energy_on_cpu(
    z: Tensor, weights: _Tensors, biases: _Tensors, *, activation: str, precision: str
) -> Tensor:
    """What `mlp_energy` computes from float32 `z` `[N, D]`: `[N]`."""
    with torch.no_grad():
        matrices, bounds = _layers(weights, biases, precision)

        def step(z: Tensor) -> tuple[Tensor]:
            finite = activation == "relu" and stays_finite(z, bounds)
            for weight, bias in zip(matrices[:-1], biases[:-1], strict=True):
                z = activated_layer(z, weight, bias, activation, finite=finite)
            return (_last_layer(z, matrices[-1], biases[-1]),)

        return in_chunks(step, (z,), chunk_rows(weights[0].shape[0], precision))[0]


def energy_and_gradient_function(
    weights: _Tensors, biases: _Tensors, *, activation: str, precision: str
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What `mlp_energy_and_gradient` computes, of float32 `[N, D]` of at most a chunk's rows.

    The weights are those of now, for all calls. To be called without gradients and autocast.
    """
    matrices, bounds = _layers(weights, biases, precision)
    transposed = [kept_matrices(weight, precision, transposed=True).each[0] for weight in weights[:-1]]

    def function(z: Tensor) -> tuple[Tensor, Tensor]:
        finite = activation == "relu" and stays_finite(z, bounds)
        kept = []
        for weight, bias in zip(matrices[:-1], biases[:-1], strict=True):
            if activation == "silu":
                kept.append(layer(z, weight, bias))
                z = F.silu(kept[-1])
            else:
                z = activated_layer(z, weight, bias, activation, finite=finite)
                kept.append(z)
        value = _last_layer(z, matrices[-1], biases[-1])
        gradient = weights[-1].to(z.dtype).expand_as(z)
        for weight, tensor in zip(reversed(transposed), reversed(kept), strict=True):
            gradient = layer(_before_activation(gradient, tensor, activation), weight, None)
        return value, gradient.to(torch.float32)

    return function


def mlp_energy_and_gradient_on_cpu(
    z: Tensor, weights: _Tensors, biases: _Tensors, *, activation: str, precision: str
) -> tuple[Tensor, Tensor]:
    """What `mlp_energy_and_gradient` computes from float32 `z` `[N, D]`: `([N], [N, D])`."""
    with torch.no_grad():
        step = energy_and_gradient_function(weights, biases, activation=activation, precision=precision)
        value, gradient = in_chunks(step, (z,), chunk_rows(weights[0].shape[0], precision))
        return value, gradient


__all__ = ["energy_and_gradient_function", "mlp_energy_and_gradient_on_cpu", "mlp_energy_on_cpu"]
