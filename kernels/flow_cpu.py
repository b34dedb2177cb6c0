"""The coupling flow on the CPU without gradients: by chunks of rows, which stay in the cache.

The same as the reference of `flow_reference.py`, up to rounding.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .coupling_cpu import clamped_log_scale
from .flow_reference import FlowOptions, FlowParameters, flow_layers, mix_columns, unmix_columns
from .mlp_cpu import (
    Bound,
    activated_layer,
    bound_behind,
    chunk_rows,
    in_chunks,
    largest_of,
    layer,
    layer_bound,
)
from .weights_cpu import kept_matrices

_Tensors = tuple[Tensor, ...]


class _Turn(NamedTuple):
    """A layer of the flow: the scale and shift of its normalisation, if it has one, and its conditioner."""

    normalisation: _Tensors
    weights: _Tensors
    biases: _Tensors


def _turns(parameters: FlowParameters, precision: str) -> tuple[list[_Turn], list[Bound]]:
    """The layers in the order of the forward direction, and the bounds of all conditioners' layers."""
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
    bounds += [layer_bound(of_out, parameters.bias_out)]
    return turns, bounds


class _Reach:
    """How far the numbers of a state may be from 0, which its layers tell without a look at it."""

    def __init__(self, bounds: list[Bound], options: FlowOptions, normalised: bool):
        self._bounds = bounds
        # b' is at most (|b| + |shift|)·exp(clamp) in both directions; what a normalisation does is looked at.
        clamp = math.inf if options.clamp is None or normalised else options.clamp
        self._growth = math.exp(clamp) if clamp < 100.0 else math.inf
        self._largest = math.inf

    def stays_finite(self, z: Tensor) -> bool:
        """Whether the conditioner's sums have no NaN and no infinity. For each coupling, in their order."""
        result = bound_behind(self._largest, self._bounds)
        if result == math.inf:  # too long since it was looked at
            self._largest = largest_of(z)
            result = bound_behind(self._largest, self._bounds)
        self._largest = (self._largest + result) * self._growth
        return result < math.inf


def coupling_flow_on_cpu(
    z: Tensor, parameters: FlowParameters, options: FlowOptions
) -> tuple[Tensor, Tensor]:
    """What `coupling_flow` computes from float32 `z` `[N, D]`: `(x [N, D], log_det [N])`, no gradients."""
    passed, changed = parameters.weight_in.shape[2], parameters.bias_out.shape[1] // 2
    inverse, activation, mixing = options.inverse, options.activation, options.mixing
    normalised = parameters.norm_log_scale is not None

    def step(z: Tensor) -> tuple[Tensor, Tensor]:
        # Log-scales, of the inverse their negatives, add up in here, and their sum is the log-determinant.
        total = z.new_zeros(z.shape[0], changed)
        reach = _Reach(bounds, options, normalised)
        for normalisation, weights, biases in reversed(turns) if inverse else turns:
            if inverse and normalisation:
                z = (z - normalisation[1]) / normalisation[0]
            finite = activation == "relu" and reach.stays_finite(z)
            a, b = unmix_columns(z, passed, mixing) if inverse else (z[:, :passed], z[:, passed:])
            h = a
            for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
                h = activated_layer(h, weight, bias, activation, finite=finite)
            s, shift = layer(h, weights[-1], biases[-1]).to(torch.float32).chunk(2, dim=1)
            log_scale = clamped_log_scale(s, options.clamp, inverse)
            total += log_scale
            scale = torch.exp(log_scale)
            if inverse:
                z = torch.cat((a, (b - shift).mul_(scale)), dim=1)
            else:
                z = mix_columns(a, torch.addcmul(shift, b, scale), mixing)
                if normalisation:
                    z = torch.addcmul(normalisation[1], z, normalisation[0])
        return z, total.sum(dim=1)

    with torch.no_grad():
        turns, bounds = _turns(parameters, options.precision)
        x, log_det = in_chunks(step, (z,), chunk_rows(parameters.bias_in.shape[1], options.precision))
        if parameters.norm_log_scale is not None:
            constant = parameters.norm_log_scale.sum()
            log_det = log_det - constant if inverse else log_det + constant
    return x, log_det


__all__ = ["coupling_flow_on_cpu"]
