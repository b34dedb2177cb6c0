"""Multilayer perceptrons on the CPU: chunks that stay in the cache, and after a while compiled loops.

A sample must not depend on whether its chunk was compiled. Matrix products are the same library call either
way; everything else that is done to a float32 here is a sum, a product, a quotient, a comparison or a move of
bits, which round alike everywhere, where exponentials of libraries do not.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .chains import is_functorch_wrapped_tensor
from .launch import reference_forced

# Bytes of a hidden layer that one thread works on: they stay in its cache beside the weights. Products of
# bfloat16 are quicker, and want more rows for the time that a call costs.
_HIDDEN_BYTES = {"ieee": 1 << 19, "tf32": 1 << 19, "bf16": 1 << 20}


def plain_on_cpu(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a network may take its form of this module: on the CPU, float32, no gradient, no tracing, and
    the reference not asked for by name."""
    tensors = [tensor for tensor in (x, *parameters) if tensor is not None]
    if x.device.type != "cpu" or x.dtype != torch.float32 or reference_forced():
        return False
    if torch.compiler.is_compiling() or any(is_functorch_wrapped_tensor(tensor) for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def chunk_rows(hidden: int, precision: str) -> int:
    """Rows that are worked on at a time, of a network whose hidden layers have `hidden` features."""
    size = 2 if precision == "bf16" else 4
    rows = _HIDDEN_BYTES[precision] // (size * max(hidden, 64)) * torch.get_num_threads()
    return max(rows, 64)


def exponential(x: Tensor) -> Tensor:
    """e^x in float32 arithmetic that rounds alike everywhere; within 2 units of the last place."""
    bounded = x.clamp(-150.0, 100.0)
    # The nearest integer to x/log 2, found by adding a number whose last place is 1.
    power = bounded * 1.4426950408889634 + 12582912.0
    power = power - 12582912.0
    r = (bounded - power * 0.693359375) - power * -2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = (p * (r * r) + r) + 1.0
    # 2^power in two factors, so that overflow gives infinity and underflow gives what is left of the digits.
    exponent = torch.where(x == x, power, 0.0).to(torch.int32)
    half = exponent >> 1
    first = ((half + 127) << 23).view(torch.float32)
    second = ((exponent - half + 127) << 23).view(torch.float32)
    return (p * first) * second


def tanh(x: Tensor) -> Tensor:
    """tanh x, likewise; within 4e-7, also relative to its size.

    A quotient of polynomials, of floats alone: beside moves of bits Inductor does not vectorise a loop that
    reads bfloat16. The polynomials are the least-error ones of Eigen's `ptanh`, for |x| below 7.9; beyond it
    tanh is 1 to float32's last place.
    """
    x = x.clamp(-7.90531110763549805, 7.90531110763549805)
    square = x * x
    p = square * -2.76076847742355e-16 + 2.00018790482477e-13
    p = p * square - 8.60467152213735e-11
    p = p * square + 5.12229709037114e-08
    p = p * square + 1.48572235717979e-05
    p = p * square + 6.37261928875436e-04
    p = p * square + 4.89352455891786e-03
    q = square * 1.19825839466702e-06 + 1.18534705686654e-04
    q = q * square + 2.26843463243900e-03
    q = q * square + 4.89352518554385e-03
    return (x * p) / q


def _sigmoid(x: Tensor) -> Tensor:
    return 0.5 * tanh(0.5 * x) + 0.5


def _relu(x: Tensor) -> Tensor:
    return F.relu(x)


def _leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x)


def _silu(x: Tensor) -> Tensor:
    return x * _sigmoid(x)


def _relu_slope(x: Tensor) -> Tensor:
    return (x > 0.0).to(x.dtype)


def _leaky_relu_slope(x: Tensor) -> Tensor:
    return torch.where(x > 0.0, 1.0, 0.01)


def _silu_slope(x: Tensor) -> Tensor:
    sigmoid = _sigmoid(x)
    return sigmoid * (1.0 + x * (1.0 - sigmoid))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (_relu, _relu_slope),
    "leaky_relu": (_leaky_relu, _leaky_relu_slope),
    "silu": (_silu, _silu_slope),
}
"""Each activation and its derivative."""


def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x @ weight.T + bias` in float32, with operands of the product in the weight's type."""
    if weight.dtype == torch.float32:
        # One call: Inductor would make it of a product and a sum, and round once less than eager does.
        return F.linear(x, weight, bias)
    return F.linear(x.to(weight.dtype), weight).to(torch.float32) + bias


def in_chunks(
    step: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...], at_once: int
) -> tuple[Tensor, ...]:
    """`step` of some rows at a time, its results joined; all of `rows` have the same first size.

    The chunks are of nearly one size, so that none is too small for its call to pay.
    """
    count = rows[0].shape[0]
    chunks = max(math.ceil(count / at_once), 1)
    if chunks == 1:
        return step(*rows)
    parts = [torch.tensor_split(tensor, chunks) for tensor in rows]
    out: tuple[Tensor, ...] = ()
    begin = 0
    for chunk in zip(*parts, strict=True):
        # Copies: a view of another offset would be compiled anew.
        results = step(*(part.clone() for part in chunk))
        if not out:
            out = tuple(result.new_empty((count, *result.shape[1:])) for result in results)
        end = begin + chunk[0].shape[0]
        for whole, result in zip(out, results, strict=True):
            whole[begin:end] = result
        begin = end
    return out


__all__ = ["ACTIVATIONS", "chunk_rows", "exponential", "in_chunks", "layer", "plain_on_cpu", "tanh"]
