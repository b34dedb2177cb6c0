"""The coupling flow on the CPU without gradients: by chunks of rows, which stay in the cache.

The same as the reference of `flow_reference.py`, up to rounding.
"""

import torch
from torch import Tensor

from .flow_reference import FlowOptions, FlowParameters, flow_layers, mix_columns, unmix_columns
from .mlp_cpu import activated_layer, chunk_rows, in_chunks, layer

_Tensors = tuple[Tensor, ...]


def _clamped(x: Tensor, clamp: float) -> Tensor:
    """clamp·tanh(x/clamp)."""
    if clamp <= 4.0:
        # By way of the sigmoid, which torch has four times as fast as tanh; its error is 1e-7 of the clamp.
        return (x * (2.0 / clamp)).sigmoid_().mul_(2.0 * clamp).sub_(clamp)
    return (x / clamp).tanh_().mul_(clamp)


def _conditioner(
    passed: Tensor, weights: _Tensors, biases: _Tensors, options: FlowOptions
) -> tuple[Tensor, Tensor]:
    """Log-scale, after the clamp, and shift, in float32."""
    h = passed
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        h = activated_layer(h, weight, bias, options.activation)
    log_scale, shift = layer(h, weights[-1], biases[-1]).to(torch.float32).chunk(2, dim=1)
    return log_scale if options.clamp is None else _clamped(log_scale, options.clamp), shift


def coupling_flow_on_cpu(
    z: Tensor, parameters: FlowParameters, options: FlowOptions
) -> tuple[Tensor, Tensor]:
    """What `coupling_flow` computes from float32 `z` `[N, D]`: `(x [N, D], log_det [N])`, no gradients."""
    rounded = torch.bfloat16 if options.precision == "bf16" else torch.float32
    passed, changed = parameters.weight_in.shape[2], parameters.bias_out.shape[1] // 2

    def step(z: Tensor) -> tuple[Tensor, Tensor]:
        # Log-scales add up in here, and their sum is the log-determinant.
        total = z.new_zeros(z.shape[0], changed)
        for normalisation, weights, biases in reversed(turns) if options.inverse else turns:
            if options.inverse:
                if normalisation:
                    z = (z - normalisation[1]) / normalisation[0]
                a, b = unmix_columns(z, passed, options.mixing)
                log_scale, shift = _conditioner(a, weights, biases, options)
                z = torch.cat((a, (b - shift).mul_(torch.exp(-log_scale))), dim=1)
                total -= log_scale
            else:
                a, b = z[:, :passed], z[:, passed:]
                log_scale, shift = _conditioner(a, weights, biases, options)
                z = mix_columns(a, torch.addcmul(shift, b, torch.exp(log_scale)), options.mixing)
                if normalisation:
                    z = torch.addcmul(normalisation[1], z, normalisation[0])
                total += log_scale
        return z, total.sum(dim=1)

    with torch.no_grad():
        turns = []
        for weights, biases, log_scale, shift in flow_layers(parameters):
            normalisation = () if log_scale is None or shift is None else (torch.exp(log_scale), shift)
            turns.append((normalisation, tuple(w.to(rounded) for w in weights), tuple(biases)))
        x, log_det = in_chunks(step, (z,), chunk_rows(parameters.bias_in.shape[1], options.precision))
        if parameters.norm_log_scale is not None:
            constant = parameters.norm_log_scale.sum()
            log_det = log_det - constant if options.inverse else log_det + constant
    return x, log_det


__all__ = ["coupling_flow_on_cpu"]
