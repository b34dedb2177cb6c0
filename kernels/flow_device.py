"""A normalizing flow in registers: what a kernel calls to push a tile of samples through the couplings.

    shape, config = flow_shape(parameters, options)                  # by the launcher
    memory = pointers(parameters, precision)

    parameters = anew(parameters, start)     # in every turn of a loop over tiles: see `opaque_device.py`
    noise_state(state_ptr, seed, index, step, scale, parameters[-1], STREAM, False, F)     # or read_state
    log_det = flow_forward(state_ptr, parameters, ROWS, F)                 # or flow_inverse
    log_det += normalisation_log_det(parameters, F)                        # a scalar; flow_inverse: -=

The state of a tile of ROWS = `config.block_rows` samples lies in memory that one program alone uses: float32
`[ROWS, D]`, dense, so little that it stays in the L1 and L2 caches. A coupling reads the half `a` that it
passes on, and once its scales and shifts are there, both halves again; it writes them back mixed. In
registers the halves would take the room of the conditioner's tiles for the whole of a coupling, which reads
them twice. A half is held as a tile `[ROWS, F.padded]`: columns beyond its size are zero. All threads take
part in every read and write of the state, and there is a barrier between one and the other.

`F` is a `FlowShape`, handed over as one `tl.constexpr`: with sizes known to the compiler offsets are
immediates, and masks that always hold cost nothing. `parameters` is the tuple `memory`: pointers and a zero.

A field of F that is used as a constant is first given to a local `tl.constexpr`: before Triton 3.9 an
attribute of a constant is a plain number, which `tl.static_range` and the shapes of tiles refuse. Loops are
told not to move what does not change out of them: with it they kept more than the registers hold.
"""

from typing import Any, NamedTuple

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
    operand,
    product,
    tanh,
    weight_tile,
)
from .opaque_device import opaque
from .philox_device import interleave4, normal4, philox_words
from .weights_gpu import operands

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
    normalised: bool


@triton.jit
def bounded(value, CLAMP: tl.constexpr):
    """tanh(value / CLAMP)."""
    return tanh(value * (1.0 / CLAMP))


