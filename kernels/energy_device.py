"""The MLP energy of a tile of rows, and its gradient: what a kernel calls to have them.

    f = energy_value(state_ptr, row, inside, row_step, memory_ptr, weights, biases, E)     float32 [ROWS]
    f = energy_and_stored_gradient(
        state_ptr, row, inside, row_step, gradient_ptr, scale, memory_ptr, weights, biases, E
    )

`weights` and `biases` are the tuples of pointers that `energy_pointers` makes: those of the hidden layers,
and then the last layer's, a single column that is float32 whatever the precision. `E` is an `EnergyShape`,
handed over as one `tl.constexpr`.

Layers lie in memory that the program alone uses (`energy_memory`): see `layers_device.py`. The last hidden
layer is weighted and summed into f where it is made; what is written of it is its gradient. The gradients of
layers take the place of their slopes: SiLU's are written when the layer is made, those of a (leaky) ReLU are
seen in the sign of what came out.

A field of E or M that is used as a constant is first given to a local `tl.constexpr`: before Triton 3.9 an
attribute of a constant is a plain number, which `tl.static_range` and the shapes of tiles refuse.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import LaunchConfig, tl, triton
from .layers_device import (
    Layers,
    keep_gradient,
    keep_input,
    keep_layer,
    layer_features,
    layer_product,
    layers,
    layers_untrusted,
    output_width,
    places,
)
from .mlp_device import ACTIVATIONS, PRECISIONS, TOO_OLD, activate, activation_slope, bias_tile, operand
from .weights_gpu import operands

MAX_DIM, MAX_HIDDEN, MAX_DEPTH = 1024, 512, 3


class EnergyShape(NamedTuple):
    """Everything about an energy that is compiled into a kernel.

    Attributes:
        dim: the state's columns D.
        state_width: columns of the state's gradient that are made at a time.
        layers: the hidden layers.
    """

    dim: int
    state_width: int
    layers: Layers


@triton.jit
def _last_features(
    layer_ptr, weights, biases, target_ptr, first, INS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """What features `first..` of the last hidden layer add to f; see `_last_layers`."""
    HIDDEN: tl.constexpr = M.hidden
    ACTIVATION: tl.constexpr = M.activation
    PRECISION: tl.constexpr = M.precision
    tile = layer_features(layer_ptr, weights[-2], biases[-2], first, INS, ROWS, WIDTH, M)
    weight = bias_tile(weights[-1], first, HIDDEN, WIDTH)
    if target_ptr is not None:
        slope = operand(activation_slope(tile, ACTIVATION) * weight, PRECISION)
        tl.store(places(target_ptr, first, ROWS, WIDTH, M), slope)
    return tl.sum(activate(tile, ACTIVATION) * weight, 1)


@triton.jit
def _last_layers(
    layer_ptr, weights, biases, target_ptr, INS: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """f, float32 `[ROWS]`, from the layer before the last hidden one; the gradient before that one's
    activation goes to memory, unless `target_ptr` is None."""
    WHOLE: tl.constexpr = M.whole
    WIDTH: tl.constexpr = M.width
    RESTS: tl.constexpr = M.rests
    STARTS: tl.constexpr = M.rest_starts
    tl.debug_barrier()
    value = tl.zeros((ROWS,), tl.float32) + tl.load(biases[-1])
    for first in tl.range(0, WHOLE, WIDTH, disable_licm=True):
        value += _last_features(layer_ptr, weights, biases, target_ptr, first, INS, ROWS, WIDTH, M)
    for k in tl.static_range(len(RESTS)):
        value += _last_features(layer_ptr, weights, biases, target_ptr, STARTS[k], INS, ROWS, RESTS[k], M)
    return value


@triton.jit
def _store_gradient(
    layer_ptr, weight_ptr, gradient_ptr, row, inside, scale, E: tl.constexpr
):  # fmt: skip
    """`scale` times the gradient of the state, to rows `row` of a dense float32 matrix `[N, E.dim]`."""
    M: tl.constexpr = E.layers
    DIM: tl.constexpr = E.dim
    HIDDEN: tl.constexpr = M.hidden
    WIDTH: tl.constexpr = E.state_width
    ROWS: tl.constexpr = row.shape[0]
    tl.debug_barrier()
    for first in tl.range(0, DIM, WIDTH, disable_licm=True):
        tile = tl.zeros((ROWS, WIDTH), tl.float32)
        tile = layer_product(layer_ptr, weight_ptr, first, tile, HIDDEN, DIM, True, M) * scale
        column = first + tl.arange(0, WIDTH)[None, :]
        tl.store(gradient_ptr + row[:, None] * DIM + column, tile, inside[:, None] & (column < DIM))


@triton.jit
def energy_value(state_ptr, row, inside, row_step, memory_ptr, weights, biases, E: tl.constexpr):
    """f of rows `row` `[ROWS]` of a float32 matrix of row stride `row_step`, zero where not `inside`."""
    M: tl.constexpr = E.layers
    DIM: tl.constexpr = E.dim
    HIDDEN: tl.constexpr = M.hidden
    DEPTH: tl.constexpr = len(weights) - 1  # pyright: ignore[reportAssignmentType]
    ROWS: tl.constexpr = row.shape[0]
    LAYER: tl.constexpr = M.features * row.shape[0]
    tl.debug_barrier()  # others may still read what the last call left
    keep_input(state_ptr, row, inside, row_step, memory_ptr, DIM, M)
    if DEPTH == 1:
        return _last_layers(memory_ptr, weights, biases, None, DIM, ROWS, M)
    else:
        keep_layer(memory_ptr, weights[0], biases[0], memory_ptr + LAYER, None, DIM, ROWS, M)
        if DEPTH == 3:
            source = memory_ptr + LAYER
            keep_layer(source, weights[1], biases[1], memory_ptr + 2 * LAYER, None, HIDDEN, ROWS, M)
        source = memory_ptr + (DEPTH - 1) * LAYER
        return _last_layers(source, weights, biases, None, HIDDEN, ROWS, M)


@triton.jit
def energy_and_stored_gradient(
    state_ptr, row, inside, row_step, gradient_ptr, scale, memory_ptr, weights, biases, E: tl.constexpr
):  # fmt: skip
    """f of rows `row` `[ROWS]` of a matrix (see `energy_value`), float32 `[ROWS]`, and its gradient.

    `scale` times the gradient is written to the same rows of a dense matrix. The two are not the same memory.
    """
    M: tl.constexpr = E.layers
    DIM: tl.constexpr = E.dim
    HIDDEN: tl.constexpr = M.hidden
    ACTIVATION: tl.constexpr = M.activation
    DEPTH: tl.constexpr = len(weights) - 1  # pyright: ignore[reportAssignmentType]
    ROWS: tl.constexpr = row.shape[0]
    LAYER: tl.constexpr = M.features * row.shape[0]
    tl.debug_barrier()  # others may still read what the last call left
    keep_input(state_ptr, row, inside, row_step, memory_ptr, DIM, M)
    # The state, the hidden layers, and with SiLU the slopes of all but the last, one behind the other.
    last_ptr = memory_ptr + DEPTH * LAYER
    if DEPTH == 1:
        value = _last_layers(memory_ptr, weights, biases, last_ptr, DIM, ROWS, M)
        _store_gradient(last_ptr, weights[0], gradient_ptr, row, inside, scale, E)
        return value
    else:
        first_ptr, second_ptr = memory_ptr + LAYER, memory_ptr + 2 * LAYER
        first_slopes_ptr, second_slopes_ptr = None, None
        first_gradient_ptr, second_gradient_ptr = first_ptr, second_ptr
        if ACTIVATION == 2:
            first_gradient_ptr, second_gradient_ptr = last_ptr + LAYER, last_ptr + 2 * LAYER
            first_slopes_ptr, second_slopes_ptr = first_gradient_ptr, second_gradient_ptr
        keep_layer(memory_ptr, weights[0], biases[0], first_ptr, first_slopes_ptr, DIM, ROWS, M)
        if DEPTH == 3:
            keep_layer(first_ptr, weights[1], biases[1], second_ptr, second_slopes_ptr, HIDDEN, ROWS, M)
        value = _last_layers(last_ptr - LAYER, weights, biases, last_ptr, HIDDEN, ROWS, M)
        if DEPTH == 3:
            keep_gradient(last_ptr, weights[2], second_gradient_ptr, HIDDEN, ROWS, M)
            last_ptr = second_gradient_ptr
        keep_gradient(last_ptr, weights[1], first_gradient_ptr, HIDDEN, ROWS, M)
        _store_gradient(first_gradient_ptr, weights[0], gradient_ptr, row, inside, scale, E)
        return value


def energy_fits(dim: int, hidden: int, depth: int, device: torch.device | None = None) -> str | None:
    """Why an energy has no kernel (on that device, if one is named), or None where it has: its tiles must fit
    on the chip."""
    if TOO_OLD is not None:
        return TOO_OLD
    untrusted = None if device is None else layers_untrusted(device)
    if untrusted is not None:
        return untrusted
    if not 1 <= dim <= MAX_DIM:
        return f"z has {dim} columns, and the kernel holds 1 to {MAX_DIM}"
    if not 1 <= hidden <= MAX_HIDDEN:
        return f"the hidden layers have {hidden} features, and the kernel holds at most {MAX_HIDDEN}"
    if not 1 <= depth <= MAX_DEPTH:
        return f"there are {depth} hidden layers, and the kernel has 1 to {MAX_DEPTH}"
    return None


def energy_shape(
    dim: int, hidden: int, activation: str, precision: str, *, one_width: bool = False
) -> tuple[EnergyShape, LaunchConfig]:
    """What is compiled into a kernel, and how it is launched; for `one_width` see `layers`."""
    shape, config = layers(dim, hidden, activation, precision, one_width=one_width)
    return EnergyShape(dim, output_width(dim, shape), shape), config


def energy_pointers(
    weights: Sequence[Tensor], biases: Sequence[Tensor], precision: str
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Weights and biases as a kernel takes them: contiguous, those of the products as these read them."""
    *hidden, last = weights
    matrices = *operands(hidden, precision), last.contiguous()
    return matrices, tuple(bias.contiguous() for bias in biases)


def energy_memory(
    energy: EnergyShape,
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
    count, shape = depth, energy.layers
    if gradient:
        count += 1 + (depth - 1 if shape.activation == ACTIVATIONS["silu"] else 0)
    kind = torch.bfloat16 if shape.precision == PRECISIONS["bf16"] else torch.float32
    return torch.empty((programs, count, config.block_rows, shape.features), dtype=kind, device=device)


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
]
