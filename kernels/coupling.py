"""Affine coupling: the elementwise map of a normalizing flow and its log-determinant, in one pass each way.

RealNVP (Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", ICLR 2017, equations 7 and 8),
with the soft clamp c·tanh(s/c) that keeps the scales bounded. What computes `log_scale` and `shift`, and
which half of a vector they came from, is the caller's affair.

What must be moved, in elements of the input's type: 4 in either map (three read, one written); 5 in the
backward of the forward map, whose gradient of `shift` is the gradient of `y`; 6 in the backward of the
inverse, and of either map with a mask. A mask that all rows share stays in the cache.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_bool, check_clamp
from .coupling_cpu import affine_coupling_on_cpu
from .coupling_reference import affine_coupling_backward_reference, affine_coupling_reference
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
from .mlp_cpu import plain_on_cpu
from .mlp_device import tanh

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@triton.jit
def _at(pointer, row, column, row_step, outer_step, inner_step, RUN: tl.constexpr, VECTOR: tl.constexpr):
    """Addresses `[ROWS, BLOCK]`; a row is runs of RUN elements, or one run where RUN is 0.

    VECTOR, where it is above 1, has them accessed in groups of that many columns, though more are adjacent.
    """
    within = column * inner_step
    if RUN > 0:
        within = (column // RUN) * outer_step + (column % RUN) * inner_step
    if VECTOR > 1:
        within = tl.max_contiguous(within, VECTOR)
    return pointer + row[:, None] * row_step + within[None, :]


@triton.jit(do_not_specialize=["rows"])
def _coupling_kernel(
    x_ptr, log_scale_ptr, shift_ptr, mask_ptr, y_ptr, log_det_ptr,
    clamp, rows, columns,
    x_row, x_outer, x_inner, s_row, s_outer, s_inner, t_row, t_outer, t_inner,
    m_row, m_outer, m_inner, y_row, y_outer, y_inner,
    INVERSE: tl.constexpr, CLAMPED: tl.constexpr, MASKED: tl.constexpr,
    RUN: tl.constexpr, MASK_RUN: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr,
    INT64: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Either map and its log-determinant.

    Program i owns rows i·ROWS to (i+1)·ROWS - 1: it alone writes these rows of y and of log_det, and walks
    along them in blocks of BLOCK columns. No two programs touch the same output.
    Per element: 3 reads and 1 write of the input's type (16 bytes in float32, 8 in 16-bit types), and a byte
    of the mask from the cache. Per row: 4 bytes of log_det.

    Args:
        x_ptr, log_scale_ptr, shift_ptr: `[rows, columns]`, read. Their strides are (row, outer, inner).
        mask_ptr: uint8, read where MASKED; a row stride of 0 shares it between rows.
        y_ptr: `[rows, columns]`, written.
        log_det_ptr: float32 `[rows]`, dense, written.
        clamp: bound of the scale, read where CLAMPED.
        RUN, MASK_RUN: length of a run of all tensors but the mask, and of the mask; 0 where a row is one run.
        VECTOR: how many bytes of the mask are read at a time, or 1 for as the compiler likes.
        EVEN: columns is a multiple of BLOCK.
    """
    clamp = tl.cast(clamp, tl.float32)
    rate = 1.0 / clamp
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if INT64:
        program = program.to(tl.int64)
        lane = lane.to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + lane
        inside = (row < rows)[:, None]
        if not EVEN:
            inside = inside & (column < columns)[None, :]
        keep = inside
        x = tl.load(_at(x_ptr, row, column, x_row, x_outer, x_inner, RUN, 1), inside, 0.0)
        s = tl.load(_at(log_scale_ptr, row, column, s_row, s_outer, s_inner, RUN, 1), inside, 0.0)
        t = tl.load(_at(shift_ptr, row, column, t_row, t_outer, t_inner, RUN, 1), inside, 0.0)
        x, s, t = x.to(tl.float32), s.to(tl.float32), t.to(tl.float32)
        if CLAMPED:
            s = clamp * tanh(s * rate)
        if MASKED:
            kept = _at(mask_ptr, row, column, m_row, m_outer, m_inner, MASK_RUN, VECTOR)
            keep = tl.load(kept, inside, 0) != 0
            s = tl.where(keep, s, 0.0)
        if INVERSE:
            s = -s
            y = (x - t) * tl.exp(s)
        else:
            y = x * tl.exp(s) + t
        if MASKED:
            y = tl.where(keep, y, x)
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(_at(y_ptr, row, column, y_row, y_outer, y_inner, RUN, 1), y, inside)
        total += s
    tl.store(log_det_ptr + row, tl.sum(total, 1), row < rows)


