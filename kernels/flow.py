"""A normalizing flow in one launch: a stack of affine couplings with MLP conditioners, from noise to sample.

What a layer does is in `flow_reference.py`; it is RealNVP (Dinh, Sohl-Dickstein, Bengio, "Density estimation
using Real NVP", ICLR 2017, equations 7 and 8). The kernel takes a tile of samples from its noise (or its row
in memory) to its result: hidden layers are nowhere but in registers, or where these do not hold them
(`flow_layers_device.py`) in the caches, as the samples between two couplings are, in the place of the result.
Weights are read again by every tile, from the L2 cache. The backward pass needs of all that the result alone
(`flow_backward.py`).
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import philox
from .asked import any_is_asked_for
from .checks import (
    NO_RULES,
    check_bool,
    check_choice,
    check_clamp,
    check_integer,
    check_numbers_of_samples,
    check_positive,
    check_seed,
    compiling,
    is_integer,
    transformed,
)
from .flow_backward import flow_backward
from .flow_cpu import coupling_flow_on_cpu
from .flow_device import (
    flow_fits,
    flow_forward,
    flow_inverse,
    noise_state,
    normalisation_log_det,
    pointers,
    read_state,
    whole_tiles,
    without_padding,
)
from .flow_layers_device import flow_form, held_forward, held_in_memory, held_inverse, held_memory
from .flow_reference import (
    FlowOptions,
    FlowParameters,
    coupling_flow_backward_reference,
    coupling_flow_reference,
)
from .launch import int64_offsets, launch, persistent_programs, register_op, tl, triton, use_triton
from .layers_device import layers_untrusted
from .mlp_cpu import plain_on_cpu
from .mlp_device import ACTIVATIONS, PRECISIONS
from .mlp_reference import without_autocast
from .opaque_device import anew
from .philox_device import int64_of
from .processor import precision_on

MIXINGS: tuple[str, ...] = ("shuffle", "swap")


class Noise(NamedTuple):
    """The numbers of `philox.normal(seed, index, step, Stream.PROPOSAL, D)`, which a kernel makes inside.

    Attributes:
        seed: an int, or an int64 tensor of one element (a captured graph reads it anew at each replay).
        index: the samples' numbers: int64 `[N]`, or a `range` of step 1.
        step: the proposal's number.
    """

    seed: int | Tensor
    index: Tensor | range  # pyright: ignore[reportIncompatibleMethodOverride]
    step: int = 0


@triton.jit(do_not_specialize=["seed", "step", "first", "rows"])
def _flow_kernel(
    z_ptr, index_ptr, seed, step, first, scale, x_ptr, log_det_ptr, parameters, memory, rows, step_rows,
    z_row, z_column, F: tl.constexpr, M: tl.constexpr, INVERSE: tl.constexpr, NOISE: tl.constexpr,
    INDEX_IN_MEMORY: tl.constexpr, SEED_IN_MEMORY: tl.constexpr, STREAM: tl.constexpr, INT64: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The whole flow or its inverse.

    A program owns tiles of ROWS rows, `step_rows` apart: it alone reads their number or their z, and reads
    and writes their x and log_det. Their x is the state from the first coupling to the last. Hidden layers,
    log-scales and shifts stay in registers. So that nothing of a tile, a layer or a piece of columns stays
    there for the next, addresses go through `opaque_device.py`: without it 12 to 20 instructions spill on
    sm_90 at D 64 and 128 in bfloat16 by Triton 3.6, and 12 in the inverse by 3.9; with it none. Where there
    is an M, hidden layers are in memory: see `flow_layers_device.py`.

    Roofline. Per row it writes 4·D + 4 bytes, and reads 4·D, or 8 with an index in memory, or nothing. It
    does 2·L·M FLOPs, M = D1·H + (depth - 1)·H² + 2·D2·H. At D 128, 8 couplings, H 256, depth 2 that is 1.84
    MFLOP and 516 bytes: 3,500 FLOPs a byte, where the data sheet of an H200 balances at 206 in bfloat16, so
    memory does not bound it. The L2 cache does more: every tile reads all weights from it, 2·L·M bytes in
    bfloat16, ROWS FLOPs for each, and every row writes its state once a coupling, 4·D bytes (it reads it
    twice, mostly from L1). With 128 rows that is 18 KB a row, 100 FLOPs for each byte: at half the matrix
    rate of an H200's data sheet 5 TB/s. And a tile's layers depend on each other: of 8 warps with more than
    128 registers a thread a multiprocessor holds one program, in which nothing runs beside what waits but the
    pipeline's reads of the last hidden layer's weights and the output layer's, at these sizes six sevenths of
    all. So the L2 cache or latency bounds it, unless the matrix units do.

    Args:
        z_ptr: float32 `[N, D]` of strides z_row and z_column, read where not NOISE.
        index_ptr: int64 `[N]`, read where INDEX_IN_MEMORY; else the samples are `first` and the next ones.
        seed: an int, or where SEED_IN_MEMORY a pointer to an int64.
        step: the proposal's number.
        scale: what the noise is multiplied by.
        x_ptr: float32 `[M, D]`, contiguous, read and written; M is N rounded up to whole tiles.
        log_det_ptr: float32 `[N]`, written.
        parameters: what `pointers` made.
        memory: scratch, what `held_memory` made; None where M is.
        step_rows: ROWS times the number of programs.
    """
    if INT64:
        rows = tl.full((), rows, tl.int64)
    for start in tl.range(tl.program_id(0) * ROWS, rows, step_rows, disable_licm=True):
        if INT64:
            start = tl.cast(start, tl.int64)  # in the interpreter it is a Python int
        own = anew(parameters, start)
        row = start + tl.arange(0, ROWS)
        inside = row < rows
        state_ptr = x_ptr + own[-1] + start * (F.passed + F.changed)
        if NOISE:
            index = int64_of(first, False) + row
            if INDEX_IN_MEMORY:
                index = tl.load(index_ptr + row, inside, 0)
            noise_state(
                state_ptr, int64_of(seed, SEED_IN_MEMORY), index, int64_of(step, False), scale, own[-1],
                STREAM, False, F,
            )  # fmt: skip
        else:
            read_state(state_ptr, z_ptr, row, inside, z_row, z_column, own[-1], F)
        if M is None and INVERSE:
            log_det = flow_inverse(state_ptr, own, ROWS, F)
        elif M is None:
            log_det = flow_forward(state_ptr, own, ROWS, F)
        elif INVERSE:
            log_det = held_inverse(state_ptr, memory, own, ROWS, F, M)
        else:
            log_det = held_forward(state_ptr, memory, own, ROWS, F, M)
        constant = normalisation_log_det(own, F)
        log_det += -constant if INVERSE else constant
        row = start + tl.arange(0, ROWS)
        tl.store(log_det_ptr + row, log_det, row < rows)


