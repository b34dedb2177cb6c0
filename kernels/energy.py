"""The MLP energy of EVaLP: its value, or its value and its gradient, in one launch.

f(z) of a multilayer perceptron with one output (the energy network of LEBM, Pang et al., "Learning Latent
Space Energy-Based Prior Model", NeurIPS 2020, section 3), whose gradient Langevin dynamics and a gradient
penalty ask for. A tile of rows stays on the chip from z to ∇f(z), in registers, shared memory and caches:
what moves through memory is z, the weights, and the result.

`precision` is that of the products with hidden layers: "ieee" float32, "tf32", or "bf16", which rounds both
operands to bfloat16 and sums in float32. The last layer, a single column, is float32 always.
"""

from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .asked import any_is_asked_for
from .checks import NO_RULES, check_choice, transformed
from .energy_cpu import mlp_energy_and_gradient_on_cpu, mlp_energy_on_cpu
from .energy_device import (
    energy_and_stored_gradient,
    energy_fits,
    energy_memory,
    energy_pointers,
    energy_shape,
    energy_value,
)
from .launch import int64_offsets, launch, persistent_programs, register_op, tl, triton, use_triton
from .mlp_cpu import plain_on_cpu
from .mlp_device import ACTIVATION_NAMES, ACTIVATIONS, PRECISION_NAMES, PRECISIONS
from .mlp_reference import activate, activation_slope, linear, without_autocast
from .processor import precision_on

Precision: TypeAlias = Literal["ieee", "tf32", "bf16"]
Activation: TypeAlias = Literal["relu", "leaky_relu", "silu"]


