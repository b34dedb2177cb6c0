"""Counter-based noise: every number is a function of (seed, index, step, stream, column).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The 64-bit seed is
the key. The counter of the block that holds columns 4j..4j+3 is

    c0 = j    c1 = index[31:0]    c2 = step    c3 = stream | index[55:32] << 8

and its four words are the four columns. There is no global state: the noise of sample 41,233 is the same
whether it is drawn alone, in a batch of 65,536, or on another machine.

The numbers are drawn by a reference that torch.compile can trace, on the CPU outside it by `philox_cpu.py`,
tile by tile and with the reference's bits, and on a GPU by a kernel (others draw in registers by
`philox_device.py`), whose words and uniforms have these bits, whose normals and exponentials differ by the
rounding of logarithm, sine and cosine (normals by at most 1e-6).
"""

import enum
import math
from typing import Any, TypeAlias

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
from .philox_cpu import MASK, Kind, double_numbers, draw_on_cpu, numbers, philox_rounds, round_keys
from .philox_device import (
    exponential4,
    int64_of,
    interleave4,
    normal4,
    philox4x32,
    philox_words,
    uniform4,
    uniform_of,
)

Index: TypeAlias = Tensor | range
"""The samples' numbers: an int64 tensor `[N]`, or a `range` of step 1, which costs no memory."""


class Stream(enum.IntEnum):
    """What the noise is for. Two streams never share a counter, so their numbers are independent."""

    PROPOSAL = 0
    LANGEVIN = 1
    ACCEPTANCE = 2
    SELECTION = 3
    DATA_ORDER = 4
    POSTERIOR = 5
    INTERPOLATION = 6
    INITIAL = 7
    DECODER = 8
    BOOTSTRAP = 9


# --- the reference ------------------------------------------------------------------------------------------


