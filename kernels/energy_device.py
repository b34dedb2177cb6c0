"""The MLP energy of a tile of rows, and its gradient: what a kernel calls to have them.

    f = energy_value(state_ptr, row, inside, row_step, memory_ptr, weights, biases, E)     float32 [ROWS]
    f = energy_and_stored_gradient(
        state_ptr, row, inside, row_step, gradient_ptr, scale, memory_ptr, weights, biases, E
    )

`weights` and `biases` are the tuples of pointers that `energy_pointers` makes: those of the hidden layers,
and then the last layer's, a single column that is float32 whatever the precision. `E` is an `EnergyShape`,
handed over as one `tl.constexpr`.

Layers lie in memory that the program alone uses (`energy_memory`), in the type that products take, and that
is so little that it stays in the caches: ROWS·H numbers each. So every product is a pipelined loop over parts
of a layer and of its weights, into one tile of sums: the registers hold no layer, whatever its width.
The last hidden layer is weighted and summed into f where it is made; what is written of it is its gradient.
The gradients of layers take the place of their slopes: SiLU's are written when the layer is made, those of a
(leaky) ReLU are seen in the sign of what came out.

Each thread reads what others wrote: there is a barrier before each layer. What is read and written in one
place (a slope, and the gradient that replaces it) depends on itself, element by element.

A field of E that is used as a constant is first given to a local `tl.constexpr`: before Triton 3.9 an
attribute of a constant is a plain number, which `tl.static_range` and the shapes of tiles refuse.
"""

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


class EnergyShape(NamedTuple):
    """Everything about an energy that is compiled into a kernel.

    Attributes:
        dim, hidden: the state's columns D, and the width H of the hidden layers.
        features: columns of a layer in the program's memory.
        width: features of a hidden layer that are made at a time, up to feature `whole`.
        whole, rests, rest_starts: a multiple of `width`; the widths of the at most two tiles that cover what
            remains, powers of two of at least 16 (what a matrix product needs), and where each begins.
        state_width: columns of the state's gradient that are made at a time.
        step: features of a layer that are multiplied at a time.
        stages: depth of the pipeline that reads them, and their weights.
        activation, precision: codes of `mlp_device`.
    """

    dim: int
    hidden: int
    features: int
    width: int
    whole: int
    rests: tuple[int, ...]
    rest_starts: tuple[int, ...]
    state_width: int
    step: int
    stages: int
    activation: int
    precision: int


@triton.jit
def _places(layer_ptr, first, ROWS: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr):
    """Addresses of features `first..` of a layer in the program's memory, `[ROWS, WIDTH]`."""
    FEATURES: tl.constexpr = E.features
    return layer_ptr + (tl.arange(0, ROWS)[:, None] * FEATURES + first + tl.arange(0, WIDTH)[None, :])


@triton.jit
def _operand(tile, PRECISION: tl.constexpr):
    """In the type that products take."""
    if PRECISION == 2:
        return tile.to(tl.bfloat16)
    else:
        return tile


@triton.jit
def _keep_state(state_ptr, row, inside, row_step, layer_ptr, E: tl.constexpr):
    """Rows `row` `[ROWS]` of a float32 matrix `[N, E.dim]` as layer 0, zero where not `inside`."""
    DIM: tl.constexpr = E.dim
    STEP: tl.constexpr = E.step
    PRECISION: tl.constexpr = E.precision
    for first in tl.range(0, DIM, STEP):
        column = first + tl.arange(0, STEP)[None, :]
        tile = tl.load(state_ptr + row[:, None] * row_step + column, inside[:, None] & (column < DIM), 0.0)
        tl.store(_places(layer_ptr, first, row.shape[0], STEP, E), _operand(tile, PRECISION))


