"""The Gumbel-max race: one categorical draw a row, in one read of its log-weights and without summing them.

Particle i rings at E_i / w_i with E_i standard exponential, and the first to ring is i with probability
w_i / Σ w (Maddison, Tarlow and Minka, "A* sampling", NeurIPS 2014, section 2, in the exponential's form).
What wins is small, so the exponentials are accurate relative to their size.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .checks import compiling
from .launch import (
    LaunchConfig,
    cdiv,
    int64_offsets,
    launch,
    next_power_of_2,
    register_op,
    tl,
    triton,
    use_triton,
)
from .philox import Stream, exponential, exponential4, interleave4, philox_words
from .resampling import check_rows, no_kernel, require_weight, seed_tensor
from .resampling_long import vector_of

_SELECTION = tl.constexpr(int(Stream.SELECTION))
# `resample` draws at step 0 of the stream.
_STEP = 1
_STEP_IN_KERNEL = tl.constexpr(_STEP)
# Log-weights whose noise the CPU holds at a time, and the longest row that a program of a kernel takes whole.
_CACHED = 1 << 17
_BLOCK = 4096
# Rows of up to _PARTED columns are taken in parts of _WIDTH, which 8 threads read in 16 bytes each; _TILE
# elements at a time are 8 for each thread of 4 warps.
_PARTED = 512
_WIDTH = 32
_TILE = 1024


def categorical_reference(log_weights: Tensor, race: Tensor) -> tuple[Tensor, Tensor]:
    """What `categorical` computes, in plain torch.

    Args:
        log_weights: `[rows, n]`; NaN has weight 0.
        race: standard exponentials `[rows, n]`.

    Returns:
        winner: int64 `[rows]`, the first arrival; in a row whose largest log-weight is not finite it means
            nothing.
        log_max: `[rows]`.
    """
    log_weights = torch.nan_to_num(log_weights, nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    return (torch.log(race) - log_weights).argmin(dim=-1), log_weights.amax(dim=-1)


@triton.jit
def _race_kernel(
    log_weights_ptr, index_ptr, seed_ptr, winner_ptr, arrival_ptr, log_max_ptr, rows, n, stride, blocks,
    INT64: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The race among one block of BLOCK columns of ROWS rows, in heats of WIDTH columns.

    log_weights_ptr float32 [rows, n], row stride `stride`, both in units of VECTOR; index_ptr int64 [rows];
    seed_ptr int64 [1]. Program (group of rows, block) alone writes its rows' elements of its block in
    winner_ptr int64, arrival_ptr float32 (the logarithm of the winner's time) and log_max_ptr float32, [rows,
    blocks]. Bytes: 4 an element read, 16 a row and block written.
    """
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    block = program % blocks
    row = (program // blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    column = block * BLOCK + tl.arange(0, WIDTH)[None, :]
    four = block * (BLOCK // 4) + tl.arange(0, WIDTH // 4)[None, :]
    if INT64:
        n = tl.full((), n, tl.int64)
    end = n * VECTOR
    seed = tl.load(seed_ptr)
    index = tl.load(index_ptr + row, mask=row < rows, other=0)
    step = tl.full((), _STEP_IN_KERNEL, tl.int64)
    largest = tl.full([ROWS, WIDTH], -float("inf"), tl.float32)
    earliest = tl.full([ROWS, WIDTH], float("inf"), tl.float32)
    leader = column + tl.zeros([ROWS, WIDTH], tl.int32)
    for part in tl.static_range(0, BLOCK, WIDTH):
        inside = (row < rows) & (column + part < end)
        pointer = log_weights_ptr + row * (stride * VECTOR) + column + part
        log_weights = tl.load(pointer, mask=inside, other=-float("inf"))
        log_weights = tl.where(log_weights == log_weights, log_weights, -float("inf"))
        largest = tl.maximum(largest, log_weights)
        w0, w1, w2, w3 = philox_words(seed, index, step, _SELECTION, four + part // 4)
        e0, e1, e2, e3 = exponential4(w0, w1, w2, w3)
        arrival = tl.log(interleave4(e0, e1, e2, e3)) - log_weights
        leader = tl.where(arrival < earliest, column + part, leader)
        earliest = tl.minimum(earliest, arrival)
    first = tl.min(earliest, axis=1, keep_dims=True)
    winner = tl.min(tl.where(earliest == first, leader, end - 1), axis=1, keep_dims=True)
    out = row * blocks + block
    tl.store(winner_ptr + out, winner.to(tl.int64), mask=row < rows)
    tl.store(arrival_ptr + out, first, mask=row < rows)
    tl.store(log_max_ptr + out, tl.max(largest, axis=1, keep_dims=True), mask=row < rows)


def row_blocks(log_weights: Tensor) -> tuple[Tensor, int, tuple[int], dict[str, Any]]:
    """Log-weights with contiguous rows, the number of blocks in a row, the grid, and a launch's keywords.

    Chosen by the length of a row alone, so that the order of its sums does not depend on the batch.
    """
    if log_weights.stride(1) != 1:
        log_weights = log_weights.contiguous()
    rows, n = log_weights.shape
    block = min(max(next_power_of_2(n), 4), _BLOCK)
    width = min(block, _WIDTH) if block <= _PARTED else block
    config = LaunchConfig(block_columns=block, block_rows=max(_TILE // width, 1), num_warps=4)
    blocks = cdiv(n, block)
    keywords = {
        "config": config,
        "device": log_weights.device,
        "INT64": int64_offsets(log_weights, rows * n),
        "VECTOR": vector_of(log_weights),
        "ROWS": config.block_rows,
        "BLOCK": block,
        "WIDTH": width,
    }
    return log_weights, blocks, (cdiv(rows, config.block_rows) * blocks,), keywords


def _launch_race(log_weights: Tensor, index: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    log_weights, blocks, grid, keywords = row_blocks(log_weights)
    rows, n = log_weights.shape
    winner = index.new_empty((rows, blocks))
    arrival, log_max = (log_weights.new_empty((rows, blocks)) for _ in range(2))
    vector = keywords["VECTOR"]
    scalars = (rows, n // vector, log_weights.stride(0) // vector, blocks)
    launch(
        _race_kernel,
        grid,
        log_weights,
        index.contiguous(),
        seed,
        winner,
        arrival,
        log_max,
        *scalars,
        **keywords,
    )
    if blocks == 1:
        return winner.squeeze(1), log_max.squeeze(1)
    return winner.gather(1, arrival.argmin(dim=1, keepdim=True)).squeeze(1), log_max.amax(dim=1)


def _race_fake(log_weights: Tensor, index: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    rows = log_weights.shape[0]
    return index.new_empty(rows), log_weights.new_empty(rows)


def _race_on_cpu(log_weights: Tensor, index: Tensor, seed: int | Tensor) -> tuple[Tensor, Tensor]:
    """The reference, in blocks of rows whose noise stays small, except where it is being traced."""
    n = log_weights.shape[1]

    def race(log_weights: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        noise = exponential(seed, index, _STEP, Stream.SELECTION, n)
        if compiling() or log_weights.is_meta:
            return categorical_reference(log_weights, noise)
        log_max = log_weights.amax(dim=-1)
        if not (log_max < math.inf).all():  # NaN is the largest of all
            return categorical_reference(log_weights, noise)
        return noise.to(log_weights.dtype).log_().sub_(log_weights).argmin(dim=-1), log_max

    at_a_time = max(1, _CACHED // n)
    if compiling() or log_weights.shape[0] <= at_a_time:
        return race(log_weights, index)
    pieces = zip(log_weights.split(at_a_time), index.split(at_a_time), strict=True)
    winner, log_max = zip(*(race(*piece) for piece in pieces), strict=True)
    return torch.cat(winner), torch.cat(log_max)


_race = register_op(
    "categorical",
    "(Tensor log_weights, Tensor index, Tensor seed) -> (Tensor winner, Tensor log_max)",
    launcher=_launch_race,
    fake=_race_fake,
    reference=_race_on_cpu,
)


def categorical(log_weights: Tensor, *, seed: int | Tensor = 0, index: Tensor | None = None) -> Tensor:
    """One draw per row in proportion to exp(log_weights): the particle whose exponential clock rings first.

    Particle i rings at E_i / w_i with E_i standard exponential, accurate relative to its size, so that
    argmin(log E_i - log w_i) is i with probability w_i / Σ w exactly; E_i is column i of the row's noise.
    Nothing is summed. On a GPU the noise is drawn as the log-weights are read; on the CPU it costs more than
    the sums of `resample(log_weights, 1)`, which is the faster one there.

    Args:
        log_weights: float32 or float64 (which has no kernel) `[..., n]`, unnormalised; -inf and NaN have
            weight 0.
        seed: an int or an int64 tensor of one element.
        index: int64 `[...]` or flat `[rows]`, the rows' sample numbers for the noise; by default 0, 1, 2, ...

    Returns:
        int64 `[...]`, indices into the last dimension. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument; ValueError names the first row that has no finite weight,
            or a weight of +inf (under `torch.compile` and graph capture: as for `resample`). vmap is refused:
            the batch goes into the leading dimensions.
    """
    rows, index = check_rows(log_weights, index, seed)
    if rows.shape[0] == 0:
        return torch.zeros(log_weights.shape[:-1], dtype=torch.int64, device=rows.device)
    if use_triton(rows, unsupported=no_kernel(rows)):
        winner, log_max = _race(rows, index, seed_tensor(seed, rows.device))
    else:
        winner, log_max = _race_on_cpu(rows, index, seed)
    require_weight(log_max)
    return winner.reshape(log_weights.shape[:-1])


__all__ = ["categorical", "categorical_reference", "row_blocks"]
