"""What the steps of many Markov chains share: states of several tensors, numbers per chain, checks of both.

A state is one tensor `[N, ...]` or a list of them; sample i of a list is the concatenation of its flattened
rows i. A number per chain is a float, a tensor of one element, or one of N; seed and step are ints or int64
tensors in the same way. Kernels read all of them through `per_chain`.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .checks import NO_RULES, compiling, is_integer, is_number
from .launch import tl, triton
from .philox import normal

State: TypeAlias = Tensor | Sequence[Tensor]
PerChain: TypeAlias = float | Tensor

MAX_TENSORS = 64
"""How many tensors of a state a kernel takes: their addresses are its parameters, of at most 4 KiB."""


CACHED = 1 << 18
"""Elements of a state that the CPU takes at a time, so that what it computes of them stays in the cache."""


def as_list(state: State) -> list[Tensor]:
    """The tensors of a state."""
    return [state] if isinstance(state, Tensor) else list(state)


def new_like(state: State) -> list[Tensor]:
    """Contiguous tensors of the shapes of a state, to be written."""
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in as_list(state)]


def copy_state(target: State, source: State) -> None:
    """Write one state over another."""
    for to, value in zip(as_list(target), as_list(source), strict=True):
        to.copy_(value)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic is float32, or float64 where the positions are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widths_of(state: State) -> tuple[int, ...]:
    """How many columns of the sample each tensor of a state holds."""
    return tuple(math.prod(tensor.shape[1:]) for tensor in as_list(state))


def flat_rows(state: State, dtype: torch.dtype) -> list[Tensor]:
    """The tensors of a state as `[N, columns]` in `dtype`."""
    return [
        tensor.reshape(tensor.shape[0], width).to(dtype)
        for tensor, width in zip(as_list(state), widths_of(state), strict=True)
    ]


def as_column(value: PerChain, dtype: torch.dtype) -> PerChain:
    """A number as it is; a tensor of 1 or N elements as a column that broadcasts over the samples."""
    return value.to(dtype).reshape(-1, 1) if isinstance(value, Tensor) else value


def clip_factor(rows: list[Tensor], grad_clip: float) -> Tensor:
    """min(1, grad_clip / norm) of each sample over all its tensors, `[N, 1]`; NaN for an infinite norm."""
    norms = [torch.linalg.vector_norm(row, dim=1, dtype=torch.float64) for row in rows]
    norm = torch.linalg.vector_norm(torch.stack(norms, dim=1), dim=1, keepdim=True)
    factor = grad_clip / torch.clamp(norm, min=grad_clip)  # and not a minimum, whose derivative at 0 is NaN
    return torch.where(torch.isfinite(norm), factor, torch.nan).to(rows[0].dtype)


def drawn_noise(
    rows: list[Tensor], seed: int | Tensor, index: Tensor, step: int | Tensor, stream: int
) -> list[Tensor]:
    """Standard normals of the shapes of `rows`: each tensor takes its own range of the sample's columns."""
    widths = [row.shape[1] for row in rows]
    noise = normal(seed, index, step, stream, sum(widths), dtype=rows[0].dtype)
    return list(noise.split(widths, dim=1))


def split_number(value: PerChain) -> tuple[Tensor | None, float]:
    """A number per chain as an op takes it: the tensor, if it is one, and the number, if it is that."""
    return (value.reshape(-1), 0) if isinstance(value, Tensor) else (None, value)


def number_source(tensor: Tensor | None) -> int:
    """How a kernel reads a number per chain: 0 an argument, 1 one element in memory, 2 one per chain."""
    return 0 if tensor is None else 1 if tensor.numel() == 1 else 2