class EnergyParameters(NamedTuple):
    """The parameters of an energy of `depth` hidden layers, as `nn.Linear` holds them.

    Attributes:
        weights: depth + 1 of them: `[H, D]`, then `[H, H]` each, then `[1, H]`. Those of the hidden layers
            may be bfloat16 copies where the precision is "bf16", which are made at every call otherwise.
        biases: `[H]` each, then `[1]`.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


def mlp_energy_reference(
    z: Tensor, parameters: EnergyParameters, precision: str = "ieee", activation: str = "leaky_relu"
) -> Tensor:
    """What `mlp_energy` computes, in plain torch: specification, CPU path and oracle of the tests."""
    x = z
    for weight, bias in zip(parameters.weights[:-1], parameters.biases[:-1], strict=True):
        x = activate(linear(x, weight, precision, bias), activation)
    return F.linear(x, parameters.weights[-1], parameters.biases[-1]).squeeze(1)


def mlp_energy_and_gradient_reference(
    z: Tensor, parameters: EnergyParameters, precision: str = "ieee", activation: str = "leaky_relu"
) -> tuple[Tensor, Tensor]:
    """What `mlp_energy_and_gradient` computes, by explicit products: it needs no automatic differentiation.

    With a_l the hidden layers before their activation σ, g_L = w·σ'(a_L), g_l = (g_{l+1} W_{l+1})·σ'(a_l),
    and ∇f = g_1 W_1.
    """
    x, slopes = z, []
    for weight, bias in zip(parameters.weights[:-1], parameters.biases[:-1], strict=True):
        x = linear(x, weight, precision, bias)
        slopes.append(activation_slope(x, activation))
        x = activate(x, activation)
    value = F.linear(x, parameters.weights[-1], parameters.biases[-1]).squeeze(1)
    gradient = parameters.weights[-1]
    for weight, slope in zip(reversed(parameters.weights[:-1]), reversed(slopes), strict=True):
        gradient = linear(gradient * slope, weight.t(), precision)
    return value, gradient


@triton.jit
def _tile_rows(tile, rows, ROWS: tl.constexpr, INT64: tl.constexpr):
    """The rows of a tile, and which of them there are."""
    if INT64:
        tile = tl.full((), tile, tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    return row, row < rows


@triton.jit(do_not_specialize=["rows"])
def _energy_kernel(
    z_ptr, value_ptr, memory_ptr, weights, biases, rows, z_row, memory_step,
    E: tl.constexpr, ROWS: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """f of the rows of z.

    A program owns ROWS rows at a time, tile after tile, and alone writes their values. Per row, with depth 2:
    4·D bytes are read and 4 written, and 2·H·(D + H + 1) FLOPs are done: at D = 128, H = 200 some 250 for
    each byte, above the 165 (H200, bf16) or 82 (tf32) at which memory and matrix units take equally long. The
    weights come from the L2 cache once a tile (128 KiB in bf16), and each layer before the last as many
    times as there are tiles of features behind it: some 28 FLOPs for each byte at 64 rows. So L2 bounds it,
    and behind it the latency of layers that depend on each other within a tile.

    Args:
        z_ptr: float32 `[rows, E.dim]` of row stride z_row, read.
        value_ptr: float32 `[rows]`, written.
        memory_ptr: scratch, memory_step elements for each program: see `energy_memory`.
        weights, biases: see `energy_pointers`; read.
    """
    if INT64:
        rows = tl.full((), rows, tl.int64)
    memory_ptr += tl.program_id(0) * memory_step
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), disable_licm=True):
        row, inside = _tile_rows(tile, rows, ROWS, INT64)
        value = energy_value(z_ptr, row, inside, z_row, memory_ptr, weights, biases, E)
        tl.store(value_ptr + row, value, inside)


@triton.jit(do_not_specialize=["rows"])
def _energy_gradient_kernel(
    z_ptr, value_ptr, gradient_ptr, memory_ptr, weights, biases, rows, z_row, memory_step,
    E: tl.constexpr, ROWS: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """f of the rows of z, and its gradient.

    A program owns ROWS rows at a time, tile after tile, and alone writes their values and gradients. Per row,
    with depth 2: 4·D bytes are read and 4·D + 4 written, and 4·H·(D + H + 1) FLOPs are done, twice those of
    the value, over twice the bytes: the roofline is that of `_energy_kernel`, at D = 128, H = 200 some 260
    FLOPs for each byte of memory and 27 for each byte from L2. Weights are read twice, once for each way.

    Args:
        z_ptr, value_ptr, memory_ptr, weights, biases: as in `_energy_kernel`.
        gradient_ptr: float32 `[rows, E.dim]`, dense, written.
    """
    if INT64:
        rows = tl.full((), rows, tl.int64)
    memory_ptr += tl.program_id(0) * memory_step
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), disable_licm=True):
        row, inside = _tile_rows(tile, rows, ROWS, INT64)
        value = energy_and_stored_gradient(
            z_ptr, row, inside, z_row, gradient_ptr, 1.0, memory_ptr, weights, biases, E
        )
        tl.store(value_ptr + row, value, inside)


def _launch(
    z: Tensor, weights: list[Tensor], biases: list[Tensor], precision: int, activation: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    value, slope = _gradient_fake(z)
    rows, dim = z.shape
    name = PRECISION_NAMES[precision]
    shape, config = energy_shape(dim, weights[0].shape[0], ACTIVATION_NAMES[activation], name)
    z = z if z.stride(1) == 1 else z.contiguous()
    pointers = energy_pointers(weights, biases, name)
    programs = persistent_programs(z.device, rows, config)
    memory = energy_memory(shape, len(weights) - 1, programs, config, z.device, gradient=gradient)
    launch(
        _energy_gradient_kernel if gradient else _energy_kernel,
        (programs,),
        z,
        value,
        *((slope,) if gradient else ()),
        memory,
        *pointers,
        rows,
        z.stride(0),
        memory.stride(0),
        E=shape,
        ROWS=config.block_rows,
        INT64=int64_offsets(z, slope),
        config=config,
        device=z.device,
    )
    return value, slope


def _launch_value(z: Tensor, *rest: Any) -> Tensor:
    return _launch(z, *rest, gradient=False)[0]


def _launch_gradient(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _launch(z, *rest, gradient=True)


def _value_fake(z: Tensor, *_: Any) -> Tensor:
    return z.new_empty(z.shape[0])


def _gradient_fake(z: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape[0]), z.new_empty(z.shape)


def _value_on_cpu(
    z: Tensor, weights: list[Tensor], biases: list[Tensor], precision: int, activation: int
) -> Tensor:
    parameters = EnergyParameters(tuple(weights), tuple(biases))
    return mlp_energy_reference(z, parameters, PRECISION_NAMES[precision], ACTIVATION_NAMES[activation])


def _gradient_on_cpu(
    z: Tensor, weights: list[Tensor], biases: list[Tensor], precision: int, activation: int
) -> tuple[Tensor, Tensor]:
    parameters = EnergyParameters(tuple(weights), tuple(biases))
    return mlp_energy_and_gradient_reference(
        z, parameters, PRECISION_NAMES[precision], ACTIVATION_NAMES[activation]
    )


_value = register_op(
    "mlp_energy",
    "(Tensor z, Tensor[] weights, Tensor[] biases, int precision, int activation) -> Tensor",
    launcher=_launch_value,
    reference=_value_on_cpu,
    fake=_value_fake,
)
_value_and_gradient = register_op(
    "mlp_energy_and_gradient",
    "(Tensor z, Tensor[] weights, Tensor[] biases, int precision, int activation) -> (Tensor, Tensor)",
    launcher=_launch_gradient,
    reference=_gradient_on_cpu,
    fake=_gradient_fake,
)


def _pull_back(
    z: Tensor, tensors: tuple[Tensor, ...], options: tuple[int, int], cotangents: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    """The gradients of z and of all parameters, by the reference's derivative: all is computed anew."""
    half = len(tensors) // 2
    precision, activation = PRECISION_NAMES[options[0]], ACTIVATION_NAMES[options[1]]

    def function(z: Tensor, *tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        parameters = EnergyParameters(tensors[:half], tensors[half:])
        if cotangents[1] is None:
            return mlp_energy_reference(z, parameters, precision, activation)
        return mlp_energy_and_gradient_reference(z, parameters, precision, activation)

    value, slope = cotangents
    with without_autocast(z.device):
        pull_back: Any = torch.func.vjp(function, z, *tensors)[1]
        if slope is None:
            return pull_back(value)
        return pull_back((torch.zeros_like(z[:, 0]) if value is None else value, slope))


class _Energy(torch.autograd.Function):
    """The value, where only parameters need a gradient."""

    @staticmethod
    def forward(z: Tensor, precision: int, activation: int, *tensors: Tensor) -> Tensor:
        half = len(tensors) // 2
        return _value(z, list(tensors[:half]), list(tensors[half:]), precision, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, *ctx.options = inputs[:3]
        ctx.save_for_backward(z, *inputs[3:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, *tensors = ctx.saved_tensors
        return None, None, None, *_pull_back(z, tuple(tensors), ctx.options, (grad, None))[1:]


class _EnergyAndGradient(torch.autograd.Function):
    """Value and gradient. The backward pass of the value is one product with the gradient that was kept, an
    output of this function: so its own derivative comes back here, as a cotangent of that output.
    """

    @staticmethod
    def forward(z: Tensor, precision: int, activation: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        half = len(tensors) // 2
        return _value_and_gradient(z, list(tensors[:half]), list(tensors[half:]), precision, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        z, *ctx.options = inputs[:3]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, output[1], *inputs[3:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_slope: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, slope, *tensors = ctx.saved_tensors
        if grad is None and grad_slope is None:
            return (None,) * (3 + len(tensors))
        if grad_slope is None and grad is not None and not any_is_asked_for(ctx, 3, 3 + len(tensors)):
            return grad[:, None] * slope, None, None, *(None for _ in tensors)
        grad_z, *grads = _pull_back(z, tuple(tensors), ctx.options, (grad, grad_slope))
        if grad_slope is None and grad is not None:
            grad_z = grad[:, None] * slope
        return grad_z, None, None, *grads


def check_energy(z: Tensor, parameters: EnergyParameters, precision: str, activation: str) -> None:
    """That z and the parameters of an energy agree with each other, in shape, dtype and device.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(z, Tensor):
        raise TypeError(f"z must be a tensor, got {type(z).__name__}")
    if z.ndim != 2 or z.shape[1] < 1:
        raise ValueError(f"z must have shape [N, D] with D at least 1, got {tuple(z.shape)}")
    if z.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"z must be float32 or float64, got {z.dtype}")
    check_choice("precision", precision, PRECISIONS)
    check_choice("activation", activation, ACTIVATIONS)
    if not isinstance(parameters, tuple) or len(parameters) != 2:
        raise TypeError(f"parameters must be EnergyParameters, got {type(parameters).__name__}")
    weights, biases = parameters
    for name, tensors in (("weights", weights), ("biases", biases)):
        if not isinstance(tensors, tuple | list):
            raise TypeError(f"parameters.{name} must be a tuple of tensors, got {type(tensors).__name__}")
        for layer, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                kind = type(tensor).__name__
                raise TypeError(f"parameters.{name}[{layer}] must be a tensor, got {kind}")
    if len(weights) < 2:
        raise ValueError(f"parameters.weights must hold at least 2 matrices, got {len(weights)}")
    if len(biases) != len(weights):
        raise ValueError(f"parameters.biases must hold {len(weights)} vectors, got {len(biases)}")
    hidden = weights[0].shape[0] if weights[0].ndim == 2 else "H"
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        last = layer == len(weights) - 1
        outs, ins = 1 if last else hidden, hidden if layer else z.shape[1]
        for name, tensor, shape in (("weights", weight, (outs, ins)), ("biases", bias, (outs,))):
            label = f"parameters.{name}[{layer}]"
            if tuple(tensor.shape) != shape:
                expected = ", ".join(str(size) for size in shape)
                raise ValueError(f"{label} must have shape [{expected}], got {list(tensor.shape)}")
            rounded = (
                tensor.dtype == torch.bfloat16 and precision == "bf16" and name == "weights" and not last
            )
            if tensor.dtype != z.dtype and not rounded:
                raise TypeError(f"{label} must be {z.dtype} as z is, got {tensor.dtype}")
            if tensor.device != z.device:
                raise ValueError(f"{label} must be on {z.device} as z is, got {tensor.device}")


def _has_no_kernel(z: Tensor, parameters: EnergyParameters) -> str | None:
    """Why the reference runs, or None where the kernel does."""
    if z.dtype == torch.float64:
        return "z is float64, which has no kernel"
    if transformed(z, *parameters.weights, *parameters.biases):
        return NO_RULES
    return energy_fits(z.shape[1], parameters.weights[0].shape[0], len(parameters.weights) - 1, z.device)


def mlp_energy(
    z: Tensor,
    parameters: EnergyParameters,
    *,
    precision: Precision = "ieee",
    activation: Activation = "leaky_relu",
) -> Tensor:
    """The energy f of the rows of `z`, of which a lower one is more likely.

    Differentiable in z and in the parameters, twice. On a GPU the launch computes ∇f along with f where z
    needs a gradient, so that the backward pass to z is one product; gradients of the parameters and second
    derivatives are computed anew by the reference, and hold no activations in between. Transforms of
    torch.func take the reference. Autocast changes nothing: the precision is an argument.

    Args:
        z: `[N, D]`, float32, or float64 (which has no kernel).
        parameters: of z's dtype and device. A shape that `energy_device.energy_fits` has something against
            takes the reference.
        precision: of the products with the hidden layers. Weights that are not rounded yet are so by a small
            launch before the other. On a CPU "tf32" is float32, and "bf16" rounds the products' results as
            well as their operands, or is float32 too, where that is faster (`processor.py`).
        activation: of the hidden layers.

    Returns:
        `[N]`, of z's dtype.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_energy(z, parameters, precision, activation)
    if not use_triton(z, unsupported=_has_no_kernel(z, parameters)):
        computed = precision_on(z.device, precision)
        if plain_on_cpu(z, *parameters.weights, *parameters.biases):
            return mlp_energy_on_cpu(z, *parameters, activation=activation, precision=computed)
        with without_autocast(z.device):
            return mlp_energy_reference(z, parameters, computed, activation)
    weights, biases = list(parameters.weights), list(parameters.biases)
    codes = PRECISIONS[precision], ACTIVATIONS[activation]
    if torch.is_grad_enabled() and z.requires_grad:
        return _EnergyAndGradient.apply(z, *codes, *weights, *biases)[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*weights, *biases)):
        return _Energy.apply(z, *codes, *weights, *biases)
    return _value(z, weights, biases, *codes)


def mlp_energy_and_gradient(
    z: Tensor,
    parameters: EnergyParameters,
    *,
    precision: Precision = "ieee",
    activation: Activation = "leaky_relu",
) -> tuple[Tensor, Tensor]:
    """The energy of the rows of `z` and its gradient, `(f [N], ∇f [N, D])`, in one launch.

    Arguments and errors as for `mlp_energy`. Where a gradient is needed both results are differentiable in z
    and in the parameters, by the reference.
    """
    check_energy(z, parameters, precision, activation)
    if not use_triton(z, unsupported=_has_no_kernel(z, parameters)):
        computed = precision_on(z.device, precision)
        if plain_on_cpu(z, *parameters.weights, *parameters.biases):
            return mlp_energy_and_gradient_on_cpu(z, *parameters, activation=activation, precision=computed)
        with without_autocast(z.device):
            return mlp_energy_and_gradient_reference(z, parameters, computed, activation)
    weights, biases = list(parameters.weights), list(parameters.biases)
    codes = PRECISIONS[precision], ACTIVATIONS[activation]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (z, *weights, *biases)):
        return _EnergyAndGradient.apply(z, *codes, *weights, *biases)
    return _value_and_gradient(z, weights, biases, *codes)


__all__ = [
    "Activation",
    "EnergyParameters",
    "Precision",
    "check_energy",
    "mlp_energy",
    "mlp_energy_and_gradient",
    "mlp_energy_and_gradient_reference",
    "mlp_energy_reference",
]
