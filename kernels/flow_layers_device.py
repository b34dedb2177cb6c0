"""A flow with the layers of its conditioners in memory: for networks that do not fit in registers.

    F, M, config = flow_form(parameters, options)                # by the launcher; what follows, where M is
    memory = held_memory(F, M, programs, config, device)

    noise_state(state_ptr, seed, index, step, scale, parameters[-1], STREAM, False, F)     # or read_state
    log_det = held_forward(state_ptr, memory, parameters, ROWS, F, M)                      # or held_inverse
    log_det += normalisation_log_det(parameters, F)                        # a scalar; held_inverse: -=

The same as `flow_forward` and `flow_inverse` of `flow_device.py`, and called in the same places. There a tile
of hidden layers is in registers, and at most their last one is made in chunks. What has to be held does not
fit at a depth of 3 and with more than 512 columns; and without matrix units ("ieee") each thread holds what
it multiplies, so that little is left. Here all layers lie in the caches, as those of an energy do
(`layers_device.py`), so that registers hold no layer, whatever its width; for that each product reads what
it multiplies from there. At D 128, H 256 and depth 3 in bfloat16 a row does 0.36 MFLOP a coupling, and moves
6 KB of weights and 7 KB of layers and states: 29 FLOPs for each byte, where `flow_forward` has 100 at depth
2. The L2 cache bounds it; in float32, whose rate is a fifteenth, the arithmetic.

The program's memory holds a second state, float32 `[ROWS, D]`, and the layers: the half that is passed on, in
the type of the products, and the hidden ones. A coupling changes its state in place, unmixed; mixing moves it
from one state to the other, so that no column is written before it is read.

`M` is a `Layers`, `F` the `FlowShape`; each is handed over as one `tl.constexpr`.
"""

import torch
from torch import Tensor

from .flow_device import FlowShape, bounded, flow_shape
from .flow_reference import FlowOptions, FlowParameters
from .launch import LaunchConfig, tl, triton
from .layers_device import Layers, keep_input, keep_layer, layer_product, layers
from .mlp_device import PRECISIONS, bias_tile
from .opaque_device import opaque


