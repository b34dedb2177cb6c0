"""The gradients of a normalizing flow, with memory that does not grow with its depth.

The flow is invertible: the kernel starts from the result, undoes one layer after another, and computes each
conditioner again from the half that it read. What it needs beside the result and its gradient is, for the
gradients of the parameters, the activations of one layer at a time, in buffers that all layers share; the
gradients are then matrix products over the batch, by torch. Where only z has a gradient, one launch walks
through all layers and nothing is written but that gradient.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .flow_device import (
    FlowShape,
    bounded,
    conditioner,
    flow_fits,
    flow_shape,
    hidden_before_last,
    last_hidden_tile,
    load_half,
    load_halves,
    normalise_halves,
    pointers,
    scale_halves,
    store_half,
    store_halves,
    whole_tiles,
    without_padding,
)
from .flow_reference import FlowOptions, FlowParameters, coupling_flow_backward_reference
from .launch import LaunchConfig, int64_offsets, launch, persistent_programs, register_op, tl, triton
from .mlp_device import activate, activation_slope, dense_tile, hidden_layer, product, weight_tile_backward
from .opaque_device import anew, opaque


@triton.jit
def _store_tile(pointer, row, inside, value, first, SIZE: tl.constexpr):
    """Write columns `first..` of the rows of a matrix `[N, SIZE]`."""
    column = first + tl.arange(0, value.shape[1])
    mask = inside[:, None] & (column < SIZE)[None, :]
    tl.store(pointer + row[:, None] * SIZE + column[None, :], value.to(pointer.dtype.element_ty), mask)


@triton.jit
def _zeros_like(tiles):
    zeros = ()
    for k in tl.static_range(len(tiles)):
        zeros += (tl.zeros(tiles[k].shape, tl.float32),)
    return zeros


@triton.jit
def _add_products(totals, grad, weight, first, outs, ins, PRECISION: tl.constexpr):
    """totals + grad @ weight, of rows `first..` of a matrix `[outs, ins]`: a tuple of tiles, as `totals`."""
    width: tl.constexpr = totals[0].shape[1]
    count: tl.constexpr = grad.shape[1]
    sums = ()
    for k in tl.static_range(len(totals)):
        part = weight_tile_backward(weight, first, k * width, outs, ins, count, width)
        sums += (product(grad, part, totals[k], PRECISION),)
    return sums


@triton.jit
def _through_layer(
    grads, inputs, weight, bias, hidden, pre_gradient, row, inside,
    outs, ins, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """From the gradients of a layer's activations to those of its `inputs`: tuples of tiles.

    The layer is computed again, tile by tile. Where WRITE, its activations and the gradients before them are
    written to `hidden` and `pre_gradient`.
    """
    below = _zeros_like(inputs)
    width: tl.constexpr = grads[0].shape[1]
    for k in tl.static_range(len(grads)):
        value = dense_tile(inputs, weight, bias, k * width, outs, ins, width, PRECISION)
        grad = grads[k] * activation_slope(value, ACTIVATION)
        if WRITE:
            _store_tile(hidden, row, inside, activate(value, ACTIVATION), k * width, outs)
            _store_tile(pre_gradient, row, inside, grad, k * width, outs)
        below = _add_products(below, grad, weight, k * width, outs, ins, PRECISION)
    return below


@triton.jit
def conditioner_gradient(
    a, inputs, grad_s, grad_t, parameters, layer, buffers, rows, row, inside,
    F: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """The gradient of `a` by way of the conditioner: float32 `[ROWS, F.padded]`.

    `inputs` is what `hidden_before_last` gave. Where WRITE, the gradients of (s, t), and every hidden layer
    with the gradient before its activation, are written to `buffers`.
    """
    P: tl.constexpr = F.padded
    D1: tl.constexpr = F.passed
    D2: tl.constexpr = F.changed
    H: tl.constexpr = F.hidden
    DEPTH: tl.constexpr = F.depth
    TILES: tl.constexpr = F.tiles
    W: tl.constexpr = F.width
    CHUNK: tl.constexpr = F.chunk
    STAGES: tl.constexpr = F.stages
    ACTIVATION: tl.constexpr = F.activation
    PRECISION: tl.constexpr = F.precision
    ROWS: tl.constexpr = a.shape[0]
    INS: tl.constexpr = D1 if DEPTH == 1 else H
    hidden, pre_gradient = buffers[1], buffers[2]
    if WRITE:
        _store_tile(buffers[0], row, inside, a, 0, D1)
        column = tl.arange(0, P)[None, :]
        place = buffers[3] + row[:, None] * (2 * D2) + column
        mask = inside[:, None] & (column < D2)
        tl.store(place, grad_s.to(buffers[3].dtype.element_ty), mask)
        tl.store(place + D2, grad_t.to(buffers[3].dtype.element_ty), mask)
    if PRECISION == 2:
        grad_s, grad_t = grad_s.to(tl.bfloat16), grad_t.to(tl.bfloat16)
    weight_out = parameters[4] + layer * (2 * D2 * H)
    if DEPTH == 1:
        weight = parameters[0] + layer * (H * D1)
    else:
        weight = parameters[2] + (layer * (DEPTH - 1) + DEPTH - 2) * (H * H)
    size = rows * H
    totals = _zeros_like(inputs)
    for piece in tl.range(0, H, CHUNK, num_stages=STAGES):
        first = opaque(piece // CHUNK, parameters[-1]) * CHUNK
        value = last_hidden_tile(inputs, parameters, layer, first, F)
        grad = tl.zeros((ROWS, CHUNK), tl.float32)
        grad = product(grad_s, weight_tile_backward(weight_out, 0, first, D2, H, P, CHUNK), grad, PRECISION)
        grad = product(
            grad_t, weight_tile_backward(weight_out + D2 * H, 0, first, D2, H, P, CHUNK), grad, PRECISION
        )
        grad = grad * activation_slope(value, ACTIVATION)
        if WRITE:
            last = (DEPTH - 1) * size
            _store_tile(hidden + last, row, inside, activate(value, ACTIVATION), first, H)
            _store_tile(pre_gradient + last, row, inside, grad, first, H)
        totals = _add_products(totals, grad, weight, first, H, INS, PRECISION)
    if DEPTH > 1:
        parameters = anew(parameters, 2)  # as in `_layer_backward`
        row = opaque(row, parameters[-1])
        inside = row < rows
        weight_in, bias_in = parameters[0] + layer * (H * D1), parameters[1] + layer * H
        if DEPTH == 3:
            h = hidden_layer((a,), weight_in, bias_in, H, D1, TILES, W, ACTIVATION, PRECISION)
            totals = _through_layer(
                totals, h, parameters[2] + layer * (2 * H * H), parameters[3] + layer * (2 * H),
                hidden + size, pre_gradient + size, row, inside, H, H, ACTIVATION, PRECISION, WRITE,
            )  # fmt: skip
        below = _through_layer(
            totals, (a,), weight_in, bias_in,
            hidden, pre_gradient, row, inside, H, D1, ACTIVATION, PRECISION, WRITE,
        )  # fmt: skip
        return below[0]
    else:
        return totals[0]


@triton.jit
def _load_layer(state_ptr, parameters, layer, ROWS: tl.constexpr, INVERSE: tl.constexpr, F: tl.constexpr):
    """The halves that a coupling gave, from the state behind its layer, in the direction of the flow."""
    a, b = load_halves(state_ptr, 0, ROWS, not INVERSE, F)
    if F.normalised and not INVERSE:
        a, b = normalise_halves(a, b, parameters, layer, F, True)
    return a, b


@triton.jit
def _layer_backward(
    state_ptr, gradient_ptr, grad_sum, parameters, layer, buffers, rows, row, inside,
    F: tl.constexpr, INVERSE: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """From the output of a layer and its gradient to its input and that one's gradient, in place.

    The formulas are those of `coupling_flow_backward_reference`.
    """
    D1: tl.constexpr = F.passed
    ROWS: tl.constexpr = row.shape[0]
    tl.debug_barrier()
    a, b = _load_layer(state_ptr, parameters, layer, ROWS, INVERSE, F)
    s, t = conditioner(hidden_before_last(a, parameters, layer, F), parameters, layer, F)
    slope = tl.full(s.shape, 1.0, tl.float32)
    if F.clamp is not None:
        CLAMP: tl.constexpr = F.clamp
        rate = bounded(s, CLAMP)
        s, slope = CLAMP * rate, 1.0 - rate * rate
    tl.debug_barrier()  # else the compiler finds that it had the halves already, and keeps them
    a, b = _load_layer(state_ptr, parameters, layer, ROWS, INVERSE, F)
    grad_a, grad_b = load_halves(gradient_ptr, 0, ROWS, not INVERSE, F)
    if F.normalised and not INVERSE:
        grad_a, grad_b = scale_halves(grad_a, grad_b, parameters, layer, F, False)
    if INVERSE:
        grad_s = -(grad_b * b + grad_sum[:, None]) * slope
        b = b * tl.exp(s) + t
        grad_b = grad_b * tl.exp(-s)
        grad_t = -grad_b
    else:
        b = (b - t) * tl.exp(-s)
        grad_t = grad_b
        grad_b = grad_b * tl.exp(s)
        grad_s = (grad_b * b + grad_sum[:, None]) * slope
    tl.debug_barrier()
    store_halves(state_ptr, 0, a, b, False, F)
    store_halves(gradient_ptr, 0, grad_a, grad_b, False, F)
    tl.debug_barrier()
    own = anew(parameters, 1)  # from here on addresses are computed once more, and not kept
    row = opaque(row, own[-1])
    inside = row < rows
    a = load_half(state_ptr + own[-1], 0, 0, D1, ROWS, F)
    below = conditioner_gradient(
        a, hidden_before_last(a, own, layer, F), grad_s, grad_t, own, layer, buffers, rows, row,
        inside, F, WRITE,
    )  # fmt: skip
    if INVERSE:
        a, b = load_halves(state_ptr, 0, ROWS, False, F)
        grad_a, grad_b = load_halves(gradient_ptr, 0, ROWS, False, F)
        grad_a += below
        if F.normalised:
            a, b = normalise_halves(a, b, parameters, layer, F, False)
            grad_a, grad_b = scale_halves(grad_a, grad_b, parameters, layer, F, True)
        tl.debug_barrier()
        store_halves(state_ptr, 0, a, b, True, F)
        store_halves(gradient_ptr, 0, grad_a, grad_b, True, F)
    else:
        grad_a = load_half(gradient_ptr, 0, 0, D1, ROWS, F) + below
        tl.debug_barrier()
        store_half(gradient_ptr, grad_a, 0, D1, F)


@triton.jit(do_not_specialize=["rows", "first_layer"])
def _flow_backward_kernel(
    state_ptr, gradient_ptr, grad_log_det_ptr, parameters, buffers, rows, step_rows, first_layer,
    F: tl.constexpr, COUNT: tl.constexpr, INVERSE: tl.constexpr, WRITE: tl.constexpr,
    INT64: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Undo COUNT layers and take the gradient through them, in place.

    A program owns tiles of ROWS rows, `step_rows` apart: it alone reads and writes them in every tensor.

    Roofline. Bytes per row: reads 8·D + 4, writes 8·D; where WRITE also per layer (D1 + 2·D2 + 2·depth·H)
    numbers in the type of the products. Per row and coupling it does, with M = D1·H + (depth - 1)·H² + 2·D2·H
    the multiplications of a conditioner, 2·(2·M + R + B) FLOPs: M to compute it, M for the gradients, R = M -
    2·D2·H for the hidden layers once more, and B for those before the last another time (at depth 3 also
    D1·H). At D 128, 8 couplings, H 256, depth 2, bfloat16: without WRITE 5.2 MFLOP and 2,052 bytes a row;
    with it, 0.66 MFLOP and 4,484 bytes a row and layer, 147 FLOPs a byte, where the data sheet of an H200
    balances at 206: the matrix units bound the first, memory the second. A tile is 32 rows, whose products
    are those of a warp and not of sm_90's four; the L2 cache, from which every tile reads the weights twice,
    gives a quarter as many FLOPs a byte as in `_flow_kernel`, and may bound both.

    Args:
        state_ptr: float32 `[M, D]`, contiguous, read and written: the output of layer `first_layer`, in the
            direction of the flow; it becomes the input of the last layer undone. M is N rounded up to whole
            tiles.
        gradient_ptr: float32 `[M, D]`, contiguous, read and written: their gradients.
        grad_log_det_ptr: float32 `[N]`.
        parameters: what `pointers` made.
        buffers: the half that the conditioner read `[N, D1]`, its hidden layers `[depth, N, H]`, the
            gradients before their activations `[depth, N, H]`, the gradient of (s, t) `[N, 2·D2]`; written
            where WRITE.
        step_rows: ROWS times the number of programs.
        first_layer: forward it is the highest layer and the others follow downwards; INVERSE the lowest.
    """
    if INT64:
        rows = tl.full((), rows, tl.int64)
    for start in tl.range(tl.program_id(0) * ROWS, rows, step_rows, disable_licm=True):
        if INT64:
            start = tl.cast(start, tl.int64)  # in the interpreter it is a Python int
        row = start + tl.arange(0, ROWS)
        grad_sum = tl.load(grad_log_det_ptr + row, row < rows, 0.0)
        for done in tl.range(0, COUNT, disable_licm=True):
            layer = first_layer + done if INVERSE else first_layer - done
            own = anew(parameters, start + layer)
            place = start * (F.passed + F.changed) + own[-1]
            row = opaque(start, own[-1]) + tl.arange(0, ROWS)
            _layer_backward(
                state_ptr + place, gradient_ptr + place, grad_sum, own, layer, buffers, rows, row, row < rows,
                F, INVERSE, WRITE,
            )  # fmt: skip


