"""Multilayer perceptrons on the CPU: chunks of rows that stay in the cache, a layer as one call of oneDNN."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import compiling, transformed
from .launch import reference_forced
from .mlp_reference import activate, linear
from .processor import CACHE_BYTES, FUSES, keep_freed_memory
from .weights_cpu import Matrices

# Rows come in multiples of it, but for the last: loops over vectors leave none over, whose bits may differ.
_VECTORS = 64


def plain_on_cpu(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a network may take its form of this module: on the CPU, float32, no gradient, forward or
    backward, no tracing, and the reference not asked for by name."""
    tensors = [tensor for tensor in (x, *parameters) if tensor is not None]
    if x.device.type != "cpu" or x.dtype != torch.float32 or reference_forced():
        return False
    if compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    if transformed(*tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def chunk_rows(hidden: int, precision: str) -> int:
    """Rows that are worked on at a time, of a network whose hidden layers have `hidden` features: a thread's
    part of such a layer is as large as its cache, which pays for the calls."""
    size = 2 if precision == "bf16" else 4
    rows = CACHE_BYTES // (size * max(hidden, 64)) * torch.get_num_threads()
    return max(rows // _VECTORS * _VECTORS, _VECTORS)


# oneDNN's names of the activations. Its ReLU makes 0 of NaN.
_FUSED: dict[str, tuple[str, list[float]]] = {
    "relu": ("relu", []),
    "leaky_relu": ("leaky_relu", [0.01]),
    "silu": ("swish", []),
}
# What products of finite numbers are far from, where this is their bound.
_FAR_FROM_INFINITY = 1e37
# What rounding operands to bfloat16 adds to a bound, at most.
_ROUNDED = 1.01


def _fused_layer(x: Tensor, weight: Tensor, bias: Tensor | None, name: str, scalars: list[float]) -> Tensor:
    """oneDNN's product with a bias and an activation. It reads the bias as if it were contiguous."""
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, name, scalars, "")


def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` in the weight's type, rounded to it once; the bias is float32.

    The weight is one of `kept_matrices`, or a plain one.
    """
    if FUSES[weight.dtype]:
        return _fused_layer(x, weight, bias, "none", [])
    return linear(x, weight, "bf16" if weight.dtype == torch.bfloat16 else "ieee", bias).to(weight.dtype)


def activated_layer(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, *, finite: bool = False
) -> Tensor:
    """The activation of `layer`, likewise. `finite` says that it has no NaN: see `stays_finite`.

    oneDNN adds the bias and applies the activation to the product's sums before they are first written: one
    pass over memory in place of three. NaN has to go through a ReLU, so that of sums which may have one is a
    pass of its own.
    """
    if FUSES[weight.dtype] and (finite or activation != "relu"):
        return _fused_layer(x, weight, bias, *_FUSED[activation])
    return activate(layer(x, weight, bias), activation)


class Bound(NamedTuple):
    """Of a layer: what max|x| is multiplied by, and what is added."""

    norm: float
    offset: float


def layer_bound(matrices: Matrices, bias: Tensor) -> Bound:
    """|layer(x)| is at most norm·max|x| + offset, for each of the matrices with its row of `bias`."""
    return Bound(matrices.norm, bias.abs().amax().item() if bias.numel() else 0.0)


def largest_of(x: Tensor) -> float:
    """max|x|: NaN, where there is one, and 0 of nothing."""
    if x.numel() == 0:
        return 0.0
    low, high = x.aminmax()
    return max(-low.item(), high.item())


def bound_behind(largest: float, bounds: Iterable[Bound]) -> float:
    """What the result of layers of these bounds, with ReLUs between them, is at most for max|x| = `largest`;
    infinity where sums on the way may have a NaN or an infinity."""
    for norm, offset in bounds:
        if not largest < _FAR_FROM_INFINITY:
            return math.inf
        largest = _ROUNDED * (norm * largest + offset)
    return largest if largest < _FAR_FROM_INFINITY else math.inf


def stays_finite(x: Tensor, bounds: Iterable[Bound]) -> bool:
    """Whether x, and sums of layers of these bounds with ReLUs between them, have no NaN and no infinity."""
    return bound_behind(largest_of(x), bounds) < math.inf


def in_chunks(
    step: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...], at_once: int
) -> tuple[Tensor, ...]:
    """`step` of some rows at a time, its results joined; all of `rows` have the same first size.

    The chunks are of nearly one size, so that none is too small for its call to pay. Autocast is off in them:
    the precision is the caller's argument.
    """
    keep_freed_memory()
    count = rows[0].shape[0]
    chunks = max(math.ceil(count / at_once), 1)
    size = min(math.ceil(max(count, 1) / chunks / _VECTORS) * _VECTORS, at_once)
    with torch.autocast("cpu", enabled=False):
        if chunks == 1:
            return step(*rows)
        out: tuple[Tensor, ...] = ()
        begin = 0
        for chunk in zip(*(tensor.split(size) for tensor in rows), strict=True):
            results = step(*chunk)
            if not out:
                out = tuple(result.new_empty((count, *result.shape[1:])) for result in results)
            end = begin + chunk[0].shape[0]
            for whole, result in zip(out, results, strict=True):
                whole[begin:end] = result
            begin = end
        return out


__all__ = [
    "Bound",
    "activated_layer",
    "bound_behind",
    "chunk_rows",
    "in_chunks",
    "largest_of",
    "layer",
    "layer_bound",
    "plain_on_cpu",
    "stays_finite",
]