@triton.jit
def noise_state(
    state_ptr, seed, index, step, scale, zero,
    STREAM: tl.constexpr, SQUARES: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Write the numbers of `philox.normal(seed, index, step, STREAM, D)`, times `scale`, to a state.

    `seed` is an int64 scalar, `index` int64 `[ROWS]`, `step` a scalar or `[ROWS, 1]`, `scale` float32, `zero`
    that of `opaque_device.py`.
    Returns the sum of their squares `[ROWS]` where SQUARES, else zeros. In pieces of columns: to make a
    number takes many more registers than to hold it.
    """
    D: tl.constexpr = F.passed + F.changed
    PIECE: tl.constexpr = min(F.padded, 32)
    ROWS: tl.constexpr = index.shape[0]
    squares = tl.zeros((ROWS,), tl.float32)
    index = opaque(index, zero)
    place = opaque(tl.arange(0, ROWS), zero)[:, None] * D
    for piece in tl.range(0, D, PIECE, disable_licm=True):
        first = opaque(piece // PIECE, zero) * PIECE
        block = first // 4 + tl.arange(0, PIECE // 4)
        w0, w1, w2, w3 = philox_words(seed, index[:, None], step, STREAM, block[None, :])
        n0, n1, n2, n3 = normal4(w0, w1, w2, w3)
        column = first + tl.arange(0, PIECE)[None, :]
        noise = tl.where(column < D, interleave4(n0, n1, n2, n3) * scale, 0.0)
        if SQUARES:
            squares += tl.sum(noise * noise, 1)
        tl.store(state_ptr + (place + column), noise, column < D)
    return squares


@triton.jit
def state_squares(state_ptr, zero, ROWS: tl.constexpr, F: tl.constexpr):
    """The sum of the squares of a state's rows `[ROWS]`, in the order of `noise_state`."""
    D: tl.constexpr = F.passed + F.changed
    PIECE: tl.constexpr = min(F.padded, 32)
    squares = tl.zeros((ROWS,), tl.float32)
    for piece in tl.range(0, D, PIECE, disable_licm=True):
        first = opaque(piece // PIECE, zero) * PIECE
        column = first + tl.arange(0, PIECE)[None, :]
        value = tl.load(state_ptr + (tl.arange(0, ROWS)[:, None] * D + column), column < D, 0.0)
        squares += tl.sum(value * value, 1)
    return squares


@triton.jit
def read_state(state_ptr, pointer, row, inside, row_step, column_step, zero, F: tl.constexpr):
    """Copy rows `row` `[ROWS]` of a matrix `[N, D]` in memory to a state: zeros where not `inside`."""
    D: tl.constexpr = F.passed + F.changed
    PIECE: tl.constexpr = min(F.padded, 32)
    ROWS: tl.constexpr = row.shape[0]
    for piece in tl.range(0, D, PIECE, disable_licm=True):
        first = opaque(piece // PIECE, zero) * PIECE
        column = first + tl.arange(0, PIECE)[None, :]
        place = pointer + row[:, None] * row_step + column * column_step
        value = tl.load(place, inside[:, None] & (column < D), 0.0).to(tl.float32)
        tl.store(state_ptr + (tl.arange(0, ROWS)[:, None] * D + column), value, column < D)


@triton.jit
def write_state(state_ptr, pointer, row, inside, zero, F: tl.constexpr):
    """Copy a state to rows `row` `[ROWS]` of a contiguous matrix `[N, D]`, where `inside`."""
    D: tl.constexpr = F.passed + F.changed
    PIECE: tl.constexpr = min(F.padded, 32)
    ROWS: tl.constexpr = row.shape[0]
    for piece in tl.range(0, D, PIECE, disable_licm=True):
        first = opaque(piece // PIECE, zero) * PIECE
        column = first + tl.arange(0, PIECE)[None, :]
        value = tl.load(state_ptr + (tl.arange(0, ROWS)[:, None] * D + column), column < D, 0.0)
        tl.store(pointer + row[:, None] * D + column, value, inside[:, None] & (column < D))


@triton.jit
def _load_half(state_ptr, zero, FIRST: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr):
    """Columns FIRST..FIRST+SIZE-1 of a state: `[ROWS, F.padded]`, then zeros."""
    P: tl.constexpr = F.padded
    D: tl.constexpr = F.passed + F.changed
    column = tl.arange(0, P)[None, :]
    place = opaque(tl.arange(0, ROWS), zero)[:, None] * D
    return tl.load(state_ptr + (place + (FIRST + column)), column < SIZE, 0.0)


@triton.jit
def _store_half(state_ptr, value, FIRST: tl.constexpr, SIZE: tl.constexpr, F: tl.constexpr):
    """Write the first SIZE columns of a tile to columns FIRST.. of a state."""
    P: tl.constexpr = F.padded
    D: tl.constexpr = F.passed + F.changed
    ROWS: tl.constexpr = value.shape[0]
    column = tl.arange(0, P)[None, :]
    tl.store(state_ptr + (tl.arange(0, ROWS)[:, None] * D + (FIRST + column)), value, column < SIZE)


@triton.jit
def _load_halves(state_ptr, zero, ROWS: tl.constexpr, MIXED: tl.constexpr, F: tl.constexpr):
    """The halves (a, b) of a state; where MIXED they are found where mixing has put them."""
    P: tl.constexpr = F.padded
    D1: tl.constexpr = F.passed
    D2: tl.constexpr = F.changed
    D: tl.constexpr = D1 + D2
    if MIXED and F.shuffle:
        # b0 a0 b1 a1 ..., and the last of a where it is the longer half.
        place = opaque(tl.arange(0, ROWS), zero)[:, None] * D
        column = tl.arange(0, 2 * P)[None, :]
        state = tl.load(state_ptr + (place + column), column < D, 0.0)
        b, a = tl.split(tl.reshape(state, (ROWS, P, 2)))
        if D1 != D2:
            column = tl.arange(0, P)[None, :]
            a, b = tl.where(column == D2, b, a), tl.where(column == D2, 0.0, b)
        return a, b
    elif MIXED:
        return _load_half(state_ptr, zero, D2, D1, ROWS, F), _load_half(state_ptr, zero, 0, D2, ROWS, F)
    else:
        return _load_half(state_ptr, zero, 0, D1, ROWS, F), _load_half(state_ptr, zero, D1, D2, ROWS, F)


@triton.jit
def _store_halves(state_ptr, zero, a, b, MIXED: tl.constexpr, F: tl.constexpr):
    """Write the halves back; where MIXED to where mixing puts them."""
    P: tl.constexpr = F.padded
    D1: tl.constexpr = F.passed
    D2: tl.constexpr = F.changed
    D: tl.constexpr = D1 + D2
    ROWS: tl.constexpr = a.shape[0]
    if MIXED and F.shuffle:
        if D1 != D2:
            b = tl.where(tl.arange(0, P)[None, :] == D2, a, b)
        place = opaque(tl.arange(0, ROWS), zero)[:, None] * D
        column = tl.arange(0, 2 * P)[None, :]
        state = tl.reshape(tl.join(b, a), (ROWS, 2 * P))
        tl.store(state_ptr + (place + column), state, column < D)
    elif MIXED:
        _store_half(state_ptr, b, 0, D2, F)
        _store_half(state_ptr, a, D2, D1, F)
    else:
        _store_half(state_ptr, a, 0, D1, F)
        _store_half(state_ptr, b, D1, D2, F)


@triton.jit
def _hidden_before_last(a, parameters, layer, F: tl.constexpr):
    """What the last hidden layer of a conditioner reads: a tuple of operands. The half `a` at depth 1."""
    D1: tl.constexpr = F.passed
    H: tl.constexpr = F.hidden
    DEPTH: tl.constexpr = F.depth
    TILES: tl.constexpr = F.tiles
    W: tl.constexpr = F.width
    ACTIVATION: tl.constexpr = F.activation
    PRECISION: tl.constexpr = F.precision
    a = operand(a, PRECISION)
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
def _last_hidden_tile(inputs, parameters, layer, first, F: tl.constexpr):
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
def _conditioner(inputs, parameters, layer, F: tl.constexpr):
    """Log-scale before the clamp, and shift: float32 `[ROWS, F.padded]` each.

    `inputs` is what `_hidden_before_last` gave. The last hidden layer is made chunk by chunk and is nowhere
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
    for piece in tl.range(0, H, CHUNK, num_stages=STAGES):
        first = opaque(piece // CHUNK, parameters[-1]) * CHUNK
        h = _last_hidden_tile(inputs, parameters, layer, first, F)
        h = operand(activate(h, ACTIVATION), PRECISION)
        log_scale = product(h, weight_tile(weight, 0, first, D2, H, P, CHUNK), log_scale, PRECISION)
        shift = product(h, weight_tile(weight + D2 * H, 0, first, D2, H, P, CHUNK), shift, PRECISION)
    return log_scale, shift


@triton.jit
def _clamped_conditioner(a, parameters, layer, F: tl.constexpr):
    """Log-scale and shift of coupling `layer`."""
    s, t = _conditioner(_hidden_before_last(a, parameters, layer, F), parameters, layer, F)
    if F.clamp is not None:
        CLAMP: tl.constexpr = F.clamp
        s = CLAMP * bounded(s, CLAMP)
    return s, t


@triton.jit
def _by_column(pointer, layer, F: tl.constexpr):
    """Numbers of a layer's columns, `[L, D]` in memory, for the halves: of the columns that mixing moves
    each to, `[1, F.padded]`."""
    P: tl.constexpr = F.padded
    D1: tl.constexpr = F.passed
    D2: tl.constexpr = F.changed
    pointer += layer * (D1 + D2)
    column = tl.arange(0, P)
    if F.shuffle:
        of_a, of_b = tl.where(column < D2, 2 * column + 1, 2 * column), 2 * column
    else:
        of_a, of_b = D2 + column, column
    a, b = tl.load(pointer + of_a, column < D1, 0.0), tl.load(pointer + of_b, column < D2, 0.0)
    return a[None, :], b[None, :]


@triton.jit
def _normalise_halves(a, b, parameters, layer, F: tl.constexpr, INVERSE: tl.constexpr):
    """The affine map of the mixed columns at the end of a layer, x·exp(log-scale) + shift, or its inverse."""
    scale_a, scale_b = _by_column(parameters[6], layer, F)
    shift_a, shift_b = _by_column(parameters[7], layer, F)
    if INVERSE:
        return (a - shift_a) * tl.exp(-scale_a), (b - shift_b) * tl.exp(-scale_b)
    else:
        return a * tl.exp(scale_a) + shift_a, b * tl.exp(scale_b) + shift_b


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
def _layer(layer, state_ptr, parameters):
    """A layer's number, a zero and the state: from them addresses are computed in each layer anew, and in
    each part of a layer that calls this."""
    layer = opaque(layer, parameters[-1])
    zero = layer * parameters[-1]
    return layer, zero, state_ptr + zero


@triton.jit
def flow_forward(state_ptr, parameters, ROWS: tl.constexpr, F: tl.constexpr):
    """Noise to sample, in place. Returns the log-determinant `[ROWS]`, less `normalisation_log_det`."""
    LAYERS: tl.constexpr = F.layers
    D1: tl.constexpr = F.passed
    log_det = tl.zeros((ROWS,), tl.float32)
    for done in tl.range(0, LAYERS, disable_licm=True):
        layer, zero, own_ptr = _layer(done, state_ptr, parameters)
        tl.debug_barrier()
        s, t = _clamped_conditioner(_load_half(own_ptr, zero, 0, D1, ROWS, F), parameters, layer, F)
        log_det += tl.sum(s, 1)
        tl.debug_barrier()  # else the compiler finds that it had the half already, and keeps it
        _, zero, own_ptr = _layer(layer, own_ptr, parameters)
        a, b = _load_halves(own_ptr, zero, ROWS, False, F)
        b = b * tl.exp(s) + t
        if F.normalised:
            a, b = _normalise_halves(a, b, parameters, layer, F, False)
        tl.debug_barrier()
        _store_halves(own_ptr, zero, a, b, True, F)
    tl.debug_barrier()
    return log_det


@triton.jit
def flow_inverse(state_ptr, parameters, ROWS: tl.constexpr, F: tl.constexpr):
    """Sample to noise, in place. Returns the log-determinant `[ROWS]`, with `normalisation_log_det` missing.

    That scalar is to be subtracted here, where `flow_forward` wants it added.
    """
    LAYERS: tl.constexpr = F.layers
    log_det = tl.zeros((ROWS,), tl.float32)
    for done in tl.range(0, LAYERS, disable_licm=True):
        layer, zero, own_ptr = _layer(LAYERS - 1 - done, state_ptr, parameters)
        tl.debug_barrier()
        a, b = _load_halves(own_ptr, zero, ROWS, True, F)
        if F.normalised:
            a, b = _normalise_halves(a, b, parameters, layer, F, True)
        s, t = _clamped_conditioner(a, parameters, layer, F)
        log_det -= tl.sum(s, 1)
        tl.debug_barrier()  # as in `flow_forward`
        _, zero, own_ptr = _layer(layer, own_ptr, parameters)
        a, b = _load_halves(own_ptr, zero, ROWS, True, F)
        if F.normalised:
            a, b = _normalise_halves(a, b, parameters, layer, F, True)
        b = (b - t) * tl.exp(-s)
        tl.debug_barrier()
        _store_halves(own_ptr, zero, a, b, False, F)
    tl.debug_barrier()
    return log_det


def flow_fits(dim: int, hidden: int, depth: int) -> str | None:
    """Why a flow has no kernel, or None where it has."""
    if TOO_OLD is not None:
        return TOO_OLD
    if not 2 <= dim <= MAX_DIM:
        return f"the dimension is {dim}, and the kernel holds 2 to {MAX_DIM} columns"
    if not 1 <= hidden <= MAX_HIDDEN:
        return f"the hidden layers have {hidden} features, and the kernel holds at most {MAX_HIDDEN}"
    if not 1 <= depth <= MAX_DEPTH:
        return f"there are {depth} hidden layers, and the kernel has 1 to {MAX_DEPTH}"
    return None


def flow_shape(parameters: FlowParameters, options: FlowOptions) -> tuple[FlowShape, LaunchConfig]:
    """What is compiled into a kernel, and how it is launched: by these shapes, never by the batch."""
    layers, hidden, passed = parameters.weight_in.shape
    changed = parameters.weight_out.shape[1] // 2
    depth = parameters.weight_hidden.shape[1] + 1
    padded = max(next_power_of_2(passed), 16)
    tiles = flow_tiles(padded, hidden, options.precision)
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
        normalised=parameters.norm_log_scale is not None,
    )
    config = LaunchConfig(
        block_columns=padded, block_rows=tiles.rows, num_warps=tiles.warps, num_stages=tiles.stages
    )
    return shape, config


def pointers(parameters: FlowParameters, precision: str) -> tuple[Any, ...]:
    """The parameters as a kernel takes them: contiguous, matrices as products read them; then the zero of
    `opaque_device.py`. Where there is no normalisation, its places hold something that is never read."""
    p = parameters
    weight_in, weight_hidden, weight_out = operands((p.weight_in, p.weight_hidden, p.weight_out), precision)
    bias_in, bias_hidden, bias_out = (bias.contiguous() for bias in (p.bias_in, p.bias_hidden, p.bias_out))
    norms = (bias_in if norm is None else norm.contiguous() for norm in (p.norm_log_scale, p.norm_shift))
    return weight_in, bias_in, weight_hidden, bias_hidden, weight_out, bias_out, *norms, 0


def whole_tiles(rows: int, config: LaunchConfig) -> int:
    """The number of rows, rounded up to whole tiles: what the states of all tiles take."""
    return cdiv(rows, config.block_rows) * config.block_rows


def without_padding(tensor: Tensor, rows: int) -> Tensor:
    """The first rows of whole tiles, as a tensor of its own: what autograd records may not change a view in
    place, and one of few rows would keep, and be saved with, all of its padding."""
    if tensor.shape[0] > 2 * rows:
        return tensor[:rows].clone()
    return tensor.resize_(rows, tensor.shape[1])


class _Tiles(NamedTuple):
    """Rows of a tile, hidden features of a tile and of a chunk, warps, stages of the pipeline."""

    rows: int
    width: int
    chunk: int
    warps: int
    stages: int


def flow_tiles(padded: int, hidden: int, precision: str) -> _Tiles:
    """The table of tiles: what the audit found to fit in registers and in shared memory.

    More rows use a weight more often once it is in shared memory. Of the asynchronous matrix products of
    sm_90 each four warps take 64 rows: with 128 rows and 8 warps what a product gives is in the registers
    where the next one reads it, and no hidden layer goes through shared memory. Wider states and hidden
    layers leave registers for fewer rows. A flow that has its layers in memory has no use for them.
    """
    held = max(padded, next_power_of_2(hidden) // 4)
    if precision == "tf32":
        tiles = _Tiles(min(max(2048 // held, 16), 32), 128, 32, 4, 2)
    elif held <= 64:
        tiles = _Tiles(128, 256, 32, 8, 2)
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
    "flow_fits",
    "flow_forward",
    "flow_inverse",
    "flow_shape",
    "noise_state",
    "normalisation_log_det",
    "pointers",
    "read_state",
    "state_squares",
    "whole_tiles",
    "without_padding",
    "write_state",
]
