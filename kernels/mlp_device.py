"""Multilayer perceptrons in registers: what a kernel calls to run one on a tile of rows, on the chip.

Activations `[ROWS, features]` are held as a tuple of tiles `[ROWS, WIDTH]` side by side, so that wide layers
are products of tiles that fit in shared memory: the number of tiles is known when the kernel is compiled.
Features beyond the layer's size are zero: their weights and biases are read as zero, and every activation
maps 0 to 0.

PRECISION, of the products alone: 0 ieee (float32), 1 tf32, 2 bfloat16 operands. Sums are float32. For the
latter two, weights are handed over rounded (`operands` in `weights_gpu.py`), so that nothing is converted on
the way to the matrix units, and what else is multiplied is rounded by `operand`.
ACTIVATION: 0 ReLU, 1 leaky ReLU of slope 0.01, 2 SiLU.
"""

import inspect
from typing import Literal, TypeAlias

from .launch import HAS_TRITON, tl, triton

Precision: TypeAlias = Literal["ieee", "tf32", "bf16"]
Activation: TypeAlias = Literal["relu", "leaky_relu", "silu"]

PRECISIONS: dict[str, int] = {"ieee": 0, "tf32": 1, "bf16": 2}
ACTIVATIONS: dict[str, int] = {"relu": 0, "leaky_relu": 1, "silu": 2}
PRECISION_NAMES: dict[int, str] = {code: name for name, code in PRECISIONS.items()}
ACTIVATION_NAMES: dict[int, str] = {code: name for name, code in ACTIVATIONS.items()}

TOO_OLD: str | None = None
"""Why the Triton that is installed cannot compile these kernels, if it cannot."""
if HAS_TRITON and "disable_licm" not in inspect.signature(tl.range.__init__).parameters:
    TOO_OLD = f"Triton {triton.__version__} has no tl.range(disable_licm=...), which 3.6 has"

_LEAK = tl.constexpr(0.01)


@triton.jit
def tanh(value):
    """2·sigmoid(2v) - 1; near 0, where that difference keeps no digits, a Taylor series (error 2e-7 of v)."""
    square = value * value
    series = value * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0)))
    # exp(-2v) as a power of two: log2(e) is multiplied in here rather than once more inside.
    sigmoid = 1.0 / (1.0 + tl.exp2(value * -2.8853900817779268))
    return tl.where(tl.abs(value) < 0.125, series, 2.0 * sigmoid - 1.0)


@triton.jit
def _sigmoid(value):
    # As a power of two with log2(e) multiplied in: fewer instructions than Triton's exp, and registers.
    return 1.0 / (1.0 + tl.exp2(value * -1.4426950408889634))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation, float32."""
    if ACTIVATION == 0:
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == 1:
        return tl.where(x >= 0.0, x, x * _LEAK)
    else:
        return x * _sigmoid(x)


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    """The derivative of the activation at x, as autograd has it: at 0 that of the negative side."""
    if ACTIVATION == 0:
        return tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == 1:
        return tl.where(x > 0.0, 1.0, _LEAK)
    else:
        sigmoid = _sigmoid(x)
        return sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit
def tf32(value):
    """A float32 as TF32: 10 bits of its significand, rounded to the nearest, halves away from zero.

    Matrix units read such numbers as they are, and of any other they cut off what TF32 does not have: twice
    the error, and always towards zero, so that the errors of a product's terms add up.
    """
    bits = value.to(tl.int32, bitcast=True)
    bits = (bits + 0x1000) & -0x2000
    return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)  # a NaN may carry into the sign


@triton.jit
def operand(tile, PRECISION: tl.constexpr):
    """As products take it, who do not round."""
    if PRECISION == 2:
        return tile.to(tl.bfloat16)
    elif PRECISION == 1:
        return tf32(tile)
    else:
        return tile


@triton.jit
def product(x, weight, total, PRECISION: tl.constexpr):
    """total + x @ weight: operands `[ROWS, IN]` and `[IN, OUT]`, float32 `[ROWS, OUT]`."""
    if PRECISION == 2:
        return tl.dot(x, weight, total)
    elif PRECISION == 1:
        return tl.dot(x, weight, total, input_precision="tf32")
    else:
        return tl.dot(x, weight, total, input_precision="ieee")


@triton.jit
def weight_tile(pointer, first_out, first_in, outs, ins, OUT: tl.constexpr, IN: tl.constexpr):
    """Rows `first_out..` and columns `first_in..` of a matrix `[outs, ins]`, transposed: `[IN, OUT]`."""
    row = first_out + tl.arange(0, OUT)[None, :]
    column = first_in + tl.arange(0, IN)[:, None]
    return tl.load(pointer + row * ins + column, (row < outs) & (column < ins), 0.0)


@triton.jit
def weight_tile_backward(pointer, first_out, first_in, outs, ins, OUT: tl.constexpr, IN: tl.constexpr):
    """The same part of the matrix as it lies in memory: `[OUT, IN]`, for products with gradients."""
    row = first_out + tl.arange(0, OUT)[:, None]
    column = first_in + tl.arange(0, IN)[None, :]
    return tl.load(pointer + row * ins + column, (row < outs) & (column < ins), 0.0)


@triton.jit
def bias_tile(pointer, first, size, WIDTH: tl.constexpr):
    """Elements `first..` of a vector in memory, float32 `[1, WIDTH]`."""
    place = first + tl.arange(0, WIDTH)
    return tl.load(pointer + place, place < size, 0.0).to(tl.float32)[None, :]


@triton.jit
def dense_tile(
    inputs, weight_ptr, bias_ptr, first_out, outs, ins, OUT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Features `first_out..` of a layer before the activation, float32 `[ROWS, OUT]`; inputs are operands."""
    rows: tl.constexpr = inputs[0].shape[0]
    width: tl.constexpr = inputs[0].shape[1]
    total = tl.zeros((rows, OUT), tl.float32) + bias_tile(bias_ptr, first_out, outs, OUT)
    for k in tl.static_range(len(inputs)):
        weight = weight_tile(weight_ptr, first_out, k * width, outs, ins, OUT, width)
        total = product(inputs[k], weight, total, PRECISION)
    return total


@triton.jit
def hidden_layer(
    inputs, weight_ptr, bias_ptr, outs, ins,
    TILES: tl.constexpr, OUT: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A layer and its activation: a tuple of TILES operands `[ROWS, OUT]`."""
    outputs = ()
    for n in tl.static_range(TILES):
        tile = dense_tile(inputs, weight_ptr, bias_ptr, n * OUT, outs, ins, OUT, PRECISION)
        outputs += (operand(activate(tile, ACTIVATION), PRECISION),)
    return outputs


__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_NAMES",
    "PRECISIONS",
    "PRECISION_NAMES",
    "TOO_OLD",
    "Activation",
    "Precision",
    "activate",
    "activation_slope",
    "bias_tile",
    "dense_tile",
    "hidden_layer",
    "operand",
    "product",
    "tanh",
    "tf32",
    "weight_tile",
    "weight_tile_backward",
]