@triton.jit
def _unmixed(column, F: tl.constexpr):
    """Where mixing takes column `column` of its result from: its place in (a, b)."""
    D1: tl.constexpr = F.passed
    D2: tl.constexpr = F.changed
    if F.shuffle:
        return tl.where((column % 2 == 0) & (column < 2 * D2), D1 + column // 2, column // 2)
    else:
        return tl.where(column < D2, D1 + column, column - D2)


@triton.jit
def mix(
    from_ptr, to_ptr, parameters, layer, ROWS: tl.constexpr, F: tl.constexpr, INVERSE: tl.constexpr,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    """A state (a, b), mixed and normalised, to another one; INVERSE undoes that. With GRADIENT they are
    gradients, which go the same way through the opposite map."""
    D: tl.constexpr = F.passed + F.changed
    PIECE: tl.constexpr = min(F.padded, 32)
    row = tl.arange(0, ROWS)[:, None] * D
    for piece in tl.range(0, D, PIECE, disable_licm=True):
        column = opaque(piece // PIECE, parameters[-1]) * PIECE + tl.arange(0, PIECE)
        there = column < D
        mixed = row + column[None, :]
        unmixed = row + _unmixed(column, F)[None, :]
        value = tl.load(from_ptr + (mixed if INVERSE else unmixed), there[None, :], 0.0)
        if F.normalised:
            place = layer * D + column
            log_scale = tl.load(parameters[6] + place, there, 0.0)[None, :]
            shift = tl.load(parameters[7] + place, there, 0.0)[None, :]
            if GRADIENT:
                value = value * tl.exp(log_scale if INVERSE else -log_scale)
            elif INVERSE:
                value = (value - shift) * tl.exp(-log_scale)
            else:
                value = value * tl.exp(log_scale) + shift
        tl.store(to_ptr + (unmixed if INVERSE else mixed), value, there[None, :])


@triton.jit
def hidden_layers(
    state_ptr, layers_ptr, parameters, layer, ROWS: tl.constexpr, F: tl.constexpr, M: tl.constexpr,
    SLOPES: tl.constexpr,
):  # fmt: skip
    """The half that an unmixed state passes on, as layer 0 in memory, and the hidden layers behind it; with
    SLOPES the derivatives of their activations behind those."""
    D1: tl.constexpr = F.passed
    D: tl.constexpr = D1 + F.changed
    H: tl.constexpr = F.hidden
    DEPTH: tl.constexpr = F.depth
    LAYER: tl.constexpr = ROWS * M.features
    row = tl.arange(0, ROWS)
    tl.debug_barrier()
    keep_input(state_ptr, row, row < ROWS, D, layers_ptr, D1, M)
    for k in tl.static_range(DEPTH):
        source_ptr, target_ptr, slopes_ptr = layers_ptr + k * LAYER, layers_ptr + (k + 1) * LAYER, None
        if SLOPES:
            slopes_ptr = layers_ptr + (k + 1 + DEPTH) * LAYER
        if k == 0:
            weight_ptr, bias_ptr = parameters[0] + layer * (H * D1), parameters[1] + layer * H
            keep_layer(source_ptr, weight_ptr, bias_ptr, target_ptr, slopes_ptr, D1, ROWS, M)
        else:
            number = layer * (DEPTH - 1) + (k - 1)
            weight_ptr, bias_ptr = parameters[2] + number * (H * H), parameters[3] + number * H
            keep_layer(source_ptr, weight_ptr, bias_ptr, target_ptr, slopes_ptr, H, ROWS, M)
    tl.debug_barrier()


@triton.jit
def output_tiles(layer_ptr, parameters, layer, first, ROWS: tl.constexpr, F: tl.constexpr, M: tl.constexpr):
    """Columns `first..` of log-scale before the clamp, and of shift, from the last hidden layer: float32."""
    D2: tl.constexpr = F.changed
    H: tl.constexpr = F.hidden
    WIDTH: tl.constexpr = min(F.padded, M.width)
    weight, bias = parameters[4] + layer * (2 * D2 * H), parameters[5] + layer * (2 * D2)
    s = tl.zeros((ROWS, WIDTH), tl.float32) + bias_tile(bias, first, D2, WIDTH)
    s = layer_product(layer_ptr, weight, first, s, D2, H, False, M)
    t = tl.zeros((ROWS, WIDTH), tl.float32) + bias_tile(bias + D2, first, D2, WIDTH)
    t = layer_product(layer_ptr, weight + D2 * H, first, t, D2, H, False, M)
    return s, t


@triton.jit
def _change(
    state_ptr, layers_ptr, parameters, layer, ROWS: tl.constexpr, F: tl.constexpr, M: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """The coupling itself, of an unmixed state in place. Returns the sums of its log-scales `[ROWS]`."""
    D1: tl.constexpr = F.passed
    D2: tl.constexpr = F.changed
    D: tl.constexpr = D1 + D2
    LAST: tl.constexpr = F.depth * ROWS * M.features
    WIDTH: tl.constexpr = min(F.padded, M.width)
    hidden_layers(state_ptr, layers_ptr, parameters, layer, ROWS, F, M, False)
    sums = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, D2, WIDTH, disable_licm=True):
        s, t = output_tiles(layers_ptr + LAST, parameters, layer, first, ROWS, F, M)
        if F.clamp is not None:
            CLAMP: tl.constexpr = F.clamp
            s = CLAMP * bounded(s, CLAMP)
        sums += tl.sum(s, 1)
        column = first + tl.arange(0, WIDTH)[None, :]
        place = state_ptr + (tl.arange(0, ROWS)[:, None] * D + D1 + column)
        b = tl.load(place, column < D2, 0.0)
        b = (b - t) * tl.exp(-s) if INVERSE else b * tl.exp(s) + t
        tl.store(place, b, column < D2)
    tl.debug_barrier()
    return sums


@triton.jit
def move(from_ptr, to_ptr, zero, ROWS: tl.constexpr, F: tl.constexpr):
    """A state to another one."""
    D: tl.constexpr = F.passed + F.changed
    PIECE: tl.constexpr = min(F.padded, 32)
    tl.debug_barrier()
    for piece in tl.range(0, D, PIECE, disable_licm=True):
        column = opaque(piece // PIECE, zero) * PIECE + tl.arange(0, PIECE)[None, :]
        place = tl.arange(0, ROWS)[:, None] * D + column
        tl.store(to_ptr + place, tl.load(from_ptr + place, column < D, 0.0), column < D)


@triton.jit
def _own(memory, ROWS: tl.constexpr, F: tl.constexpr, M: tl.constexpr):
    """This program's second state and layers."""
    D: tl.constexpr = F.passed + F.changed
    LAYERS: tl.constexpr = (F.depth + 1) * M.features
    return memory[0] + tl.program_id(0) * (ROWS * D), memory[1] + tl.program_id(0) * (ROWS * LAYERS)


@triton.jit
def held_forward(
    state_ptr, memory, parameters, ROWS: tl.constexpr, F: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """Noise to sample, in place. Returns the log-determinant `[ROWS]`, less `normalisation_log_det`."""
    LAYERS: tl.constexpr = F.layers
    second_ptr, layers_ptr = _own(memory, ROWS, F, M)
    log_det = tl.zeros((ROWS,), tl.float32)
    for done in tl.range(0, LAYERS, disable_licm=True):
        layer = opaque(done, parameters[-1])
        own_ptr = tl.where(layer % 2 == 0, state_ptr, second_ptr)
        other_ptr = tl.where(layer % 2 == 0, second_ptr, state_ptr)
        log_det += _change(own_ptr, layers_ptr, parameters, layer, ROWS, F, M, False)
        mix(own_ptr, other_ptr, parameters, layer, ROWS, F, False, False)
    if LAYERS % 2 == 1:
        move(second_ptr, state_ptr, parameters[-1], ROWS, F)
    tl.debug_barrier()
    return log_det


@triton.jit
def held_inverse(
    state_ptr, memory, parameters, ROWS: tl.constexpr, F: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """Sample to noise, in place. Returns the log-determinant `[ROWS]`, with `normalisation_log_det` missing.

    That scalar is to be subtracted here, where `held_forward` wants it added.
    """
    LAYERS: tl.constexpr = F.layers
    second_ptr, layers_ptr = _own(memory, ROWS, F, M)
    log_det = tl.zeros((ROWS,), tl.float32)
    for done in tl.range(0, LAYERS, disable_licm=True):
        turn = opaque(done, parameters[-1])
        layer = LAYERS - 1 - turn
        own_ptr = tl.where(turn % 2 == 0, state_ptr, second_ptr)
        other_ptr = tl.where(turn % 2 == 0, second_ptr, state_ptr)
        tl.debug_barrier()
        mix(own_ptr, other_ptr, parameters, layer, ROWS, F, True, False)
        log_det -= _change(other_ptr, layers_ptr, parameters, layer, ROWS, F, M, True)
    if LAYERS % 2 == 1:
        move(second_ptr, state_ptr, parameters[-1], ROWS, F)
    tl.debug_barrier()
    return log_det


def held_in_memory(parameters: FlowParameters, precision: str) -> bool:
    """Whether a flow's kernel has the layers in memory: where registers do not hold them, by the audit."""
    hidden, passed = parameters.weight_in.shape[1:]
    deep = parameters.weight_hidden.shape[1] == 2 and hidden > 128
    return precision == "ieee" or deep or passed > 256


def flow_form(
    parameters: FlowParameters, options: FlowOptions
) -> tuple[FlowShape, Layers | None, LaunchConfig]:
    """What is compiled into a kernel, with the layers where they are in memory, and how it is launched: by
    these shapes, never by the batch."""
    shape, config = flow_shape(parameters, options)
    if not held_in_memory(parameters, options.precision):
        return shape, None, config
    return shape, *layers(shape.passed, shape.hidden, options.activation, options.precision)


def held_memory(
    flow: FlowShape, shape: Layers, programs: int, config: LaunchConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What programs keep, uninitialised: states `[programs, ROWS, D]`, layers `[programs, depth + 1, ROWS,
    features]`."""
    kind = torch.bfloat16 if shape.precision == PRECISIONS["bf16"] else torch.float32
    rows = config.block_rows
    dim = flow.passed + flow.changed
    states = torch.empty((programs, rows, dim), dtype=torch.float32, device=device)
    return states, torch.empty((programs, flow.depth + 1, rows, shape.features), dtype=kind, device=device)


__all__ = [
    "flow_form",
    "held_forward",
    "held_in_memory",
    "held_inverse",
    "held_memory",
    "hidden_layers",
    "mix",
    "move",
    "output_tiles",
]
