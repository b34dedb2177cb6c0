"""Multilayer perceptrons on the CPU: chunks of rows that stay in the cache, a layer as one call of oneDNN."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import transformed
from .launch import reference_forced
from .mlp_reference import activate, linear

# Bytes of a hidden layer that one thread works on: they stay in its cache, and pay for the calls.
_HIDDEN_BYTES = 1 << 20
# Rows come in multiples of it, but for the last: loops over vectors leave none over, whose bits may differ.
_VECTORS = 64


def plain_on_cpu(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a network may take its form of this module: on the CPU, float32, no gradient, forward or
    backward, no tracing, and the reference not asked for by name."""
    tensors = [tensor for tensor in (x, *parameters) if tensor is not None]
    if x.device.type != "cpu" or x.dtype != torch.float32 or reference_forced():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    if transformed(*tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def chunk_rows(hidden: int, precision: str) -> int:
    """Rows that are worked on at a time, of a network whose hidden layers have `hidden` features."""
    size = 2 if precision == "bf16" else 4
    rows = _HIDDEN_BYTES // (size * max(hidden, 64)) * torch.get_num_threads()
    return max(rows // _VECTORS * _VECTORS, _VECTORS)


_FUSED: dict[str, tuple[str, list[float]]] = {"leaky_relu": ("leaky_relu", [0.01]), "silu": ("swish", [])}


def _fuses(dtype: torch.dtype) -> bool:
    """Whether this build and this processor have oneDNN's products that do something to their sums."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


_FUSES = {dtype: _fuses(dtype) for dtype in (torch.float32, torch.bfloat16)}


def _fused_layer(x: Tensor, weight: Tensor, bias: Tensor, name: str, scalars: list[float]) -> Tensor:
    """oneDNN's product with a bias and an activation. It reads the bias as if it were contiguous."""
    linear_pointwise = torch.ops.mkldnn._linear_pointwise
    return linear_pointwise(x.to(weight.dtype), weight, bias.contiguous(), name, scalars, "")


def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x @ weight.T + bias` in the weight's type, rounded to it once; the bias is float32."""
    if _FUSES[weight.dtype]:
        return _fused_layer(x, weight, bias, "none", [])
    return linear(x, weight, "bf16" if weight.dtype == torch.bfloat16 else "ieee", bias).to(weight.dtype)


def activated_layer(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """The activation of `layer`, likewise.

    oneDNN adds the bias and applies the activation to the product's sums before they are first written: one
    pass over memory in place of three. Its ReLU would make 0 of NaN, so that one is a pass of its own.
    """
    if _FUSES[weight.dtype] and activation in _FUSED:
        return _fused_layer(x, weight, bias, *_FUSED[activation])
    return activate(layer(x, weight, bias), activation)


@functools.cache
def _keep_freed_memory() -> None:
    """Once in a process: let glibc keep up to 62 MiB of freed memory, for the next chunk to take.

    It returns freed memory to the system above a limit, twice the largest block up to 32 MiB that it has seen
    freed. Below that a chunk's layers are taken from the system anew at each call, and every page of them is
    cleared first, thousands a call. The block is never touched, so it costs nothing; other allocators do as
    they do.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def in_chunks(
    step: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...], at_once: int
) -> tuple[Tensor, ...]:
    """`step` of some rows at a time, its results joined; all of `rows` have the same first size.

    The chunks are of nearly one size, so that none is too small for its call to pay. Autocast is off in them:
    the precision is the caller's argument.
    """
    _keep_freed_memory()
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


__all__ = ["activated_layer", "chunk_rows", "in_chunks", "layer", "plain_on_cpu"]
