"""Parameters of flows and energies for the tests of their kernels: random, and large enough to matter."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from evalp_fast.kernels.energy import EnergyParameters
from evalp_fast.kernels.flow import FlowParameters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _stack(generator: torch.Generator, *shape: int, fan: int = 1) -> Tensor:
    return (0.5 * torch.randn(shape, generator=generator) / fan**0.5).to(DEVICE)


def flow_parameters(
    dim: int, hidden: int, depth: int, *, layers: int = 3, normalised: bool = False, seed: int = 0
) -> FlowParameters:
    """Every coupling moves every column, and clamps bend."""
    generator = torch.Generator().manual_seed(seed)
    passed, changed = (dim + 1) // 2, dim // 2
    norm = (0.5 * _stack(generator, layers, dim), _stack(generator, layers, dim)) if normalised else ()
    return FlowParameters(
        _stack(generator, layers, hidden, passed, fan=passed),
        _stack(generator, layers, hidden),
        _stack(generator, layers, depth - 1, hidden, hidden, fan=hidden),
        _stack(generator, layers, depth - 1, hidden),
        _stack(generator, layers, 2 * changed, hidden, fan=hidden),
        _stack(generator, layers, 2 * changed),
        *norm,
    )


def energy_parameters(dim: int, hidden: int, depth: int, *, seed: int = 0) -> EnergyParameters:
    """An energy that varies by about one."""
    generator = torch.Generator().manual_seed(seed)
    widths = [dim, *[hidden] * depth, 1]
    weights = (2.0 * _stack(generator, o, i, fan=i) for i, o in pairwise(widths))
    return EnergyParameters(tuple(weights), tuple(_stack(generator, width) for width in widths[1:]))


def double(parameters: Any) -> Any:
    """The same parameters in float64."""
    if isinstance(parameters, Tensor):
        return parameters.double()
    if parameters is None or isinstance(parameters, str | float):
        return parameters
    values = (double(value) for value in parameters)
    return type(parameters)(*values) if hasattr(parameters, "_fields") else type(parameters)(values)
