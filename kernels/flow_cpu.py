"""The coupling flow on the CPU without gradients: by chunks of rows, which stay in the cache.

The same as the reference of `flow_reference.py`, up to rounding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .flow_reference import FlowOptions, FlowParameters, flow_layers, mix_columns, unmix_columns
from .mlp_cpu import Bound, activated_layer, chunk_rows, in_chunks, layer, layer_bound, stays_finite
from .weights_cpu import kept_matrices

_Tensors = tuple[Tensor, ...]


def _clamped(x: Tensor, clamp: float) -> Tensor:
    """clamp·tanh(x/clamp)."""
    if clamp <= 4.0:
        # By way of the sigmoid, which torch has four times as fast as tanh; its error is 1e-7 of the clamp.
        return (x * (2.0 / clamp)).sigmoid_().mul_(2.0 * clamp).sub_(clamp)
    return (x / clamp).tanh_().mul_(clamp)


def _conditioner(
    passed: Tensor, weights: _Tensors, biases: _Tensors, options: FlowOptions, finite: bool
) -> tuple[Tensor, Tensor]:
    """Log-scale, after the clamp, and shift, in float32."""
    h = passed
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        h = activated_layer(h, weight, bias, options.activation, finite=finite)
    log_scale, shift = layer(h, weights[-1], biases[-1]).to(torch.float32).chunk(2, dim=1)
    return log_scale if options.clamp is None else _clamped(log_scale, options.clamp), shift


class _Turn(NamedTuple):
    """A layer of the flow: the scale and shift of its normalisation, if it has one, and its conditioner."""

    normalisation: _Tensors
    weights: _Tensors
    biases: _Tensors


def _turns(parameters: FlowParameters, precision: str) -> tuple[list[_Turn], list[Bound]]:
    """The layers in the order of the forward direction, and the bounds of all their hidden layers."""
    of_in, of_hidden, of_out = (
        kept_matrices(stack, precision)
        for stack in (parameters.weight_in, parameters.weight_hidden, parameters.weight_out)
    )
    between = parameters.weight_hidden.shape[1]
    turns = []
    for k, (_, biases, log_scale, shift) in enumerate(flow_layers(parameters)):
        normalisation = () if log_scale is None or shift is None else (torch.exp(log_scale), shift)
        hidden = of_hidden.each[k * between : (k + 1) * between]
        turns.append(_Turn(normalisation, (of_in.each[k], *hidden, of_out.each[k]), tuple(biases)))
    bounds = [layer_bound(of_in, parameters.bias_in)]
    bounds += [layer_bound(of_hidden, parameters.bias_hidden)] * between
    return turns, bounds


def coupling_flow_on_cpu(
    z: Tensor, parameters: FlowParameters, options: FlowOptions
) -> tuple[Tensor, Tensor]:
    """What `coupling_flow` computes from float32 `z` `[N, D]`: `(x [N, D], log_det [N])`, no gradients."""
    passed, changed = parameters.weight_in.shape[2], parameters.bias_out.shape[1] // 2

    def step(z: Tensor) -> tuple[Tensor, Tensor]:
        # Log-scales add up in here, and their sum is the log-determinant.
        total = z.new_zeros(z.shape[0], changed)
        for normalisation, weights, biases in reversed(turns) if options.inverse else turns:
            if options.inverse and normalisation:
                z = (z - normalisation[1]) / normalisation[0]
            finite = options.activation == "relu" and stays_finite(z, bounds)
            if options.inverse:
                a, b = unmix_columns(z, passed, options.mixing)
                log_scale, shift = _conditioner(a, weights, biases, options, finite)
                z = torch.cat((a, (b - shift).mul_(torch.exp(-log_scale))), dim=1)
                total -= log_scale
            else:
                a, b = z[:, :passed], z[:, passed:]
                log_scale, shift = _conditioner(a, weights, biases, options, finite)
                z = mix_columns(a, torch.addcmul(shift, b, torch.exp(log_scale)), options.mixing)
                if normalisation:
                    z = torch.addcmul(normalisation[1], z, normalisation[0])
                total += log_scale
        return z, total.sum(dim=1)

    with torch.no_grad():
        turns, bounds = _turns(parameters, options.precision)
        x, log_det = in_chunks(step, (z,), chunk_rows(parameters.bias_in.shape[1], options.precision))
        if parameters.norm_log_scale is not None:
            constant = parameters.norm_log_scale.sum()
            log_det = log_det - constant if options.inverse else log_det + constant
    return x, log_det


__all__ = ["coupling_flow_on_cpu"]