@contextlib.contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    """Within the block torch's float32 products on CUDA run in TF32 for "tf32", else in float32."""
    settings: Any = torch.backends.cuda.matmul
    before, settings.allow_tf32 = settings.allow_tf32, precision == "tf32"
    try:
        yield
    finally:
        settings.allow_tf32 = before


def _over_batch(gradient: Tensor, inputs: Tensor, out: Tensor) -> None:
    """out = gradientᵀ @ inputs: `[N, outs]` and `[N, ins]` to `[outs, ins]`, with float32 sums."""
    if gradient.dtype == torch.float32:
        out.copy_(gradient.t() @ inputs)
    else:
        out.copy_(torch.mm(gradient.t(), inputs, out_dtype=torch.float32))


def _launch_layers(
    tensors: tuple[Tensor, ...],
    memory: tuple[Tensor, ...],
    buffers: tuple[Tensor, ...],
    first_layer: int,
    shape: FlowShape,
    config: LaunchConfig,
    **constants: Any,
) -> None:
    state, _, grad_sum = tensors
    programs = persistent_programs(state.device, grad_sum.shape[0], config)
    launch(
        _flow_backward_kernel,
        (programs,),
        *tensors,
        memory,
        buffers,
        grad_sum.shape[0],
        programs * config.block_rows,
        first_layer,
        F=shape,
        INT64=int64_offsets(state.numel(), *(buffer.numel() for buffer in buffers)),
        ROWS=config.block_rows,
        config=config,
        device=state.device,
        **constants,
    )


