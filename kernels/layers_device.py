"""The layers of a multilayer perceptron in memory: what a kernel calls to make one from another.

    keep_input(source_ptr, row, inside, row_step, layer_ptr, INS, M)        # layer 0, from a float32 matrix
    keep_layer(layer_ptr, weight_ptr, bias_ptr, target_ptr, None, INS, ROWS, M)
    total = layer_product(layer_ptr, weight_ptr, first, total, OUTS, INS, False, M)

Layers lie in memory that the program alone uses, as products take them, `[ROWS, M.features]` each:
32 KB at 256 features in bfloat16, so little that it stays in the caches. So every product is a pipelined loop
over parts of a layer and of its weights, into one tile of sums: the registers hold no layer, whatever its
width. Energies (`energy_device.py`) are made so, gradients of flows (`flow_backward_device.py`), and flows
that do not fit in registers (`flow_layers_device.py`).

Each thread reads what others wrote: there is a barrier before each layer. What is read and written in one
place (a slope, and the gradient that replaces it) depends on itself, element by element.

`M` is a `Layers`, handed over as one `tl.constexpr`. A field of it that is used as a constant is first given
to a local `tl.constexpr`: before Triton 3.9 an attribute of a constant is a plain number, which
`tl.static_range` and the shapes of tiles refuse.
"""

from typing import NamedTuple

import torch

from .launch import LaunchConfig, cdiv, next_power_of_2, tl, triton, triton_version
from .mlp_device import (
    ACTIVATIONS,
    PRECISIONS,
    activate,
    activation_slope,
    bias_tile,
    operand,
    product,
    weight_tile,
    weight_tile_backward,
)


class Layers(NamedTuple):
    """What is compiled into a kernel of a perceptron's hidden layers.

    Attributes:
        hidden: their width H.
        features: columns of a layer in the program's memory.
        width: features of a hidden layer that are made at a time, up to feature `whole`.
        whole, rests, rest_starts: a multiple of `width`; the widths of the at most two tiles that cover what
            remains, powers of two of at least 16 (what a matrix product needs), and where each begins.
        step: features of a layer that are multiplied at a time.
        stages: depth of the pipeline that reads them, and their weights.
        activation, precision: codes of `mlp_device`.
    """

    hidden: int
    features: int
    width: int
    whole: int
    rests: tuple[int, ...]
    rest_starts: tuple[int, ...]
    step: int
    stages: int
    activation: int
    precision: int


@triton.jit
def places(layer_ptr, first, ROWS: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr):
    """Addresses of features `first..` of a layer in the program's memory, `[ROWS, WIDTH]`."""
    FEATURES: tl.constexpr = M.features
    return layer_ptr + (tl.arange(0, ROWS)[:, None] * FEATURES + first + tl.arange(0, WIDTH)[None, :])


@triton.jit
def keep_input(source_ptr, row, inside, row_step, layer_ptr, INS: tl.constexpr, M: tl.constexpr):
    """The first INS columns of rows `row` `[ROWS]` of a float32 matrix to layer 0; zeros if not `inside`."""
    STEP: tl.constexpr = M.step
    PRECISION: tl.constexpr = M.precision
    for first in tl.range(0, INS, STEP):
        column = first + tl.arange(0, STEP)[None, :]
        tile = tl.load(source_ptr + row[:, None] * row_step + column, inside[:, None] & (column < INS), 0.0)
        tl.store(places(layer_ptr, first, row.shape[0], STEP, M), operand(tile, PRECISION))


