"""The gradient of a flow, layer by layer: what the kernel of `flow_backward.py` calls.

    F, M, config = backward_form(parameters, options)               # by the launcher
    memory = backward_memory(F, M, programs, config, device)

    layers_backward(
        state_ptr, gradient_ptr, memory, grad_sum, parameters, buffers, rows, row, inside, first_layer,
        F, M, COUNT, INVERSE, WRITE,
    )

The formulas are those of `coupling_flow_backward_reference`, and the manner that of `flow_layers_device.py`,
whatever the shape: what a gradient needs of a conditioner is all of its layers, which no registers hold. The
program's memory holds a second state and a second gradient, float32 `[ROWS, D]` each, and the layers, in the
type of the products: the half that is passed on, the hidden ones, with SiLU their slopes, and the gradient of
log-scales and shifts. The gradients before activations take the place of the slopes, or of the activations,
whose sign tells the slope of a (leaky) ReLU. At D 128, H 256 and depth 2 that is 0.2 MB a program in
bfloat16; at the limits (D 1024, H 512, depth 3, SiLU) 1.5 MB, and no cache holds that of all programs.
"""

import torch
from torch import Tensor

from .flow_device import FlowShape, bounded, flow_shape
from .flow_layers_device import hidden_layers, mix, move, output_tiles
from .flow_reference import FlowOptions, FlowParameters
from .launch import LaunchConfig, tl, triton
from .layers_device import Layers, keep_gradient, layer_product, layers, places
from .mlp_device import ACTIVATIONS, PRECISIONS, operand
from .opaque_device import opaque


@triton.jit
def _write_layer(layer_ptr, pointer, row, inside, SIZE: tl.constexpr, M: tl.constexpr):
    """A layer in the program's memory to rows `row` of a matrix `[N, SIZE]`, where `inside`."""
    STEP: tl.constexpr = M.step
    ROWS: tl.constexpr = row.shape[0]
    for first in tl.range(0, SIZE, STEP, disable_licm=True):
        column = first + tl.arange(0, STEP)[None, :]
        there = column < SIZE
        tile = tl.load(places(layer_ptr, first, ROWS, STEP, M), there, 0.0)
        tl.store(pointer + row[:, None] * SIZE + column, tile, inside[:, None] & there)


