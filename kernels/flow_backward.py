"""The gradients of a normalizing flow, with memory that does not grow with its depth.

The flow is invertible: the kernel starts from the result, undoes one layer after another, and computes each
conditioner again from the half that it read. What it needs beside the result and its gradient is, for the
gradients of the parameters, the activations of one layer at a time, in buffers that all layers share; the
gradients are then matrix products over the batch, by torch. Where only z has a gradient, one launch walks
through all layers and nothing is written but that gradient.
"""

from typing import Any

import torch
from torch import Tensor

from .flow_backward_device import backward_form, backward_memory, layers_backward
from .flow_device import FlowShape, pointers, whole_tiles, without_padding
from .flow_reference import FlowOptions, FlowParameters, coupling_flow_backward_reference
from .launch import (
    LaunchConfig,
    int64_offsets,
    launch,
    persistent_programs,
    register_op,
    tl,
    triton,
    use_triton,
)
from .layers_device import Layers, layers_untrusted
from .matmul_precision import matmul_precision
from .opaque_device import anew


@triton.jit(do_not_specialize=["rows", "first_layer"])
def _flow_backward_kernel(
    state_ptr, gradient_ptr, grad_log_det_ptr, parameters, memory, buffers, rows, step_rows, first_layer,
    F: tl.constexpr, M: tl.constexpr, COUNT: tl.constexpr, INVERSE: tl.constexpr, WRITE: tl.constexpr,
    INT64: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Undo COUNT layers and take the gradient through them, in place.

    A program owns tiles of ROWS rows, `step_rows` apart: it alone reads and writes them in every tensor.

    Roofline. Bytes per row: reads 8·D + 4, writes 8·D; where WRITE also per layer (D1 + 2·D2 + 2·depth·H)
    numbers in the type of the products. Per row and coupling it does 4·M FLOPs, M = D1·H + (depth - 1)·H² +
    2·D2·H: half of them to compute the conditioner, half for the gradients. At D 128, 8 couplings, H 256,
    depth 2, bfloat16: without WRITE 3.7 MFLOP and 2,052 bytes a row, which the matrix units bound and not
    memory; with it, 0.46 MFLOP and 4,484 bytes a row and layer, 102 FLOPs a byte, where the data sheet of an
    H200 balances at 206: memory. From the caches a tile of 64 rows reads all weights twice, 7 KB a row and
    coupling, and some 11 KB more of what the program keeps (16 with WRITE): 24 FLOPs for each byte, a quarter
    of those of `_flow_kernel`, so that the L2 cache may bound both.

    Args:
        state_ptr: float32 `[M, D]`, contiguous, read and written: the output of layer `first_layer`, in the
            direction of the flow; it becomes the input of the last layer undone. M is N rounded up to whole
            tiles.
        gradient_ptr: float32 `[M, D]`, contiguous, read and written: their gradients.
        grad_log_det_ptr: float32 `[N]`.
        parameters: what `pointers` made.
        memory: scratch, what `backward_memory` made.
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
        own = anew(parameters, start)
        place = start * (F.passed + F.changed)
        layers_backward(
            state_ptr + place, gradient_ptr + place, memory, grad_sum, own, buffers, rows, row, row < rows,
            first_layer, F, M, COUNT, INVERSE, WRITE,
        )  # fmt: skip


def _over_batch(gradient: Tensor, inputs: Tensor, out: Tensor) -> None:
    """out = gradientᵀ @ inputs: `[N, outs]` and `[N, ins]` to `[outs, ins]`, with float32 sums."""
    if gradient.dtype == torch.float32:
        out.copy_(gradient.t() @ inputs)
    else:
        out.copy_(torch.mm(gradient.t(), inputs, out_dtype=torch.float32))


def _launch_layers(
    tensors: tuple[Tensor, ...],
    parameters: tuple[Any, ...],
    memory: tuple[Tensor, Tensor],
    buffers: tuple[Tensor, ...],
    first_layer: int,
    shape: FlowShape,
    layers: Layers,
    config: LaunchConfig,
    **constants: Any,
) -> None:
    state, _, grad_sum = tensors
    programs = memory[0].shape[0]
    launch(
        _flow_backward_kernel,
        (programs,),
        *tensors,
        parameters,
        memory,
        buffers,
        grad_sum.shape[0],
        programs * config.block_rows,
        first_layer,
        F=shape,
        M=layers,
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
    if not use_triton(x, unsupported=layers_untrusted(x.device)):
        return _backward_in_torch(grad_x, grad_log_det, x, *rest)  # undoes layers too, in plain torch
    shape, form, config = backward_form(parameters, options)
    stacks = pointers(parameters, options.precision)
    rows, layers = x.shape[0], shape.layers
    grad_sum = grad_log_det.contiguous()
    tensors = (_in_whole_tiles(x, config), _in_whole_tiles(grad_x, config), grad_sum)
    state, grad = tensors[0][:rows], tensors[1][:rows]
    programs = persistent_programs(x.device, rows, config)
    memory = backward_memory(shape, form, programs, config, x.device)
    if not wanted:
        first = 0 if options.inverse else layers - 1
        flags = {"COUNT": layers, "INVERSE": options.inverse, "WRITE": False}
        _launch_layers(tensors, stacks, memory, (grad,) * 4, first, shape, form, config, **flags)
        return without_padding(tensors[1], rows), []
    empty: Any = (None if p is None else torch.empty_like(p) for p in parameters)
    gradients = FlowParameters(*empty)
    if rows == 0:
        return without_padding(tensors[1], rows), [
            gradient.zero_() for gradient in gradients if gradient is not None
        ]
    kind = torch.bfloat16 if options.precision == "bf16" else torch.float32
    hidden = (shape.depth, rows, shape.hidden)
    sizes = ((rows, shape.passed), hidden, hidden, (rows, 2 * shape.changed))
    buffers = tuple(torch.empty(size, dtype=kind, device=x.device) for size in sizes)
    flags = {"COUNT": 1, "INVERSE": options.inverse, "WRITE": True}
    with matmul_precision(options.precision):
        for layer in range(layers) if options.inverse else reversed(range(layers)):
            if not options.inverse:
                _normalisation_gradients(gradients, parameters, layer, state, grad, grad_sum, 1.0)
            _launch_layers(tensors, stacks, memory, buffers, layer, shape, form, config, **flags)
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


__all__ = ["flow_backward"]
