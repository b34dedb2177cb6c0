"""Weights as a GPU's products read them: rounded, by one launch for all matrices of a network.

Copies in bfloat16 can be kept with the weights. Nothing on the host knows when weights have changed: a fused
optimizer, and whatever writes through `weight.data`, leaves a tensor's version as it was, and a captured CUDA
graph runs without the host. So the device compares the copies with the weights and rewrites what has changed.
It reads what a conversion would read, and writes nothing where nothing changed; and it makes no tensor, so
that a graph may hold the addresses of the copies as it does those of the weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakIdKeyDictionary

from .checks import transformed
from .launch import LaunchConfig, cdiv, int64_offsets, launch, register_op, tl, triton, why_reference
from .mlp_device import tf32

_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


@triton.jit
def _bfloat16_bits(value):
    """A float32 as bfloat16, rounded to the nearest, halves to even: an int16 of its bits.

    In integers, as the interpreter's conversion cuts off.
    """
    bits = value.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value == value, bits, 0x7FC0).to(tl.int16)


@triton.jit
def _rounding_kernel(
    weights, copies, sizes, KEPT: tl.constexpr, BLOCK: tl.constexpr, INT64: tl.constexpr
):  # fmt: skip
    """Matrices, rounded to the type of their copies.

    A program owns BLOCK numbers of one matrix: 4 bytes of each are read, and 2 or 4 written. Where copies are
    KEPT it reads these too, and compares bits: a NaN is what it was, and 0 is not -0. It writes all BLOCK, in
    wide stores, if one has changed.

    Args:
        weights, copies: tuples of pointers, float32 and int16 (the bits of bfloat16) or float32 (TF32),
            contiguous.
        sizes: the matrices' numbers of elements.
    """
    block = tl.program_id(0)
    for k in tl.static_range(len(sizes)):
        blocks = tl.cdiv(sizes[k], BLOCK)
        if (block >= 0) & (block < blocks):
            first = block.to(tl.int64) * BLOCK if INT64 else block * BLOCK
            place = first + tl.arange(0, BLOCK)
            inside = place < sizes[k]
            value = tl.load(weights[k] + place, inside, 0.0)
            value = _bfloat16_bits(value) if copies[k].dtype.element_ty == tl.int16 else tf32(value)
            if KEPT:
                changed = inside & (value != tl.load(copies[k] + place, inside, 0))
                if tl.sum(changed.to(tl.int32), 0) > 0:
                    tl.store(copies[k] + place, value, inside)
            else:
                tl.store(copies[k] + place, value, inside)
        block -= blocks


def _launch_rounding(weights: Sequence[Tensor], copies: Sequence[Tensor], *, kept: bool) -> None:
    pairs = [
        (weight, copy.view(torch.int16) if copy.dtype == torch.bfloat16 else copy)
        for weight, copy in zip(weights, copies, strict=True)
        if weight.numel()
    ]
    if not pairs:
        return
    sizes = tuple(weight.numel() for weight, _ in pairs)
    config = LaunchConfig.elementwise(max(sizes), 2)
    launch(
        _rounding_kernel,
        (sum(cdiv(size, config.block_columns) for size in sizes),),
        *zip(*pairs, strict=True),
        sizes,
        KEPT=kept,
        BLOCK=config.block_columns,
        INT64=int64_offsets(*sizes),
        config=config,
        device=pairs[0][0].device,
    )


def operands(weights: Sequence[Tensor], precision: str) -> tuple[Tensor, ...]:
    """Matrices as the products of a kernel read them, for its launcher: contiguous, and rounded unless
    `precision` is "ieee" or they are bfloat16 already."""
    weights = tuple(weight.contiguous() for weight in weights)
    if precision == "ieee":
        return weights
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    copies = tuple(w if w.dtype == torch.bfloat16 else torch.empty_like(w, dtype=kind) for w in weights)
    made = [(weight, copy) for weight, copy in zip(weights, copies, strict=True) if copy is not weight]
    if made:
        _launch_rounding(*zip(*made, strict=True), kept=False)
    return copies


def _refresh_reference(weights: list[Tensor], copies: list[Tensor]) -> None:
    for weight, copy in zip(weights, copies, strict=True):
        copy.copy_(weight)


_refresh = register_op(
    "refresh_copies",
    "(Tensor[] weights, Tensor(a!)[] copies) -> ()",
    launcher=lambda weights, copies: _launch_rounding(weights, copies, kept=True),
    reference=_refresh_reference,
    fake=lambda weights, copies: None,
)


def _not_kept(weights: tuple[Tensor, ...]) -> str | None:
    """Why copies of these weights are made anew, or None where they are kept."""
    if torch.compiler.is_compiling():
        return "the compiler makes them, in what it compiles"
    if torch.is_grad_enabled():
        return "what autograd saves may not change"
    if transformed(*weights) or any(type(weight) not in (Tensor, Parameter) for weight in weights):
        return "the weights are not plain tensors"
    if any(weight.dtype != torch.float32 or not weight.is_contiguous() for weight in weights):
        return "the weights are not float32 and contiguous"
    capturing = weights[0].is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing and any(_copy_of(weight) is None for weight in weights):
        return "the graph that is being captured would own them"
    return None


def _copy_of(weight: Tensor) -> Tensor | None:
    """The copy that is kept, unless the weight has moved or changed its shape."""
    copy = _kept.get(weight)
    return copy if copy is not None and copy.device == weight.device and copy.shape == weight.shape else None


def _new_copy(weight: Tensor) -> Tensor:
    """Nothing yet, where the copy is to be."""
    with torch.inference_mode(False):  # else nothing outside of that mode could write to it
        copy = _kept[weight] = torch.empty_like(weight, dtype=torch.bfloat16)
    return copy


def bfloat16_copies(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The weights in bfloat16, as they are when the device comes to it.

    Where nothing is recorded by autograd, traced or transformed, the copies are kept: with the weights, for
    as long as these live, 2 bytes a number. The next call may change them, so they are for what is queued
    before it. Elsewhere they are new tensors.

    Args:
        weights: on one device.
    """
    if why_reference(*weights, unsupported=_not_kept(weights)) is not None:
        return tuple(weight.bfloat16() for weight in weights)
    copies = []
    for weight in weights:
        copy = _copy_of(weight)
        copies.append(_new_copy(weight) if copy is None else copy)
    _refresh(list(weights), copies)
    return tuple(copies)


__all__ = ["bfloat16_copies", "operands"]
