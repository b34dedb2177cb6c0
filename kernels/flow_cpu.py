"""The coupling flow on the CPU without gradients: by chunks, coupling by coupling, compiled after a while.

The same as the reference of `flow_reference.py`, up to rounding; `mlp_cpu.py` says why it has an exponential
of its own. One compiled coupling serves all of a flow's and all of a chunk's length.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .flow_reference import FlowOptions, FlowParameters, flow_layers, mix_columns, unmix_columns
from .launch import compiled_later
from .mlp_cpu import ACTIVATIONS, chunk_rows, exponential, in_chunks, layer, tanh

_Tensors = tuple[Tensor, ...]


def _conditioner(passed: Tensor, weights: _Tensors, biases: _Tensors, options: FlowOptions) -> _Tensors:
    """Log-scale, after the clamp, and shift."""
    activate = ACTIVATIONS[options.activation][0]
    h = passed
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        h = activate(layer(h, weight, bias))
    log_scale, shift = layer(h, weights[-1], biases[-1]).chunk(2, dim=1)
    if options.clamp is not None:
        log_scale = options.clamp * tanh(log_scale / options.clamp)
    return log_scale, shift


def _forward(
    z: Tensor,
    total: Tensor,
    normalisation: _Tensors,
    weights: _Tensors,
    biases: _Tensors,
    options: FlowOptions,
) -> tuple[Tensor, Tensor]:
    """One coupling and its mixing. `total` `[N, D2]` adds up log-scales, whose sum is the log-determinant."""
    width = total.shape[1]
    passed, changed = z.split((z.shape[1] - width, width), dim=1)
    log_scale, shift = _conditioner(passed, weights, biases, options)
    z = torch.cat((passed, changed * exponential(log_scale) + shift), dim=1)
    z = mix_columns(z, passed.shape[1], options.mixing)
    if normalisation:
        z = z * normalisation[0] + normalisation[1]
    return z, total + log_scale


def _inverse(
    z: Tensor,
    total: Tensor,
    normalisation: _Tensors,
    weights: _Tensors,
    biases: _Tensors,
    options: FlowOptions,
) -> tuple[Tensor, Tensor]:
    """The inverse of one coupling and its mixing."""
    width = total.shape[1]
    if normalisation:
        z = (z - normalisation[1]) / normalisation[0]
    z = unmix_columns(z, z.shape[1] - width, options.mixing)
    passed, changed = z.split((z.shape[1] - width, width), dim=1)
    log_scale, shift = _conditioner(passed, weights, biases, options)
    return torch.cat((passed, (changed - shift) * exponential(-log_scale)), dim=1), total - log_scale


@functools.cache
def _coupling(inverse: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    return compiled_later(_inverse if inverse else _forward, dynamic=True)


def coupling_flow_on_cpu(
    z: Tensor, parameters: FlowParameters, options: FlowOptions
) -> tuple[Tensor, Tensor]:
    """What `coupling_flow` computes from float32 `z` `[N, D]`: `(x [N, D], log_det [N])`, no gradients."""
    rounded = torch.bfloat16 if options.precision == "bf16" else torch.float32
    changed = parameters.bias_out.shape[1] // 2
    coupling = _coupling(options.inverse)
    with torch.no_grad():
        turns = []
        for weights, biases, log_scale, shift in flow_layers(parameters):
            normalisation = () if log_scale is None or shift is None else (torch.exp(log_scale), shift)
            turns.append((normalisation, tuple(w.to(rounded) for w in weights), tuple(biases)))

        def step(z: Tensor) -> tuple[Tensor, Tensor]:
            total = z.new_zeros(z.shape[0], changed)
            for turn in reversed(turns) if options.inverse else turns:
                z, total = coupling(z, total, *turn, options)
            return z, total.sum(dim=1)

        x, log_det = in_chunks(step, (z,), chunk_rows(parameters.bias_in.shape[1], options.precision))
        if parameters.norm_log_scale is not None:
            constant = parameters.norm_log_scale.sum()
            log_det = log_det - constant if options.inverse else log_det + constant
    return x, log_det


__all__ = ["coupling_flow_on_cpu"]