class _Source(NamedTuple):
    """Where a flow's input comes from: a tensor, or the noise of samples `numbers`, or `first` and on."""

    z: Tensor | None
    numbers: Tensor | None
    seed_tensor: Tensor | None
    seed: int
    step: int
    first: int
    rows: int
    scale: float


def _split(args: tuple[Any, ...]) -> tuple[_Source, FlowParameters, FlowOptions]:
    """The op's arguments."""
    return _Source(*args[:8]), FlowParameters(*args[8:16]), FlowOptions(*args[16:])


def _launch_forward(*args: Any) -> tuple[Tensor, Tensor]:
    source, parameters, options = _split(args)
    shape, held, config = flow_form(parameters, options)
    like, dim = parameters.bias_in, shape.passed + shape.changed
    # The kernel's states are whole tiles.
    x, log_det = like.new_empty((whole_tiles(source.rows, config), dim)), like.new_empty((source.rows,))
    z = x if source.z is None else source.z
    programs = persistent_programs(x.device, source.rows, config)
    launch(
        _flow_kernel,
        (programs,),
        z,
        log_det if source.numbers is None else source.numbers.contiguous(),
        source.seed if source.seed_tensor is None else source.seed_tensor,
        source.step,
        source.first,
        source.scale,
        x,
        log_det,
        pointers(parameters, options.precision),
        None if held is None else held_memory(shape, held, programs, config, x.device),
        source.rows,
        programs * config.block_rows,
        z.stride(0),
        z.stride(1),
        F=shape,
        M=held,
        INVERSE=options.inverse,
        NOISE=source.z is None,
        INDEX_IN_MEMORY=source.numbers is not None,
        SEED_IN_MEMORY=source.seed_tensor is not None,
        STREAM=int(philox.Stream.PROPOSAL),
        INT64=int64_offsets(z, x.numel()),
        ROWS=config.block_rows,
        config=config,
        device=x.device,
    )
    return without_padding(x, source.rows), log_det


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    source, parameters, _ = _split(args)
    dim = parameters.weight_in.shape[2] + parameters.weight_out.shape[1] // 2
    like = parameters.bias_in
    return like.new_empty((source.rows, dim)), like.new_empty((source.rows,))


