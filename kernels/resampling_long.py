"""Resampling one long row: the row in blocks, and the device functions that it shares with short rows.

A long row is read twice (`resampling.py` says what is computed, and why in which precision): first for its
blocks' sums; then, when `num` slots have been dealt out to the blocks, for the draws. The ordered schemes
fill a block's slots from the block, which is read again; multinomial draws, in no order, are looked up in
stored sums. Residual resampling sums three times: the weights, the copies, and what the copies leave.
"""

import torch
from torch import Tensor

from .launch import LaunchConfig, cdiv, int64_offsets, launch, next_power_of_2, tl, triton
from .philox import Stream, philox_words

# A block of a long row, and the slots that a program fills at most.
_BLOCK = 2048
_CHUNK = 2 * _BLOCK
# One unit of the kernels' fixed point; 2048 weights of at most 1 stay below 2^62.
_UNIT = tl.constexpr(2.0**-51)
_PER_UNIT = tl.constexpr(2.0**51)

MULTINOMIAL, STRATIFIED, SYSTEMATIC, RESIDUAL = (
    tl.constexpr(0),
    tl.constexpr(1),
    tl.constexpr(2),
    tl.constexpr(3),
)
# What a long row is summed of, and which of its slots are searched for.
_WEIGHTS, _COPIES, _REST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_SELECTION = tl.constexpr(int(Stream.SELECTION))


def vector_of(log_weights: Tensor) -> int:
    """4 where every row of `[rows, n]` begins and ends at a multiple of 4 elements, else 1.

    Kernels take n and the row stride divided by it, and multiply: so the compiler knows, and reads 16 bytes
    at once.
    """
    return 4 if log_weights.shape[1] % 4 == 0 and log_weights.stride(0) % 4 == 0 else 1


@triton.jit
def load_log_weights(pointer, mask):
    """NaN and what is masked have weight 0."""
    log_weights = tl.load(pointer, mask=mask, other=-float("inf"))
    return tl.where(log_weights == log_weights, log_weights, -float("inf"))


@triton.jit
def relative_weights(log_weights, log_max):
    """exp(log_weight - log_max): at most 1, and 0 in a row or block without a weight."""
    return tl.exp(log_weights - tl.where(log_max == -float("inf"), 0.0, log_max))


@triton.jit
def fixed_point(values):
    """Fixed point; what is below one unit is 0."""
    return (values * _PER_UNIT).to(tl.int64)


@triton.jit
def _uniform52(first, second):
    bits = (first.to(tl.int64) << 20) | (second.to(tl.int64) >> 12)
    return (bits.to(tl.float64) + 0.5) * (1.0 / 4503599627370496.0)


@triton.jit
def slot_uniform(seed, index, slot):
    """float64: the uniform of each slot, from half of a block of the row's noise."""
    w0, w1, w2, w3 = philox_words(seed, index, tl.full((), 0, tl.int64), _SELECTION, slot >> 1)
    odd = (slot & 1) == 1
    return _uniform52(tl.where(odd, w2, w0), tl.where(odd, w3, w1))


@triton.jit
def first_above(sums, position, LEVELS: tl.constexpr):
    """The first i with sums_i > position, row by row: `[R, 2^LEVELS]` and `[R, K]` give int32 `[R, K]`.

    By bisection; every position is below its row's last sum. Flat, because a gather of one dimension goes
    through shared memory; of two it becomes a number of shuffles that grows with the square of the row.
    """
    rows: tl.constexpr = sums.shape[0]
    block: tl.constexpr = sums.shape[1]
    slots: tl.constexpr = position.shape[1]
    begin = tl.reshape(
        tl.arange(0, rows)[:, None] * block + tl.zeros([rows, slots], tl.int32), [rows * slots]
    )
    flat_sums, flat_position = tl.reshape(sums, [rows * block]), tl.reshape(position, [rows * slots])
    found = begin
    for level in tl.static_range(LEVELS):
        probe = tl.gather(flat_sums, found + ((block >> (level + 1)) - 1), 0)
        found += tl.where(probe <= flat_position, block >> (level + 1), 0)
    return tl.reshape(found - begin, [rows, slots])


