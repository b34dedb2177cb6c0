"""Resampling: draw particles in proportion to their weights, from one long row or from many short ones.

A row of log-weights becomes the cumulative sum c_0 <= ... <= c_{n-1} of its weights, and slot j of `num`
takes the particle i whose interval [c_{i-1}, c_i) holds the slot's position:

    multinomial   u_j · c_{n-1}                    independent draws
    stratified    (j + u_j) / num · c_{n-1}        one uniform for each slot
    systematic    (j + u) / num · c_{n-1}          one uniform for the row
    residual      floor(num·w_i / c_{n-1}) copies of i, then multinomial on what is left of the weights

(Douc, Cappé and Moulines, "Comparison of resampling schemes for particle filtering", ISPA 2005, sections 2.1
to 2.4.) The uniforms have 52 bits, from words 2j and 2j + 1 of the row's selection noise: the draw of slot j
is a function of the row's weights and of (seed, index, j), for multinomial whatever `num` is.

Precision. A cumulative sum in float32 stops moving: of 2^24 particles one in six would have an empty
interval. The reference sums in float64. The kernels sum within a block in 64-bit fixed point, 2^-51 of the
block's largest weight: exact in any order, so that a row draws the same particles whatever shares its
program, and a particle without weight has an empty interval. Between blocks they sum in float64.

Two kernels for rows that fit a program's registers or not. Short rows are read once and their draws written:
4·n + 8·num bytes a row. A long row is read twice, first for the blocks' sums, then, where `num` slots have
been dealt out to the blocks, for the draws: 8·n + 8·num bytes. No program waits for another: the order comes
from the launches.
"""

import math
from typing import Literal, get_args

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
from .philox import Stream, words
from .philox_cpu import Kind, draw_on_cpu, fine_uniform
from .resampling_long import (
    MULTINOMIAL,
    RESIDUAL,
    STRATIFIED,
    first_above,
    fixed_point,
    launch_long,
    load_log_weights,
    relative_weights,
    slot_uniform,
    vector_of,
)

try:
    from torch._C._functorch import is_batchedtensor  # pyright: ignore[reportMissingImports]
except ImportError:  # a private name: where it has moved, vmap itself refuses, in its own words

    def is_batchedtensor(tensor: Tensor) -> bool:
        return False


Scheme = Literal["multinomial", "stratified", "systematic", "residual"]
SCHEMES: tuple[str, ...] = get_args(Scheme)

# On the CPU, rows are taken in blocks whose float64 sums stay in a core's second-level cache, their noise for
# more of them at a time; and from this many particles on, look-ups in random order would miss the cache: they
# are made in the order of their leading 16 bits.
_CACHED = 1 << 17
_NOISE = 1 << 20
_SORT_FROM = 1 << 16
# The longest row that the kernel for whole rows takes.
_SHORT = 2048
# A single draw takes rows in parts of _WIDTH columns, which 8 threads read in 16 bytes each; _TILE elements
# at a time are 8 for each thread of 4 warps.
_WIDTH = 32
_TILE = 1024


def slot_uniforms(seed: int | Tensor, index: Tensor, width: int) -> Tensor:
    """`fine_uniform` of words 2k and 2k + 1 for slot k: float64 `[rows, width]`, strictly between 0 and 1."""
    if index.is_cpu and not compiling():
        seeds = (seed, 0) if isinstance(seed, Tensor) else (None, seed)
        kind, stream = Kind.FINE_UNIFORM, int(Stream.SELECTION)
        return draw_on_cpu(index, None, *seeds, None, 0, kind, stream, width, torch.float64)
    pairs = words(seed, index, 0, Stream.SELECTION, 2 * width).unflatten(-1, (width, 2))
    return fine_uniform(pairs[..., 0], pairs[..., 1])


def _search(cdf: Tensor, positions: Tensor) -> Tensor:
    """The first i with cdf_i > position, row by row. No position reaches the last cdf: i has a weight."""
    positions = torch.minimum(positions, cdf[:, -1:] * (1.0 - 2.0**-53))
    return torch.searchsorted(cdf, positions, right=True)


def _search_anywhere(cdf: Tensor, uniforms: Tensor) -> Tensor:
    """`_search` of positions in no order."""
    positions = uniforms * cdf[:, -1:]
    if cdf.shape[-1] < _SORT_FROM:
        return _search(cdf, positions)
    digits = (uniforms * 65536.0 - 32768.0).to(torch.int16)
    # One row of integers of 16 bits is sorted by counting.
    order = torch.argsort(digits[0])[None] if digits.shape[0] == 1 else torch.argsort(digits, dim=-1)
    found = _search(cdf, positions.gather(-1, order))
    return torch.empty_like(found).scatter_(-1, order, found)