def _drawn(source: _Source, parameters: FlowParameters) -> Tensor:
    """The input `[N, D]` as a tensor."""
    if source.z is not None:
        return source.z
    like = parameters.bias_in
    seed = source.seed if source.seed_tensor is None else source.seed_tensor
    first, end = source.first, source.first + source.rows
    if source.numbers is not None:
        index = source.numbers
    elif compiling():  # to a compiler the ends of a range are constants
        index = torch.arange(first, end, device=like.device)
    else:
        index = range(first, end)
    dim = parameters.weight_in.shape[2] + parameters.weight_out.shape[1] // 2
    noise = philox.normal(
        seed, index, source.step, philox.Stream.PROPOSAL, dim, dtype=like.dtype, device=like.device
    )
    return noise * source.scale if source.scale != 1.0 else noise


def _forward_on_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    source, parameters, options = _split(args)
    return coupling_flow_reference(_drawn(source, parameters), parameters, options)


_PARAMETERS = (
    "Tensor weight_in, Tensor bias_in, Tensor weight_hidden, Tensor bias_hidden, Tensor weight_out,"
    " Tensor bias_out, Tensor? norm_log_scale, Tensor? norm_shift"
)
_forward = register_op(
    "coupling_flow",
    "(Tensor? z, Tensor? index, Tensor? seed_tensor, SymInt seed, SymInt step, SymInt first, SymInt rows,"
    f" float scale, {_PARAMETERS}, bool inverse, str precision, str activation, float? clamp, str mixing)"
    " -> (Tensor x, Tensor log_det)",
    launcher=_launch_forward,
    reference=_forward_on_cpu,
    fake=_forward_fake,
)


class _CouplingFlow(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[0], *inputs[8:16])
        ctx.options = FlowOptions(*inputs[16:])

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *parameters = ctx.saved_tensors
        wanted = any_is_asked_for(ctx, 8, 16)
        found = _FlowGradients.apply(grad_x, grad_log_det, x, *parameters, wanted, *ctx.options)
        found = iter(found)
        grad_z = next(found)
        gradients = [None if p is None or not wanted else next(found) for p in parameters]
        return (grad_z if ctx.needs_input_grad[0] else None, *(None,) * 7, *gradients, *(None,) * 5)