@triton.jit
def _product(
    layer_ptr, weight_ptr, first, total, OUTS: tl.constexpr, INS: tl.constexpr, BACKWARD: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """total + a layer in memory times a part of a matrix `[OUTS, INS]`, float32 `[ROWS, WIDTH]`.

    Forward it is the part that makes features `first..`, of all inputs; with BACKWARD the one that makes the
    gradients of inputs `first..`, of all features.
    """
    STEP: tl.constexpr = E.step
    STAGES: tl.constexpr = E.stages
    PRECISION: tl.constexpr = E.precision
    COUNT: tl.constexpr = OUTS if BACKWARD else INS
    ROWS: tl.constexpr = total.shape[0]
    WIDTH: tl.constexpr = total.shape[1]
    for k in tl.range(0, COUNT, STEP, num_stages=STAGES):
        # Behind the layer's last feature lies what nobody wrote.
        there = (k + tl.arange(0, STEP) < COUNT)[None, :]
        part = tl.load(_places(layer_ptr, k, ROWS, STEP, E), there, 0.0)
        if BACKWARD:
            weight = weight_tile_backward(weight_ptr, k, first, OUTS, INS, STEP, WIDTH)
        else:
            weight = weight_tile(weight_ptr, first, k, OUTS, INS, WIDTH, STEP)
        total = product(part, weight, total, PRECISION)
    return total


@triton.jit
def _features(
    layer_ptr, weight_ptr, bias_ptr, first, INS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """Features `first..` of the layer behind one in memory, before the activation, float32."""
    HIDDEN: tl.constexpr = E.hidden
    total = tl.zeros((ROWS, WIDTH), tl.float32) + bias_tile(bias_ptr, first, HIDDEN, WIDTH)
    return _product(layer_ptr, weight_ptr, first, total, HIDDEN, INS, False, E)


@triton.jit
def _keep_features(
    layer_ptr, weight_ptr, bias_ptr, target_ptr, slopes_ptr, first, INS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """`_keep_layer` of features `first..`."""
    ACTIVATION: tl.constexpr = E.activation
    PRECISION: tl.constexpr = E.precision
    tile = _features(layer_ptr, weight_ptr, bias_ptr, first, INS, ROWS, WIDTH, E)
    tl.store(_places(target_ptr, first, ROWS, WIDTH, E), _operand(activate(tile, ACTIVATION), PRECISION))
    if slopes_ptr is not None:
        slope = _operand(activation_slope(tile, ACTIVATION), PRECISION)
        tl.store(_places(slopes_ptr, first, ROWS, WIDTH, E), slope)


@triton.jit
def _keep_layer(
    layer_ptr, weight_ptr, bias_ptr, target_ptr, slopes_ptr, INS: tl.constexpr, ROWS: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """The layer behind one in memory, with its activation, to memory; and its slopes, unless that is None."""
    WHOLE: tl.constexpr = E.whole
    WIDTH: tl.constexpr = E.width
    RESTS: tl.constexpr = E.rests
    STARTS: tl.constexpr = E.rest_starts
    tl.debug_barrier()
    for first in tl.range(0, WHOLE, WIDTH, disable_licm=True):
        _keep_features(layer_ptr, weight_ptr, bias_ptr, target_ptr, slopes_ptr, first, INS, ROWS, WIDTH, E)
    for k in tl.static_range(len(RESTS)):
        _keep_features(
            layer_ptr, weight_ptr, bias_ptr, target_ptr, slopes_ptr, STARTS[k], INS, ROWS, RESTS[k], E
        )


@triton.jit
def _last_features(
    layer_ptr, weights, biases, target_ptr, first, INS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """What features `first..` of the last hidden layer add to f; see `_last_layers`."""
    HIDDEN: tl.constexpr = E.hidden
    ACTIVATION: tl.constexpr = E.activation
    PRECISION: tl.constexpr = E.precision
    tile = _features(layer_ptr, weights[-2], biases[-2], first, INS, ROWS, WIDTH, E)
    weight = bias_tile(weights[-1], first, HIDDEN, WIDTH)
    if target_ptr is not None:
        slope = _operand(activation_slope(tile, ACTIVATION) * weight, PRECISION)
        tl.store(_places(target_ptr, first, ROWS, WIDTH, E), slope)
    return tl.sum(activate(tile, ACTIVATION) * weight, 1)


@triton.jit
def _last_layers(
    layer_ptr, weights, biases, target_ptr, INS: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """f, float32 `[ROWS]`, from the layer before the last hidden one; the gradient before that one's
    activation goes to memory, unless `target_ptr` is None."""
    WHOLE: tl.constexpr = E.whole
    WIDTH: tl.constexpr = E.width
    RESTS: tl.constexpr = E.rests
    STARTS: tl.constexpr = E.rest_starts
    tl.debug_barrier()
    value = tl.zeros((ROWS,), tl.float32) + tl.load(biases[-1])
    for first in tl.range(0, WHOLE, WIDTH, disable_licm=True):
        value += _last_features(layer_ptr, weights, biases, target_ptr, first, INS, ROWS, WIDTH, E)
    for k in tl.static_range(len(RESTS)):
        value += _last_features(layer_ptr, weights, biases, target_ptr, STARTS[k], INS, ROWS, RESTS[k], E)
    return value


@triton.jit
def _gradient_features(
    layer_ptr, weight_ptr, slopes_ptr, first, ROWS: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr
):
    """`_keep_gradient` of features `first..`."""
    HIDDEN: tl.constexpr = E.hidden
    ACTIVATION: tl.constexpr = E.activation
    PRECISION: tl.constexpr = E.precision
    tile = tl.zeros((ROWS, WIDTH), tl.float32)
    tile = _product(layer_ptr, weight_ptr, first, tile, HIDDEN, HIDDEN, True, E)
    place = _places(slopes_ptr, first, ROWS, WIDTH, E)
    slope = tl.load(place).to(tl.float32)
    if ACTIVATION != 2:
        slope = activation_slope(slope, ACTIVATION)
    tl.store(place, _operand(tile * slope, PRECISION))


@triton.jit
def _keep_gradient(layer_ptr, weight_ptr, slopes_ptr, ROWS: tl.constexpr, E: tl.constexpr):
    """The gradient before a layer's activation, in the place of its slopes, from that of the next layer.

    The slope of a (leaky) ReLU is seen in the sign of what came out, which lies there then.
    """
    WHOLE: tl.constexpr = E.whole
    WIDTH: tl.constexpr = E.width
    RESTS: tl.constexpr = E.rests
    STARTS: tl.constexpr = E.rest_starts
    tl.debug_barrier()
    for first in tl.range(0, WHOLE, WIDTH, disable_licm=True):
        _gradient_features(layer_ptr, weight_ptr, slopes_ptr, first, ROWS, WIDTH, E)
    for k in tl.static_range(len(RESTS)):
        _gradient_features(layer_ptr, weight_ptr, slopes_ptr, STARTS[k], ROWS, RESTS[k], E)


@triton.jit
def _store_gradient(
    layer_ptr, weight_ptr, gradient_ptr, row, inside, scale, E: tl.constexpr
):  # fmt: skip
    """`scale` times the gradient of the state, to rows `row` of a dense float32 matrix `[N, E.dim]`."""
    DIM: tl.constexpr = E.dim
    HIDDEN: tl.constexpr = E.hidden
    WIDTH: tl.constexpr = E.state_width
    ROWS: tl.constexpr = row.shape[0]
    tl.debug_barrier()
    for first in tl.range(0, DIM, WIDTH, disable_licm=True):
        tile = tl.zeros((ROWS, WIDTH), tl.float32)
        tile = _product(layer_ptr, weight_ptr, first, tile, HIDDEN, DIM, True, E) * scale
        column = first + tl.arange(0, WIDTH)[None, :]
        tl.store(gradient_ptr + row[:, None] * DIM + column, tile, inside[:, None] & (column < DIM))


@triton.jit
def energy_value(state_ptr, row, inside, row_step, memory_ptr, weights, biases, E: tl.constexpr):
    """f of rows `row` `[ROWS]` of a float32 matrix of row stride `row_step`, zero where not `inside`."""
    DIM: tl.constexpr = E.dim
    HIDDEN: tl.constexpr = E.hidden
    DEPTH: tl.constexpr = len(weights) - 1  # pyright: ignore[reportAssignmentType]
    ROWS: tl.constexpr = row.shape[0]
    LAYER: tl.constexpr = E.features * row.shape[0]
    tl.debug_barrier()  # others may still read what the last call left
    _keep_state(state_ptr, row, inside, row_step, memory_ptr, E)
    if DEPTH == 1:
        return _last_layers(memory_ptr, weights, biases, None, DIM, ROWS, E)
    else:
        _keep_layer(memory_ptr, weights[0], biases[0], memory_ptr + LAYER, None, DIM, ROWS, E)
        if DEPTH == 3:
            source = memory_ptr + LAYER
            _keep_layer(source, weights[1], biases[1], memory_ptr + 2 * LAYER, None, HIDDEN, ROWS, E)
        source = memory_ptr + (DEPTH - 1) * LAYER
        return _last_layers(source, weights, biases, None, HIDDEN, ROWS, E)


@triton.jit
def energy_and_stored_gradient(
    state_ptr, row, inside, row_step, gradient_ptr, scale, memory_ptr, weights, biases, E: tl.constexpr
):  # fmt: skip
    """f of rows `row` `[ROWS]` of a matrix (see `energy_value`), float32 `[ROWS]`, and its gradient.

    `scale` times the gradient is written to the same rows of a dense matrix. The two are not the same memory.
    """
    DIM: tl.constexpr = E.dim
    HIDDEN: tl.constexpr = E.hidden
    ACTIVATION: tl.constexpr = E.activation
    DEPTH: tl.constexpr = len(weights) - 1  # pyright: ignore[reportAssignmentType]
    ROWS: tl.constexpr = row.shape[0]
    LAYER: tl.constexpr = E.features * row.shape[0]
    tl.debug_barrier()  # others may still read what the last call left
    _keep_state(state_ptr, row, inside, row_step, memory_ptr, E)
    # The state, the hidden layers, and with SiLU the slopes of all but the last, one behind the other.
    last_ptr = memory_ptr + DEPTH * LAYER
    if DEPTH == 1:
        value = _last_layers(memory_ptr, weights, biases, last_ptr, DIM, ROWS, E)
        _store_gradient(last_ptr, weights[0], gradient_ptr, row, inside, scale, E)
        return value
    else:
        first_ptr, second_ptr = memory_ptr + LAYER, memory_ptr + 2 * LAYER
        first_slopes_ptr, second_slopes_ptr = None, None
        first_gradient_ptr, second_gradient_ptr = first_ptr, second_ptr
        if ACTIVATION == 2:
            first_gradient_ptr, second_gradient_ptr = last_ptr + LAYER, last_ptr + 2 * LAYER
            first_slopes_ptr, second_slopes_ptr = first_gradient_ptr, second_gradient_ptr
        _keep_layer(memory_ptr, weights[0], biases[0], first_ptr, first_slopes_ptr, DIM, ROWS, E)
        if DEPTH == 3:
            _keep_layer(first_ptr, weights[1], biases[1], second_ptr, second_slopes_ptr, HIDDEN, ROWS, E)
        value = _last_layers(last_ptr - LAYER, weights, biases, last_ptr, HIDDEN, ROWS, E)
        if DEPTH == 3:
            _keep_gradient(last_ptr, weights[2], second_gradient_ptr, ROWS, E)
            last_ptr = second_gradient_ptr
        _keep_gradient(last_ptr, weights[1], first_gradient_ptr, ROWS, E)
        _store_gradient(first_gradient_ptr, weights[0], gradient_ptr, row, inside, scale, E)
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
    return None


def _miscompiled(device: torch.device) -> bool:
    """Whether the Triton that is installed may drop the body of an energy's kernel on this device.

    Triton 3.6 compiles an energy of depth 3 and SiLU for compute capability 10.0 to a kernel without a single
    store, without a word; 3.9 does not. Which shapes are hit is not known, so none is trusted there.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return triton_version() < (3, 9) and torch.cuda.get_device_capability(device) >= (10, 0)


class _Tiles(NamedTuple):
    """How the work is cut: rows of a program, features made and multiplied at a time, warps, stages."""

    rows: int
    width: int
    step: int
    warps: int
    stages: int


# By the audit: without spills at 16 to 512 columns, 200 to 512 features and depths 2 and 3, in shared memory
# that every GPU has. 64 rows are what Hopper's matrix units take at a time. Without matrix units ("ieee") a
# thread holds what it multiplies, so that tiles are small.
_TILES = {
    "bf16": _Tiles(64, 128, 32, 8, 3),
    "tf32": _Tiles(64, 64, 32, 8, 3),
    "ieee": _Tiles(32, 64, 16, 4, 2),
}


def rest_widths(size: int) -> tuple[int, ...]:
    """At most two powers of two of at least 16 that cover `size` features.

    (64, 16) for 72: a power of two for all of it would be three quarters more work.
    """
    size = cdiv(size, 16) * 16
    largest = next_power_of_2(size)
    second = size - largest // 2
    if size == 0 or largest == size or second & (second - 1):
        return (largest,) if size else ()
    return largest // 2, second


def energy_shape(
    dim: int, hidden: int, activation: str, precision: str, *, one_width: bool = False
) -> tuple[EnergyShape, LaunchConfig]:
    """What is compiled into a kernel, and how it is launched: by these shapes, never by the batch.

    With `one_width` features are made in tiles of one width, more of them than there are: less code, for a
    kernel that has registers to spare for nothing and does most of its work elsewhere.
    """
    tiles = _TILES[precision]
    whole = (cdiv(hidden, tiles.width) if one_width else hidden // tiles.width) * tiles.width
    rests = rest_widths(max(hidden - whole, 0))
    shape = EnergyShape(
        dim=dim,
        hidden=hidden,
        features=cdiv(max(dim, whole + sum(rests)), tiles.step) * tiles.step,
        width=tiles.width,
        whole=whole,
        rests=rests,
        rest_starts=tuple(whole + sum(rests[:k]) for k in range(len(rests))),
        state_width=min(next_power_of_2(max(dim, 16)), tiles.width),
        step=tiles.step,
        stages=tiles.stages,
        activation=ACTIVATIONS[activation],
        precision=PRECISIONS[precision],
    )
    config = LaunchConfig(
        block_columns=tiles.width, block_rows=tiles.rows, num_warps=tiles.warps, num_stages=tiles.stages
    )
    return shape, config


def energy_pointers(tensors: Sequence[Tensor], precision: str) -> tuple[Tensor, ...]:
    """Weights, or biases, as a kernel takes them: contiguous, those of the products in their type."""
    kind = torch.bfloat16 if precision == "bf16" and tensors[0].ndim == 2 else torch.float32
    *hidden, last = tensors
    return *(tensor.to(kind).contiguous() for tensor in hidden), last.to(torch.float32).contiguous()


def energy_memory(
    shape: EnergyShape,
    depth: int,
    programs: int,
    config: LaunchConfig,
    device: torch.device,
    *,
    gradient: bool,
) -> Tensor:
    """Memory for the layers that programs keep: `[programs, layers, ROWS, features]`, uninitialised.

    The layers are the state and the depth - 1 first hidden ones; and for a gradient that of the last one, and
    where the activation is SiLU the slopes of the others.
    """
    layers = depth
    if gradient:
        layers += 1 + (depth - 1 if shape.activation == ACTIVATIONS["silu"] else 0)
    kind = torch.bfloat16 if shape.precision == PRECISIONS["bf16"] else torch.float32
    return torch.empty((programs, layers, config.block_rows, shape.features), dtype=kind, device=device)


__all__ = [
    "MAX_DEPTH",
    "MAX_DIM",
    "MAX_HIDDEN",
    "EnergyShape",
    "energy_and_stored_gradient",
    "energy_fits",
    "energy_memory",
    "energy_pointers",
    "energy_shape",
    "energy_value",
    "rest_widths",
]
