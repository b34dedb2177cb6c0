"""The MLP energy of a tile of rows, and its gradient, in registers: what a kernel calls to have them.

    f = energy_value(state, memory_ptr, weights, biases, E)           float32 [ROWS]
    f = energy_and_stored_gradient(
        state_ptr, row, inside, row_step, gradient_ptr, scale, memory_ptr, weights, biases, E
    )

`state` is a tuple of tiles `[ROWS, width]` side by side, zero beyond the state's columns, in float32 or in
the type that products take. `weights` and `biases` are the tuples of pointers that `energy_pointers` makes:
those of the hidden layers, and then the last layer's, a single column that is float32 whatever the precision.
`E` is an `EnergyShape`, handed over as one `tl.constexpr`.

The last hidden layer is never there as a whole: a chunk of its features is made at a time, weighted with the
last layer and summed into the energy; its gradient is multiplied back into that of the layer before. So what
is kept are the layers before it, in the type that products take. They lie in memory that the program alone
uses, and that is so little that it stays in the caches (`energy_memory`): matrix units take them from shared
memory, and as operands in registers each of the two groups of warps would hold all of them, and spill.

A field of E that is used as a constant is first given to a local `tl.constexpr`: before Triton 3.9 an
attribute of a constant is a plain number, which `tl.static_range` and the shapes of tiles refuse.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import LaunchConfig, cdiv, next_power_of_2, tl, triton, triton_version
from .mlp_device import (
    ACTIVATIONS,
    PRECISIONS,
    TOO_OLD,
    activate,
    activation_slope,
    bias_tile,
    product,
    weight_tile,
    weight_tile_backward,
)

MAX_DIM, MAX_HIDDEN, MAX_DEPTH = 1024, 512, 3

MAX_TILES = 32
"""Products of layers that are held whole are written out tile by tile: with more the code takes minutes to
compile and spills, and layers of that size keep the library's products busy."""


class EnergyShape(NamedTuple):
    """Everything about an energy that is compiled into a kernel.

    Attributes:
        dim, hidden: the state's columns D, and the width H of the hidden layers.
        starts: the column of the state that each of its tiles begins with: (0, 64, 128) for three tiles of
            64, (0, D1) for two halves.
        widths: the widths of these tiles, powers of two of at least 16 (what a matrix product needs).
        hidden_starts, hidden_widths: the same of the hidden layers that are held as a whole.
        chunk: features of the last hidden layer that are made at a time, and forgotten.
        stages: depth of the pipeline that reads the weights of these chunks.
        activation, precision: codes of `mlp_device`.
    """

    dim: int
    hidden: int
    starts: tuple[int, ...]
    widths: tuple[int, ...]
    hidden_starts: tuple[int, ...]
    hidden_widths: tuple[int, ...]
    chunk: int
    stages: int
    activation: int
    precision: int


@triton.jit
def _with(tiles, tile):
    """A tuple with one more tile."""
    return tiles + (tile,)  # noqa: RUF005 (Triton has no unpacking)


@triton.jit
def load_state(pointer, row, inside, row_step, E: tl.constexpr):
    """Rows `row` `[ROWS]` of a float32 matrix `[N, E.dim]` in memory, zero where not `inside`, as a state."""
    STARTS: tl.constexpr = E.starts
    WIDTHS: tl.constexpr = E.widths
    DIM: tl.constexpr = E.dim
    state = ()
    for k in tl.static_range(len(STARTS)):
        column = STARTS[k] + tl.arange(0, WIDTHS[k])[None, :]
        tile = tl.load(pointer + row[:, None] * row_step + column, inside[:, None] & (column < DIM), 0.0)
        state = _with(state, tile)
    return state


@triton.jit
def store_state(pointer, row, inside, state, E: tl.constexpr):
    """Write a state to rows `row` `[ROWS]` of a contiguous matrix `[N, E.dim]`, where `inside`."""
    STARTS: tl.constexpr = E.starts
    DIM: tl.constexpr = E.dim
    for k in tl.static_range(len(STARTS)):
        _store_tile(pointer, row, inside, STARTS[k], state[k], DIM)


