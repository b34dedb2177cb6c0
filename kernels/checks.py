"""Checks of arguments that several public functions share.

Each raises a TypeError or a ValueError that names the argument and what was expected. What a compiler traces
(SymInt, SymFloat) passes as the number it stands for.
"""

import math
import numbers
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
        is_functorch_wrapped_tensor,
        maybe_current_level,
    )
except ImportError:  # private names: where they have moved, transforms of torch.func take the way of all

    def is_functorch_wrapped_tensor(tensor: Tensor) -> bool:
        return False

    def maybe_current_level() -> int | None:
        return None


# Private: where it has moved, what another thread compiles counts as ours.
_modes_of_this_thread: Any = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)

_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def compiling() -> bool:
    """Whether torch.compile or torch.export records what this thread does. `torch.compiler.is_compiling()`
    is true as well while they are at work in another, and a sample would take the way of what is recorded."""
    if not torch.compiler.is_compiling():
        return False
    return torch.compiler.is_dynamo_compiling() or _modes_of_this_thread() > 0


def transformed(*values: Any) -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) is at work on one of these tensors."""
    if compiling():
        return False
    return any(
        isinstance(value, Tensor)
        and (is_functorch_wrapped_tensor(value) or forward_ad.unpack_dual(value).tangent is not None)
        for value in values
    )


def under_a_transform() -> bool:
    """Whether a transform of torch.func is at work, be it on these tensors or on others."""
    return maybe_current_level() is not None


NO_RULES = "the kernel has no rules for vmap and the other transforms of torch.func"


def is_integer(value: object) -> bool:
    """An int, or one that a compiler traces; a bool is none."""
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """A real number of Python or NumPy, or one that a compiler traces; a bool is none."""
    real = isinstance(value, numbers.Real | torch.SymInt | torch.SymFloat)
    return real and not isinstance(value, bool)


def check_bool(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """One of some names."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_integer(name: str, value: Any, low: int, high: int | None = None, allowed: str = "") -> None:
    """An int of at least `low` and below `high`, which `allowed` says in words."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value >= high):
        raise ValueError(f"{name} must be {allowed or f'at least {low}'}, got {value}")


def _require_number(name: str, value: object) -> None:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_positive(name: str, value: Any) -> None:
    """A positive and finite number."""
    _require_number(name, value)
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_not_negative(name: str, value: Any) -> None:
    """A finite number of at least 0."""
    _require_number(name, value)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def check_finite(name: str, value: Any) -> None:
    """A finite number."""
    _require_number(name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")


def check_clamp(value: Any) -> None:
    """None, or a bound of log-scales that kernels can divide by: they take a denormal number for 0."""
    if value is None:
        return
    if not is_number(value):
        raise TypeError(f"clamp must be None or a number, got {type(value).__name__}")
    if not 0.0 < value < math.inf:
        raise ValueError(f"clamp must be None or positive and finite, got {value}")
    if not _SMALLEST <= value <= _LARGEST:
        raise ValueError(f"clamp must be None or a normal number in float32, got {value}")


def check_seed(name: str, value: Any, device: torch.device | None = None) -> None:
    """An int of 64 bits; with a device also an int64 tensor of one element there."""
    if device is not None and isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1 or value.device != device:
            got = f"{value.dtype} {tuple(value.shape)} on {value.device}"
            raise TypeError(f"{name} must be an int or an int64 tensor of 1 element on {device}, got {got}")
        return
    if not is_integer(value):
        wanted = "an int" if device is None else "an int or an int64 tensor of 1 element"
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"{name} must be an int of 64 bits, got {value}")


def check_numbers_of_samples(name: str, index: Tensor) -> None:
    """That the numbers of samples are in [0, 2^56). Those on a GPU are not read, which would wait for it; nor
    are those that a compiler traces or a transform of torch.func maps."""
    if not index.is_cpu or type(index) is not Tensor or index.numel() == 0:
        return
    if compiling() or is_functorch_wrapped_tensor(index):
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= 1 << 56:
        raise ValueError(f"{name} must be within [0, 2^56), got numbers from {low} to {high}")


__all__ = [
    "NO_RULES",
    "check_bool",
    "check_choice",
    "check_clamp",
    "check_finite",
    "check_integer",
    "check_not_negative",
    "check_numbers_of_samples",
    "check_positive",
    "check_seed",
    "compiling",
    "is_functorch_wrapped_tensor",
    "is_integer",
    "is_number",
    "transformed",
    "under_a_transform",
]
