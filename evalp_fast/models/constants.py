"""A module whose parameters are constants."""

import copy
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def of_constants(module: M) -> M:
    """`module` with constants for parameters, which share their memory: a gradient that passes through it
    asks for none of theirs. Buffers, hooks and all else are those of `module`."""
    clone: Any = copy.copy(module)
    clone._parameters = {
        name: None if parameter is None else parameter.detach()
        for name, parameter in module._parameters.items()
    }
    clone._modules = {
        name: None if child is None else of_constants(child) for name, child in module._modules.items()
    }
    return clone


__all__ = ["of_constants"]