@triton.jit(do_not_specialize=["rows"])
def _coupling_backward_kernel(
    grad_y_ptr, grad_log_det_ptr, point_ptr, log_scale_ptr, mask_ptr,
    grad_x_ptr, grad_log_scale_ptr, grad_shift_ptr,
    clamp, rows, columns, grad_log_det_step,
    g_row, g_outer, g_inner, p_row, p_outer, p_inner, s_row, s_outer, s_inner,
    m_row, m_outer, m_inner, out_row, out_outer, out_inner,
    INVERSE: tl.constexpr, CLAMPED: tl.constexpr, MASKED: tl.constexpr, SHIFT: tl.constexpr,
    RUN: tl.constexpr, MASK_RUN: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr,
    INT64: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of either map, by the formulas of `affine_coupling_backward_reference`.

    Program i owns the same rows as in `_coupling_kernel` and alone writes them in all outputs.
    Per element: 3 reads and 2 writes of the input's type (20 bytes in float32, 10 in 16-bit types), 3 writes
    where SHIFT (24 and 12), and a byte of the mask from the cache. Per row: 4 bytes of grad_log_det.

    Args:
        grad_y_ptr: `[rows, columns]`, read. Its strides are (row, outer, inner).
        grad_log_det_ptr: float32 `[rows]` of stride grad_log_det_step, read.
        point_ptr: x of the forward map, y of the inverse (INVERSE), read.
        log_scale_ptr, mask_ptr: as in the map, read.
        grad_x_ptr, grad_log_scale_ptr: `[rows, columns]`, written.
        grad_shift_ptr: the same where SHIFT; else the gradient of shift is grad_y itself, nothing is written.
        clamp, RUN, MASK_RUN, VECTOR, EVEN: as in the map.
    """
    clamp = tl.cast(clamp, tl.float32)
    rate = 1.0 / clamp
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if INT64:
        program = program.to(tl.int64)
        lane = lane.to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    grad_sum = tl.load(grad_log_det_ptr + row * grad_log_det_step, row < rows, 0.0)[:, None]
    for start in range(0, columns, BLOCK):
        column = start + lane
        inside = (row < rows)[:, None]
        if not EVEN:
            inside = inside & (column < columns)[None, :]
        keep = inside
        grad = tl.load(_at(grad_y_ptr, row, column, g_row, g_outer, g_inner, RUN, 1), inside, 0.0)
        point = tl.load(_at(point_ptr, row, column, p_row, p_outer, p_inner, RUN, 1), inside, 0.0)
        s = tl.load(_at(log_scale_ptr, row, column, s_row, s_outer, s_inner, RUN, 1), inside, 0.0)
        grad, point, s = grad.to(tl.float32), point.to(tl.float32), s.to(tl.float32)
        slope = tl.full((ROWS, BLOCK), 1.0, tl.float32)
        if CLAMPED:
            bounded = tanh(s * rate)
            slope = 1.0 - bounded * bounded
            s = clamp * bounded
        if MASKED:
            kept = _at(mask_ptr, row, column, m_row, m_outer, m_inner, MASK_RUN, VECTOR)
            keep = tl.load(kept, inside, 0) != 0
            s = tl.where(keep, s, 0.0)
        if INVERSE:
            grad_x = grad * tl.exp(-s)
            grad_s = -(grad * point + grad_sum) * slope
            grad_t = -grad_x
        else:
            grad_x = grad * tl.exp(s)
            grad_s = (grad_x * point + grad_sum) * slope
            grad_t = grad
        if MASKED:
            grad_s = tl.where(keep, grad_s, 0.0)
            grad_t = tl.where(keep, grad_t, 0.0)
        element = grad_x_ptr.dtype.element_ty
        out = _at(0, row, column, out_row, out_outer, out_inner, RUN, 1)
        tl.store(grad_x_ptr + out, grad_x.to(element), inside)
        tl.store(grad_log_scale_ptr + out, grad_s.to(element), inside)
        if SHIFT:
            tl.store(grad_shift_ptr + out, grad_t.to(element), inside)


class _Runs(NamedTuple):
    """A row of several tensors as runs of equal length."""

    columns: int  # elements of a row
    run: int  # elements of a run of all tensors but the mask; 0 where a row is one run
    mask_run: int  # elements of a run of the mask, the last tensor but one; likewise
    strides: tuple[int, ...]  # (row, outer, inner) of each tensor in turn
    reach: int  # the largest offset in any tensor


@functools.lru_cache(maxsize=1024)
def _runs(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> _Runs | None:
    """The runs of tensors of one shape, walked in the order of the last one's dimensions, the dense output.

    None where one level of runs does not describe all of them.
    """
    dims = [d for d in range(1, len(shape)) if shape[d] != 1]
    runs: list[tuple[int, tuple[int, ...]]] = []
    for d in sorted(dims, key=lambda d: -strides[-1][d]):
        size, steps = shape[d], tuple(stride[d] for stride in strides)
        if runs and all(outer == step * size for outer, step in zip(runs[-1][1], steps, strict=True)):
            runs[-1] = (runs[-1][0] * size, steps)
        else:
            runs.append((size, steps))
    if len(runs) > 2:
        return None
    inner, inner_steps = runs.pop() if runs else (1, (1,) * len(strides))
    outer, outer_steps = runs.pop() if runs else (1, tuple(inner * step for step in inner_steps))
    several = [step != inner * inner_step for step, inner_step in zip(outer_steps, inner_steps, strict=True)]
    mask_run = inner if several.pop(-2) else 0
    triples = zip((stride[0] for stride in strides), outer_steps, inner_steps, strict=True)
    reach = max(sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) for steps in strides)
    steps = tuple(step for triple in triples for step in triple)
    return _Runs(outer * inner, inner if any(several) else 0, mask_run, steps, reach)


def _in_runs(tensors: list[Tensor], out: Tensor) -> tuple[list[Tensor], _Runs]:
    """The tensors and their `_runs` with `out`; where they have none, copies in the layout of `out`."""
    shape = tuple(out.shape)
    runs = _runs(shape, tuple(tensor.stride() for tensor in (*tensors, out)))
    if runs is None:
        tensors = [tensor if tensor.stride() == out.stride() else _like(tensor, out) for tensor in tensors]
        runs = _runs(shape, tuple(tensor.stride() for tensor in (*tensors, out)))
        assert runs is not None
    return tensors, runs


def _like(tensor: Tensor, out: Tensor) -> Tensor:
    """A copy in the layout of `out`; of one row where all rows are the same."""
    rows = slice(0, 1) if tensor.stride(0) == 0 else slice(None)
    return torch.empty_like(out[rows], dtype=tensor.dtype).copy_(tensor[rows]).expand(out.shape)


@functools.lru_cache(maxsize=1024)
def _config(columns: int, element_size: int) -> LaunchConfig:
    """Two 16-byte accesses a thread for each operand (one where a warp has 64 threads).

    By columns and type alone, so that the order in which a row is summed does not depend on the batch. A
    block that divides the columns needs no mask along them and leaves no lane idle.
    """
    tile = 4096 // element_size
    divisors = (block for block in (1024, 512, 256, 128) if columns % block == 0)
    block = next(divisors, min(next_power_of_2(columns), 1024))
    return LaunchConfig(block_columns=block, block_rows=tile // block, num_warps=4, num_stages=1)


def _bytes(mask: Tensor | None, x: Tensor) -> Tensor:
    """The mask as uint8 in the shape of x; without one, something that is never read."""
    return x if mask is None else mask.view(torch.uint8).expand(x.shape)


def _constants(runs: _Runs, clamp: float | None, mask: Tensor | None, out: Tensor) -> dict[str, Any]:
    """What both kernels are launched with beside their pointers and strides."""
    config = _config(runs.columns, out.element_size())
    # The mask is read by the elements of a 16-byte access to the data, or it would be moved between threads.
    # That many of its bytes must be adjacent: the kernel says so to the compiler.
    vector = 16 // out.element_size()
    adjacent = runs.strides[-4] == 1 and runs.mask_run % vector == 0 and config.block_columns % vector == 0
    return {
        "CLAMPED": clamp is not None,
        "MASKED": mask is not None,
        "RUN": runs.run,
        "MASK_RUN": runs.mask_run,
        "VECTOR": vector if mask is not None and adjacent else 1,
        "EVEN": runs.columns % config.block_columns == 0,
        "INT64": int64_offsets(runs.reach),
        "ROWS": config.block_rows,
        "BLOCK": config.block_columns,
        "config": config,
        "device": out.device,
    }


def _launch_forward(
    x: Tensor, log_scale: Tensor, shift: Tensor, mask: Tensor | None, clamp: float | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    y, log_det = _forward_fake(x)
    if x.numel() == 0:
        return y, log_det.zero_()
    inputs, runs = _in_runs([x, log_scale, shift, _bytes(mask, x)], y)
    constants = _constants(runs, clamp, mask, y)
    grid = (cdiv(x.shape[0], constants["ROWS"]),)
    scalars = (clamp or 1.0, x.shape[0], runs.columns)
    launch(_coupling_kernel, grid, *inputs, y, log_det, *scalars, *runs.strides, INVERSE=inverse, **constants)
    return y, log_det


def _forward_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


def _forward_on_cpu(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, log_det = affine_coupling_reference(x, *rest)
    return torch.empty_like(x).copy_(y), log_det


def _launch_backward(
    grad_y: Tensor,
    grad_log_det: Tensor,
    point: Tensor,
    log_scale: Tensor,
    mask: Tensor | None,
    clamp: float | None,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _backward_fake(grad_y, grad_log_det, point, log_scale, mask, clamp, inverse)
    if point.numel() == 0:
        return outputs
    inputs, runs = _in_runs([grad_y, point, log_scale, _bytes(mask, point)], outputs[0])
    constants = _constants(runs, clamp, mask, outputs[0])
    grid = (cdiv(point.shape[0], constants["ROWS"]),)
    tensors = (inputs[0], grad_log_det, *inputs[1:], *outputs)
    scalars = (clamp or 1.0, point.shape[0], runs.columns, grad_log_det.stride(0))
    flags = {"INVERSE": inverse, "SHIFT": _writes_shift(mask, inverse)}
    launch(_coupling_backward_kernel, grid, *tensors, *scalars, *runs.strides, **flags, **constants)
    return outputs


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, point, _, mask, _, inverse = args
    grad_shift = torch.empty_like(point) if _writes_shift(mask, inverse) else point.new_empty(0)
    return torch.empty_like(point), torch.empty_like(point), grad_shift


def _backward_on_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _backward_fake(*args)
    for output, gradient in zip(outputs, affine_coupling_backward_reference(*args), strict=True):
        if output.shape == gradient.shape:
            output.copy_(gradient)
    return outputs


def _writes_shift(mask: Tensor | None, inverse: bool) -> bool:
    """Whether the gradient of shift is another tensor than the gradient of y."""
    return inverse or mask is not None


_forward = register_op(
    "affine_coupling",
    "(Tensor x, Tensor log_scale, Tensor shift, Tensor? mask, float? clamp, bool inverse)"
    " -> (Tensor y, Tensor log_det)",
    launcher=_launch_forward,
    reference=_forward_on_cpu,
    fake=_forward_fake,
)
_backward = register_op(
    "affine_coupling_backward",
    "(Tensor grad_y, Tensor grad_log_det, Tensor point, Tensor log_scale, Tensor? mask, float? clamp,"
    " bool inverse) -> (Tensor grad_x, Tensor grad_log_scale, Tensor grad_shift)",
    launcher=_launch_backward,
    reference=_backward_on_cpu,
    fake=_backward_fake,
)


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The vmapped dimension, or as many copies where there is none, folded into the batch."""
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _fold_mask(mask: Tensor | None, dim: int | None, size: int, shape: torch.Size) -> Tensor | None:
    """The mask for folded tensors of `shape`. One without a batch dimension serves all rows as it is."""
    if mask is None or (dim is None and (mask.ndim < len(shape) or mask.shape[0] == 1)):
        return mask
    mask = mask.expand(size, *mask.shape) if dim is None else mask.movedim(dim, 0)
    mask = mask.reshape(size, *[1] * (len(shape) + 1 - mask.ndim), *mask.shape[1:])
    return mask.expand(size, shape[0] // size, *shape[1:]).flatten(0, 1)


def _vmap_rule(op: Any, count: int) -> Any:
    """For an op whose arguments are `count` tensors with a batch dimension, mask, clamp and inverse."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        tensors = [_fold(args[i], in_dims[i], size) for i in range(count)]
        mask = _fold_mask(args[count], in_dims[count], size, tensors[0].shape)
        outputs = op(*tensors, mask, *args[count + 1 :])
        # The gradient of shift is an empty vector where the op does not write it.
        rows = tensors[0].shape[0]
        dims = tuple(0 if output.shape[0] == rows else None for output in outputs)
        split = (size, rows // size)
        pairs = zip(outputs, dims, strict=True)
        return tuple(output if dim is None else output.unflatten(0, split) for output, dim in pairs), dims

    return rule


torch.library.register_vmap(_forward, _vmap_rule(_forward, 3))
torch.library.register_vmap(_backward, _vmap_rule(_backward, 4))


class _AffineCoupling(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, log_scale, _, mask, ctx.clamp, ctx.inverse = inputs
        ctx.save_for_backward(output[0] if ctx.inverse else x, log_scale, mask)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        point, log_scale, mask = ctx.saved_tensors
        grad_x, grad_log_scale, grad_shift = _CouplingGradients.apply(
            grad_y, grad_log_det, point, log_scale, mask, ctx.clamp, ctx.inverse
        )
        if not _writes_shift(mask, ctx.inverse):
            grad_shift = grad_y
        return grad_x, grad_log_scale, grad_shift, None, None, None


class _CouplingGradients(torch.autograd.Function):
    """The backward pass, so that it can itself be differentiated: by the reference, since that is rare."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.clamp, ctx.inverse = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *tensors, mask = ctx.saved_tensors
        count = 3 if _writes_shift(mask, ctx.inverse) else 2
        reference: Any = affine_coupling_backward_reference

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            return reference(*tensors, mask, ctx.clamp, ctx.inverse)[:count]

        pull_back: Any = torch.func.vjp(gradients, *tensors)[1]
        return *pull_back(cotangents[:count]), None, None, None


def _check(
    x: Tensor, log_scale: Tensor, shift: Tensor, inverse: bool, clamp: float | None, mask: Tensor | None
) -> None:
    for name, value in (("x", x), ("log_scale", log_scale), ("shift", shift)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    shape = tuple(x.shape)
    if len(shape) < 2:
        raise ValueError(f"x must have a batch dimension and at least one more, [B, ...], got shape {shape}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    for name, value in (("log_scale", log_scale), ("shift", shift)):
        if value.shape != x.shape:
            raise ValueError(f"{name} must have the shape of x, {shape}, got {tuple(value.shape)}")
        if value.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {value.dtype}")
        if value.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")
    check_bool("inverse", inverse)
    check_clamp(clamp)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be None or a bool tensor, got {got}")
        if mask.device != x.device:
            raise ValueError(f"mask must be on the device of x, {x.device}, got {mask.device}")
        pairs = zip(reversed(mask.shape), reversed(shape), strict=False)
        if mask.ndim > x.ndim or any(m not in (1, n) for m, n in pairs):
            raise ValueError(f"mask must broadcast to the shape of x, {shape}, got {tuple(mask.shape)}")


def affine_coupling(
    x: Tensor,
    log_scale: Tensor,
    shift: Tensor,
    *,
    inverse: bool = False,
    clamp: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Affine map of every element of `x`, and the log-determinant of its Jacobian.

    With s = clamp·tanh(log_scale / clamp), or s = log_scale where clamp is None
    (Dinh et al. 2017, equations 7 and 8):

        forward   y = x·exp(s) + shift        log_det =  Σ s
        inverse   y = (x - shift)·exp(-s)     log_det = -Σ s

    In 16-bit types the arithmetic is float32 and only y is rounded. Differentiable in x, log_scale and shift;
    derivatives beyond the first take the reference. `torch.compile` and `torch.vmap` work.

    Args:
        x: `[B, ...]`, float32, bfloat16, float16, or float64 (which has no kernel). Any strides: a half of a
            wider tensor is read in place.
        log_scale: as `x`.
        shift: as `x`.
        inverse: the direction.
        clamp: bound on |s|, positive; None leaves the scale unbounded.
        mask: bool, broadcastable to `x` (`[D]`, `[C, 1, 1]`, `[1, H, W]`, `[B, D]`, ...). True: transformed.
            False: passed through unchanged, and not counted in `log_det`.

    Returns:
        y: shape and dtype of `x`.
        log_det: `[B]`, float32 (float64 for float64 input).

    Raises:
        TypeError: an argument is of another type or dtype.
        ValueError: an argument is of another shape or on another device, or clamp is not positive.
    """
    _check(x, log_scale, shift, inverse, clamp, mask)
    unsupported = "x is float64, which has no kernel" if x.dtype == torch.float64 else None
    if use_triton(x, unsupported=unsupported):
        return _AffineCoupling.apply(x, log_scale, shift, mask, clamp, inverse)
    if plain_on_cpu(x, log_scale, shift, mask):
        return affine_coupling_on_cpu(x, log_scale, shift, mask, clamp, inverse)
    return affine_coupling_reference(x, log_scale, shift, mask, clamp, inverse)


__all__ = ["affine_coupling"]