@triton.jit
def _store_tile(pointer, row, inside, start, tile, DIM: tl.constexpr):
    """Write a tile to columns `start..` of a dense matrix `[N, DIM]`."""
    column = start + tl.arange(0, tile.shape[1])[None, :]
    tl.store(pointer + row[:, None] * DIM + column, tile, inside[:, None] & (column < DIM))


@triton.jit
def _operand(tile, PRECISION: tl.constexpr):
    """In the type that products take."""
    if PRECISION == 2:
        return tile.to(tl.bfloat16)
    else:
        return tile


@triton.jit
def operands(state, E: tl.constexpr):
    """A state in the type that products take: half the registers in bfloat16, where nothing else reads it."""
    PRECISION: tl.constexpr = E.precision
    tiles = ()
    for k in tl.static_range(len(state)):
        tiles = _with(tiles, _operand(state[k], PRECISION))
    return tiles


@triton.jit
def _dense_tile(
    inputs, weight_ptr, bias_ptr, first_out, STARTS: tl.constexpr, INS: tl.constexpr, OUT: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """Features `first_out..` of a layer, before the activation, from tiles that begin at columns STARTS."""
    HIDDEN: tl.constexpr = E.hidden
    PRECISION: tl.constexpr = E.precision
    ROWS: tl.constexpr = inputs[0].shape[0]
    total = tl.zeros((ROWS, OUT), tl.float32) + bias_tile(bias_ptr, first_out, HIDDEN, OUT)
    for k in tl.static_range(len(inputs)):
        weight = weight_tile(weight_ptr, first_out, STARTS[k], HIDDEN, INS, OUT, inputs[k].shape[1])
        total = product(inputs[k], weight, total, PRECISION)
    return total


@triton.jit
def _places(layer_ptr, start, ROWS: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr):
    """Addresses of features `start..` of a layer in the program's memory, `[ROWS, WIDTH]`."""
    FEATURES: tl.constexpr = E.hidden_starts[-1] + E.hidden_widths[-1]
    return layer_ptr + (tl.arange(0, ROWS)[:, None] * FEATURES + start + tl.arange(0, WIDTH)[None, :])


@triton.jit
def _layer_ptr(memory_ptr, layer: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr):
    """Where a layer in the program's memory begins."""
    FEATURES: tl.constexpr = E.hidden_starts[-1] + E.hidden_widths[-1]
    return memory_ptr + layer * ROWS * FEATURES


@triton.jit
def _layer_tiles(layer_ptr, ROWS: tl.constexpr, E: tl.constexpr):
    """A layer from the program's memory, once all threads have written it."""
    STARTS: tl.constexpr = E.hidden_starts
    WIDTHS: tl.constexpr = E.hidden_widths
    tl.debug_barrier()
    tiles = ()
    for n in tl.static_range(len(STARTS)):
        tiles = _with(tiles, tl.load(_places(layer_ptr, STARTS[n], ROWS, WIDTHS[n], E)))
    return tiles


@triton.jit
def _keep_layer(
    inputs, weight_ptr, bias_ptr, layer_ptr, slopes_ptr, STARTS: tl.constexpr, INS: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """A layer and its activation, in the type that products take, to the program's memory.

    The slopes of SiLU go there as well, where `slopes_ptr` is another place.
    """
    OUT_STARTS: tl.constexpr = E.hidden_starts
    OUT_WIDTHS: tl.constexpr = E.hidden_widths
    ACTIVATION: tl.constexpr = E.activation
    PRECISION: tl.constexpr = E.precision
    ROWS: tl.constexpr = inputs[0].shape[0]
    for n in tl.static_range(len(OUT_STARTS)):
        tile = _dense_tile(inputs, weight_ptr, bias_ptr, OUT_STARTS[n], STARTS, INS, OUT_WIDTHS[n], E)
        place = _places(layer_ptr, OUT_STARTS[n], ROWS, OUT_WIDTHS[n], E)
        tl.store(place, _operand(activate(tile, ACTIVATION), PRECISION))
        if slopes_ptr is not None:
            place = _places(slopes_ptr, OUT_STARTS[n], ROWS, OUT_WIDTHS[n], E)
            tl.store(place, _operand(activation_slope(tile, ACTIVATION), PRECISION))


@triton.jit
def _keep_gradient(gradient, slopes_ptr, n: tl.constexpr, E: tl.constexpr):
    """Tile n of the gradient before a layer's activation, from the one behind it, in the place of the slopes.

    The slope of a (leaky) ReLU is seen in the sign of what came out, which then lies there.
    """
    STARTS: tl.constexpr = E.hidden_starts
    ACTIVATION: tl.constexpr = E.activation
    PRECISION: tl.constexpr = E.precision
    place = _places(slopes_ptr, STARTS[n], gradient.shape[0], gradient.shape[1], E)
    slope = tl.load(place).to(tl.float32)
    if ACTIVATION != 2:
        slope = activation_slope(slope, ACTIVATION)
    tl.store(place, _operand(gradient * slope, PRECISION))


@triton.jit
def backward_tile(gradients, weight_ptr, first_in, INS: tl.constexpr, IN: tl.constexpr, E: tl.constexpr):
    """The gradient of a layer's inputs `first_in..`, float32 `[ROWS, IN]`, from those of its outputs."""
    STARTS: tl.constexpr = E.hidden_starts
    HIDDEN: tl.constexpr = E.hidden
    PRECISION: tl.constexpr = E.precision
    ROWS: tl.constexpr = gradients[0].shape[0]
    total = tl.zeros((ROWS, IN), tl.float32)
    for k in tl.static_range(len(gradients)):
        weight = weight_tile_backward(weight_ptr, STARTS[k], first_in, HIDDEN, INS, gradients[k].shape[1], IN)
        total = product(gradients[k], weight, total, PRECISION)
    return total


@triton.jit
def _last_layers(inputs, weights, biases, STARTS: tl.constexpr, INS: tl.constexpr, E: tl.constexpr):
    """The last hidden layer and the last layer, float32 `[ROWS]`."""
    HIDDEN: tl.constexpr = E.hidden
    CHUNK: tl.constexpr = E.chunk
    STAGES: tl.constexpr = E.stages
    ACTIVATION: tl.constexpr = E.activation
    ROWS: tl.constexpr = inputs[0].shape[0]
    total = tl.zeros((ROWS,), tl.float32) + tl.load(biases[-1])
    for c in tl.range(0, HIDDEN, CHUNK, num_stages=STAGES):
        chunk = _dense_tile(inputs, weights[-2], biases[-2], c, STARTS, INS, CHUNK, E)
        total += tl.sum(activate(chunk, ACTIVATION) * bias_tile(weights[-1], c, HIDDEN, CHUNK), 1)
    return total


@triton.jit
def _last_layers_and_gradient(
    inputs, weights, biases, STARTS: tl.constexpr, INS: tl.constexpr, E: tl.constexpr
):
    """As `_last_layers`, and the gradient of `inputs`. A part of the weights is read once for both ways."""
    HIDDEN: tl.constexpr = E.hidden
    CHUNK: tl.constexpr = E.chunk
    STAGES: tl.constexpr = E.stages
    ACTIVATION: tl.constexpr = E.activation
    PRECISION: tl.constexpr = E.precision
    ROWS: tl.constexpr = inputs[0].shape[0]
    total = tl.zeros((ROWS,), tl.float32) + tl.load(biases[-1])
    gradients = ()
    for k in tl.static_range(len(inputs)):
        gradients = _with(gradients, tl.zeros((ROWS, inputs[k].shape[1]), tl.float32))
    for c in tl.range(0, HIDDEN, CHUNK, num_stages=STAGES, disable_licm=True):
        parts = ()
        chunk = tl.zeros((ROWS, CHUNK), tl.float32) + bias_tile(biases[-2], c, HIDDEN, CHUNK)
        for k in tl.static_range(len(inputs)):
            part = weight_tile_backward(weights[-2], c, STARTS[k], HIDDEN, INS, CHUNK, inputs[k].shape[1])
            parts = _with(parts, part)
            chunk = product(inputs[k], tl.trans(part), chunk, PRECISION)
        out_weight = bias_tile(weights[-1], c, HIDDEN, CHUNK)
        total += tl.sum(activate(chunk, ACTIVATION) * out_weight, 1)
        slope = _operand(activation_slope(chunk, ACTIVATION) * out_weight, PRECISION)
        sums = ()
        for k in tl.static_range(len(inputs)):
            sums = _with(sums, product(slope, parts[k], gradients[k], PRECISION))
        gradients = sums
    return total, gradients


@triton.jit
def energy_value(state, memory_ptr, weights, biases, E: tl.constexpr):
    """f of the rows of a state: float32 `[ROWS]`."""
    STARTS: tl.constexpr = E.starts
    HIDDEN_STARTS: tl.constexpr = E.hidden_starts
    DIM: tl.constexpr = E.dim
    HIDDEN: tl.constexpr = E.hidden
    ROWS: tl.constexpr = state[0].shape[0]
    if len(weights) == 2:
        return _last_layers(state, weights, biases, STARTS, DIM, E)
    else:
        tl.debug_barrier()  # others may still read what the last call left there
        layer_ptr = _layer_ptr(memory_ptr, 0, ROWS, E)
        _keep_layer(state, weights[0], biases[0], layer_ptr, None, STARTS, DIM, E)
        inputs = _layer_tiles(layer_ptr, ROWS, E)
        if len(weights) == 4:
            layer_ptr = _layer_ptr(memory_ptr, 1, ROWS, E)
            _keep_layer(inputs, weights[1], biases[1], layer_ptr, None, HIDDEN_STARTS, HIDDEN, E)
            inputs = _layer_tiles(layer_ptr, ROWS, E)
        return _last_layers(inputs, weights, biases, HIDDEN_STARTS, HIDDEN, E)


@triton.jit
def energy_and_stored_gradient(
    state_ptr, row, inside, row_step, gradient_ptr, scale, memory_ptr, weights, biases, E: tl.constexpr
):  # fmt: skip
    """f of rows `row` `[ROWS]` of a matrix (see `load_state`), float32 `[ROWS]`, and its gradient.

    `scale` times the gradient is written to the same rows of a dense matrix, tile by tile: but at depth 1 a
    wide one is never there as a whole. The two matrices are not the same memory.
    """
    STARTS: tl.constexpr = E.starts
    HIDDEN_STARTS: tl.constexpr = E.hidden_starts
    HIDDEN_WIDTHS: tl.constexpr = E.hidden_widths
    WIDTHS: tl.constexpr = E.widths
    DIM: tl.constexpr = E.dim
    HIDDEN: tl.constexpr = E.hidden
    ACTIVATION: tl.constexpr = E.activation
    DEPTH: tl.constexpr = len(weights) - 1
    ROWS: tl.constexpr = row.shape[0]
    state = operands(load_state(state_ptr, row, inside, row_step, E), E)
    if DEPTH == 1:
        value, gradients = _last_layers_and_gradient(state, weights, biases, STARTS, DIM, E)
        for k in tl.static_range(len(STARTS)):
            _store_tile(gradient_ptr, row, inside, STARTS[k], gradients[k] * scale, DIM)
        return value
    else:
        tl.debug_barrier()  # others may still read what the last call left there
        layer_ptr = _layer_ptr(memory_ptr, DEPTH - 2, ROWS, E)
        slopes_ptr, kept_slopes_ptr = layer_ptr, None
        first_ptr = _layer_ptr(memory_ptr, 0, ROWS, E)
        first_slopes_ptr, kept_first_slopes_ptr = first_ptr, None
        if ACTIVATION == 2:
            slopes_ptr = _layer_ptr(memory_ptr, 2 * DEPTH - 3, ROWS, E)
            kept_slopes_ptr = slopes_ptr
            first_slopes_ptr = _layer_ptr(memory_ptr, DEPTH - 1, ROWS, E)
            kept_first_slopes_ptr = first_slopes_ptr
        _keep_layer(state, weights[0], biases[0], first_ptr, kept_first_slopes_ptr, STARTS, DIM, E)
        inputs = _layer_tiles(first_ptr, ROWS, E)
        if DEPTH == 3:
            _keep_layer(inputs, weights[1], biases[1], layer_ptr, kept_slopes_ptr, HIDDEN_STARTS, HIDDEN, E)
            inputs = _layer_tiles(layer_ptr, ROWS, E)
        value, gradients = _last_layers_and_gradient(inputs, weights, biases, HIDDEN_STARTS, HIDDEN, E)
        tl.debug_barrier()
        for k in tl.static_range(len(HIDDEN_STARTS)):
            _keep_gradient(gradients[k], slopes_ptr, k, E)
        if DEPTH == 3:
            above = _layer_tiles(slopes_ptr, ROWS, E)
            for k in tl.static_range(len(HIDDEN_STARTS)):
                gradient = backward_tile(above, weights[1], HIDDEN_STARTS[k], HIDDEN, HIDDEN_WIDTHS[k], E)
                _keep_gradient(gradient, first_slopes_ptr, k, E)
        above = _layer_tiles(first_slopes_ptr, ROWS, E)
        for k in tl.static_range(len(STARTS)):
            gradient = backward_tile(above, weights[0], STARTS[k], DIM, WIDTHS[k], E)
            _store_tile(gradient_ptr, row, inside, STARTS[k], gradient * scale, DIM)
        return value


def energy_fits(dim: int, hidden: int, depth: int, device: torch.device | None = None) -> str | None:
    """Why an energy has no kernel (on that device, if one is named), or None where it has: its tiles must fit
    on the chip."""
    if TOO_OLD is not None:
        return TOO_OLD
    if device is not None and _miscompiled(device):
        name = torch.cuda.get_device_name(device)
        return f"Triton {triton.__version__} may miscompile it for {name}, which 3.9 does not"
    if not 1 <= dim <= MAX_DIM:
        return f"z has {dim} columns, and the kernel holds 1 to {MAX_DIM}"
    if not 1 <= hidden <= MAX_HIDDEN:
        return f"the hidden layers have {hidden} features, and the kernel holds at most {MAX_HIDDEN}"
    if not 1 <= depth <= MAX_DEPTH:
        return f"there are {depth} hidden layers, and the kernel has 1 to {MAX_DEPTH}"
    ins, outs = cdiv(dim, 64), cdiv(hidden, 64)
    tiles = ins * outs + (depth - 2) * outs * outs
    if depth > 1 and tiles > MAX_TILES:
        return (
            f"the layers held whole have {tiles} tiles of 64 x 64 weights, and the kernel takes {MAX_TILES}"
        )
    return None


def _miscompiled(device: torch.device) -> bool:
    """Whether the Triton that is installed may drop the body of an energy's kernel on this device.

    Triton 3.6 compiles an energy of depth 3 and SiLU for compute capability 10.0 to a kernel without a single
    store, without a word; 3.9 does not. Which shapes are hit is not known, so none is trusted there.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return triton_version() < (3, 9) and torch.cuda.get_device_capability(device) >= (10, 0)


def tile_widths(size: int, widest: int) -> tuple[int, ...]:
    """Tiles that cover `size` columns: whole ones of `widest`, and at most two smaller ones, of at least 16.

    (64, 64, 64, 16) for 200: a power of two for all of it would be a fifth more work.
    """
    whole, rest = divmod(cdiv(size, 16) * 16, widest)
    first = next_power_of_2(rest) // 2 if rest & (rest - 1) else rest
    second = rest - first
    if second & (second - 1):
        first, second = next_power_of_2(rest), 0
    return (widest,) * whole + tuple(width for width in (first, second) if width)


def _starts(widths: Sequence[int]) -> tuple[int, ...]:
    return tuple(itertools.accumulate(widths, initial=0))[:-1]


def energy_shape(
    dim: int, hidden: int, depth: int, activation: str, precision: str
) -> tuple[EnergyShape, LaunchConfig]:
    """What is compiled into a kernel, and how it is launched: by these shapes, never by the batch.

    64 rows and 8 warps are what Hopper's matrix units take at a time (`fitted` has other GPUs); fewer rows
    where a tile would not fit
    in the registers of a multiprocessor.
    """
    widest = 32 if precision == "ieee" else 64
    widths, hidden_widths = tile_widths(dim, widest), tile_widths(hidden, widest)
    size = 2 if precision == "bf16" else 4
    # One layer's gradient; and where products are made from registers what comes before it.
    kept = 4 * min(depth - 1, 1 if precision == "bf16" else 2)
    row = sum(hidden_widths) * kept + sum(widths) * (size + (4 if depth == 1 else 0))
    rows = next((rows for rows in (64, 32) if rows * row <= _ROW_BYTES[precision]), 16)
    stages = 2 if precision == "bf16" else 1
    chunk = 16 if precision == "ieee" else 32
    shape = EnergyShape(
        dim=dim,
        hidden=hidden,
        starts=_starts(widths),
        widths=widths,
        hidden_starts=_starts(hidden_widths),
        hidden_widths=hidden_widths,
        chunk=min(chunk, max(next_power_of_2(hidden), 16)),
        stages=stages,
        activation=ACTIVATIONS[activation],
        precision=PRECISIONS[precision],
    )
    config = LaunchConfig(block_columns=16, block_rows=rows, num_warps=8, num_stages=stages)
    return shape, config


# What the tiles of a program may hold, of the 256 KiB of registers: the rest is for the chunk, the weights on
# their way to the matrix units, and addresses.
_ROW_BYTES = {"bf16": 120 * 1024, "tf32": 96 * 1024, "ieee": 48 * 1024}


def energy_pointers(tensors: Sequence[Tensor], precision: str) -> tuple[Tensor, ...]:
    """Weights, or biases, as a kernel takes them: contiguous, those of the products in their type."""
    kind = torch.bfloat16 if precision == "bf16" and tensors[0].ndim == 2 else torch.float32
    *hidden, last = tensors
    return *(tensor.to(kind).contiguous() for tensor in hidden), last.to(torch.float32).contiguous()


def fitted(config: LaunchConfig, device: torch.device) -> LaunchConfig:
    """The launch for this GPU.

    Before Hopper products are made from registers, which hold half the rows; AMD's warps have twice the
    lanes, and half as many of them twice the registers.
    """
    if device.type != "cuda":
        return config
    rows = min(config.block_rows, 32)
    if torch.version.hip:
        return dataclasses.replace(config, block_rows=rows, num_warps=4)
    if torch.cuda.get_device_capability(device) < (9, 0):
        return dataclasses.replace(config, block_rows=rows)
    return config


def energy_memory(
    shape: EnergyShape, depth: int, programs: int, config: LaunchConfig, device: torch.device, *, slopes: bool
) -> Tensor:
    """Memory for the layers that programs keep: `[programs, layers, ROWS, features]`, uninitialised.

    The layers are the depth - 1 first ones, and behind them, where `slopes` are asked for and the activation
    is SiLU, as many with its slopes.
    """
    features = shape.hidden_starts[-1] + shape.hidden_widths[-1]
    layers = (depth - 1) * (2 if slopes and shape.activation == ACTIVATIONS["silu"] else 1)
    kind = torch.bfloat16 if shape.precision == PRECISIONS["bf16"] else torch.float32
    return torch.empty((programs, layers, config.block_rows, features), dtype=kind, device=device)


def energy_programs(device: torch.device, rows: int, config: LaunchConfig) -> int:
    """How many programs share the tiles: on a GPU two for each multiprocessor, elsewhere one a tile."""
    tiles = cdiv(rows, config.block_rows)
    return min(tiles, 2 * _multiprocessors(device.index)) if device.type == "cuda" else tiles


@functools.cache
def _multiprocessors(index: int | None) -> int:
    device = torch.cuda.current_device() if index is None else index
    return torch.cuda.get_device_properties(device).multi_processor_count


__all__ = [
    "MAX_DEPTH",
    "MAX_DIM",
    "MAX_HIDDEN",
    "EnergyShape",
    "energy_and_stored_gradient",
    "energy_fits",
    "energy_memory",
    "energy_pointers",
    "energy_programs",
    "energy_shape",
    "energy_value",
    "fitted",
    "load_state",
    "operands",
    "store_state",
    "tile_widths",
]