def needs_gradient(*values: PerChain) -> bool:
    """Whether autograd would record an operation on these."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def eager_on_cpu(tensors: list[Tensor], differentiated: bool, wrapped: bool) -> bool:
    """Whether a step on the CPU may go by rows and write in place: nothing traces or transforms it."""
    return tensors[0].is_cpu and not (differentiated or wrapped or compiling())


def rows_of(value: Any, part: slice) -> Any:
    """The numbers of some of the chains."""
    return value.reshape(-1)[part] if isinstance(value, Tensor) and value.numel() > 1 else value


def no_kernel(tensors: list[Tensor], differentiated: bool, wrapped: bool) -> str | None:
    """What the kernels cannot do for a state, if anything: then the reference runs."""
    if wrapped:
        return NO_RULES
    if tensors[0].dtype == torch.float64:
        return "float64 has no kernel"
    if differentiated:
        return "the kernel has no gradient: call under torch.no_grad()"
    if len(tensors) > MAX_TENSORS:
        return f"the kernel takes at most {MAX_TENSORS} tensors, got {len(tensors)}"
    return None


NORM_UNIT = tl.constexpr(2.0**-40)
"""Norms are added up in units of 2^40 times the clip: squares of up to 10^31 times the clip stay finite."""


# In Triton's interpreter a number is a Python number, hence `tl.full` and not `.to`.


@triton.jit
def per_chain(value, row, inside, SOURCE: tl.constexpr, DTYPE: tl.constexpr):
    """The number of each chain in `row`, in DTYPE: `value` is a number or a pointer, as SOURCE tells."""
    if SOURCE == 0:
        return tl.full((), value, DTYPE)
    elif SOURCE == 1:
        return tl.load(value).to(DTYPE)
    else:
        return tl.load(value + row, mask=inside, other=1).to(DTYPE)


@triton.jit
def clip_factor_of(square):
    """min(1, 2^-40/sqrt(square)): `clip_factor` from the square of a norm in units of the clip·2^40.

    NaN where the square is not finite.
    """
    factor = NORM_UNIT / tl.sqrt_rn(tl.maximum(square, NORM_UNIT * NORM_UNIT))
    return tl.where(square < float("inf"), factor, float("nan"))


@triton.jit
def choose(values, which):
    """values[which], where `which` is known only at run time.

    Selections of scalars keep what the compiler knows of the alignment of pointers. A single value stays a
    constant.
    """
    value = values[0]
    for k in tl.static_range(1, len(values)):
        value = tl.where(which == k, values[k], value)
    return value


def check_state(name: str, state: State) -> list[Tensor]:
    """The tensors of a state, after checking that they agree in dtype, device and number of samples."""
    if not isinstance(state, Tensor | list | tuple):
        raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(state).__name__}")
    tensors = as_list(state)
    if not tensors:
        raise ValueError(f"{name} must hold at least one tensor, got an empty list")
    for position, tensor in enumerate(tensors):
        label = name if isinstance(state, Tensor) else f"{name}[{position}]"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{label} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{label} must be of a floating dtype, got {tensor.dtype}")
        if tensor.ndim == 0 or tensor.shape[0] != tensors[0].shape[0]:
            expected = "[N, ...]" if position == 0 else f"[{tensors[0].shape[0]}, ...]"
            raise ValueError(f"{label} must have shape {expected}, got {tuple(tensor.shape)}")
        if tensor.dtype != tensors[0].dtype or tensor.device != tensors[0].device:
            raise ValueError(
                f"{label} must be {tensors[0].dtype} on {tensors[0].device} as {name}[0] is, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    return tensors


def check_like(
    name: str, state: State, reference_name: str, reference: State, *, dtype: bool
) -> list[Tensor]:
    """The tensors of a state, after checking that they have the shapes, device (and dtype) of another's."""
    if isinstance(state, Tensor) != isinstance(reference, Tensor):
        kind = "a tensor" if isinstance(reference, Tensor) else "a list of tensors"
        raise TypeError(f"{name} must be {kind} as {reference_name} is, got {type(state).__name__}")
    tensors, expected = check_state(name, state), as_list(reference)
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in expected]:
        shapes = [tuple(tensor.shape) for tensor in expected]
        got = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(f"{name} must have the shape of {reference_name}, {shapes}, got {got}")
    like, first = expected[0], tensors[0]
    if first.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as {reference_name} is, got {first.device}")
    if dtype and first.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype} as {reference_name} is, got {first.dtype}")
    if first.dtype == torch.float64 and like.dtype != torch.float64:
        raise TypeError(f"{name} must not be float64 where {reference_name} is {like.dtype}")
    return tensors


