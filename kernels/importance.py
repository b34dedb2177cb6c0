"""Importance weights: their mean and effective sample size in one read.

`summarize` is an online log-sum-exp: running maximum, sum and sum of squares (Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018, algorithm 3, with the squares beside it). What it keeps,
`WeightStatistics`, can be merged with another's, so that log-weights may come in pieces that are never held
together. Draws by weight: `resample` (`resampling.py`) and `categorical` (`categorical.py`), imported from
here.

Bytes that must be moved: 4 per log-weight read; for the gradient of `summarize` 8, read and written.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .categorical import categorical, row_blocks
from .checks import compiling, is_functorch_wrapped_tensor
from .launch import LaunchConfig, int64_offsets, launch, next_power_of_2, register_op, tl, triton, use_triton
from .resampling import Scheme, no_kernel, resample

# Log-weights that the CPU takes at a time, so that what it computes of them stays in the cache.
_CACHED = 1 << 17
# Blocks of a row that are merged at a time.
_MERGED = 1024


class WeightStatistics(NamedTuple):
    """What one read of log-weights leaves, and all that is needed to go on with more of them.

    Attributes:
        log_max: the largest log-weight, -inf where none is finite.
        total: the sum of exp(log_weight - log_max).
        total_squares: the sum of its square.
        count: how many log-weights there were, whatever their value.
        non_finite: int64, how many of them were NaN or +inf; they have weight 0.
    """

    log_max: Tensor
    total: Tensor
    total_squares: Tensor
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    non_finite: Tensor


class WeightSummary(NamedTuple):
    """What log-weights say of the sampler that they come from.

    Attributes:
        log_mean: log of the mean weight; where the weights are unbiased, the estimate of log Z.
        ess: effective sample size, (sum of weights)² / (sum of squares) (Kong, Liu and Wong 1994), 1 to n.
        log_max: the largest log-weight.
        non_finite: int64, how many log-weights were NaN or +inf.
    """

    log_mean: Tensor
    ess: Tensor
    log_max: Tensor
    non_finite: Tensor


def _shift(log_max: Tensor) -> Tensor:
    """What to subtract before exp: -inf less -inf is NaN."""
    return torch.where(log_max == -math.inf, 0.0, log_max)


def statistics_reference(log_weights: Tensor) -> WeightStatistics:
    """What `weight_statistics` computes along the last dimension, in plain torch. The sums have gradients."""
    usable = torch.nan_to_num(log_weights, nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    log_max = usable.detach().amax(dim=-1)
    weights = torch.exp(usable - _shift(log_max).unsqueeze(-1))
    # Sums in float64, so that they hardly depend on the order, which depends on the batch and the threads.
    total = weights.sum(dim=-1, dtype=torch.float64).to(weights.dtype)
    total_squares = (weights * weights).sum(dim=-1, dtype=torch.float64).to(weights.dtype)
    count = log_weights.shape[-1]
    return WeightStatistics(
        log_max, total, total_squares, count, count - (log_weights < math.inf).sum(dim=-1)
    )


def merge(*parts: WeightStatistics) -> WeightStatistics:
    """The statistics of all log-weights together, from those of two or more parts of them, row by row.

    Sums again in float64, so that the order hardly matters. Not differentiable.
    """
    if not parts:
        raise ValueError("merge takes at least one WeightStatistics, got none")
    if any(part.log_max.shape != parts[0].log_max.shape for part in parts):
        shapes = [tuple(part.log_max.shape) for part in parts]
        raise ValueError(f"parts must be statistics of the same rows, got shapes {shapes}")
    if any(part.log_max.device != parts[0].log_max.device for part in parts):
        raise ValueError(f"parts must be on one device, got {[str(part.log_max.device) for part in parts]}")
    log_maxima = torch.stack([part.log_max for part in parts])
    log_max = log_maxima.amax(dim=0)
    scale = torch.exp((log_maxima - _shift(log_max)).to(torch.float64))
    total = (torch.stack([part.total for part in parts]) * scale).sum(dim=0)
    total_squares = (torch.stack([part.total_squares for part in parts]) * scale.square()).sum(dim=0)
    return WeightStatistics(
        log_max,
        total.to(log_max.dtype),
        total_squares.to(log_max.dtype),
        sum(part.count for part in parts),
        torch.stack([part.non_finite for part in parts]).sum(dim=0),
    )


def finish(statistics: WeightStatistics) -> WeightSummary:
    """log_mean = log_max + log(total / count), ess = total² / total_squares; -inf and 0 without a weight."""
    log_max, total, total_squares, count, non_finite = statistics
    alive = total > 0
    log_mean = log_max + (torch.log(torch.where(alive, total, 1.0)) - math.log(max(count, 1)))
    ess = torch.where(alive, total, 0.0).square() / torch.where(alive, total_squares, 1.0)
    return WeightSummary(torch.where(alive, log_mean, -math.inf), ess, log_max, non_finite)


def summary_backward_reference(
    log_weights: Tensor, log_max: Tensor, total: Tensor, ess: Tensor, grad_log_mean: Tensor, grad_ess: Tensor
) -> Tensor:
    """With p the normalised weights: p for log_mean, 2·ess·(p - ess·p²) for ess; 0 without a weight."""
    usable = torch.nan_to_num(log_weights, nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    alive = (total > 0).unsqueeze(-1)
    weights = torch.exp(usable - _shift(log_max).unsqueeze(-1)) / torch.where(alive, total.unsqueeze(-1), 1.0)
    slope = grad_log_mean.unsqueeze(-1) + (2.0 * grad_ess * ess).unsqueeze(-1) * (
        1.0 - ess.unsqueeze(-1) * weights
    )
    return torch.where(weights > 0, slope * weights, 0.0)


@triton.jit
def _store_summary(
    log_max, total, squares, missing, n, row, mask, log_max_ptr, total_ptr, squares_ptr, missing_ptr,
    log_mean_ptr, ess_ptr, FINISH: tl.constexpr,
):  # fmt: skip
    tl.store(log_max_ptr + row, log_max, mask=mask)
    tl.store(total_ptr + row, total, mask=mask)
    tl.store(squares_ptr + row, squares, mask=mask)
    tl.store(missing_ptr + row, missing.to(tl.int64), mask=mask)
    if FINISH:
        alive = total > 0.0
        log_mean = log_max + (tl.log(tl.where(alive, total, 1.0)) - tl.log(tl.full((), n, tl.float32)))
        ess = total * total / tl.where(alive, squares, 1.0)
        tl.store(log_mean_ptr + row, tl.where(alive, log_mean, -float("inf")), mask=mask)
        tl.store(ess_ptr + row, ess, mask=mask)


@triton.jit
def _summary_kernel(
    log_weights_ptr, log_max_ptr, total_ptr, squares_ptr, missing_ptr, log_mean_ptr, ess_ptr,
    rows, n, stride, blocks,
    WHOLE: tl.constexpr, INT64: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One block of BLOCK columns of ROWS rows: the whole rows, if WHOLE.

    Short rows go by in parts of WIDTH columns, so that few threads share a row and little is left to add
    across them; the second look finds them in a register or in the first-level cache.

    log_weights_ptr float32 [rows, n], row stride `stride`, both in units of VECTOR. Program (group of rows,
    block) alone writes its rows' elements of its block in the others, [rows, blocks]: float32, missing_ptr
    int64; log_mean_ptr and ess_ptr only if WHOLE. Bytes: 4 an element read, and 28 a row and block written.
    """
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    block = program % blocks
    row = (program // blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    column = block * BLOCK + tl.arange(0, WIDTH)[None, :]
    pointer = log_weights_ptr + row * (stride * VECTOR) + column
    if INT64:
        n = tl.full((), n, tl.int64)
    end = n * VECTOR
    largest = tl.full([ROWS, WIDTH], -float("inf"), tl.float32)
    for part in tl.static_range(0, BLOCK, WIDTH):
        inside = (row < rows) & (column + part < end)
        log_weights = tl.load(pointer + part, mask=inside, other=-float("inf"))
        # A comparison with NaN is false.
        usable = tl.where(log_weights < float("inf"), log_weights, -float("inf"))
        largest = usable if part == 0 else tl.maximum(largest, usable)
    log_max = tl.max(largest, axis=1, keep_dims=True)
    shift = tl.where(log_max == -float("inf"), 0.0, log_max)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    squares = tl.zeros([ROWS, WIDTH], tl.float32)
    missing = tl.zeros([ROWS, WIDTH], tl.int32)
    for part in tl.static_range(0, BLOCK, WIDTH):
        inside = (row < rows) & (column + part < end)
        log_weights = tl.load(pointer + part, mask=inside, other=-float("inf"))
        usable = log_weights < float("inf")
        weights = tl.exp(tl.where(usable, log_weights, -float("inf")) - shift)
        unusable = tl.where(usable, 0, 1)
        total = weights if part == 0 else total + weights
        squares = weights * weights if part == 0 else squares + weights * weights
        missing = unusable if part == 0 else missing + unusable
    total = tl.sum(total, axis=1, keep_dims=True)
    squares = tl.sum(squares, axis=1, keep_dims=True)
    missing = tl.sum(missing, axis=1, keep_dims=True)
    _store_summary(
        log_max, total, squares, missing, end, row * blocks + block, row < rows,
        log_max_ptr, total_ptr, squares_ptr, missing_ptr, log_mean_ptr, ess_ptr, FINISH=WHOLE,
    )  # fmt: skip


@triton.jit
def _merge_kernel(
    part_max_ptr, part_total_ptr, part_squares_ptr, part_missing_ptr,
    log_max_ptr, total_ptr, squares_ptr, missing_ptr, log_mean_ptr, ess_ptr, n, blocks,
    INT64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The blocks of a row, merged: part_*_ptr [rows, blocks] as `_summary_kernel` wrote them.

    Program `row` alone writes its element of the others, [rows]. Bytes: 20 a block read, 28 a row written.
    """
    row = tl.program_id(0)
    if INT64:
        row = row.to(tl.int64)
    log_max = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    missing = tl.zeros([BLOCK], tl.int64)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        inside = block < blocks
        part = row * blocks + block
        part_max = tl.load(part_max_ptr + part, mask=inside, other=-float("inf"))
        larger = tl.maximum(log_max, part_max)
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        old, new = tl.exp(log_max - shift), tl.exp(part_max - shift)
        total = total * old + tl.load(part_total_ptr + part, mask=inside, other=0.0) * new
        squares = squares * (old * old) + tl.load(part_squares_ptr + part, mask=inside, other=0.0) * (
            new * new
        )
        missing += tl.load(part_missing_ptr + part, mask=inside, other=0)
        log_max = larger
    out = row + tl.arange(0, 1)
    row_max = tl.max(log_max, axis=0)
    scale = tl.exp(log_max - tl.where(row_max == -float("inf"), 0.0, row_max))
    _store_summary(
        row_max, tl.sum(total * scale, axis=0), tl.sum(squares * (scale * scale), axis=0),
        tl.sum(missing, axis=0), n, out, out >= 0,
        log_max_ptr, total_ptr, squares_ptr, missing_ptr, log_mean_ptr, ess_ptr, FINISH=True,
    )  # fmt: skip


@triton.jit
def _summary_backward_kernel(
    log_weights_ptr, log_max_ptr, total_ptr, ess_ptr, grad_log_mean_ptr, grad_ess_ptr, grad_ptr,
    rows, n, stride, blocks, log_mean_stride, ess_stride,
    INT64: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of log-weights; the formula is in `summary_backward_reference`.

    log_weights_ptr float32 [rows, n], row stride `stride`, both in units of VECTOR; the others float32
    [rows], the gradients with a stride. Program (group of rows, block) alone writes its elements of grad_ptr,
    float32 [rows, n]. Bytes an element: 4 read, 4 written.
    """
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    row = (program // blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % blocks) * BLOCK + tl.arange(0, WIDTH)[None, :]
    alive = row < rows
    if INT64:
        n = tl.full((), n, tl.int64)
    end = n * VECTOR
    log_max = tl.load(log_max_ptr + row, mask=alive, other=0.0)
    total = tl.load(total_ptr + row, mask=alive, other=1.0)
    ess = tl.load(ess_ptr + row, mask=alive, other=0.0)
    grad_log_mean = tl.load(grad_log_mean_ptr + row * log_mean_stride, mask=alive, other=0.0)
    grad_ess = tl.load(grad_ess_ptr + row * ess_stride, mask=alive, other=0.0)
    shift = tl.where(log_max == -float("inf"), 0.0, log_max)
    inverse = 1.0 / tl.where(total > 0.0, total, 1.0)
    of_ess = 2.0 * grad_ess * ess
    for part in tl.static_range(0, BLOCK, WIDTH):
        inside = alive & (column + part < end)
        pointer = log_weights_ptr + row * (stride * VECTOR) + column + part
        log_weights = tl.load(pointer, mask=inside, other=-float("inf"))
        usable = log_weights < float("inf")  # false for NaN too
        weights = tl.where(usable, tl.exp(log_weights - shift) * inverse, 0.0)
        slope = grad_log_mean + of_ess * (1.0 - ess * weights)
        gradient = tl.where(weights > 0.0, slope * weights, 0.0)
        tl.store(grad_ptr + row * end + column + part, gradient, mask=inside)


def _launch_summary(log_weights: Tensor) -> tuple[Tensor, ...]:
    rows, n = log_weights.shape
    outputs = _summary_fake(log_weights)
    log_weights, blocks, grid, keywords = row_blocks(log_weights)
    vector = keywords["VECTOR"]
    scalars = (rows, n // vector, log_weights.stride(0) // vector, blocks)
    if blocks == 1:
        launch(_summary_kernel, grid, log_weights, *outputs, *scalars, WHOLE=True, **keywords)
        return outputs
    parts = [output.new_empty((rows, blocks)) for output in outputs[:4]]
    launch(_summary_kernel, grid, log_weights, *parts, *outputs[4:], *scalars, WHOLE=False, **keywords)
    width = min(next_power_of_2(blocks), _MERGED)
    launch(
        _merge_kernel, (rows,), *parts, *outputs, n, blocks, INT64=int64_offsets(rows * blocks), BLOCK=width,
        config=LaunchConfig(block_columns=width, num_warps=4), device=log_weights.device,
    )  # fmt: skip
    return outputs


def _summary_fake(log_weights: Tensor) -> tuple[Tensor, ...]:
    rows = log_weights.shape[0]
    log_max, total, squares, log_mean, ess = (log_weights.new_empty(rows) for _ in range(5))
    return log_max, total, squares, log_weights.new_empty(rows, dtype=torch.int64), log_mean, ess


def _summary_on_cpu(log_weights: Tensor) -> tuple[Tensor, ...]:
    statistics = _statistics_on_cpu(log_weights)
    log_mean, ess, log_max, non_finite = finish(statistics)
    return log_max, statistics.total, statistics.total_squares, non_finite, log_mean, ess


def _statistics_on_cpu(log_weights: Tensor) -> WeightStatistics:
    """The reference, on pieces of `[rows, n]` that stay in the cache, except where it is being traced."""
    rows, n = log_weights.shape
    if compiling() or is_functorch_wrapped_tensor(log_weights) or log_weights.is_meta:
        return statistics_reference(log_weights)
    if n > _CACHED:
        return merge(*(_statistics_on_cpu(piece) for piece in log_weights.split(_CACHED, dim=1)))
    if rows * n <= _CACHED:
        return _statistics_of_piece(log_weights)
    pieces = [_statistics_of_piece(piece) for piece in log_weights.split(_CACHED // n)]
    log_max, total, total_squares, non_finite = (
        torch.cat(field) for field in zip(*((s[0], s[1], s[2], s[4]) for s in pieces), strict=True)
    )
    return WeightStatistics(log_max, total, total_squares, n, non_finite)


def _statistics_of_piece(log_weights: Tensor) -> WeightStatistics:
    """The reference in fewer looks: the largest log-weight tells whether any is NaN or +inf."""
    log_max = log_weights.amax(dim=-1)
    if log_weights.numel() == 0 or not (log_max < math.inf).all():
        return statistics_reference(log_weights)
    weights = (log_weights - _shift(log_max).unsqueeze(-1)).exp_().to(torch.float64)
    total = weights.sum(dim=-1).to(log_max.dtype)
    total_squares = torch.linalg.vector_norm(weights, dim=-1).square_().to(log_max.dtype)
    non_finite = torch.zeros(log_max.shape, dtype=torch.int64, device=log_max.device)
    return WeightStatistics(log_max, total, total_squares, log_weights.shape[-1], non_finite)


_summary = register_op(
    "weight_summary",
    "(Tensor log_weights) -> (Tensor log_max, Tensor total, Tensor total_squares, Tensor non_finite,"
    " Tensor log_mean, Tensor ess)",
    launcher=_launch_summary,
    fake=_summary_fake,
    reference=_summary_on_cpu,
)


def _launch_summary_backward(
    log_weights: Tensor, log_max: Tensor, total: Tensor, ess: Tensor, grad_log_mean: Tensor, grad_ess: Tensor
) -> Tensor:
    grad = log_weights.new_empty(log_weights.shape)
    log_weights, blocks, grid, keywords = row_blocks(log_weights)
    rows, n = log_weights.shape
    vector = keywords["VECTOR"]
    launch(
        _summary_backward_kernel, grid, log_weights, log_max, total, ess, grad_log_mean, grad_ess, grad,
        rows, n // vector, log_weights.stride(0) // vector, blocks, grad_log_mean.stride(0),
        grad_ess.stride(0), **keywords,
    )  # fmt: skip
    return grad


_summary_backward = register_op(
    "weight_summary_backward",
    "(Tensor log_weights, Tensor log_max, Tensor total, Tensor ess, Tensor grad_log_mean, Tensor grad_ess)"
    " -> Tensor",
    launcher=_launch_summary_backward,
    fake=lambda log_weights, *_: log_weights.new_empty(log_weights.shape),
    reference=summary_backward_reference,
)


def _vmap_rule(op: Any) -> Any:
    """For an op whose arguments and results all have rows first: the vmapped dimension becomes more rows."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Any, Any]:
        size = info.batch_size
        full = [
            arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        outputs = op(*(arg.flatten(0, 1) for arg in full))
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, full[0].shape[:2]), 0
        return tuple(output.unflatten(0, full[0].shape[:2]) for output in outputs), (0,) * len(outputs)

    return rule


torch.library.register_vmap(_summary, _vmap_rule(_summary))
torch.library.register_vmap(_summary_backward, _vmap_rule(_summary_backward))


class _Summarize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(log_weights: Tensor) -> tuple[Tensor, ...]:
        return _summary(log_weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        log_max, total, total_squares, non_finite, _, ess = output
        ctx.mark_non_differentiable(log_max, total, total_squares, non_finite)
        ctx.save_for_backward(inputs[0], log_max, total, ess)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _summary_backward(*ctx.saved_tensors, *grads[4:])


def _as_rows(log_weights: Tensor, dim: int) -> tuple[Tensor, torch.Size]:
    """`[rows, n]` with `dim` last, and the shape of the rows."""
    if not isinstance(log_weights, Tensor) or log_weights.dtype not in (torch.float32, torch.float64):
        got = log_weights.dtype if isinstance(log_weights, Tensor) else type(log_weights).__name__
        raise TypeError(f"log_weights must be a float32 or float64 tensor, got {got}")
    if not isinstance(dim, int | torch.SymInt):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    if log_weights.ndim == 0 or not -log_weights.ndim <= dim < log_weights.ndim:
        raise ValueError(f"dim must be a dimension of log_weights, {tuple(log_weights.shape)}, got {dim}")
    if log_weights.shape[dim] == 0:
        raise ValueError(f"log_weights must not be empty along dim {dim}, got {tuple(log_weights.shape)}")
    log_weights = log_weights.movedim(dim, -1)
    shape = log_weights.shape[:-1]
    return log_weights.reshape(math.prod(shape), log_weights.shape[-1]), shape


def weight_statistics(log_weights: Tensor, dim: int = -1) -> WeightStatistics:
    """One read of log-weights along `dim`: to `merge` with others, and to `finish` into a summary.

    Not differentiable: `summarize` is. Arguments and errors as there; every field has the shape of
    `log_weights` without `dim`, but for `count`, an int.
    """
    rows, shape = _as_rows(log_weights, dim)
    rows = rows.detach()
    if use_triton(rows, unsupported=no_kernel(rows)):
        log_max, total, total_squares, non_finite, _, _ = _summary(rows)
        statistics = WeightStatistics(log_max, total, total_squares, rows.shape[1], non_finite)
    else:
        statistics = _statistics_on_cpu(rows)
    log_max, total, total_squares, count, non_finite = statistics
    return WeightStatistics(
        log_max.reshape(shape),
        total.reshape(shape),
        total_squares.reshape(shape),
        count,
        non_finite.reshape(shape),
    )


def summarize(log_weights: Tensor, dim: int = -1) -> WeightSummary:
    """Log of the mean weight, effective sample size, largest log-weight, number of NaN and +inf along `dim`.

    log_mean = log(1/n · Σ exp(log_weights)) and ess = (Σ w)² / Σ w² (Kong, Liu and Wong, JASA 1994; Owen,
    "Monte Carlo theory, methods and examples", equation 9.13), from one read. Without a finite weight they
    are -inf and 0: nothing raises here. `log_mean` and `ess` are differentiable, the gradient of `log_mean`
    being the normalised weights (once, in the kernel; any number of times on the reference path). Supports
    `torch.compile` and `torch.vmap`.

    Args:
        log_weights: float32 or float64 (which has no kernel) `[..., n, ...]`, n >= 1. -inf, NaN and +inf have
            weight 0, and the last two are counted.
        dim: the dimension of size n.

    Returns:
        WeightSummary(log_mean, ess, log_max, non_finite), each of the shape of `log_weights` without `dim`;
        the dtype is that of `log_weights`, and int64 for `non_finite`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    rows, shape = _as_rows(log_weights, dim)
    if use_triton(rows, unsupported=no_kernel(rows)):
        log_max, _, _, non_finite, log_mean, ess = _Summarize.apply(rows)
        summary = WeightSummary(log_mean, ess, log_max, non_finite)
    elif torch.is_grad_enabled() and rows.requires_grad:
        summary = finish(statistics_reference(rows))
    else:
        summary = finish(_statistics_on_cpu(rows))
    return WeightSummary(*(field.reshape(shape) for field in summary))


__all__ = [
    "Scheme",
    "WeightStatistics",
    "WeightSummary",
    "categorical",
    "finish",
    "merge",
    "resample",
    "statistics_reference",
    "summarize",
    "summary_backward_reference",
    "weight_statistics",
]
