"""Weights as a GPU's products read them: rounded, by one launch for all matrices of a network.

A network can keep its copies in bfloat16. Nothing on the host knows when weights have changed: a fused
optimizer, and whatever writes through `weight.data`, leaves a tensor's version as it was. So the device
compares the copies with the weights and rewrites what has changed: it reads what a conversion would read,
writes nothing where nothing changed, and no memory is allocated.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .checks import compiling, under_a_transform
from .launch import LaunchConfig, cdiv, int64_offsets, launch, register_op, tl, triton, why_reference
from .mlp_device import tf32

Kept: TypeAlias = dict[tuple[torch.device, int], tuple[Tensor, ...]]
"""A network's copies, for each device and stream that they are used on."""


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
    KEPT it reads these too, 2 bytes, and compares bits: a NaN is what it was, and 0 is not -0. If one has
    changed it writes all BLOCK, in wide stores, and else nothing.

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
    if compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return "what is traced must contain the conversion"
    if torch.is_grad_enabled():
        return "what autograd saves may not change"
    if under_a_transform():
        return "new tensors belong to a transform of torch.func"
    if any(weight.dtype != torch.float32 or not weight.is_contiguous() for weight in weights):
        return "the weights are not float32 and contiguous"
    if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return "a captured graph has memory of its own"
    return None


def bfloat16_copies(weights: tuple[Tensor, ...], kept: Kept) -> tuple[Tensor, ...]:
    """The weights in bfloat16, as they are when the device comes to it.

    Without gradients they are those in `kept`, which the next call may change: they are for what is queued on
    this stream before it. Where gradients are enabled, and under tracing, transforms and the capture of a
    graph, they are new tensors.

    Args:
        weights: a network's matrices, on one device.
        kept: what the network keeps, read and added to: 2 bytes a number.
    """
    if why_reference(*weights, unsupported=_not_kept(weights)) is not None:
        return tuple(weight.bfloat16() for weight in weights)
    device = weights[0].device
    place = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    copies = kept.get(place)
    if copies is None or [copy.shape for copy in copies] != [weight.shape for weight in weights]:
        with torch.inference_mode(False):  # else nothing outside of that mode could write to them
            copies = tuple(torch.empty_like(weight, dtype=torch.bfloat16) for weight in weights)
        if any(type(copy) is not Tensor for copy in copies):  # of a subclass, or fake
            return tuple(weight.bfloat16() for weight in weights)
        kept[place] = copies
    _refresh(list(weights), list(copies))
    return copies


__all__ = ["Kept", "bfloat16_copies", "operands"]