def check_written(name: str, state: State) -> None:
    """Each element that is written has its own place in memory."""
    if any(
        size > 1 and step == 0 for t in as_list(state) for size, step in zip(t.shape, t.stride(), strict=True)
    ):
        raise ValueError(f"{name} must not be an expanded tensor: its elements share memory")


def check_per_chain(
    name: str, value: PerChain, count: int, device: torch.device, *, zero: bool = False
) -> None:
    """A positive (with `zero`, non-negative) number, or a floating tensor of 1 or N elements on the device.

    The elements of a tensor are not read: that would wait for the device.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a number or a floating tensor, got {value.dtype}")
        if value.numel() not in (1, count) or value.ndim > 1:
            raise ValueError(f"{name} must be a number or have shape [{count}], got {tuple(value.shape)}")
        if value.device != device:
            raise ValueError(f"{name} must be on {device} as x is, got {value.device}")
    elif not is_number(value):
        raise TypeError(f"{name} must be a number or a floating tensor, got {type(value).__name__}")
    elif not (0.0 <= value < math.inf) or (value == 0.0 and not zero):
        raise ValueError(f"{name} must be finite and {'not negative' if zero else 'positive'}, got {value}")


def check_noise(
    seed: int | Tensor, index: Tensor, step: int | Tensor, stream: int, count: int, device: torch.device
) -> None:
    """What the noise of `count` samples on `device` is a function of."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be an int64 tensor of shape [{count}], got {got}")
    if index.shape != (count,):
        raise ValueError(f"index must have shape [{count}], one number per sample, got {tuple(index.shape)}")
    if index.device != device:
        raise ValueError(f"index must be on {device} as x is, got {index.device}")
    for name, value, sizes in (("seed", seed, (1,)), ("step", step, (1, count))):
        if isinstance(value, Tensor):
            if value.dtype != torch.int64 or value.ndim > 1 or value.numel() not in sizes:
                allowed = " or ".join(str(size) for size in dict.fromkeys(sizes))
                got = f"{value.dtype} {tuple(value.shape)}"
                raise TypeError(f"{name} must be an int or an int64 tensor of {allowed} elements, got {got}")
            if value.device != device:
                raise ValueError(f"{name} must be on {device} as x is, got {value.device}")
        elif not is_integer(value):
            raise TypeError(f"{name} must be an int or an int64 tensor, got {type(value).__name__}")
    if not isinstance(seed, Tensor) and not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    if not isinstance(step, Tensor) and not 0 <= step < 1 << 32:
        raise ValueError(f"step must be in [0, 2^32), got {step}")
    if not isinstance(stream, int):
        raise TypeError(f"stream must be an int, got {type(stream).__name__}")
    if not 0 <= stream < 256:
        raise ValueError(f"stream must be in [0, 256), got {stream}")


def check_drift(grad_clip: float | None, prior_precision: float | None) -> None:
    """The two optional numbers that shape the drift."""
    for name, value in (("grad_clip", grad_clip), ("prior_precision", prior_precision)):
        if value is not None and not is_number(value):
            raise TypeError(f"{name} must be None or a number, got {type(value).__name__}")
    if grad_clip is not None and not 0.0 < grad_clip < math.inf:
        raise ValueError(f"grad_clip must be None or finite and positive, got {grad_clip}")
    if prior_precision is not None and not 0.0 <= prior_precision < math.inf:
        raise ValueError(f"prior_precision must be None or finite and not negative, got {prior_precision}")


__all__ = [
    "CACHED",
    "MAX_TENSORS",
    "NORM_UNIT",
    "PerChain",
    "State",
    "as_column",
    "as_list",
    "check_drift",
    "check_like",
    "check_noise",
    "check_per_chain",
    "check_state",
    "check_written",
    "choose",
    "clip_factor",
    "clip_factor_of",
    "copy_state",
    "drawn_noise",
    "eager_on_cpu",
    "flat_rows",
    "needs_gradient",
    "new_like",
    "no_kernel",
    "number_source",
    "per_chain",
    "rows_of",
    "split_number",
    "widths_of",
    "working_dtype",
]