def _cumulative(weights: Tensor) -> Tensor:
    """float64 sums. A device adds in a tree, where a sum may fall by a rounding: only weights raise it."""
    sums = torch.cumsum(weights, dim=-1, dtype=torch.float64)
    return sums if sums.is_cpu else torch.where(weights > 0, sums, 0.0).cummax(dim=-1).values


def resample_reference(log_weights: Tensor, num: int, scheme: str, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """What `resample` computes, in plain torch: specification, CPU path and oracle of the tests.

    Args:
        log_weights: `[rows, n]`; NaN has weight 0.
        num: slots, at least 1.
        scheme: one of `SCHEMES`.
        uniforms: float64 `[rows, num]`, or `[rows, 1]` for the systematic scheme, in (0, 1).

    Returns:
        drawn: int64 `[rows, num]`; in a row whose largest log-weight is not finite it means nothing.
        log_max: `[rows]`, the largest log-weight.
    """
    log_weights = torch.nan_to_num(log_weights, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    log_max = log_weights.amax(dim=-1)
    weights = torch.exp(log_weights - log_max.unsqueeze(-1))
    cdf = _cumulative(weights)
    if num == 1 or scheme == "multinomial":
        return _search_anywhere(cdf, uniforms), log_max
    slots = torch.arange(num, dtype=torch.float64, device=cdf.device)
    if scheme != "residual":
        return _search(cdf, (slots + uniforms) * (cdf[:, -1:] / num)), log_max
    share = weights.to(torch.float64) * (num / cdf[:, -1:])
    copies = torch.floor(share)
    if 4 * num >= copies.shape[-1] and copies.is_cpu and not compiling():
        return _copies_and_rest(copies, share, num, uniforms), log_max
    ends = _cumulative(copies)
    copied = torch.searchsorted(ends, slots.expand(ends.shape[0], -1).contiguous(), right=True)
    drawn = _search_anywhere(_cumulative(share - copies), uniforms)
    return torch.where(slots < ends[:, -1:], copied, drawn), log_max


def _copies_and_rest(copies: Tensor, share: Tensor, num: int, uniforms: Tensor) -> Tensor:
    """The slots of the residual scheme, without a search for the copies and for slots that no row draws."""
    rows, n = copies.shape
    given = copies.sum(dim=-1, keepdim=True)
    usable = torch.isfinite(given)  # else the row has no weight, and its slots mean nothing
    given = torch.where(usable, given, num)
    counts = torch.cat((torch.where(usable, copies, 0.0), num - given), dim=-1).to(torch.int64)
    counts[:, 0] += num - counts.sum(dim=-1)
    particles = torch.arange(n + 1, device=copies.device).expand(rows, -1)
    drawn = torch.repeat_interleave(particles.reshape(-1), counts.reshape(-1)).reshape(rows, num)
    first = int(given.min())
    if first < num:
        rest = _search_anywhere(_cumulative(share - copies), uniforms[:, first:])
        tail = drawn[:, first:]
        drawn[:, first:] = torch.where(tail == n, rest, tail)
    return drawn


@triton.jit
def _draw_rows_kernel(
    log_weights_ptr, index_ptr, seed_ptr, drawn_ptr, log_max_ptr, rows, n, stride,
    VECTOR: tl.constexpr, INT64: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One draw from each of ROWS whole rows, which go by in parts of WIDTH columns, so that few threads share
    one.

    log_weights_ptr float32 [rows, n], row stride `stride`, both in units of VECTOR; index_ptr int64 [rows];
    seed_ptr int64 [1]. Each program alone writes its rows in drawn_ptr, int64 [rows], and log_max_ptr,
    float32 [rows]. Bytes a row: 4·n read, a second and third time from a register or the first-level cache;
    12 written.
    """
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    pointer = log_weights_ptr + row * (stride * VECTOR) + column
    end = n * VECTOR
    largest = tl.full([ROWS, WIDTH], -float("inf"), tl.float32)
    for part in tl.static_range(0, BLOCK, WIDTH):
        inside = (row < rows) & (column + part < end)
        largest = tl.maximum(largest, load_log_weights(pointer + part, inside))
    log_max = tl.max(largest, axis=1, keep_dims=True)
    units = tl.zeros([ROWS, WIDTH], tl.int64)
    for part in tl.static_range(0, BLOCK, WIDTH):
        inside = (row < rows) & (column + part < end)
        units += fixed_point(relative_weights(load_log_weights(pointer + part, inside), log_max))
    total = tl.sum(units, axis=1, keep_dims=True)
    index = tl.load(index_ptr + row, mask=row < rows, other=0)
    uniform = slot_uniform(tl.load(seed_ptr), index, tl.zeros([1, 1], tl.int32))
    left = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    passed = tl.zeros([ROWS, WIDTH], tl.int32)
    for part in tl.static_range(0, BLOCK, WIDTH):
        inside = (row < rows) & (column + part < end)
        weights = fixed_point(relative_weights(load_log_weights(pointer + part, inside), log_max))
        sums = tl.cumsum(weights, axis=1)
        passed += (sums <= left).to(tl.int32)
        left -= tl.max(sums, axis=1, keep_dims=True)
    drawn = tl.sum(passed, axis=1, keep_dims=True)
    tl.store(drawn_ptr + row, drawn.to(tl.int64), mask=row < rows)
    tl.store(log_max_ptr + row, log_max, mask=row < rows)


@triton.jit
def _resample_rows_kernel(
    log_weights_ptr, index_ptr, seed_ptr, drawn_ptr, log_max_ptr, rows, n, num, stride, groups,
    SCHEME: tl.constexpr, VECTOR: tl.constexpr, INT64: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows and OUT of their slots.

    log_weights_ptr float32 [rows, n], row stride `stride`, both in units of VECTOR; index_ptr int64 [rows];
    seed_ptr int64 [1]. Program (group, chunk) alone writes its rows' slots of its chunk in drawn_ptr, int64
    [rows, num]; the first chunk's program writes log_max_ptr, float32 [rows]. Bytes a row: 4·n read in each
    chunk, 8·num written.
    """
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    row = (program % groups) * ROWS + tl.arange(0, ROWS)[:, None]
    chunk = program // groups
    column = tl.arange(0, BLOCK)[None, :]
    slot = chunk * OUT + tl.arange(0, OUT)[None, :]
    inside = (row < rows) & (column < n * VECTOR)
    log_weights = load_log_weights(log_weights_ptr + row * (stride * VECTOR) + column, inside)
    log_max = tl.max(log_weights, axis=1, keep_dims=True)
    if chunk == 0:
        tl.store(log_max_ptr + row, log_max, mask=row < rows)
    weights = fixed_point(relative_weights(log_weights, log_max))
    sums = tl.cumsum(weights, axis=1)
    total = tl.max(sums, axis=1, keep_dims=True)
    seed = tl.load(seed_ptr)
    index = tl.load(index_ptr + row, mask=row < rows, other=0)
    mask = (row < rows) & (slot < num)
    if SCHEME == RESIDUAL:
        share = weights.to(tl.float64) * (tl.full((), num, tl.float64) / tl.maximum(total, 1).to(tl.float64))
        copies = share.to(tl.int64)
        ends = tl.cumsum(copies, axis=1)
        rest = tl.cumsum(fixed_point(share - copies.to(tl.float64)), axis=1)
        rest_total = tl.max(rest, axis=1, keep_dims=True)
        position = (slot_uniform(seed, index, slot) * rest_total.to(tl.float64)).to(tl.int64)
        drawn = tl.where(
            slot < tl.max(ends, axis=1, keep_dims=True),
            first_above(ends, slot.to(tl.int64) + tl.zeros([ROWS, OUT], tl.int64), LEVELS),
            first_above(rest, tl.minimum(position, rest_total - 1), LEVELS),
        )
    else:
        if SCHEME == MULTINOMIAL:
            position = slot_uniform(seed, index, slot) * total.to(tl.float64)
        else:
            noise_slot = slot if SCHEME == STRATIFIED else tl.zeros([1, 1], tl.int32)
            uniform = slot_uniform(seed, index, noise_slot)
            position = (slot.to(tl.float64) + uniform) * (total.to(tl.float64) / num)
        drawn = first_above(sums, tl.minimum(position.to(tl.int64), total - 1), LEVELS)
    tl.store(drawn_ptr + row * num + slot, drawn.to(tl.int64), mask=mask)


def _launch_short(
    log_weights: Tensor, index: Tensor, seed: Tensor, num: int, scheme: int, drawn: Tensor, log_max: Tensor
) -> None:
    rows, n = log_weights.shape
    block, vector = max(next_power_of_2(n), 2), vector_of(log_weights)
    common = {
        "VECTOR": vector,
        "INT64": int64_offsets(log_weights, drawn),
        "BLOCK": block,
        "device": log_weights.device,
    }
    if num == 1:  # one draw, whatever the scheme
        width = min(block, _WIDTH)
        config = LaunchConfig(block_columns=block, block_rows=max(_TILE // width, 1), num_warps=4)
        launch(
            _draw_rows_kernel, (cdiv(rows, config.block_rows),),
            log_weights, index, seed, drawn, log_max, rows, n // vector, log_weights.stride(0) // vector,
            ROWS=config.block_rows, WIDTH=width, config=config, **common,
        )  # fmt: skip
        return
    out = min(next_power_of_2(num), max(block, _SHORT // 2))
    config = LaunchConfig(block_columns=block, block_rows=max(_SHORT // max(block, out), 1), num_warps=8)
    groups = cdiv(rows, config.block_rows)
    launch(
        _resample_rows_kernel, (groups * cdiv(num, out),),
        log_weights, index, seed, drawn, log_max,
        rows, n // vector, num, log_weights.stride(0) // vector, groups,
        SCHEME=scheme, ROWS=config.block_rows, LEVELS=block.bit_length() - 1, OUT=out, config=config,
        **common,
    )  # fmt: skip


def _launch_resample(
    log_weights: Tensor, index: Tensor, seed: Tensor, num: int, scheme: int
) -> tuple[Tensor, Tensor]:
    drawn, log_max = _resample_fake(log_weights, index, seed, num, scheme)
    if log_weights.stride(1) != 1:
        log_weights = log_weights.contiguous()
    if num == 1:
        scheme = MULTINOMIAL.value
    launcher = _launch_short if log_weights.shape[1] <= _SHORT else launch_long
    launcher(log_weights, index.contiguous(), seed, num, scheme, drawn, log_max)
    return drawn, log_max


def _resample_fake(
    log_weights: Tensor, index: Tensor, seed: Tensor, num: int, scheme: int
) -> tuple[Tensor, Tensor]:
    rows = log_weights.shape[0]
    return index.new_empty((rows, num)), log_weights.new_empty(rows)


def _resample_on_cpu(
    log_weights: Tensor, index: Tensor, seed: Tensor | int, num: int, scheme: int
) -> tuple[Tensor, Tensor]:
    """The reference, in blocks of rows that stay in the cache, except where it is being traced."""
    width = 1 if SCHEMES[scheme] == "systematic" else num
    few = max(1, _CACHED // max(log_weights.shape[1], num))
    if compiling() or log_weights.shape[0] <= few:
        return resample_reference(log_weights, num, SCHEMES[scheme], slot_uniforms(seed, index, width))
    pieces: list[tuple[Tensor, Tensor]] = []
    many = max(few, _NOISE // width)
    for weights, numbers in zip(log_weights.split(many), index.split(many), strict=True):
        uniforms = slot_uniforms(seed, numbers, width)
        blocks = zip(weights.split(few), uniforms.split(few), strict=True)
        pieces += [resample_reference(block, num, SCHEMES[scheme], noise) for block, noise in blocks]
    drawn, log_max = zip(*pieces, strict=True)
    return torch.cat(drawn), torch.cat(log_max)


_resample = register_op(
    "resample",
    "(Tensor log_weights, Tensor index, Tensor seed, int num, int scheme) -> (Tensor drawn, Tensor log_max)",
    launcher=_launch_resample,
    fake=_resample_fake,
    reference=_resample_on_cpu,
)


def require_weight(log_max: Tensor) -> None:
    """Raise where a row's largest log-weight is not finite, naming the row.

    While a graph is traced or captured the values cannot be read: the assertion then runs on the device.
    Tensors on the meta device have no values.
    """
    if log_max.is_meta:
        return
    finite = torch.isfinite(log_max)
    tracing = compiling()
    if tracing or (log_max.is_cuda and torch.cuda.is_current_stream_capturing()):
        torch.ops.aten._assert_async.msg(
            finite.all(), "log_weights: a row has no finite weight, or a weight of +inf"
        )
    elif not finite.all():
        row = int(finite.logical_not().nonzero()[0, 0])
        what = "+inf is not a log-weight" if log_max[row] > 0 else "no weight is finite"
        raise ValueError(f"log_weights: row {row}: {what}")


def check_rows(log_weights: Tensor, index: Tensor | None, seed: int | Tensor) -> tuple[Tensor, Tensor]:
    """`[rows, n]` and `[rows]` of what the user passed; TypeError or ValueError that names the argument."""
    if not isinstance(log_weights, Tensor) or log_weights.dtype not in (torch.float32, torch.float64):
        got = log_weights.dtype if isinstance(log_weights, Tensor) else type(log_weights).__name__
        raise TypeError(f"log_weights must be a float32 or float64 tensor, got {got}")
    for name, value in (("log_weights", log_weights), ("index", index), ("seed", seed)):
        if not compiling() and isinstance(value, Tensor) and is_batchedtensor(value):
            raise ValueError(f"{name} must not be batched by vmap: pass the batch as leading dimensions")
    if log_weights.ndim == 0 or log_weights.shape[-1] == 0:
        raise ValueError(f"log_weights must have shape [..., n] with n >= 1, got {tuple(log_weights.shape)}")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != log_weights.device:
            got = f"{seed.dtype} {tuple(seed.shape)} on {seed.device}"
            raise TypeError(
                f"seed must be an int, or int64 of one element on {log_weights.device}, got {got}"
            )
    elif not isinstance(seed, int):
        raise TypeError(f"seed must be an int or an int64 tensor of one element, got {type(seed).__name__}")
    elif not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    batch = log_weights.shape[:-1]
    rows = log_weights.detach().reshape(math.prod(batch), log_weights.shape[-1])
    if index is None:
        return rows, torch.arange(rows.shape[0], device=rows.device)
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be an int64 tensor, got {got}")
    if index.shape != batch and index.shape != (rows.shape[0],):
        raise ValueError(
            f"index must have shape {tuple(batch)} or [{rows.shape[0]}], got {tuple(index.shape)}"
        )
    if index.device != rows.device:
        raise ValueError(f"index must be on the device of log_weights, {rows.device}, got {index.device}")
    return rows, index.reshape(-1)


def no_kernel(log_weights: Tensor) -> str | None:
    """What the kernels cannot do, for `use_triton`."""
    return "float64 log_weights have no kernel" if log_weights.dtype == torch.float64 else None


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """The seed as the ops take it: int64 on the device, made without a copy from the host."""
    return seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device)


def resample(
    log_weights: Tensor,
    num: int,
    *,
    scheme: Scheme = "systematic",
    seed: int | Tensor = 0,
    index: Tensor | None = None,
) -> Tensor:
    """Draw `num` particles of each row in proportion to exp(log_weights).

    Every scheme draws particle i num·w_i times on average (w: normalised weights); systematic resampling
    within one of that, stratified within two, residual at least floor(num·w_i) times (up to the rounding of
    the weights, which are float32 relative to the row's largest). A particle with at least 2^-51 of its row's
    weight can be drawn; one of weight 0 never is. The slots of multinomial resampling are independent and in
    no order; those of stratified and systematic resampling ascend, those of residual resampling begin with
    the copies, ascending.

    Args:
        log_weights: float32 or float64 (which has no kernel) `[..., n]`, unnormalised; -inf and NaN have
            weight 0.
        num: slots per row, >= 0.
        scheme: "multinomial", "stratified", "systematic" or "residual"; the formulas are at the top of this
            file.
        seed: an int or an int64 tensor of one element.
        index: int64 `[...]` or flat `[rows]`, the rows' sample numbers for the noise; by default 0, 1, 2, ...
            A row draws the same particles whatever else is in the batch.

    Returns:
        int64 `[..., num]`, indices into the last dimension. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument; ValueError names the first row that has no finite weight,
            or a weight of +inf (a RuntimeError that does not name it under `torch.compile`, a device
            assertion in a captured graph). vmap is refused: the batch goes into the leading dimensions.
    """
    rows, index = check_rows(log_weights, index, seed)
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if not isinstance(num, int | torch.SymInt):
        raise TypeError(f"num must be an int, got {type(num).__name__}")
    if num < 0:
        raise ValueError(f"num must be at least 0, got {num}")
    shape = (*log_weights.shape[:-1], num)
    if num == 0 or rows.shape[0] == 0:
        return torch.zeros(shape, dtype=torch.int64, device=rows.device)
    number = SCHEMES.index(scheme)
    if use_triton(rows, unsupported=no_kernel(rows)):
        drawn, log_max = _resample(rows, index, seed_tensor(seed, rows.device), num, number)
    else:
        drawn, log_max = _resample_on_cpu(rows, index, seed, num, number)
    require_weight(log_max)
    return drawn.reshape(shape)


__all__ = ["SCHEMES", "Scheme", "resample", "resample_reference"]
