"""Products in TF32: the kernels round their operands to the nearest, all of them, and once.

Triton hands float32 numbers to matrix units as they are, and these cut off what TF32 does not have: samples
of the shipped model are then 3.3e-3 off in norm, and 7e-4 if they are rounded. The interpreter multiplies in
float32, so that what is seen there is the rounding of the kernels.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.accuracy import TF32Operands
from evalp_fast.kernels.energy import EnergyParameters, mlp_energy, mlp_energy_and_gradient
from evalp_fast.kernels.flow import FlowParameters, coupling_flow
from evalp_fast.kernels.launch import INTERPRETED, backend
from evalp_fast.kernels.sir import sir

ROWS = 40


@pytest.fixture(
    autouse=True,
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with backend("triton"), torch.device(request.param):
        yield request.param


def draw(*shape: int, fan: int = 4) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), device="cpu").to(
        torch.get_default_device()
    ) / (fan**0.5)


def flow_parameters(dim: int, hidden: int, depth: int) -> FlowParameters:
    passed, changed = (dim + 1) // 2, dim // 2
    return FlowParameters(
        draw(3, hidden, passed, fan=passed),
        draw(3, hidden),
        draw(3, depth - 1, hidden, hidden, fan=hidden),
        draw(3, depth - 1, hidden),
        draw(3, 2 * changed, hidden, fan=hidden),
        draw(3, 2 * changed),
    )


def energy_parameters(dim: int, hidden: int, depth: int) -> EnergyParameters:
    widths = [dim, *[hidden] * depth, 1]
    weights = tuple(draw(widths[k + 1], widths[k], fan=widths[k]) for k in range(depth + 1))
    return EnergyParameters(weights, tuple(draw(width) for width in widths[1:]))


def double(parameters: Any) -> Any:
    if isinstance(parameters, Tensor):
        return parameters.double()
    if parameters is None:
        return None
    return (
        type(parameters)(*map(double, parameters))
        if hasattr(parameters, "_fields")
        else tuple(map(double, parameters))
    )


def distance(a: Tensor, b: Tensor) -> float:
    """Of a and b, relative to b, in norm."""
    return float((a.double() - b).norm() / b.norm())


def check_rounded(found: Tensor, rounded: Tensor, exact: Tensor) -> None:
    """The kernel has the errors of operands that are rounded to the nearest, and hardly another: not those of
    numbers that are cut off, which are larger, and not none."""
    assert 2e-5 < distance(rounded, exact) < 2e-3
    assert distance(found, rounded) < 0.1 * distance(rounded, exact)


# The second has its hidden layers in memory.
SHAPES = [(9, 24, 2), (6, 130, 3), (5, 20, 1)]
each_shape = pytest.mark.parametrize(("dim", "hidden", "depth"), SHAPES)


@each_shape
@pytest.mark.parametrize("inverse", [False, True])
def test_flow(dim: int, hidden: int, depth: int, inverse: bool) -> None:
    parameters, z = flow_parameters(dim, hidden, depth), draw(ROWS, dim, fan=1)
    found = coupling_flow(z, parameters, inverse=inverse, precision="tf32")
    with backend("reference"):
        exact = coupling_flow(z.double(), double(parameters), inverse=inverse)
        with TF32Operands():
            rounded = coupling_flow(z.double(), double(parameters), inverse=inverse)
    for triple in zip(found, rounded, exact, strict=True):
        check_rounded(*triple)


@each_shape
def test_energy(dim: int, hidden: int, depth: int) -> None:
    parameters, z = energy_parameters(dim, hidden, depth), draw(ROWS, dim, fan=1)
    found = mlp_energy(z, parameters, precision="tf32")
    with backend("reference"):
        exact = mlp_energy(z.double(), double(parameters))
        with TF32Operands():
            rounded = mlp_energy(z.double(), double(parameters))
    check_rounded(found, rounded, exact)


@each_shape
def test_gradients(dim: int, hidden: int, depth: int) -> None:
    """Of an energy, and of a flow in all that it depends on: they have the errors of TF32, and no more."""
    z, options = draw(ROWS, dim, fan=1), {"activation": "silu"}
    energy, parameters = energy_parameters(dim, hidden, depth), flow_parameters(dim, hidden, depth)
    _, found = mlp_energy_and_gradient(z, energy, precision="tf32", **options)
    with backend("reference"):
        _, exact = mlp_energy_and_gradient(z.double(), double(energy), **options)
    assert 2e-5 < distance(found, exact) < 2e-3

    def of_flow(z: Tensor, parameters: FlowParameters, **options: Any) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in (z, *parameters[:6]) if t is not None]
        x, log_det = coupling_flow(leaves[0], FlowParameters(*leaves[1:]), **options)
        return torch.autograd.grad(x.square().sum() + log_det.sum(), leaves, allow_unused=True)

    found = of_flow(z, parameters, precision="tf32", **options)
    with backend("reference"):
        exact = of_flow(z.double(), double(parameters), **options)
    for one, other in zip(found, exact, strict=True):
        if other is not None and other.numel():
            assert 2e-5 < distance(one, other) < 2e-3


def test_sir_in_both_forms() -> None:
    """The weights are those of the rounded networks."""
    for dim, hidden, depth in SHAPES[:2]:
        flow, energy = flow_parameters(dim, hidden, depth), energy_parameters(dim, 20, 2)
        found = sir(3, 5, ROWS, 3, flow, energy, precision="tf32")
        with backend("reference"), TF32Operands():
            rounded = sir(3, 5, ROWS, 3, flow, energy)
        with backend("reference"):
            exact = sir(3, 5, ROWS, 3, flow, energy)
        for name in ("log_mean_weight", "log_max"):
            triple = [getattr(drawn.diagnostics, name) for drawn in (found, rounded, exact)]
            check_rounded(triple[0], triple[1].double(), triple[2].double())