def _in_whole_tiles(x: Tensor, config: LaunchConfig) -> Tensor:
    """A contiguous copy, with rows of zeros to whole tiles."""
    copy = x.new_empty((whole_tiles(x.shape[0], config), x.shape[1]))
    copy[: x.shape[0]] = x
    copy[x.shape[0] :] = 0.0
    return copy


def _launch_backward(
    grad_x: Tensor, grad_log_det: Tensor, x: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    parameters, wanted, options = FlowParameters(*rest[:8]), rest[8], FlowOptions(*rest[9:])
    dim, hidden, depth = x.shape[1], parameters.bias_in.shape[1], parameters.weight_hidden.shape[1] + 1
    if flow_fits(dim, hidden, depth, options.precision, backward=True) is not None:
        return _backward_in_torch(grad_x, grad_log_det, x, *rest)  # undoes layers too, in plain torch
    shape, config = flow_shape(parameters, options, backward=True)
    memory = pointers(parameters, options.precision)
    rows, layers = x.shape[0], shape.layers
    grad_sum = grad_log_det.contiguous()
    tensors = (_in_whole_tiles(x, config), _in_whole_tiles(grad_x, config), grad_sum)
    state, grad = tensors[0][:rows], tensors[1][:rows]
    if not wanted:
        first = 0 if options.inverse else layers - 1
        flags = {"COUNT": layers, "INVERSE": options.inverse, "WRITE": False}
        _launch_layers(tensors, memory, (grad,) * 4, first, shape, config, **flags)
        return without_padding(tensors[1], rows), []
    empty: Any = (None if p is None else torch.empty_like(p) for p in parameters)
    gradients = FlowParameters(*empty)
    if rows == 0:
        return without_padding(tensors[1], rows), [
            gradient.zero_() for gradient in gradients if gradient is not None
        ]
    kind = torch.bfloat16 if options.precision == "bf16" else torch.float32
    layer = (depth, rows, hidden)
    sizes = ((rows, shape.passed), layer, layer, (rows, 2 * shape.changed))
    buffers = tuple(torch.empty(size, dtype=kind, device=x.device) for size in sizes)
    flags = {"COUNT": 1, "INVERSE": options.inverse, "WRITE": True}
    with _float32_products(options.precision):
        for layer in range(layers) if options.inverse else reversed(range(layers)):
            if not options.inverse:
                _normalisation_gradients(gradients, parameters, layer, state, grad, grad_sum, 1.0)
            _launch_layers(tensors, memory, buffers, layer, shape, config, **flags)
            if options.inverse:
                _normalisation_gradients(gradients, parameters, layer, state, grad, grad_sum, -1.0)
            _layer_gradients(gradients, layer, buffers)
    return without_padding(tensors[1], rows), [gradient for gradient in gradients if gradient is not None]


def _normalisation_gradients(
    gradients: FlowParameters,
    parameters: FlowParameters,
    layer: int,
    x: Tensor,
    grad: Tensor,
    grad_sum: Tensor,
    sign: float,
) -> None:
    """Those of one layer, from the state that the affine map gives (or, in the inverse, takes)."""
    if gradients.norm_log_scale is None or gradients.norm_shift is None or parameters.norm_shift is None:
        return
    gradients.norm_shift[layer] = sign * grad.sum(0)
    moved = (grad * (x - parameters.norm_shift[layer])).sum(0)
    gradients.norm_log_scale[layer] = sign * (moved + grad_sum.sum())


def _layer_gradients(gradients: FlowParameters, layer: int, buffers: tuple[Tensor, ...]) -> None:
    """The gradients of one conditioner from what the kernel wrote."""
    read, hidden, pre_gradient, output = buffers
    depth = hidden.shape[0]
    weights = [gradients.weight_in[layer], *gradients.weight_hidden[layer], gradients.weight_out[layer]]
    biases = [gradients.bias_in[layer], *gradients.bias_hidden[layer], gradients.bias_out[layer]]
    for k in range(depth + 1):
        gradient = output if k == depth else pre_gradient[k]
        _over_batch(gradient, read if k == 0 else hidden[k - 1], weights[k])
        biases[k].copy_(gradient.sum(0, dtype=torch.float32))


def _backward_in_torch(
    grad_x: Tensor, grad_log_det: Tensor, x: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    wanted, options = rest[8], FlowOptions(*rest[9:])
    grad_z, gradients = coupling_flow_backward_reference(
        grad_x, grad_log_det, x, FlowParameters(*rest[:8]), options
    )
    return grad_z, [gradient for gradient in gradients if gradient is not None] if wanted else []


def _backward_fake(
    grad_x: Tensor, grad_log_det: Tensor, x: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    gradients = [torch.empty_like(p) for p in rest[:8] if p is not None] if rest[8] else []
    return torch.empty_like(x), gradients


flow_backward = register_op(
    "coupling_flow_backward",
    "(Tensor grad_x, Tensor grad_log_det, Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_hidden,"
    " Tensor bias_hidden, Tensor weight_out, Tensor bias_out, Tensor? norm_log_scale, Tensor? norm_shift,"
    " bool parameter_gradients, bool inverse, str precision, str activation, float? clamp, str mixing)"
    " -> (Tensor grad_z, Tensor[] grad_parameters)",
    launcher=_launch_backward,
    reference=_backward_in_torch,
    fake=_backward_fake,
)


__all__ = ["conditioner_gradient", "flow_backward"]