@triton.jit
def layer_product(
    layer_ptr, weight_ptr, first, total, OUTS: tl.constexpr, INS: tl.constexpr, BACKWARD: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """total + a layer in memory times a part of a matrix `[OUTS, INS]`, float32 `[ROWS, WIDTH]`.

    Forward it is the part that makes features `first..`, of all inputs; with BACKWARD the one that makes the
    gradients of inputs `first..`, of all features.
    """
    STEP: tl.constexpr = M.step
    STAGES: tl.constexpr = M.stages
    PRECISION: tl.constexpr = M.precision
    COUNT: tl.constexpr = OUTS if BACKWARD else INS
    ROWS: tl.constexpr = total.shape[0]
    WIDTH: tl.constexpr = total.shape[1]
    for k in tl.range(0, COUNT, STEP, num_stages=STAGES):
        # Behind the layer's last feature lies what nobody wrote.
        there = (k + tl.arange(0, STEP) < COUNT)[None, :]
        part = tl.load(places(layer_ptr, k, ROWS, STEP, M), there, 0.0)
        if BACKWARD:
            weight = weight_tile_backward(weight_ptr, k, first, OUTS, INS, STEP, WIDTH)
        else:
            weight = weight_tile(weight_ptr, first, k, OUTS, INS, WIDTH, STEP)
        total = product(part, weight, total, PRECISION)
    return total


@triton.jit
def layer_features(
    layer_ptr, weight_ptr, bias_ptr, first, INS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """Features `first..` of the layer behind one in memory, before the activation, float32."""
    HIDDEN: tl.constexpr = M.hidden
    total = tl.zeros((ROWS, WIDTH), tl.float32) + bias_tile(bias_ptr, first, HIDDEN, WIDTH)
    return layer_product(layer_ptr, weight_ptr, first, total, HIDDEN, INS, False, M)


@triton.jit
def _keep_features(
    layer_ptr, weight_ptr, bias_ptr, target_ptr, slopes_ptr, first, INS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """`keep_layer` of features `first..`."""
    ACTIVATION: tl.constexpr = M.activation
    PRECISION: tl.constexpr = M.precision
    tile = layer_features(layer_ptr, weight_ptr, bias_ptr, first, INS, ROWS, WIDTH, M)
    tl.store(places(target_ptr, first, ROWS, WIDTH, M), operand(activate(tile, ACTIVATION), PRECISION))
    if slopes_ptr is not None:
        slope = activation_slope(tile, ACTIVATION).to(slopes_ptr.dtype.element_ty)
        tl.store(places(slopes_ptr, first, ROWS, WIDTH, M), slope)


@triton.jit
def keep_layer(
    layer_ptr, weight_ptr, bias_ptr, target_ptr, slopes_ptr, INS: tl.constexpr, ROWS: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """The layer behind one in memory, with its activation, to memory; and its slopes, unless that is None."""
    WHOLE: tl.constexpr = M.whole
    WIDTH: tl.constexpr = M.width
    RESTS: tl.constexpr = M.rests
    STARTS: tl.constexpr = M.rest_starts
    tl.debug_barrier()
    for first in tl.range(0, WHOLE, WIDTH, disable_licm=True):
        _keep_features(layer_ptr, weight_ptr, bias_ptr, target_ptr, slopes_ptr, first, INS, ROWS, WIDTH, M)
    for k in tl.static_range(len(RESTS)):
        _keep_features(
            layer_ptr, weight_ptr, bias_ptr, target_ptr, slopes_ptr, STARTS[k], INS, ROWS, RESTS[k], M
        )


@triton.jit
def _gradient_features(
    layer_ptr, weight_ptr, slopes_ptr, first, OUTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """`keep_gradient` of features `first..`."""
    HIDDEN: tl.constexpr = M.hidden
    ACTIVATION: tl.constexpr = M.activation
    PRECISION: tl.constexpr = M.precision
    tile = tl.zeros((ROWS, WIDTH), tl.float32)
    tile = layer_product(layer_ptr, weight_ptr, first, tile, OUTS, HIDDEN, True, M)
    place = places(slopes_ptr, first, ROWS, WIDTH, M)
    slope = tl.load(place).to(tl.float32)
    if ACTIVATION != 2:
        slope = activation_slope(slope, ACTIVATION)
    tl.store(place, operand(tile * slope, PRECISION))


@triton.jit
def keep_gradient(
    layer_ptr, weight_ptr, slopes_ptr, OUTS: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """The gradient before a layer's activation, in the place of its slopes, from that of the next layer, of
    OUTS features.

    The slope of a (leaky) ReLU is seen in the sign of what came out, which lies there then.
    """
    WHOLE: tl.constexpr = M.whole
    WIDTH: tl.constexpr = M.width
    RESTS: tl.constexpr = M.rests
    STARTS: tl.constexpr = M.rest_starts
    tl.debug_barrier()
    for first in tl.range(0, WHOLE, WIDTH, disable_licm=True):
        _gradient_features(layer_ptr, weight_ptr, slopes_ptr, first, OUTS, ROWS, WIDTH, M)
    for k in tl.static_range(len(RESTS)):
        _gradient_features(layer_ptr, weight_ptr, slopes_ptr, STARTS[k], OUTS, ROWS, RESTS[k], M)


class Tiles(NamedTuple):
    """How the work is cut: rows of a program, features made and multiplied at a time, warps, stages."""

    rows: int
    width: int
    step: int
    warps: int
    stages: int


# By the audit: without spills at 16 to 512 columns, 200 to 512 features and depths 2 and 3, in shared memory
# that every GPU has. 64 rows are what Hopper's matrix units take at a time. Without matrix units ("ieee") a
# thread holds what it multiplies, so that tiles are small.
TILES = {
    "bf16": Tiles(64, 128, 32, 8, 3),
    "tf32": Tiles(64, 64, 32, 8, 3),
    "ieee": Tiles(32, 64, 16, 4, 2),
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


def layers(
    dim: int, hidden: int, activation: str, precision: str, *, one_width: bool = False
) -> tuple[Layers, LaunchConfig]:
    """What is compiled into a kernel, and how it is launched: by these shapes, never by the batch.

    With `one_width` features are made in tiles of one width, more of them than there are: less code, for a
    kernel that has registers to spare for nothing and does most of its work elsewhere.

    Args:
        dim: columns of the widest layer beside the hidden ones.
    """
    tiles = TILES[precision]
    whole = (cdiv(hidden, tiles.width) if one_width else hidden // tiles.width) * tiles.width
    rests = rest_widths(max(hidden - whole, 0))
    shape = Layers(
        hidden=hidden,
        features=cdiv(max(dim, whole + sum(rests)), tiles.step) * tiles.step,
        width=tiles.width,
        whole=whole,
        rests=rests,
        rest_starts=tuple(whole + sum(rests[:k]) for k in range(len(rests))),
        step=tiles.step,
        stages=tiles.stages,
        activation=ACTIVATIONS[activation],
        precision=PRECISIONS[precision],
    )
    config = LaunchConfig(
        block_columns=tiles.width,
        block_rows=tiles.rows,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        max_registers=168 if precision == "ieee" else None,  # three programs of 4 warps; most need 128: four
    )
    return shape, config


def output_width(columns: int, shape: Layers) -> int:
    """Of a layer that is not hidden: columns that are made at a time."""
    return min(next_power_of_2(max(columns, 16)), shape.width)


def layers_untrusted(device: torch.device) -> str | None:
    """Why layers in memory are not trusted on a device, or None where they are.

    Triton 3.6 compiles an energy of depth 3 and SiLU for compute capability 10.0 to a kernel without a single
    store, without a word; 3.9 does not. Which shapes are hit is not known, so none is trusted there.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    if triton_version() >= (3, 9) or torch.cuda.get_device_capability(device) < (10, 0):
        return None
    name = torch.cuda.get_device_name(device)
    return f"Triton {triton.__version__} may miscompile it for {name}, which 3.9 does not"


__all__ = [
    "TILES",
    "Layers",
    "Tiles",
    "keep_gradient",
    "keep_input",
    "keep_layer",
    "layer_features",
    "layer_product",
    "layers",
    "layers_untrusted",
    "output_width",
    "places",
    "rest_widths",
]