class _FlowGradients(torch.autograd.Function):
    """The backward pass, so that it can itself be differentiated: by the reference, since that is rare."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        grad_z, gradients = flow_backward(*args)
        return grad_z, *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:11])
        ctx.wanted, ctx.options = inputs[11], FlowOptions(*inputs[12:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        present = [tensor for tensor in saved if tensor is not None]

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            parameters = FlowParameters(*tensors[3:])
            grad_z, found = coupling_flow_backward_reference(
                tensors[0], tensors[1], tensors[2], parameters, ctx.options
            )
            return (grad_z, *(g for g in found if g is not None)) if ctx.wanted else (grad_z,)

        pull_back: Any = torch.func.vjp(gradients, *present)[1]
        found = iter(pull_back(cotangents))
        return *(None if tensor is None else next(found) for tensor in saved), *(None,) * 6


def _check_parameters(parameters: FlowParameters, precision: str) -> None:
    if not isinstance(parameters, FlowParameters):
        raise TypeError(f"parameters must be a FlowParameters, got {type(parameters).__name__}")
    if (parameters.norm_log_scale is None) != (parameters.norm_shift is None):
        raise ValueError("parameters.norm_log_scale and parameters.norm_shift must be given together")
    for name, stack in parameters._asdict().items():
        if not isinstance(stack, Tensor) and not (stack is None and name.startswith("norm")):
            raise TypeError(f"parameters.{name} must be a tensor, got {type(stack).__name__}")
    weight_in, _, weight_hidden, _, weight_out = parameters[:5]
    if weight_in.ndim != 3 or weight_hidden.ndim != 4 or weight_out.ndim != 3:
        shapes = [tuple(stack.shape) for stack in (weight_in, weight_hidden, weight_out)]
        wanted = "parameters.weight_in [L, H, D1], weight_hidden [L, depth-1, H, H], weight_out [L, 2·D2, H]"
        raise ValueError(f"{wanted} are what is expected, got the shapes {shapes}")
    layers, hidden, passed = weight_in.shape
    changed, depth = weight_out.shape[1] // 2, weight_hidden.shape[1] + 1
    if passed - changed not in (0, 1) or changed < 1 or layers < 1 or hidden < 1:
        raise ValueError(
            "parameters.weight_in [L, H, D1] and weight_out [L, 2·D2, H] must have L and H of at least 1 and"
            f" D1 = D2 or D2 + 1, got {tuple(weight_in.shape)} and {tuple(weight_out.shape)}"
        )
    shapes = (
        *((layers, hidden, passed), (layers, hidden)),
        *((layers, depth - 1, hidden, hidden), (layers, depth - 1, hidden)),
        *((layers, 2 * changed, hidden), (layers, 2 * changed)),
        *((layers, passed + changed), (layers, passed + changed)),
    )
    dtype, device = parameters.bias_in.dtype, parameters.bias_in.device
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"parameters.bias_in must be float32 or float64, got {dtype}")
    for name, stack, shape in zip(FlowParameters._fields, parameters, shapes, strict=True):
        if stack is None:
            continue
        if tuple(stack.shape) != shape:
            raise ValueError(f"parameters.{name} must have shape {list(shape)}, got {tuple(stack.shape)}")
        rounded = name.startswith("weight") and precision == "bf16" and stack.dtype == torch.bfloat16
        if stack.dtype != dtype and not rounded:
            raise TypeError(f"parameters.{name} must be {dtype} as bias_in is, got {stack.dtype}")
        if stack.device != device:
            raise ValueError(f"parameters.{name} must be on {device} as bias_in is, got {stack.device}")


def _check_options(options: FlowOptions) -> None:
    check_bool("inverse", options.inverse)
    check_choice("precision", options.precision, PRECISIONS)
    check_choice("activation", options.activation, ACTIVATIONS)
    check_choice("mixing", options.mixing, MIXINGS)
    check_clamp(options.clamp)


def check_flow(parameters: FlowParameters, options: FlowOptions) -> None:
    """That the parameters agree with each other and the options exist: TypeError or ValueError if not."""
    _check_options(options)
    _check_parameters(parameters, options.precision)


def _source(z: Any, parameters: FlowParameters, temperature: float) -> _Source:
    """Checks the input, and takes it apart."""
    like = parameters.bias_in
    dim = parameters.weight_in.shape[2] + parameters.weight_out.shape[1] // 2
    check_positive("temperature", temperature)
    if isinstance(z, Tensor):
        if temperature != 1.0:
            raise ValueError(
                f"temperature scales noise that is made inside; with a tensor it is 1, got {temperature}"
            )
        if z.ndim != 2 or z.shape[1] != dim:
            raise ValueError(f"z must have shape [N, {dim}], got {tuple(z.shape)}")
        if z.dtype != like.dtype:
            raise TypeError(f"z must be {like.dtype} as the parameters are, got {z.dtype}")
        if z.device != like.device:
            raise ValueError(f"z must be on the parameters' device {like.device}, got {z.device}")
        return _Source(z, None, None, 0, 0, 0, z.shape[0], 1.0)
    if not isinstance(z, tuple):
        raise TypeError(f"z must be a tensor, a Noise or a tuple (seed, start, n), got {type(z).__name__}")
    numbers, start, rows, step = None, 0, 0, 0
    if not isinstance(z, Noise):  # not by way of a range, whose length a compiler takes for a constant
        if len(z) != 3 or not (is_integer(z[1]) and is_integer(z[2])) or z[1] < 0 or z[2] < 0:
            raise ValueError(f"z as a tuple must be (seed, start, n) with start and n at least 0, got {z}")
        seed, start, rows = z
        if start + rows > 1 << 56:
            raise ValueError(f"z as a tuple must be (seed, start, n) with start + n at most 2^56, got {z}")
    else:
        seed, index, step = z
        check_integer("z.step", step, 0, 1 << 32, "in [0, 2^32)")
        if isinstance(index, range):
            start, rows = index.start, len(index)
            if index.step != 1 or start < 0 or start + rows > 1 << 56:
                raise ValueError(f"z.index must be a range of step 1 within [0, 2^56), got {index}")
        elif not isinstance(index, Tensor) or index.dtype != torch.int64 or index.ndim != 1:
            got = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"z.index must be an int64 tensor of shape [N] or a range, got {got}")
        elif index.device != like.device:
            raise ValueError(f"z.index must be on the parameters' device {like.device}, got {index.device}")
        else:
            check_numbers_of_samples("z.index", index)
            numbers, rows = index, index.shape[0]
    check_seed("z.seed", seed, like.device)
    seed_tensor, seed = (seed, 0) if isinstance(seed, Tensor) else (None, seed)
    return _Source(None, numbers, seed_tensor, seed, step, start, rows, math.sqrt(temperature))


def flow_has_no_kernel(parameters: FlowParameters, precision: str) -> str | None:
    """Why `coupling_flow` takes the reference for such parameters, or None where it has a kernel."""
    if parameters.bias_in.dtype == torch.float64:
        return "the parameters are float64, which has no kernel"
    dim = parameters.weight_in.shape[2] + parameters.weight_out.shape[1] // 2
    reason = flow_fits(dim, parameters.bias_in.shape[1], parameters.weight_hidden.shape[1] + 1)
    if reason is None and held_in_memory(parameters, precision):
        reason = layers_untrusted(parameters.bias_in.device)
    return reason


def coupling_flow(
    z: Tensor | Noise | tuple[int, int, int],
    parameters: FlowParameters,
    *,
    inverse: bool = False,
    precision: Literal["ieee", "tf32", "bf16"] = "ieee",
    activation: Literal["relu", "leaky_relu", "silu"] = "relu",
    clamp: float | None = 2.0,
    mixing: Literal["shuffle", "swap"] = "shuffle",
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """A stack of affine couplings with MLP conditioners, and the log-determinant of its Jacobian.

    For l = 0..L-1, with a the first D1 = ceil(D/2) columns and b the others (Dinh et al. 2017, eq. 7 and 8):

        s, t = MLP_l(a)
        b <- b·exp(s') + t,  s' = clamp·tanh(s / clamp)   (s' = s without a clamp)
        x <- (a, b) with the columns mixed
        x <- x·exp(norm_log_scale_l) + norm_shift_l       (where there is a normalisation)

    The log-determinant is the sum of all s' and norm_log_scale; `inverse=True` undoes all of it. On a GPU it
    is one launch where `flow_has_no_kernel` has no objection, and a row's result does not depend on the batch
    it is in, to the last bit. Elsewhere it is the reference in plain torch.

    Differentiable in z and all parameters. The backward pass of the kernel keeps the result and the
    parameters, and computes each layer's input from its output, in memory that does not grow with L. That is
    as accurate as the layers can be undone: without a clamp, scales near 0 cannot. Second derivatives take
    the reference, with memory that does grow, and so do the transforms of torch.func. Where the reference
    runs, autograd differentiates it. Autocast changes nothing, for the precision is an argument, but in a
    backward pass of the reference that runs within it, which torch advises against.

    Args:
        z: `[N, D]`, in the dtype of the parameters, any strides; or a `Noise`, or (seed, start, n) for
            `Noise(seed, range(start, start + n))`: then z is never in memory on the kernel's path. Numbers of
            samples are in [0, 2^56); those in a GPU's memory are not checked. A compiler may leave start and
            n of a tuple open; a range is a constant to it.
        parameters: float32, or float64, which has no kernel. With "bf16" the matrices may be bfloat16
            already, so that no call has to round them.
        inverse: the direction: False noise to sample, True sample to noise.
        precision: of the operands of matrix products alone; sums are float32. Weights that are not rounded
            yet are so by a small launch before the other. On a CPU "tf32" is float32, and "bf16" rounds the
            products' results as well, or is float32 too, where that is faster (`processor.py`).
        activation: of the hidden layers; leaky ReLU has slope 0.01.
        clamp: bound of the log-scales, positive and not denormal, or None.
        mixing: "shuffle" interleaves the halves, b0 a0 b1 a1 ...; "swap" puts b before a.
        temperature: T, for noise made inside, which is scaled by sqrt(T).

    Returns:
        x: `[N, D]`, float32 (float64 for float64 parameters).
        log_det: `[N]`, likewise: log|det dx/dz|.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    options = FlowOptions(inverse, precision, activation, clamp, mixing)
    check_flow(parameters, options)
    source = _source(z, parameters, temperature)
    like = parameters.bias_in
    wrapped = transformed(source.z, source.numbers, source.seed_tensor, *parameters)
    unsupported = NO_RULES if wrapped else flow_has_no_kernel(parameters, precision)
    if use_triton(like, unsupported=unsupported):
        return _CouplingFlow.apply(*source, *parameters, *options)
    drawn = _drawn(source, parameters)
    options = options._replace(precision=precision_on(like.device, precision))
    if plain_on_cpu(drawn, *parameters):
        return coupling_flow_on_cpu(drawn, parameters, options)
    with without_autocast(like.device):
        return coupling_flow_reference(drawn, parameters, options)


__all__ = [
    "MIXINGS",
    "FlowOptions",
    "FlowParameters",
    "Noise",
    "check_flow",
    "coupling_flow",
    "coupling_flow_backward_reference",
    "coupling_flow_reference",
    "flow_has_no_kernel",
]