@triton.jit
def _undo_change(
    state_ptr, gradient_ptr, last_ptr, output_ptr, grad_sum, parameters, layer, ROWS: tl.constexpr,
    F: tl.constexpr, M: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """The half b and its gradient, before the coupling from behind it (or, INVERSE, behind from before), in
    place; and the gradient of log-scales and shifts, to layer `output_ptr`."""
    D1: tl.constexpr = F.passed
    D2: tl.constexpr = F.changed
    D: tl.constexpr = D1 + D2
    WIDTH: tl.constexpr = min(F.padded, M.width)
    PRECISION: tl.constexpr = M.precision
    for first in tl.range(0, D2, WIDTH, disable_licm=True):
        s, t = output_tiles(last_ptr, parameters, layer, first, ROWS, F, M)
        slope = tl.full(s.shape, 1.0, tl.float32)
        if F.clamp is not None:
            CLAMP: tl.constexpr = F.clamp
            rate = bounded(s, CLAMP)
            s, slope = CLAMP * rate, 1.0 - rate * rate
        column = first + tl.arange(0, WIDTH)[None, :]
        there = column < D2
        place = tl.arange(0, ROWS)[:, None] * D + (D1 + column)
        b = tl.load(state_ptr + place, there, 0.0)
        grad_b = tl.load(gradient_ptr + place, there, 0.0)
        if INVERSE:
            grad_s = -(grad_b * b + grad_sum[:, None]) * slope
            b = b * tl.exp(s) + t
            grad_b = grad_b * tl.exp(-s)
            grad_t = -grad_b
        else:
            b = (b - t) * tl.exp(-s)
            grad_t = grad_b
            grad_b = grad_b * tl.exp(s)
            grad_s = (grad_b * b + grad_sum[:, None]) * slope
        tl.store(state_ptr + place, b, there)
        tl.store(gradient_ptr + place, grad_b, there)
        tl.store(places(output_ptr, first, ROWS, WIDTH, M), operand(grad_s, PRECISION), there)
        tl.store(places(output_ptr, D2 + first, ROWS, WIDTH, M), operand(grad_t, PRECISION), there)


@triton.jit
def _add_below(
    layer_ptr, gradient_ptr, parameters, layer, ROWS: tl.constexpr, F: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """To the gradient of the half that was passed on, what comes by way of the first hidden layer."""
    D1: tl.constexpr = F.passed
    D: tl.constexpr = D1 + F.changed
    H: tl.constexpr = F.hidden
    WIDTH: tl.constexpr = min(F.padded, M.width)
    for first in tl.range(0, D1, WIDTH, disable_licm=True):
        column = first + tl.arange(0, WIDTH)[None, :]
        place = gradient_ptr + (tl.arange(0, ROWS)[:, None] * D + column)
        below = tl.zeros((ROWS, WIDTH), tl.float32)
        below = layer_product(layer_ptr, parameters[0] + layer * (H * D1), first, below, H, D1, True, M)
        tl.store(place, tl.load(place, column < D1, 0.0) + below, column < D1)


@triton.jit
def _through_coupling(
    state_ptr, gradient_ptr, layers_ptr, grad_sum, parameters, layer, buffers, rows, row, inside,
    F: tl.constexpr, M: tl.constexpr, INVERSE: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Through one coupling, of an unmixed state and its gradient, in place."""
    D1: tl.constexpr = F.passed
    D2: tl.constexpr = F.changed
    H: tl.constexpr = F.hidden
    DEPTH: tl.constexpr = F.depth
    ROWS: tl.constexpr = row.shape[0]
    LAYER: tl.constexpr = ROWS * M.features
    SLOPES: tl.constexpr = M.activation == 2
    BEHIND: tl.constexpr = DEPTH if SLOPES else 0  # from a hidden layer to its slopes
    hidden_layers(state_ptr, layers_ptr, parameters, layer, ROWS, F, M, SLOPES)
    if WRITE:
        _write_layer(layers_ptr, buffers[0], row, inside, D1, M)
        for k in tl.static_range(DEPTH):
            _write_layer(layers_ptr + (k + 1) * LAYER, buffers[1] + k * (rows * H), row, inside, H, M)
    above_ptr = layers_ptr + (1 + DEPTH + BEHIND) * LAYER
    last_ptr = layers_ptr + DEPTH * LAYER
    _undo_change(
        state_ptr, gradient_ptr, last_ptr, above_ptr, grad_sum, parameters, layer, ROWS, F, M, INVERSE
    )
    tl.debug_barrier()
    if WRITE:
        _write_layer(above_ptr, buffers[3], row, inside, 2 * D2, M)
    for back in tl.static_range(DEPTH):
        slopes_ptr = layers_ptr + (DEPTH - back + BEHIND) * LAYER
        if back == 0:
            keep_gradient(above_ptr, parameters[4] + layer * (2 * D2 * H), slopes_ptr, 2 * D2, ROWS, M)
        else:
            number = layer * (DEPTH - 1) + (DEPTH - 1 - back)
            keep_gradient(above_ptr, parameters[2] + number * (H * H), slopes_ptr, H, ROWS, M)
        above_ptr = slopes_ptr
    tl.debug_barrier()
    if WRITE:
        for k in tl.static_range(DEPTH):
            slopes_ptr = layers_ptr + (1 + k + BEHIND) * LAYER
            _write_layer(slopes_ptr, buffers[2] + k * (rows * H), row, inside, H, M)
    _add_below(above_ptr, gradient_ptr, parameters, layer, ROWS, F, M)
    tl.debug_barrier()


@triton.jit
def layers_backward(
    state_ptr, gradient_ptr, memory, grad_sum, parameters, buffers, rows, row, inside, first_layer,
    F: tl.constexpr, M: tl.constexpr, COUNT: tl.constexpr, INVERSE: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """From the output of COUNT layers and its gradient to their input and that one's gradient, in place."""
    D: tl.constexpr = F.passed + F.changed
    ROWS: tl.constexpr = row.shape[0]
    SLOTS: tl.constexpr = (2 + F.depth * (2 if M.activation == 2 else 1)) * M.features
    program = tl.program_id(0)
    second_ptr = memory[0] + program * (2 * ROWS * D)
    layers_ptr = memory[1] + program * (ROWS * SLOTS)
    for done in tl.range(0, COUNT, disable_licm=True):
        turn = opaque(done, parameters[-1])
        layer = first_layer + turn if INVERSE else first_layer - turn
        own_ptr = tl.where(turn % 2 == 0, state_ptr, second_ptr)
        own_gradient_ptr = tl.where(turn % 2 == 0, gradient_ptr, second_ptr + ROWS * D)
        other_ptr = tl.where(turn % 2 == 0, second_ptr, state_ptr)
        other_gradient_ptr = tl.where(turn % 2 == 0, second_ptr + ROWS * D, gradient_ptr)
        tl.debug_barrier()
        if INVERSE:
            _through_coupling(
                own_ptr, own_gradient_ptr, layers_ptr, grad_sum, parameters, layer, buffers, rows, row,
                inside, F, M, True, WRITE,
            )  # fmt: skip
            mix(own_ptr, other_ptr, parameters, layer, ROWS, F, False, False)
            mix(own_gradient_ptr, other_gradient_ptr, parameters, layer, ROWS, F, False, True)
        else:
            mix(own_ptr, other_ptr, parameters, layer, ROWS, F, True, False)
            mix(own_gradient_ptr, other_gradient_ptr, parameters, layer, ROWS, F, True, True)
            _through_coupling(
                other_ptr, other_gradient_ptr, layers_ptr, grad_sum, parameters, layer, buffers, rows, row,
                inside, F, M, False, WRITE,
            )  # fmt: skip
    if COUNT % 2 == 1:
        move(second_ptr, state_ptr, parameters[-1], ROWS, F)
        move(second_ptr + ROWS * D, gradient_ptr, parameters[-1], ROWS, F)


def backward_form(parameters: FlowParameters, options: FlowOptions) -> tuple[FlowShape, Layers, LaunchConfig]:
    """What is compiled into the kernel, and how it is launched: by these shapes, never by the batch."""
    shape, _ = flow_shape(parameters, options)
    widest = max(shape.passed, 2 * shape.changed)
    return shape, *layers(widest, shape.hidden, options.activation, options.precision)


def backward_memory(
    flow: FlowShape, shape: Layers, programs: int, config: LaunchConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What programs keep, uninitialised: states and their gradients `[programs, 2, ROWS, D]`, and layers
    `[programs, 2 + depth, ROWS, features]`, 2 + 2·depth of them with SiLU."""
    kind = torch.bfloat16 if shape.precision == PRECISIONS["bf16"] else torch.float32
    rows, dim = config.block_rows, flow.passed + flow.changed
    count = 2 + flow.depth * (2 if shape.activation == ACTIVATIONS["silu"] else 1)
    states = torch.empty((programs, 2, rows, dim), dtype=torch.float32, device=device)
    return states, torch.empty((programs, count, rows, shape.features), dtype=kind, device=device)


__all__ = ["backward_form", "backward_memory", "layers_backward"]
