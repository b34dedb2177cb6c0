"""A normalizing flow in plain torch: specification, CPU path and oracle of the kernels of `flow.py`.

Layer l maps x = (a, b), `a` the first D1 = ceil(D/2) columns, `b` the other D2:

    s, t = MLP_l(a)                                   hidden layers of width H; log-scales first
    b <- b·exp(s') + t,  s' = clamp·tanh(s / clamp)   RealNVP (Dinh et al. 2017), equations 7 and 8
    x <- the columns mixed                            "shuffle": b0 a0 b1 a1 ...;  "swap": b, then a
    x <- x·exp(norm_log_scale_l) + norm_shift_l       where there is a normalisation

and the log-determinant is the sum of all s' and norm_log_scale. Everything here is a pure function of tensors
that `torch.compile(fullgraph=True)` traces, in float32 or float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .coupling_reference import affine_coupling_reference
from .mlp_reference import activate, activation_slope, linear


class FlowParameters(NamedTuple):
    """The parameters of L couplings of D columns, stacked; D1 = ceil(D/2), D2 = D - D1, hidden width H.

    Attributes:
        weight_in: `[L, H, D1]`.
        bias_in: `[L, H]`.
        weight_hidden: `[L, depth - 1, H, H]`.
        bias_hidden: `[L, depth - 1, H]`.
        weight_out: `[L, 2·D2, H]`: rows of the log-scales, then rows of the shifts.
        bias_out: `[L, 2·D2]`.
        norm_log_scale: `[L, D]`, or None: the affine map of every column at the end of a layer, behind the
            mixing: x·exp(norm_log_scale) + norm_shift. ActNorm as it is; of BatchNorm in evaluation
            log(gain / deviation) and offset - mean·gain / deviation.
        norm_shift: `[L, D]`, or None with the other.
    """

    weight_in: Tensor
    bias_in: Tensor
    weight_hidden: Tensor
    bias_hidden: Tensor
    weight_out: Tensor
    bias_out: Tensor
    norm_log_scale: Tensor | None = None
    norm_shift: Tensor | None = None


class FlowOptions(NamedTuple):
    """What a flow does with its parameters; see `coupling_flow`."""

    inverse: bool = False
    precision: str = "ieee"
    activation: str = "relu"
    clamp: float | None = 2.0
    mixing: str = "shuffle"


def mix_columns(a: Tensor, b: Tensor, mixing: str) -> Tensor:
    """The permutation of columns behind a coupling, from its halves: the passed one and the changed one."""
    if mixing == "swap":
        return torch.cat((b, a), dim=1)
    pairs = torch.stack((b, a[:, : b.shape[1]]), dim=2).flatten(1)
    return torch.cat((pairs, a[:, b.shape[1] :]), dim=1) if a.shape[1] > b.shape[1] else pairs


def unmix_columns(x: Tensor, passed: int, mixing: str) -> tuple[Tensor, Tensor]:
    """Its inverse: both halves."""
    changed = x.shape[1] - passed
    if mixing == "swap":
        return x[:, changed:], x[:, :changed]
    pairs = x[:, : 2 * changed]
    return torch.cat((pairs[:, 1::2], x[:, 2 * changed :]), dim=1), pairs[:, 0::2]


class FlowLayer(NamedTuple):
    """The parameters of one coupling: those of its MLP in the order of use, and of the normalisation."""

    weights: list[Tensor]
    biases: list[Tensor]
    norm_log_scale: Tensor | None
    norm_shift: Tensor | None


def flow_layers(parameters: FlowParameters) -> list[FlowLayer]:
    """The parameters coupling by coupling."""
    # One unbind per stack: indexing layer by layer would make autograd write a full stack for each.
    weight_in, bias_in, weight_hidden, bias_hidden, weight_out, bias_out = (
        stack.unbind(0) for stack in parameters[:6]
    )
    count = len(weight_in)
    none = (None,) * count
    scale = none if parameters.norm_log_scale is None else parameters.norm_log_scale.unbind(0)
    shift = none if parameters.norm_shift is None else parameters.norm_shift.unbind(0)
    return [
        FlowLayer(
            [weight_in[k], *weight_hidden[k].unbind(0), weight_out[k]],
            [bias_in[k], *bias_hidden[k].unbind(0), bias_out[k]],
            scale[k],
            shift[k],
        )
        for k in range(count)
    ]


def _conditioner(a: Tensor, layer: FlowLayer, options: FlowOptions) -> tuple[list[Tensor], list[Tensor]]:
    """What each product of the MLP reads, and what it gives (with its bias); the last one is (s, t)."""
    inputs, outputs = [a], []
    for weight, bias in zip(layer.weights, layer.biases, strict=True):
        outputs.append(linear(inputs[-1], weight, options.precision, bias))
        inputs.append(activate(outputs[-1], options.activation))
    return inputs[:-1], outputs


def coupling_flow_reference(
    z: Tensor, parameters: FlowParameters, options: FlowOptions
) -> tuple[Tensor, Tensor]:
    """What `coupling_flow` computes from a tensor `[N, D]`: `(x [N, D], log_det [N])` in its dtype."""
    passed = parameters.weight_in.shape[2]
    clamp, mixing = options.clamp, options.mixing
    x, log_det = z, z.new_zeros(z.shape[0])
    layers = flow_layers(parameters)
    for layer in reversed(layers) if options.inverse else layers:
        if options.inverse:
            if layer.norm_log_scale is not None and layer.norm_shift is not None:
                x = (x - layer.norm_shift) * torch.exp(-layer.norm_log_scale)
            a, b = unmix_columns(x, passed, mixing)
        else:
            a, b = x[:, :passed], x[:, passed:]
        s, t = _conditioner(a, layer, options)[1][-1].chunk(2, dim=1)
        b, layer_log_det = affine_coupling_reference(b, s, t, None, clamp, options.inverse)
        log_det = log_det + layer_log_det
        if options.inverse:
            x = torch.cat((a, b), dim=1)
        else:
            x = mix_columns(a, b, mixing)
            if layer.norm_log_scale is not None and layer.norm_shift is not None:
                x = x * torch.exp(layer.norm_log_scale) + layer.norm_shift
    if parameters.norm_log_scale is not None:
        total = parameters.norm_log_scale.sum()
        log_det = log_det - total if options.inverse else log_det + total
    return x, log_det


def coupling_flow_backward_reference(
    grad_x: Tensor,
    grad_log_det: Tensor,
    x: Tensor,
    parameters: FlowParameters,
    options: FlowOptions,
) -> tuple[Tensor, FlowParameters]:
    """The gradients of z and of all parameters, from the flow's result `x` alone.

    Each layer's input is computed from its output, and the conditioner again from its input: what is kept at
    any time is one layer. With h the derivative of the clamped log-scale s' by s, and (s, t) the conditioner:

        forward   db = db'·exp(s')     ds =  (db·b + dlog_det)·h      dt = db'
        inverse   db' = db·exp(-s')    ds = -(db·b + dlog_det)·h      dt = -db'

    where b is the half before the coupling and b' the one behind it.
    """
    passed = parameters.weight_in.shape[2]
    inverse, clamp, mixing = options.inverse, options.clamp, options.mixing
    grad, grad_sum = grad_x, grad_log_det[:, None]
    layers = flow_layers(parameters)
    found: list[list[Tensor]] = []
    for layer in layers if inverse else reversed(layers):
        gradients: list[Tensor] = []
        if not inverse:
            if layer.norm_log_scale is not None and layer.norm_shift is not None:
                offset = x - layer.norm_shift
                gradients += [(grad * offset).sum(0) + grad_log_det.sum(), grad.sum(0)]
                x = offset * torch.exp(-layer.norm_log_scale)
                grad = grad * torch.exp(layer.norm_log_scale)
            (a, b), (grad_a, grad_b) = (unmix_columns(half, passed, mixing) for half in (x, grad))
        else:
            a, b, grad_a, grad_b = x[:, :passed], x[:, passed:], grad[:, :passed], grad[:, passed:]
        inputs, outputs = _conditioner(a, layer, options)
        s, t = outputs[-1].chunk(2, dim=1)
        slope = torch.ones_like(s)
        if clamp is not None:
            bounded = torch.tanh(s / clamp)
            s, slope = clamp * bounded, 1.0 - bounded * bounded
        if inverse:
            grad_s, grad_t = -(grad_b * b + grad_sum) * slope, -grad_b * torch.exp(-s)
            b, grad_b = b * torch.exp(s) + t, -grad_t
        else:
            b, grad_t, grad_b = (b - t) * torch.exp(-s), grad_b, grad_b * torch.exp(s)
            grad_s = (grad_b * b + grad_sum) * slope
        grad_output = torch.cat((grad_s, grad_t), dim=1)
        weights, biases = [], []
        for k in reversed(range(len(inputs))):
            weight = layer.weights[k]
            if k < len(inputs) - 1:
                grad_output = grad_output * activation_slope(outputs[k], options.activation)
            weights.insert(0, linear(grad_output.t(), inputs[k].t(), options.precision))
            biases.insert(0, grad_output.sum(0))
            grad_output = linear(grad_output, weight.t(), options.precision)
        grad_a = grad_a + grad_output
        if not inverse:
            x, grad = torch.cat((a, b), dim=1), torch.cat((grad_a, grad_b), dim=1)
        else:
            x, grad = mix_columns(a, b, mixing), mix_columns(grad_a, grad_b, mixing)
            if layer.norm_log_scale is not None and layer.norm_shift is not None:
                grad = grad * torch.exp(-layer.norm_log_scale)
                offset = x * torch.exp(layer.norm_log_scale)
                gradients += [-(grad * offset).sum(0) - grad_log_det.sum(), -grad.sum(0)]
                x = offset + layer.norm_shift
        hidden = parameters.weight_hidden[0].shape, parameters.bias_hidden[0].shape
        stacks = [
            torch.stack(part).reshape(shape) if part else weights[0].new_zeros(shape)
            for part, shape in zip((weights[1:-1], biases[1:-1]), hidden, strict=True)
        ]
        found.append([weights[0], biases[0], *stacks, weights[-1], biases[-1], *gradients])
    ordered = found if inverse else found[::-1]
    stacked = (torch.stack(part) for part in zip(*ordered, strict=True))
    typed = (
        gradient.to(parameter.dtype) for gradient, parameter in zip(stacked, parameters, strict=False)
        if parameter is not None
    )  # fmt: skip
    return grad, FlowParameters(*typed)


__all__ = [
    "FlowLayer",
    "FlowOptions",
    "FlowParameters",
    "coupling_flow_backward_reference",
    "coupling_flow_reference",
    "flow_layers",
    "mix_columns",
    "unmix_columns",
]