@triton.jit
def _block_sums_kernel(
    log_weights_ptr, row_max_ptr, row_total_ptr, block_max_ptr, block_total_ptr, sums_ptr,
    n, num, stride, blocks,
    KIND: tl.constexpr, STORE: tl.constexpr, VECTOR: tl.constexpr, INT64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of one block of a long row: of its weights, of its copies, or of what they leave.

    log_weights_ptr float32 [rows, n], row stride `stride`, both in units of VECTOR; row_max_ptr float32
    [rows] and row_total_ptr float64 [rows], the largest log-weight and the sum relative to it, are read for
    copies and rest only. Program (row, block) alone writes its element of block_max_ptr, float32, and of
    block_total_ptr, int64 [rows, blocks]: fixed point relative to block_max, except copies, which are
    counted; with STORE also its block of sums_ptr, int64 [rows, blocks·BLOCK]. Bytes a particle: 4 read; 8
    written with STORE.
    """
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    row = program // blocks
    if INT64:
        n = tl.full((), n, tl.int64)
    lane = tl.arange(0, BLOCK)
    column = (program % blocks) * BLOCK + lane
    log_weights = load_log_weights(log_weights_ptr + row * (stride * VECTOR) + column, column < n * VECTOR)
    if KIND == _WEIGHTS:
        log_max = tl.max(log_weights, axis=0)
        tl.store(block_max_ptr + program, log_max)
        units = fixed_point(relative_weights(log_weights, log_max))
    else:
        weights = relative_weights(log_weights, tl.load(row_max_ptr + row)).to(tl.float64)
        share = weights * (tl.full((), num, tl.float64) / tl.load(row_total_ptr + row))
        units = share.to(tl.int64)
        if KIND == _REST:
            units = fixed_point(share - units.to(tl.float64))
    tl.store(block_total_ptr + program, tl.sum(units, axis=0))
    if STORE:
        tl.store(sums_ptr + program * BLOCK + lane, tl.cumsum(units, axis=0))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _deal_kernel(
    block_max_ptr, block_total_ptr, index_ptr, seed_ptr,
    row_max_ptr, row_total_ptr, scale_ptr, block_end_ptr, slot_end_ptr, extra_end_ptr, num, blocks,
    SCHEME: tl.constexpr, KIND: tl.constexpr, CHUNK: tl.constexpr, INT64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where each block of a row ends, in the sum of the row's weights and among its slots.

    Program `row` alone reads and writes its row. Read: block_max_ptr float32 (for weights only),
    block_total_ptr int64, both [rows, blocks]; index_ptr int64 [rows]; seed_ptr int64 [1]. Written:
    row_max_ptr float32 (for weights only) and row_total_ptr float64, [rows]; and, [rows, blocks], scale_ptr
    float64, the value of a unit of the block's sums; block_end_ptr float64, which does not fall and rises in
    blocks with a weight only; for the ordered schemes slot_end_ptr int64, the number of slots whose position
    is below block_end, and extra_end_ptr int64, the running number of chunks beyond the first that the
    blocks' slots fill.
    """
    row = tl.program_id(0)
    if INT64:
        row = row.to(tl.int64)
    first = row * blocks
    lane = tl.arange(0, BLOCK)
    log_max = tl.full([BLOCK], 0.0, tl.float32)
    if KIND == _WEIGHTS:
        log_max -= float("inf")
        for start in range(0, blocks, BLOCK):
            block = start + lane
            log_max = tl.maximum(
                log_max, tl.load(block_max_ptr + first + block, mask=block < blocks, other=-float("inf"))
            )
    row_max = tl.max(log_max, axis=0)
    shift = tl.where(row_max == -float("inf"), 0.0, row_max)
    total = tl.zeros([BLOCK], tl.float64)
    last_alive = tl.full([BLOCK], -1, tl.int32)
    for start in range(0, blocks, BLOCK):
        block = start + lane
        block_total = tl.load(block_total_ptr + first + block, mask=block < blocks, other=0)
        scale = tl.full([BLOCK], 1.0, tl.float64)
        if KIND == _WEIGHTS:
            block_max = tl.load(block_max_ptr + first + block, mask=block < blocks, other=-float("inf"))
            scale = tl.exp((block_max - shift).to(tl.float64))
        if KIND != _COPIES:
            scale *= _UNIT
        tl.store(scale_ptr + first + block, scale, mask=block < blocks)
        total += block_total.to(tl.float64) * scale
        last_alive = tl.where(block_total > 0, block, last_alive)
    row_total = tl.sum(total, axis=0)
    alive = tl.max(last_alive, axis=0)
    if KIND == _WEIGHTS:
        tl.store(row_max_ptr + row, row_max)
    tl.store(row_total_ptr + row, row_total)

    slots = tl.full((), num, tl.int64)
    seed, index = tl.load(seed_ptr), tl.load(index_ptr + row)
    end_before = tl.full((), 0.0, tl.float64)
    slots_before = tl.full((), 0, tl.int64)
    extra_before = tl.full((), 0, tl.int64)
    for start in range(0, blocks, BLOCK):
        block = start + lane
        block_total = tl.load(block_total_ptr + first + block, mask=block < blocks, other=0)
        scale = tl.load(scale_ptr + first + block, mask=block < blocks, other=0.0)
        # The scan adds in a tree, where a sum may fall by a rounding: only weights may raise it.
        end = end_before + tl.cumsum(block_total.to(tl.float64) * scale, axis=0)
        end = tl.associative_scan(tl.where(block_total > 0, end, end_before), 0, _larger)
        tl.store(block_end_ptr + first + block, end, mask=block < blocks)
        end_before = tl.max(end, axis=0)
        if (SCHEME == STRATIFIED) | (SCHEME == SYSTEMATIC):
            # Slot j lies below a position x, counted in slots, if j + u_j < x.
            x = end * (slots.to(tl.float64) / row_total)
            whole = tl.maximum(tl.minimum(x.to(tl.int64), slots - 1), 0)
            noise_slot = whole if SCHEME == STRATIFIED else tl.zeros([1], tl.int64)
            below = whole + (slot_uniform(seed, index, noise_slot) < x - whole.to(tl.float64)).to(tl.int64)
            slot_end = tl.where(block >= alive, slots, below)
            before = tl.gather(slot_end, tl.maximum(lane - 1, 0), 0)
            before = tl.where(lane == 0, slots_before, before)
            extra = tl.maximum((slot_end - before + (CHUNK - 1)) // CHUNK - 1, 0)
            extra_end = extra_before + tl.cumsum(extra, axis=0)
            tl.store(slot_end_ptr + first + block, slot_end, mask=block < blocks)
            tl.store(extra_end_ptr + first + block, extra_end, mask=block < blocks)
            slots_before = tl.max(slot_end, axis=0)
            extra_before = tl.max(extra_end, axis=0)


@triton.jit
def _bisect(pointer, position, count, LEVELS: tl.constexpr):
    """The first i with pointer[i] > position, or count - 1 if there is none; count <= 2^LEVELS."""
    # Not `position * 0`: of a row without a weight the position is NaN.
    found = tl.where(position == position, 0, 0)
    for level in tl.static_range(LEVELS):
        probe = found + ((1 << (LEVELS - 1 - level)) - 1)
        inside = probe < count - 1
        passed = inside & (tl.load(pointer + probe, mask=inside, other=0) <= position)
        found = tl.where(passed, probe + 1, found)
    return found


@triton.jit
def _fill_kernel(
    log_weights_ptr, index_ptr, seed_ptr, row_total_ptr, scale_ptr, block_end_ptr, slot_end_ptr,
    extra_end_ptr, drawn_ptr, n, num, stride, blocks, programs,
    SCHEME: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr, INT64: tl.constexpr,
    BLOCK: tl.constexpr, LEVELS: tl.constexpr, BLOCK_LEVELS: tl.constexpr,
):  # fmt: skip
    """Up to CHUNK of the slots that fall to one block of a long row, for the ordered schemes.

    log_weights_ptr float32 [rows, n], row stride `stride`, both in units of VECTOR; index_ptr, seed_ptr and
    the arrays of `_deal_kernel` are read. Of the `programs` of a row, the first `blocks` take the first chunk
    of their block; the others, most of which find nothing to do, take the further chunks, so that no program
    has much work where one particle takes all slots. The slots of different blocks and chunks are disjoint,
    and each is written once in drawn_ptr, int64 [rows, num]. Bytes: 4 a particle read for each chunk of its
    block, 8 a slot written.
    """
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    row = program // programs
    block = (program % programs).to(tl.int32)
    first = row * blocks
    chunk = tl.full((), 0, tl.int64)
    if block >= blocks:
        extra = (block - blocks).to(tl.int64)
        if extra >= tl.load(extra_end_ptr + first + blocks - 1):
            return
        block = _bisect(extra_end_ptr + first, extra, blocks, BLOCK_LEVELS)
        chunk = 1 + extra - tl.load(extra_end_ptr + first + block - 1, mask=block > 0, other=0)
    slot_begin = tl.load(slot_end_ptr + first + block - 1, mask=block > 0, other=0) + chunk * CHUNK
    slot_end = tl.minimum(tl.load(slot_end_ptr + first + block), slot_begin + CHUNK)
    if slot_begin >= slot_end:
        return
    if INT64:
        n = tl.full((), n, tl.int64)
        block = block.to(tl.int64)
    column = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    log_weights = load_log_weights(log_weights_ptr + row * (stride * VECTOR) + column, column < n * VECTOR)
    sums = tl.cumsum(
        fixed_point(relative_weights(log_weights, tl.max(log_weights, axis=1, keep_dims=True))), axis=1
    )
    total = tl.max(sums, axis=1, keep_dims=True)
    begin = tl.load(block_end_ptr + first + block - 1, mask=block > 0, other=0.0)
    per_unit = 1.0 / tl.load(scale_ptr + first + block)
    per_slot = tl.load(row_total_ptr + row) / num
    seed, index = tl.load(seed_ptr), tl.load(index_ptr + row)
    for start in range(0, (slot_end - slot_begin).to(tl.int32), BLOCK):
        slot = slot_begin + start + tl.arange(0, BLOCK)[None, :]
        noise_slot = slot if SCHEME == STRATIFIED else tl.zeros([1, 1], tl.int64)
        position = (slot.to(tl.float64) + slot_uniform(seed, index, noise_slot)) * per_slot
        position = tl.maximum((position - begin) * per_unit, 0.0).to(tl.int64)
        drawn = block * BLOCK + first_above(sums, tl.minimum(position, total - 1), LEVELS)
        tl.store(drawn_ptr + row * num + slot, drawn.to(tl.int64), mask=slot < slot_end)


@triton.jit
def _search_kernel(
    index_ptr, seed_ptr, copied_ptr, row_total_ptr, scale_ptr, block_end_ptr, block_total_ptr, sums_ptr,
    drawn_ptr, num, blocks, tiles,
    KIND: tl.constexpr, INT64: tl.constexpr, OUT: tl.constexpr,
    BLOCK: tl.constexpr, LEVELS: tl.constexpr, BLOCK_LEVELS: tl.constexpr,
):  # fmt: skip
    """OUT slots of a long row, each looked up among the blocks and then in its block.

    index_ptr, seed_ptr, the arrays of `_deal_kernel` and `_block_sums_kernel` (with STORE) are read.
    Weights: every slot draws. Copies: slots below the row's copied_ptr, float64 [rows], take their copy.
    Rest: the others draw. Program (row, tile) alone writes its slots in drawn_ptr, int64 [rows, num]; the
    launch for the rest writes those that the launch for the copies does not. Bytes a slot: 8 written, and
    about 32 from each of a few cached and LEVELS/2 uncached look-ups.
    """
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    row = program // tiles
    first = row * blocks
    slot = (program % tiles) * OUT + tl.arange(0, OUT)
    mask = slot < num
    row_total = tl.load(row_total_ptr + row)
    if KIND == _COPIES:
        mask = mask & (slot < tl.load(copied_ptr + row))
        position = slot.to(tl.float64)
    else:
        if KIND == _REST:
            mask = mask & (slot >= tl.load(copied_ptr + row))
        position = slot_uniform(tl.load(seed_ptr), tl.load(index_ptr + row), slot) * row_total
    last_end = tl.load(block_end_ptr + first + blocks - 1)
    position = tl.minimum(position, last_end * (1.0 - 2.0**-53))
    block = _bisect(block_end_ptr + first, position, blocks, BLOCK_LEVELS)
    begin = tl.load(block_end_ptr + first + block - 1, mask=block > 0, other=0.0)
    scale = tl.load(scale_ptr + first + block)
    local = tl.maximum((position - begin) / scale, 0.0).to(tl.int64)
    local = tl.minimum(local, tl.load(block_total_ptr + first + block) - 1)
    found = _bisect(sums_ptr + (first + block) * BLOCK, local, BLOCK, LEVELS)
    tl.store(drawn_ptr + row * num + slot, block.to(tl.int64) * BLOCK + found, mask=mask)


def launch_long(
    log_weights: Tensor, index: Tensor, seed: Tensor, num: int, scheme: int, drawn: Tensor, log_max: Tensor
) -> None:
    rows, n = log_weights.shape
    blocks, vector = cdiv(n, _BLOCK), vector_of(log_weights)
    device = log_weights.device
    config = LaunchConfig(block_columns=_BLOCK, num_warps=4)
    deal_config = LaunchConfig(block_columns=min(max(next_power_of_2(blocks), 2), 2048), num_warps=8)
    fill_config = LaunchConfig(block_columns=_BLOCK, num_warps=8)
    levels = {"LEVELS": _BLOCK.bit_length() - 1, "BLOCK_LEVELS": next_power_of_2(blocks).bit_length() - 1}
    common = {"INT64": int64_offsets(log_weights, drawn, rows * blocks * _BLOCK), "device": device}
    ordered = scheme in (STRATIFIED.value, SYSTEMATIC.value)

    def per_block(dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, blocks), dtype=dtype, device=device)

    def deal(kind: int, store: bool) -> tuple[Tensor, ...]:
        """The launches that sum a row: total; by block scale, end, slot end, extra end, total; sums."""
        block_max, block_total = per_block(torch.float32), per_block(torch.int64)
        width = rows * blocks * _BLOCK if store else 0
        sums = torch.empty(width, dtype=torch.int64, device=device)
        launch(
            _block_sums_kernel, (rows * blocks,),
            log_weights, log_max, weight_total, block_max, block_total, sums,
            n // vector, num, log_weights.stride(0) // vector, blocks,
            KIND=kind, VECTOR=vector, STORE=store, BLOCK=_BLOCK, config=config, **common,
        )  # fmt: skip
        total = torch.empty(rows, dtype=torch.float64, device=device)
        scale, block_end = per_block(torch.float64), per_block(torch.float64)
        slot_end, extra_end = (per_block(torch.int64) if ordered else block_total for _ in range(2))
        launch(
            _deal_kernel, (rows,),
            block_max, block_total, index, seed, log_max, total, scale, block_end, slot_end, extra_end,
            num, blocks, SCHEME=scheme, KIND=kind, CHUNK=_CHUNK, BLOCK=deal_config.block_columns,
            config=deal_config, **common,
        )  # fmt: skip
        return total, scale, block_end, slot_end, extra_end, block_total, sums

    def search(kind: int, copied: Tensor, deals: tuple[Tensor, ...]) -> None:
        total, scale, block_end, _, _, block_total, sums = deals
        tiles = cdiv(num, _BLOCK // 2)
        launch(
            _search_kernel, (rows * tiles,),
            index, seed, copied, total, scale, block_end, block_total, sums, drawn, num, blocks, tiles,
            KIND=kind, OUT=_BLOCK // 2, BLOCK=_BLOCK, config=config, **levels, **common,
        )  # fmt: skip

    weight_total = torch.empty(rows, dtype=torch.float64, device=device)
    deals = deal(_WEIGHTS.value, scheme == MULTINOMIAL.value)
    weight_total = deals[0]
    if ordered:
        programs = blocks + cdiv(num, _CHUNK)
        launch(
            _fill_kernel, (rows * programs,),
            log_weights, index, seed, *deals[:5], drawn,
            n // vector, num, log_weights.stride(0) // vector, blocks, programs,
            SCHEME=scheme, VECTOR=vector, CHUNK=_CHUNK, BLOCK=_BLOCK, config=fill_config, **levels, **common,
        )  # fmt: skip
    elif scheme == MULTINOMIAL.value:
        search(_WEIGHTS.value, weight_total, deals)
    else:
        copies = deal(_COPIES.value, True)
        search(_COPIES.value, copies[0], copies)
        rest = deal(_REST.value, True)
        search(_REST.value, copies[0], rest)


__all__ = [
    "MULTINOMIAL",
    "RESIDUAL",
    "STRATIFIED",
    "SYSTEMATIC",
    "first_above",
    "fixed_point",
    "launch_long",
    "load_log_weights",
    "relative_weights",
    "slot_uniform",
    "vector_of",
]
