"""A normalizing flow in registers: what a kernel calls to push a tile of samples through the couplings.

    shape, config = flow_shape(parameters, options)                  # by the launcher
    memory = pointers(parameters, precision)

    a, b = noise_halves(seed, index, step, scale, STREAM, F)         # or load_halves, of a tensor
    a, b, log_det = flow_forward(a, b, parameters, F)                # or flow_inverse
    log_det += normalisation_log_det(parameters, F)                  # a scalar; flow_inverse: subtracted
    store_halves(pointer, row, inside, a, b, F)

The state of a tile of `config.block_rows` samples is two tiles `[ROWS, F.padded]`, float32: `a` the columns
that a coupling passes on, `b` those that it changes. Columns beyond the size of a half are zero and stay
zero. `F` is a `FlowShape`, handed over as one `tl.constexpr`: with sizes known to the compiler offsets are
immediates, and masks that always hold cost nothing. `parameters` is the tuple of pointers `memory`.

A field of F that is used as a constant is first given to a local `tl.constexpr`: before Triton 3.9 an
attribute of a constant is a plain number, which `tl.static_range` and the shapes of tiles refuse. Loops are
told not to move what does not change out of them: with it they kept more than the registers hold.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .flow_reference import FlowOptions, FlowParameters
from .launch import LaunchConfig, cdiv, next_power_of_2, tl, triton
from .mlp_device import (
    ACTIVATIONS,
    PRECISIONS,
    TOO_OLD,
    activate,
    bias_tile,
    dense_tile,
    hidden_layer,
    product,
    tanh,
    weight_tile,
)
from .philox_device import interleave4, normal4, philox_words

MAX_DIM, MAX_HIDDEN, MAX_DEPTH = 1024, 512, 3


class FlowShape(NamedTuple):
    """Everything about a flow that is compiled into a kernel.

    Attributes:
        layers: couplings L.
        passed: columns D1 that a coupling passes on.
        changed: columns D2 that it changes; D1 or D1 - 1.
        hidden: width H of the hidden layers.
        depth: number of hidden layers, 1 to 3.
        padded: width of a half's tile: a power of two, at least 16 (what a matrix product needs).
        width: hidden features of a tile of the layers that are held whole; a power of two.
        tiles: number of these tiles.
        chunk: hidden features of the last hidden layer that are made at a time, and forgotten.
        stages: depth of the pipeline that reads the weights of these chunks.
        activation, precision: codes of `mlp_device`.
        clamp: bound of the log-scales, or None.
        shuffle: the mixing interleaves the halves; else it exchanges them.
        whole: both halves fill their tiles.
        normalised: every layer ends with an affine map of its columns.
    """

    layers: int
    passed: int
    changed: int
    hidden: int
    depth: int
    padded: int
    width: int
    tiles: int
    chunk: int
    stages: int
    activation: int
    precision: int
    clamp: float | None
    shuffle: bool
    whole: bool
    normalised: bool


@triton.jit
def bounded(value, CLAMP: tl.constexpr):
    """tanh(value / CLAMP)."""
    return tanh(value * (1.0 / CLAMP))


@triton.jit
def _normal_columns(seed, index, step, STREAM: tl.constexpr, FIRST: tl.constexpr, P: tl.constexpr):
    """Columns FIRST..FIRST+P-1 of the normals of samples `index` `[ROWS]`: `[ROWS, P]`."""
    if FIRST % 4 == 0:
        block = FIRST // 4 + tl.arange(0, P // 4)
        w0, w1, w2, w3 = philox_words(seed, index[:, None], step, STREAM, block[None, :])
        n0, n1, n2, n3 = normal4(w0, w1, w2, w3)
        return interleave4(n0, n1, n2, n3)
    else:
        # The half begins inside a block of four columns: every column draws its block and keeps its share.
        column = FIRST + tl.arange(0, P)
        w0, w1, w2, w3 = philox_words(seed, index[:, None], step, STREAM, (column // 4)[None, :])
        first_pair = (column % 4 < 2)[None, :]
        radius, angle = tl.where(first_pair, w0, w2), tl.where(first_pair, w1, w3)
        n0, n1, _, _ = normal4(radius, angle, radius, angle)
        return tl.where((column % 2 == 0)[None, :], n0, n1)


@triton.jit
def noise_halves(seed, index, step, scale, STREAM: tl.constexpr, F: tl.constexpr):
    """The numbers of `philox.normal(seed, index, step, STREAM, D)`, times `scale`, as halves of a state.

    `seed` and `step` are int64 scalars, `index` is int64 `[ROWS]`, `scale` is float32.
    """
    P: tl.constexpr = F.padded
    D1: tl.constexpr = F.passed
    D2: tl.constexpr = F.changed
    a = _normal_columns(seed, index, step, STREAM, 0, P) * scale
    b = _normal_columns(seed, index, step, STREAM, D1, P) * scale
    if not F.whole:
        column = tl.arange(0, P)[None, :]
        a, b = tl.where(column < D1, a, 0.0), tl.where(column < D2, b, 0.0)
    return a, b


@triton.jit
def load_halves(pointer, row, inside, row_step, column_step, F: tl.constexpr):
    """Rows `row` `[ROWS]` of a matrix `[N, D]` in memory, zero where not `inside`, as halves of a state."""
    P: tl.constexpr = F.padded
    D1: tl.constexpr = F.passed
    D2: tl.constexpr = F.changed
    column = tl.arange(0, P)[None, :]
    place = pointer + row[:, None] * row_step + column * column_step
    a = tl.load(place, inside[:, None] & (column < D1), 0.0)
    b = tl.load(place + D1 * column_step, inside[:, None] & (column < D2), 0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_halves(pointer, row, inside, a, b, F: tl.constexpr):
    """Write the state to rows `row` `[ROWS]` of a contiguous matrix `[N, D]`, where `inside`."""
    P: tl.constexpr = F.padded
    D1: tl.constexpr = F.passed
    D2: tl.constexpr = F.changed
    column = tl.arange(0, P)[None, :]
    place = pointer + row[:, None] * (D1 + D2) + column
    tl.store(place, a.to(pointer.dtype.element_ty), inside[:, None] & (column < D1))
    tl.store(place + D1, b.to(pointer.dtype.element_ty), inside[:, None] & (column < D2))


@triton.jit
def _from_columns(a, b, source, SIZE: tl.constexpr, D1: tl.constexpr):
    """Columns `source` `[P]` of the state; zero beyond the first SIZE of them."""
    P: tl.constexpr = a.shape[1]
    column = tl.arange(0, P)[None, :]
    in_a = tl.broadcast_to(tl.minimum(source, P - 1)[None, :], a.shape)
    in_b = tl.broadcast_to(tl.minimum(tl.maximum(source - D1, 0), P - 1)[None, :], a.shape)
    value = tl.where((source < D1)[None, :], tl.gather(a, in_a, 1), tl.gather(b, in_b, 1))
    return tl.where(column < SIZE, value, 0.0)


@triton.jit
def _mixed_from(column, D1: tl.constexpr, D2: tl.constexpr, SHUFFLE: tl.constexpr, BACK: tl.constexpr):
    """The column that mixing moves to `column`; where BACK, the one that undoing it does."""
    if SHUFFLE and not BACK:
        # b0 a0 b1 a1 ..., and the last of a where it is the longer half.
        pair = column // 2
        return tl.where(column == 2 * D2, D2, tl.where(column % 2 == 0, D1 + pair, pair))
    elif SHUFFLE:
        in_a = tl.where(column == D2, 2 * D2, 2 * column + 1)
        return tl.where(column < D1, in_a, 2 * (column - D1))
    elif BACK:
        return tl.where(column < D1, D2 + column, column - D1)
    else:
        return tl.where(column < D2, D1 + column, column - D2)


@triton.jit
def mix_halves(a, b, F: tl.constexpr, BACK: tl.constexpr):
    """The permutation between couplings, or, where BACK, its inverse; on the chip."""
    P: tl.constexpr = F.padded
    D1: tl.constexpr = F.passed
    D2: tl.constexpr = F.changed
    SHUFFLE: tl.constexpr = F.shuffle
    ROWS: tl.constexpr = a.shape[0]
    if not SHUFFLE and D1 == D2:
        return b, a
    elif SHUFFLE and F.whole:
        if BACK:
            state = tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (ROWS, P, 2))
            new_b, new_a = tl.split(state)
        else:
            state = tl.reshape(tl.join(b, a), (ROWS, 2, P))
            new_a, new_b = tl.split(tl.permute(state, (0, 2, 1)))
        return new_a, new_b
    else:
        column = tl.arange(0, P)
        new_a = _from_columns(a, b, _mixed_from(column, D1, D2, SHUFFLE, BACK), D1, D1)
        new_b = _from_columns(a, b, _mixed_from(D1 + column, D1, D2, SHUFFLE, BACK), D2, D1)
        return new_a, new_b


@triton.jit
def hidden_before_last(a, parameters, layer, F: tl.constexpr):
    """What the last hidden layer of a conditioner reads: a tuple of tiles. The half `a` itself at depth 1."""
    D1: tl.constexpr = F.passed
    H: tl.constexpr = F.hidden
    DEPTH: tl.constexpr = F.depth
    TILES: tl.constexpr = F.tiles
    W: tl.constexpr = F.width
    ACTIVATION: tl.constexpr = F.activation
    PRECISION: tl.constexpr = F.precision
    if DEPTH == 1:
        return (a,)
    else:
        h = hidden_layer(
            (a,), parameters[0] + layer * (H * D1), parameters[1] + layer * H, H, D1, TILES, W,
            ACTIVATION, PRECISION,
        )  # fmt: skip
        if DEPTH == 3:
            h = hidden_layer(
                h, parameters[2] + layer * (2 * H * H), parameters[3] + layer * (2 * H), H, H, TILES, W,
                ACTIVATION, PRECISION,
            )  # fmt: skip
        return h


@triton.jit
def last_hidden_tile(inputs, parameters, layer, first, F: tl.constexpr):
    """Features `first..` of the last hidden layer, before the activation: float32 `[ROWS, F.chunk]`."""
    D1: tl.constexpr = F.passed
    H: tl.constexpr = F.hidden
    DEPTH: tl.constexpr = F.depth
    CHUNK: tl.constexpr = F.chunk
    PRECISION: tl.constexpr = F.precision
    if DEPTH == 1:
        weight = parameters[0] + layer * (H * D1)
        return dense_tile(inputs, weight, parameters[1] + layer * H, first, H, D1, CHUNK, PRECISION)
    else:
        place = layer * (DEPTH - 1) + DEPTH - 2
        weight = parameters[2] + place * (H * H)
        return dense_tile(inputs, weight, parameters[3] + place * H, first, H, H, CHUNK, PRECISION)


@triton.jit
def conditioner(inputs, parameters, layer, F: tl.constexpr):
    """Log-scale before the clamp, and shift: float32 `[ROWS, F.padded]` each.

    `inputs` is what `hidden_before_last` gave. The last hidden layer is made chunk by chunk and is nowhere
    whole; the compiler reads the weights of the next chunk while it multiplies those of this one.
    """
    P: tl.constexpr = F.padded
    D2: tl.constexpr = F.changed
    H: tl.constexpr = F.hidden
    CHUNK: tl.constexpr = F.chunk
    STAGES: tl.constexpr = F.stages
    ACTIVATION: tl.constexpr = F.activation
    PRECISION: tl.constexpr = F.precision
    ROWS: tl.constexpr = inputs[0].shape[0]
    weight = parameters[4] + layer * (2 * D2 * H)
    bias = parameters[5] + layer * (2 * D2)
    log_scale = tl.zeros((ROWS, P), tl.float32) + bias_tile(bias, 0, D2, P)
    shift = tl.zeros((ROWS, P), tl.float32) + bias_tile(bias + D2, 0, D2, P)
    for first in tl.range(0, H, CHUNK, num_stages=STAGES):
        h = activate(last_hidden_tile(inputs, parameters, layer, first, F), ACTIVATION)
        log_scale = product(h, weight_tile(weight, 0, first, D2, H, P, CHUNK), log_scale, PRECISION)
        shift = product(h, weight_tile(weight + D2 * H, 0, first, D2, H, P, CHUNK), shift, PRECISION)
    return log_scale, shift


@triton.jit
def coupling_halves(a, b, parameters, layer, F: tl.constexpr, INVERSE: tl.constexpr):
    """Coupling `layer` or its inverse: the new b, and the log-determinant `[ROWS]`."""
    s, t = conditioner(hidden_before_last(a, parameters, layer, F), parameters, layer, F)
    if F.clamp is not None:
        CLAMP: tl.constexpr = F.clamp
        s = CLAMP * bounded(s, CLAMP)
    if INVERSE:
        return (b - t) * tl.exp(-s), -tl.sum(s, 1)
    else:
        return b * tl.exp(s) + t, tl.sum(s, 1)


@triton.jit
def normalise_halves(a, b, parameters, layer, F: tl.constexpr, INVERSE: tl.constexpr):
    """The affine map at the end of a layer, x·exp(log-scale) + shift by column, or its inverse."""
    P: tl.constexpr = F.padded
    D1: tl.constexpr = F.passed
    D2: tl.constexpr = F.changed
    log_scale, shift = parameters[6] + layer * (D1 + D2), parameters[7] + layer * (D1 + D2)
    scale_a, scale_b = bias_tile(log_scale, 0, D1, P), bias_tile(log_scale + D1, 0, D2, P)
    shift_a, shift_b = bias_tile(shift, 0, D1, P), bias_tile(shift + D1, 0, D2, P)
    if INVERSE:
        return (a - shift_a) * tl.exp(-scale_a), (b - shift_b) * tl.exp(-scale_b)
    else:
        return a * tl.exp(scale_a) + shift_a, b * tl.exp(scale_b) + shift_b


@triton.jit
def scale_halves(a, b, parameters, layer, F: tl.constexpr, INVERSE: tl.constexpr):
    """The linear part of that map, or of its inverse: what a gradient goes through."""
    P: tl.constexpr = F.padded
    D1: tl.constexpr = F.passed
    D2: tl.constexpr = F.changed
    log_scale = parameters[6] + layer * (D1 + D2)
    scale_a, scale_b = bias_tile(log_scale, 0, D1, P), bias_tile(log_scale + D1, 0, D2, P)
    if INVERSE:
        scale_a, scale_b = -scale_a, -scale_b
    return a * tl.exp(scale_a), b * tl.exp(scale_b)


@triton.jit
def normalisation_log_det(parameters, F: tl.constexpr):
    """The log-determinant of all normalisations, the same for all samples: a scalar, 0 without them."""
    if F.normalised:
        SIZE: tl.constexpr = F.layers * (F.passed + F.changed)
        total = tl.zeros((256,), tl.float32)
        for first in range(0, SIZE, 256):
            place = first + tl.arange(0, 256)
            total += tl.load(parameters[6] + place, place < SIZE, 0.0)
        return tl.sum(total, 0)
    else:
        return 0.0


@triton.jit
def flow_forward(a, b, parameters, F: tl.constexpr):
    """Noise to sample: the new halves and the log-determinant `[ROWS]`, less `normalisation_log_det`."""
    LAYERS: tl.constexpr = F.layers
    ROWS: tl.constexpr = a.shape[0]
    log_det = tl.zeros((ROWS,), tl.float32)
    for layer in tl.range(0, LAYERS, disable_licm=True):
        b, layer_log_det = coupling_halves(a, b, parameters, layer, F, False)
        log_det += layer_log_det
        a, b = mix_halves(a, b, F, False)
        if F.normalised:
            a, b = normalise_halves(a, b, parameters, layer, F, False)
    return a, b, log_det


@triton.jit
def flow_inverse(a, b, parameters, F: tl.constexpr):
    """Sample to noise: the new halves and the log-determinant `[ROWS]`, with `normalisation_log_det` missing.

    That scalar is to be subtracted here, where `flow_forward` wants it added.
    """
    LAYERS: tl.constexpr = F.layers
    ROWS: tl.constexpr = a.shape[0]
    log_det = tl.zeros((ROWS,), tl.float32)
    for done in tl.range(0, LAYERS, disable_licm=True):
        layer = LAYERS - 1 - done
        if F.normalised:
            a, b = normalise_halves(a, b, parameters, layer, F, True)
        a, b = mix_halves(a, b, F, True)
        b, layer_log_det = coupling_halves(a, b, parameters, layer, F, True)
        log_det += layer_log_det
    return a, b, log_det


def flow_fits(
    dim: int, hidden: int, depth: int, precision: str = "bf16", *, backward: bool = False
) -> str | None:
    """Why a flow has no kernel, or None where it has: its tiles must fit in registers and shared memory."""
    if TOO_OLD is not None:
        return TOO_OLD
    if not 2 <= dim <= MAX_DIM:
        return f"the dimension is {dim}, and the kernel holds 2 to {MAX_DIM} columns"
    if not 1 <= hidden <= MAX_HIDDEN:
        return f"the hidden layers have {hidden} features, and the kernel holds at most {MAX_HIDDEN}"
    if not 1 <= depth <= MAX_DEPTH:
        return f"there are {depth} hidden layers, and the kernel has 1 to {MAX_DEPTH}"
    if backward and dim > (128 if hidden > 256 else 256):
        held = "128 columns, or 256 with hidden layers of at most 256"
        return f"the dimension is {dim}, and the kernel of the backward pass holds {held}"
    if precision == "ieee" and dim > 256:
        return f'the dimension is {dim}, and with "ieee" the kernel holds at most 256 columns'
    return None


def flow_shape(
    parameters: FlowParameters, options: FlowOptions, *, backward: bool = False
) -> tuple[FlowShape, LaunchConfig]:
    """What is compiled into a kernel, and how it is launched: by these shapes, never by the batch."""
    layers, hidden, passed = parameters.weight_in.shape
    changed = parameters.weight_out.shape[1] // 2
    depth = parameters.weight_hidden.shape[1] + 1
    padded = max(next_power_of_2(passed), 16)
    tiles = flow_tiles(padded, hidden, options.precision, backward)
    shape = FlowShape(
        layers=layers,
        passed=passed,
        changed=changed,
        hidden=hidden,
        depth=depth,
        padded=padded,
        width=tiles.width,
        tiles=cdiv(hidden, tiles.width),
        chunk=tiles.chunk,
        stages=tiles.stages,
        activation=ACTIVATIONS[options.activation],
        precision=PRECISIONS[options.precision],
        clamp=options.clamp,
        shuffle=options.mixing == "shuffle",
        whole=changed == passed == padded,
        normalised=parameters.norm_log_scale is not None,
    )
    config = LaunchConfig(
        block_columns=padded, block_rows=tiles.rows, num_warps=tiles.warps, num_stages=tiles.stages
    )
    return shape, config


def pointers(parameters: FlowParameters, precision: str) -> tuple[Tensor, ...]:
    """The parameters as a kernel takes them: contiguous, matrices in the type that the products read.

    Matrices that are bfloat16 already are not copied. Where there is no normalisation, its places hold
    something that is never read.
    """
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    stacks = [parameters.bias_in if stack is None else stack for stack in parameters]
    types = (kind, torch.float32) * 3 + (torch.float32,) * 2
    return tuple(stack.to(type).contiguous() for stack, type in zip(stacks, types, strict=True))


def flow_programs(device: torch.device, rows: int, config: LaunchConfig) -> int:
    """How many programs share the tiles: on a GPU two for each multiprocessor, elsewhere one a tile."""
    tiles = cdiv(rows, config.block_rows)
    return min(tiles, 2 * _multiprocessors(device.index)) if device.type == "cuda" else tiles


@functools.cache
def _multiprocessors(index: int | None) -> int:
    device = torch.cuda.current_device() if index is None else index
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Tiles(NamedTuple):
    """Rows of a tile, hidden features of a tile and of a chunk, warps, stages of the pipeline."""

    rows: int
    width: int
    chunk: int
    warps: int
    stages: int


def flow_tiles(padded: int, hidden: int, precision: str, backward: bool) -> _Tiles:
    """The table of tiles: what the audit found to fit in registers and in shared memory.

    More rows use a weight more often once it is in shared memory, and 64 are what the asynchronous matrix
    products of sm_90 need; wider states and hidden layers leave registers for fewer. Without matrix units
    ("ieee") a thread holds what it multiplies, so that tiles are small.
    """
    held = max(padded, next_power_of_2(hidden) // 4)
    if precision == "ieee":
        tiles = _Tiles(16 if backward or held > 64 else 32, 32, 32, 8, 2)
    elif precision == "tf32":
        rows = min(max(2048 // held, 16), 32)
        wide = 128 if hidden > 256 else 64
        tiles = _Tiles(16, wide, 32, 8, 2) if backward else _Tiles(rows, 128, 32, 4, 2)
    elif backward:
        tiles = _Tiles(min(max(2048 // held, 16), 32), 128 if hidden > 256 else 64, 32, 8, 2)
    else:
        tiles = _Tiles(min(max(4096 // held, 16), 64), 128, 32, 8, 3)
    if padded > 128:
        tiles = tiles._replace(width=64, chunk=16, warps=8, stages=1)
    # Features that pad the last tile are multiplied too: H 192 is three tiles of 64.
    width = tiles.width
    while width > 16 and (hidden <= width // 2 or (width > 64 and hidden % width)):
        width //= 2
    return tiles._replace(width=width)


__all__ = [
    "MAX_DEPTH",
    "MAX_DIM",
    "MAX_HIDDEN",
    "FlowShape",
    "bounded",
    "conditioner",
    "coupling_halves",
    "flow_fits",
    "flow_forward",
    "flow_inverse",
    "flow_programs",
    "flow_shape",
    "hidden_before_last",
    "last_hidden_tile",
    "load_halves",
    "mix_halves",
    "noise_halves",
    "normalisation_log_det",
    "normalise_halves",
    "pointers",
    "scale_halves",
    "store_halves",
]