def draw_reference(
    index: Tensor,
    rows: int | None,
    seed_tensor: Tensor | None,
    seed: int,
    step_tensor: Tensor | None,
    step: int,
    kind: int,
    stream: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """What the kernel computes, in torch operations that torch.compile fuses into one loop.

    The arguments are the op's: `index` is `[N]`, or the first of `rows` consecutive numbers; `seed` and
    `step` count where their tensors are None.
    """
    device = index.device
    if rows is not None:
        index = index + torch.arange(rows, device=device)
    # torch.full and not torch.tensor: no copy from the host, which a graph capture forbids.
    key = (
        torch.full((), seed, dtype=torch.int64, device=device)
        if seed_tensor is None
        else seed_tensor.reshape(())
    )
    steps = torch.full((1,), step, dtype=torch.int64, device=device) if step_tensor is None else step_tensor
    index = index[:, None]
    words = philox_rounds(
        torch.arange(cdiv(width, 4), device=device)[None, :],
        index & MASK,
        (steps & MASK).reshape(-1, 1),
        ((index >> 32) << 8) | stream,
        round_keys(key & MASK, (key >> 32) & MASK),
    )
    # Four planes until the very end: Inductor then computes a block once, not once for each of its columns.
    columns = (double_numbers if dtype == torch.float64 else numbers)(kind, words)
    return torch.stack(columns, dim=-1).flatten(1)[:, :width].to(dtype).contiguous()


def _fill_on_cpu(out: Tensor, index: Tensor, *rest: Any) -> None:
    arguments: Any = (index, *rest, out.shape[1], out.dtype)
    draw_on_cpu(*arguments, out=out)


# --- the kernel, the ops ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "step"])
def fill_kernel(
    out_ptr,
    index_ptr,
    seed,
    step,
    rows,
    width,
    KIND: tl.constexpr,
    STREAM: tl.constexpr,
    CONSECUTIVE: tl.constexpr,
    SEED_IN_MEMORY: tl.constexpr,
    STEP_IN_MEMORY: tl.constexpr,
    STEP_PER_ROW: tl.constexpr,
    UNIT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A tile of BLOCK_ROWS x BLOCK_COLUMNS numbers: writes each element of `out` once, reads the index.

    Bytes per element: the element itself (and 8 bytes a row for an index in memory).

    Args:
        out_ptr: `[rows, width]`, contiguous; int64 for words, else a float type. Programs share no element.
        index_ptr: int64 `[rows]`, or where CONSECUTIVE the first of `rows` consecutive numbers.
        seed: an int, or where SEED_IN_MEMORY a pointer to an int64.
        step: an int, or where STEP_IN_MEMORY a pointer to an int64, or where STEP_PER_ROW to `[rows]`.
        KIND: 0 words, 1 uniforms, 2 normals, 3 exponentials.
        UNIT: a power of two that divides `width`: what makes 16-byte stores legal.
    """
    tiles = tl.cdiv(width, BLOCK_COLUMNS)
    program = tl.program_id(0)
    top, left = program // tiles, (program % tiles) * BLOCK_COLUMNS
    if INT64:
        top = top.to(tl.int64)
    row = top * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    if CONSECUTIVE:
        index = tl.load(index_ptr) + row.to(tl.int64)
    else:
        index = tl.load(index_ptr + row, mask=inside, other=0)
    if STEP_PER_ROW:
        steps = tl.load(step + row, mask=inside, other=0)[:, None]
    else:
        steps = int64_of(step, STEP_IN_MEMORY)
    block = left // 4 + tl.arange(0, BLOCK_COLUMNS // 4)
    w0, w1, w2, w3 = philox_words(
        int64_of(seed, SEED_IN_MEMORY), index[:, None], steps, STREAM, block[None, :]
    )
    if KIND == 0:
        values = interleave4(w0, w1, w2, w3)
    else:
        if KIND == 1:
            a, b, c, d = uniform4(w0, w1, w2, w3)
        elif KIND == 2:
            a, b, c, d = normal4(w0, w1, w2, w3)
        else:
            a, b, c, d = exponential4(w0, w1, w2, w3)
        values = interleave4(a, b, c, d)
    column = left + tl.arange(0, BLOCK_COLUMNS)
    # The product tells the compiler that a row starts at a multiple of UNIT.
    extent = width // UNIT * UNIT
    mask = inside[:, None] & (column < extent)[None, :]
    tl.store(
        out_ptr + (row * extent)[:, None] + column[None, :], values.to(out_ptr.dtype.element_ty), mask=mask
    )


def fill_config(rows: int, width: int) -> LaunchConfig:
    """Tiles of 2048 numbers in 4 warps: four blocks a thread, which share the round keys."""
    columns = min(max(next_power_of_2(width), 4), 2048)
    block_rows = min(2048 // columns, next_power_of_2(rows))
    return LaunchConfig(block_columns=columns, block_rows=block_rows, num_warps=4)


def _launch_fill(
    out: Tensor,
    index: Tensor,
    rows: int | None,
    seed_tensor: Tensor | None,
    seed: int,
    step_tensor: Tensor | None,
    step: int,
    kind: int,
    stream: int,
) -> None:
    count, width = out.shape
    config = fill_config(count, width)
    launch(
        fill_kernel,
        (cdiv(count, config.block_rows) * cdiv(width, config.block_columns),),
        out,
        index.contiguous(),
        seed if seed_tensor is None else seed_tensor,
        step if step_tensor is None else step_tensor.contiguous(),
        count,
        width,
        KIND=kind,
        STREAM=stream,
        CONSECUTIVE=rows is not None,
        SEED_IN_MEMORY=seed_tensor is not None,
        STEP_IN_MEMORY=step_tensor is not None,
        STEP_PER_ROW=step_tensor is not None and step_tensor.numel() > 1,
        UNIT=math.gcd(width, 16),
        INT64=int64_offsets(out.numel()),
        BLOCK_ROWS=config.block_rows,
        BLOCK_COLUMNS=config.block_columns,
        config=config,
        device=out.device,
    )


def _launch_draw(index: Tensor, rows: int | None, *rest: Any) -> Tensor:
    out = _empty(index, rows, rest[-2], rest[-1])
    _launch_fill(out, index, rows, *rest[:-2])
    return out


def _empty(index: Tensor, rows: int | None, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((index.shape[0] if rows is None else rows, width), dtype=dtype, device=index.device)


_ARGUMENTS = (
    "Tensor index, SymInt? rows, Tensor? seed_tensor, SymInt seed, Tensor? step_tensor, SymInt step, "
    "int kind, int stream"
)
_draw = register_op(
    "philox",
    f"({_ARGUMENTS}, SymInt width, ScalarType dtype) -> Tensor",
    launcher=_launch_draw,
    reference=draw_on_cpu,
    fake=lambda index, rows, *rest: _empty(index, rows, rest[-2], rest[-1]),
)
_fill = register_op(
    "philox_fill",
    f"(Tensor(a!) out, {_ARGUMENTS}) -> ()",
    launcher=_launch_fill,
    reference=_fill_on_cpu,
    fake=lambda *arguments: None,
)


# --- the public functions -----------------------------------------------------------------------------------


def _integer(name: str, value: int | Tensor, counts: tuple[int, ...], device: torch.device) -> None:
    """Checks the type of a seed or a step."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() not in counts:
            allowed = " or ".join(str(count) for count in dict.fromkeys(counts))
            got = f"{value.dtype} {tuple(value.shape)}"
            raise TypeError(f"{name} must be an int or an int64 tensor of {allowed} elements, got {got}")
        if value.device != device:
            raise ValueError(f"{name} must be on the index's device {device}, got {value.device}")
    elif not isinstance(value, int):
        raise TypeError(f"{name} must be an int or an int64 tensor, got {type(value).__name__}")


def _noise(
    kind: Kind,
    seed: int | Tensor,
    index: Index,
    step: int | Tensor,
    stream: int,
    width: int,
    dtype: torch.dtype | None,
    out: Tensor | None,
    device: torch.device | str | None,
) -> Tensor:
    """Checks the arguments and takes one of the three drivers."""
    if out is not None and not isinstance(out, Tensor):
        raise TypeError(f"out must be None or a tensor, got {type(out).__name__}")
    rows = None
    if isinstance(index, range):
        if index.step != 1 or (len(index) > 0 and not 0 <= index[0] <= index[-1] < 1 << 56):
            raise ValueError(f"index must be a range of step 1 within [0, 2^56), got {index}")
        rows = len(index)
        device = device if device is not None else "cpu" if out is None else out.device
        first = torch.full((1,), index.start, dtype=torch.int64, device=device)
    elif not isinstance(index, Tensor) or index.dtype != torch.int64 or index.ndim != 1:
        got = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be an int64 tensor of shape [N] or a range, got {got}")
    else:
        if device is not None and torch.device(device).type != index.device.type:
            raise ValueError(f"device must be the index's device {index.device} or None, got {device}")
        first = index
    count = first.shape[0] if rows is None else rows
    _integer("seed", seed, (1,), first.device)
    _integer("step", step, (1, count), first.device)
    if not isinstance(seed, Tensor) and not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    if not isinstance(step, Tensor) and not 0 <= step <= MASK:
        raise ValueError(f"step must be in [0, 2^32), got {step}")
    for name, number in (("stream", stream), ("width", width)):
        if not isinstance(number, int | torch.SymInt):
            raise TypeError(f"{name} must be an int, got {type(number).__name__}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be None or a torch.dtype, got {type(dtype).__name__}")
    if not 0 <= stream < 256:
        raise ValueError(f"stream must be in [0, 256), got {stream}")
    if not 0 <= width < 1 << 34:
        raise ValueError(f"width must be in [0, 2^34), got {width}")
    if kind == Kind.WORDS:
        dtype = torch.int64
    else:
        dtype = dtype or (torch.float32 if out is None else out.dtype)
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating type, got {dtype}")
    if out is not None and (out.shape != (count, width) or out.dtype != dtype or out.device != first.device):
        wanted = f"{dtype} [{count}, {width}] on {first.device}"
        raise ValueError(f"out must be {wanted}, got {out.dtype} {tuple(out.shape)} on {out.device}")
    if out is not None and not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    seed_tensor, seed_number = (seed, 0) if isinstance(seed, Tensor) else (None, seed)
    step_tensor, step_number = (step, 0) if isinstance(step, Tensor) else (None, step)
    arguments = (first, rows, seed_tensor, seed_number, step_tensor, step_number, int(kind), int(stream))
    unsupported = "float64 has no kernel" if dtype == torch.float64 else None
    on_cpu = first.device.type == "cpu"
    if use_triton(first, unsupported=unsupported) or (on_cpu and not compiling()):
        if out is None:
            return _draw(*arguments, width, dtype)
        _fill(out, *arguments)
        return out
    drawn = draw_reference(*arguments, width, dtype)
    return drawn if out is None else out.copy_(drawn)


def words(
    seed: int | Tensor,
    index: Index,
    step: int | Tensor,
    stream: int,
    width: int,
    *,
    out: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The raw 32-bit words, int64 `[N, width]` in [0, 2^32). Arguments as for `normal`."""
    return _noise(Kind.WORDS, seed, index, step, stream, width, None, out, device)


def normal(
    seed: int | Tensor,
    index: Index,
    step: int | Tensor,
    stream: int,
    width: int,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals, |normal| <= 6.76: Box-Muller on the first and the last two words of each block.

    Args:
        seed: 64-bit seed, an int or an int64 tensor of one element (a tensor may change between replays of
            a captured graph; a Python int is frozen there).
        index: int64 `[N]`, the samples' numbers, 0 <= index < 2^56; or a `range` of step 1.
        step: Langevin step or proposal number, in [0, 2^32): an int, or an int64 tensor of 1 or N elements.
        stream: a `Stream`.
        width: columns per sample.
        dtype: float32 by default; bfloat16 and float16 round the float32 number; float64 evaluates the same
            words in double precision (on a GPU by the reference, which no kernel replaces).
        out: contiguous `[N, width]`, where to write.
        device: where to draw, for an index that is a range: `out`'s device, or the CPU, by default.

    Returns:
        `[N, width]` of `dtype`, contiguous. No gradient.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    return _noise(Kind.NORMAL, seed, index, step, stream, width, dtype, out, device)


def uniform(
    seed: int | Tensor,
    index: Index,
    step: int | Tensor,
    stream: int,
    width: int,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniforms (word + 0.5)·2^-32, `[N, width]` in (0, 1]. Arguments as for `normal`.

    Never 0 in float32, float64 or bfloat16; in float16 what is below 2^-25 becomes 0.
    """
    return _noise(Kind.UNIFORM, seed, index, step, stream, width, dtype, out, device)


def exponential(
    seed: int | Tensor,
    index: Index,
    step: int | Tensor,
    stream: int,
    width: int,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard exponentials -log(1 - uniform), `[N, width]`, accurate relative to their size at both ends.

    `(exponential / weight).argmin()` is a categorical draw (the Gumbel-max race), which the small values win.
    Arguments as for `normal`.
    """
    return _noise(Kind.EXPONENTIAL, seed, index, step, stream, width, dtype, out, device)


__all__ = [
    "Index",
    "Stream",
    "draw_reference",
    "exponential",
    "exponential4",
    "int64_of",
    "interleave4",
    "normal",
    "normal4",
    "philox4x32",
    "philox_rounds",
    "philox_words",
    "uniform",
    "uniform4",
    "uniform_of",
    "words",
]
