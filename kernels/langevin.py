"""One step of overdamped Langevin dynamics, everything but the gradient in one pass over memory.

    x <- clamp(x - (step_size/2)·(grad + prior_precision·x) + sqrt(step_size·temperature)·noise)

The convention is that of VAEBM (Xiao et al., ICLR 2021) and of LEBM (Pang et al., NeurIPS 2020, where
step_size is s²). As step_size goes to 0 the invariant law goes to exp(-U/temperature) with the energy
U = energy + prior_precision·|x|²/2; at a finite step it is another law, which `metropolis.py` corrects.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .chains import (
    CACHED,
    NORM_UNIT,
    PerChain,
    State,
    as_column,
    as_list,
    check_drift,
    check_like,
    check_noise,
    check_per_chain,
    check_state,
    check_written,
    choose,
    clip_factor,
    clip_factor_of,
    copy_state,
    drawn_noise,
    eager_on_cpu,
    flat_rows,
    needs_gradient,
    new_like,
    no_kernel,
    number_source,
    per_chain,
    rows_of,
    split_number,
    widths_of,
    working_dtype,
)
from .checks import is_number, transformed
from .launch import LaunchConfig, cdiv, int64_offsets, launch, register_op, tl, triton, use_triton
from .metropolis import MalaStep, mala_accept, mala_accept_reference
from .philox import Stream, interleave4, normal4, philox_words


def langevin_step_reference(
    x: State,
    grad: State,
    step_size: PerChain,
    *,
    temperature: PerChain = 1.0,
    seed: int | Tensor = 0,
    index: Tensor | None = None,
    step: int | Tensor = 0,
    stream: int = Stream.LANGEVIN,
    clamp: tuple[float, float] | None = None,
    grad_clip: float | None = None,
    prior_precision: float | None = None,
    noise: State | None = None,
) -> Tensor | list[Tensor]:
    """What `langevin_step` computes, in plain torch; `noise`, of the shape of x, replaces the draw."""
    tensors = as_list(x)
    dtype = working_dtype(tensors[0].dtype)
    positions, grads = flat_rows(x, dtype), flat_rows(grad, dtype)
    if grad_clip is not None:
        factor = clip_factor(grads, grad_clip)
        grads = [g * factor for g in grads]
    if prior_precision is not None:
        grads = [g + prior_precision * position for g, position in zip(grads, positions, strict=True)]
    if noise is not None:
        normals = flat_rows(noise, dtype)
    elif index is not None:
        normals = drawn_noise(positions, seed, index, step, stream)
    else:
        raise TypeError("langevin_step_reference needs index where noise is not given")
    step_size, temperature = as_column(step_size, dtype), as_column(temperature, dtype)
    variance = step_size * temperature
    scale = torch.sqrt(variance) if isinstance(variance, Tensor) else math.sqrt(variance)
    moved = []
    for position, g, xi, like in zip(positions, grads, normals, tensors, strict=True):
        new = position - (0.5 * step_size) * g + scale * xi
        if clamp is not None:
            new = torch.clamp(new, *clamp)
        moved.append(new.reshape(like.shape).to(like.dtype))
    return moved[0] if isinstance(x, Tensor) else moved


_CHUNK = 8192  # columns of a sample that one program of the norm's kernel adds up


@triton.jit(do_not_specialize=["rows"])
def _square_norm_kernel(
    partials_ptr,
    grad,
    grad_clip,
    rows,
    WIDTHS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INT64: tl.constexpr,
):
    """Sums of squares of gradients, in units of (2^40·grad_clip)².

    partials_ptr: float32 `[rows, sum(CHUNKS)]`; program (row tile, chunk) alone writes its chunk's column.
    grad: pointers of the state's gradients, `[rows, WIDTHS[k]]` each, contiguous.
    Reads each gradient once: 4 bytes per element in float32, 2 in 16-bit types.
    """
    unit = NORM_UNIT / tl.full((), grad_clip, tl.float32)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    which = 0
    first = 0
    end = 0
    for k in tl.static_range(len(CHUNKS) - 1):
        end += CHUNKS[k]
        which = tl.where(part >= end, k + 1, which)
        first = tl.where(part >= end, end, first)
    grad_ptr = choose(grad, which)
    width = choose(WIDTHS, which)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    if INT64:
        row = row.to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin = (part - first) * CHUNK
    for start in range(begin, tl.minimum(begin + CHUNK, width), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < width)[None, :]
        value = tl.load(grad_ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0)
        value = value.to(tl.float32) * unit
        total += value * value
    tl.store(partials_ptr + row * tl.num_programs(1) + part, tl.sum(total, axis=1), mask=inside)


@triton.jit(do_not_specialize=["rows", "seed", "step"])
def _langevin_kernel(
    out,
    x,
    grad,
    index_ptr,
    step_size,
    temperature,
    seed,
    step,
    partials_ptr,
    prior_precision,
    low,
    high,
    rows,
    WIDTHS: tl.constexpr,
    OFFSETS: tl.constexpr,
    STREAM: tl.constexpr,
    STEP_SIZE_SOURCE: tl.constexpr,
    TEMPERATURE_SOURCE: tl.constexpr,
    SEED_SOURCE: tl.constexpr,
    STEP_SOURCE: tl.constexpr,
    PARTIALS: tl.constexpr,
    PRIOR: tl.constexpr,
    CLAMP: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    """The update of all tensors of a state.

    out, x, grad: pointers of the state's tensors, `[rows, WIDTHS[k]]` each, contiguous; `out` may be `x`.
    index_ptr: int64 `[rows]`.
    step_size, temperature, seed, step: numbers or pointers, as their SOURCE tells (see `per_chain`).
    partials_ptr: what `_square_norm_kernel` wrote, `[rows, PARTIALS]`; not read where PARTIALS is 0.

    Tensor k holds the columns OFFSETS[k].. of a sample. A program takes BLOCK groups of VECTOR columns (4, or
    8 in 16-bit types) of one tensor, and alone reads and writes them: so it may write in place. A group is a
    16-byte access where ALIGNED (every width a multiple of VECTOR), and one or two Philox calls, all of whose
    words are used. Per element: reads x and grad and writes out, 12 bytes in float32 and 6 in 16-bit types,
    and its share of the row's index (8 bytes) and partial norms.
    """
    program = tl.program_id(0)
    rows = tl.full((), rows, tl.int64 if INT64 else tl.int32)
    which = 0
    first = program * 0
    end = program * 0
    for k in tl.static_range(len(WIDTHS) - 1):
        end += tl.cdiv(rows * ((OFFSETS[k] % VECTOR + WIDTHS[k] + VECTOR - 1) // VECTOR), BLOCK)
        which = tl.where(program >= end, k + 1, which)
        first = tl.where(program >= end, end, first)
    width = choose(WIDTHS, which)
    offset = choose(OFFSETS, which)
    groups = (offset % VECTOR + width + VECTOR - 1) // VECTOR

    item = (program - first).to(rows.dtype) * BLOCK + tl.arange(0, BLOCK)
    row = (item // groups)[:, None]
    group = (item % groups)[:, None]
    lane = tl.arange(0, VECTOR)[None, :]
    inside = row < rows
    if ALIGNED:
        mask = inside & (lane < VECTOR)
        position = item[:, None] * VECTOR + lane
    else:
        column = group * VECTOR + lane - offset % VECTOR
        mask = inside & (column >= 0) & (column < width)
        position = row * width + column

    index = tl.load(index_ptr + row, mask=inside, other=0)
    eta = per_chain(step_size, row, inside, STEP_SIZE_SOURCE, tl.float32)
    variance = eta * per_chain(temperature, row, inside, TEMPERATURE_SOURCE, tl.float32)
    block = (offset // VECTOR + group) * (VECTOR // 4) + tl.arange(0, VECTOR // 4)[None, :]
    w0, w1, w2, w3 = philox_words(
        per_chain(seed, row, inside, SEED_SOURCE, tl.int64),
        index,
        per_chain(step, row, inside, STEP_SOURCE, tl.int64),
        STREAM,
        block,
    )
    n0, n1, n2, n3 = normal4(w0, w1, w2, w3)
    noise = interleave4(n0, n1, n2, n3)

    value = tl.load(choose(x, which) + position, mask=mask, other=0.0).to(tl.float32)
    drift = tl.load(choose(grad, which) + position, mask=mask, other=0.0).to(tl.float32)
    if PARTIALS > 0:
        square = tl.zeros((BLOCK, 1), tl.float32)
        for part in range(PARTIALS):
            square += tl.load(partials_ptr + row * PARTIALS + part, mask=inside, other=0.0)
        drift *= clip_factor_of(square)
    if PRIOR:
        drift += tl.full((), prior_precision, tl.float32) * value
    new = value - 0.5 * eta * drift + tl.sqrt_rn(variance) * noise
    if CLAMP:
        # Comparisons and not minima, so that NaN stays NaN.
        low = tl.full((), low, tl.float32)
        high = tl.full((), high, tl.float32)
        new = tl.where(new < low, low, tl.where(new > high, high, new))
    target = choose(out, which)
    tl.store(target + position, new.to(target.dtype.element_ty), mask=mask)


def _launch_step(
    out: list[Tensor],
    x: list[Tensor],
    grad: list[Tensor],
    index: Tensor,
    step_sizes: Tensor | None,
    step_size: float,
    temperatures: Tensor | None,
    temperature: float,
    seeds: Tensor | None,
    seed: int,
    steps: Tensor | None,
    step: int,
    stream: int,
    clamp: Sequence[float] | None,
    grad_clip: float | None,
    prior_precision: float | None,
) -> None:
    rows, widths = x[0].shape[0], widths_of(x)
    offsets = tuple(itertools.accumulate(widths, initial=0))[:-1]
    held = [k for k, width in enumerate(widths) if width > 0]
    if rows == 0 or not held:
        return
    positions, grads = [x[k].contiguous() for k in held], [grad[k].contiguous() for k in held]
    targets = [
        torch.empty_like(p) if not out[k].is_contiguous() else out[k]
        for k, p in zip(held, positions, strict=True)
    ]
    widths, offsets = tuple(widths[k] for k in held), tuple(offsets[k] for k in held)
    device, size = x[0].device, x[0].element_size()
    int64 = int64_offsets(*positions)

    partials = torch.empty((rows, 0), dtype=torch.float32, device=device)
    if grad_clip is not None:
        partials = _launch_square_norm(grads, widths, grad_clip, int64)
    vector = 8 if size == 2 and all(width % 8 == 0 for width in widths) else 4
    config = LaunchConfig.elementwise(rows * sum(widths), size)
    block = max(config.block_columns // vector, 1)
    groups = [cdiv(offset % vector + width, vector) for offset, width in zip(offsets, widths, strict=True)]
    low, high = (0.0, 0.0) if clamp is None else clamp
    launch(
        _langevin_kernel,
        (sum(cdiv(rows * count, block) for count in groups),),
        tuple(targets),
        tuple(positions),
        tuple(grads),
        index.contiguous(),
        step_size if step_sizes is None else step_sizes.contiguous(),
        temperature if temperatures is None else temperatures.contiguous(),
        seed if seeds is None else seeds,
        step if steps is None else steps.contiguous(),
        partials,
        0.0 if prior_precision is None else prior_precision,
        low,
        high,
        rows,
        WIDTHS=widths,
        OFFSETS=offsets,
        STREAM=stream,
        STEP_SIZE_SOURCE=number_source(step_sizes),
        TEMPERATURE_SOURCE=number_source(temperatures),
        SEED_SOURCE=number_source(seeds),
        STEP_SOURCE=number_source(steps),
        PARTIALS=partials.shape[1],
        PRIOR=prior_precision is not None,
        CLAMP=clamp is not None,
        ALIGNED=all(width % vector == 0 for width in widths),
        VECTOR=vector,
        BLOCK=block,
        INT64=int64,
        config=config,
        device=device,
    )
    for k, target in zip(held, targets, strict=True):
        if target is not out[k]:
            out[k].copy_(target)


def _launch_square_norm(
    grads: list[Tensor], widths: tuple[int, ...], grad_clip: float, int64: bool
) -> Tensor:
    rows = grads[0].shape[0]
    chunks = tuple(cdiv(width, _CHUNK) for width in widths)
    # As if there were many rows, so that a row is added up in the same order alone and in a batch.
    config = LaunchConfig.by_rows(1 << 30, max(widths), max_columns=min(1024, _CHUNK))
    partials = torch.empty((rows, sum(chunks)), dtype=torch.float32, device=grads[0].device)
    launch(
        _square_norm_kernel,
        (cdiv(rows, config.block_rows), sum(chunks)),
        partials,
        tuple(grads),
        grad_clip,
        rows,
        WIDTHS=widths,
        CHUNKS=chunks,
        CHUNK=_CHUNK,
        ROWS=config.block_rows,
        COLUMNS=config.block_columns,
        INT64=int64,
        config=config,
        device=partials.device,
    )
    return partials


def _step_on_cpu(
    out: list[Tensor],
    x: list[Tensor],
    grad: list[Tensor],
    index: Tensor,
    step_sizes: Tensor | None,
    step_size: float,
    temperatures: Tensor | None,
    temperature: float,
    seeds: Tensor | None,
    seed: int,
    steps: Tensor | None,
    step: int,
    stream: int,
    clamp: Sequence[float] | None,
    grad_clip: float | None,
    prior_precision: float | None,
) -> None:
    sizes: Any = step_size if step_sizes is None else step_sizes
    heats: Any = temperature if temperatures is None else temperatures
    numbers = step if steps is None else steps
    count = max(1, CACHED // max(sum(widths_of(x)), 1))
    for part in (slice(top, top + count) for top in range(0, index.shape[0], count)):
        _move(
            [tensor[part] for tensor in out],
            [tensor[part] for tensor in x],
            [tensor[part] for tensor in grad],
            rows_of(sizes, part),
            rows_of(heats, part),
            seed if seeds is None else seeds,
            index[part],
            rows_of(numbers, part),
            stream,
            None if clamp is None else (clamp[0], clamp[1]),
            grad_clip,
            prior_precision,
        )


def _move(
    out: list[Tensor],
    x: list[Tensor],
    grad: list[Tensor],
    step_size: PerChain,
    temperature: PerChain,
    seed: int | Tensor,
    index: Tensor,
    step: int | Tensor,
    stream: int,
    clamp: tuple[float, float] | None,
    grad_clip: float | None,
    prior_precision: float | None,
) -> None:
    """The reference, into `out` and with its intermediate results in place: the same operations and bits."""
    dtype = working_dtype(x[0].dtype)
    positions, grads = flat_rows(x, dtype), flat_rows(grad, dtype)
    noise = drawn_noise(positions, seed, index, step, stream)
    if grad_clip is not None:
        factor = clip_factor(grads, grad_clip)
        grads = [g * factor for g in grads]
    step_size, temperature = as_column(step_size, dtype), as_column(temperature, dtype)
    variance = step_size * temperature
    scale = torch.sqrt(variance) if isinstance(variance, Tensor) else math.sqrt(variance)
    for target, position, g, xi in zip(out, positions, grads, noise, strict=True):
        if prior_precision is not None:
            g = torch.add(g, prior_precision * position)
        drift = g * (0.5 * step_size)
        new, kick = torch.sub(position, drift, out=drift), xi.mul_(scale)
        if clamp is None and target.dtype == dtype and target.is_contiguous():
            torch.add(new, kick, out=target.view(new.shape))
        else:
            new.add_(kick)
            target.copy_((new if clamp is None else new.clamp_(*clamp)).reshape(target.shape))


_step = register_op(
    "langevin_step",
    "(Tensor(a!)[] out, Tensor[] x, Tensor[] grad, Tensor index, Tensor? step_sizes, float step_size,"
    " Tensor? temperatures, float temperature, Tensor? seeds, SymInt seed, Tensor? steps, SymInt step,"
    " int stream, float[]? clamp, float? grad_clip, float? prior_precision) -> ()",
    launcher=_launch_step,
    reference=_step_on_cpu,
    fake=lambda *args: None,
)


def langevin_step(
    x: State,
    grad: State,
    step_size: PerChain,
    *,
    temperature: PerChain = 1.0,
    seed: int | Tensor,
    index: Tensor,
    step: int | Tensor,
    stream: int = Stream.LANGEVIN,
    clamp: tuple[float, float] | None = None,
    grad_clip: float | None = None,
    prior_precision: float | None = None,
    out: State | None = None,
) -> Tensor | list[Tensor]:
    """One unadjusted Langevin step of N chains.

        x <- clamp(x - (step_size/2)·(grad + prior_precision·x) + sqrt(step_size·temperature)·noise)

    Args:
        x: positions `[N, ...]`, or a list of such tensors that are moved at once: sample i is the
            concatenation of its flattened rows, and noise column c belongs to position c in it. So a list
            gives the same numbers as its concatenation. Keep positions in float32: a step below half a unit
            in the last place of a 16-bit position is lost.
        grad: the energy's gradient at x, of the shapes of x; its dtype may be another one.
        step_size, temperature: a number, or a floating tensor of 1 or N elements (one per chain).
        seed, step: an int, or an int64 tensor of one element on the device, which a captured graph reads anew
            at each replay (step also of N elements).
        index: int64 `[N]`, the samples' numbers, in [0, 2^56): the noise is a function of
            (seed, index, step, stream, column).
        clamp: (min, max) of the new positions. NaN stays NaN.
        grad_clip: the largest norm that a sample's `grad` may have; a longer one is shortened to it. The norm
            spans all tensors of a list; where it is not finite the whole sample becomes NaN. The prior's term
            is not clipped.
        prior_precision: adds prior_precision·x to the gradient, after clipping: the term of a prior
            N(0, 1/prior_precision).
        out: where to write; `out=x` moves the chains in place. Otherwise it shares no memory with x and grad.

    One launch for all tensors of a list (up to 64), and one more, which reads grad once, with grad_clip.

    Returns:
        As x: a tensor, or a list of tensors. The arithmetic is float32 (float64 for float64 positions). Where
        a gradient is needed the step is differentiable, by the reference, with respect to x, grad, step_size
        and temperature; `torch.vmap` maps the reference too.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    tensors = check_state("x", x)
    count, device = tensors[0].shape[0], tensors[0].device
    check_like("grad", grad, "x", x, dtype=False)
    check_per_chain("step_size", step_size, count, device)
    check_per_chain("temperature", temperature, count, device, zero=True)
    check_noise(seed, index, step, stream, count, device)
    check_drift(grad_clip, prior_precision)
    if clamp is not None:
        if not isinstance(clamp, tuple | list) or not all(is_number(bound) for bound in clamp):
            raise TypeError(f"clamp must be None or a pair of numbers (min, max), got {clamp!r}")
        if len(clamp) != 2 or not clamp[0] < clamp[1]:
            raise ValueError(f"clamp must be None or a pair (min, max) with min < max, got {clamp}")
    if out is not None:
        check_like("out", out, "x", x, dtype=True)
        check_written("out", out)
    differentiated = needs_gradient(*tensors, *as_list(grad), step_size, temperature)
    wrapped = transformed(*tensors, *as_list(grad), step_size, temperature, seed, index, step)
    if differentiated and out is not None:
        raise ValueError("out must be None where a gradient is needed: call under torch.no_grad()")
    uses_kernel = use_triton(*tensors, unsupported=no_kernel(tensors, differentiated, wrapped))
    if uses_kernel or eager_on_cpu(tensors, differentiated, wrapped):
        targets = new_like(x) if out is None else as_list(out)
        move: Any = _step if uses_kernel else _step_on_cpu
        move(
            targets,
            tensors,
            as_list(grad),
            index,
            *split_number(step_size),
            *split_number(temperature),
            *split_number(seed),
            *split_number(step),
            int(stream),
            clamp,
            grad_clip,
            prior_precision,
        )
        return targets[0] if isinstance(x, Tensor) else targets
    result = langevin_step_reference(
        x,
        grad,
        step_size,
        temperature=temperature,
        seed=seed,
        index=index,
        step=step,
        stream=stream,
        clamp=clamp,
        grad_clip=grad_clip,
        prior_precision=prior_precision,
    )
    if out is None:
        return result
    copy_state(out, result)
    return out if isinstance(out, Tensor) else list(out)


def mala_propose(
    x: State,
    grad: State,
    step_size: PerChain,
    *,
    temperature: PerChain = 1.0,
    seed: int | Tensor,
    index: Tensor,
    step: int | Tensor,
    stream: int = Stream.LANGEVIN,
    grad_clip: float | None = None,
    prior_precision: float | None = None,
) -> Tensor | list[Tensor]:
    """The proposal of the Metropolis-adjusted Langevin algorithm: a step for `mala_accept` to judge.

    Arguments as for `langevin_step`; there is no clamp, which would take the proposal's density away: give
    positions outside the support an energy of infinity instead.
    """
    return langevin_step(
        x,
        grad,
        step_size,
        temperature=temperature,
        seed=seed,
        index=index,
        step=step,
        stream=stream,
        grad_clip=grad_clip,
        prior_precision=prior_precision,
    )


__all__ = [
    "MalaStep",
    "langevin_step",
    "langevin_step_reference",
    "mala_accept",
    "mala_accept_reference",
    "mala_propose",
]
