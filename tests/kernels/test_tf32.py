"""Products in TF32: the kernels round their operands to the nearest, all of them, and once.

Triton hands float32 numbers to matrix units as they are, and these cut off what TF32 does not have: samples
of the shipped model are then 3.3e-3 off in norm, and 7e-4 if they are rounded. The interpreter multiplies in
float32, so that what is seen there is the rounding of the kernels.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import DEVICE, double, energy_parameters, flow_parameters
from torch import Tensor

from bench.accuracy import TF32Operands
from evalp_fast.kernels.energy import EnergyParameters, mlp_energy
from evalp_fast.kernels.flow import FlowParameters, coupling_flow
from evalp_fast.kernels.launch import HAS_TRITON, INTERPRETED, backend
from evalp_fast.kernels.sir import sir

pytestmark = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED), reason="needs Triton, on a GPU or interpreted"
)
ROWS = 40


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with backend("triton"):
        yield


class _Linear(torch.autograd.Function):
    """A linear layer whose operands are rounded by `read`, those of its gradients too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, read: Any) -> Tensor:
        x, weight = read(x), read(weight)
        ctx.save_for_backward(x, weight)
        ctx.read = read
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = ctx.read(gradient)
        return gradient @ weight, gradient.T @ x, gradient.sum(0), None


class TF32Products(TF32Operands):
    """The same, differentiable: with the gradients of the kernels."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _Linear.apply(x, weight, bias, self.read)


def points(dim: int) -> Tensor:
    return torch.randn(ROWS, dim, generator=torch.Generator().manual_seed(1)).to(DEVICE)


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
    parameters, z = flow_parameters(dim, hidden, depth), points(dim)
    found = coupling_flow(z, parameters, inverse=inverse, precision="tf32")
    with backend("reference"):
        exact = coupling_flow(z.double(), double(parameters), inverse=inverse)
        with TF32Products():
            rounded = coupling_flow(z.double(), double(parameters), inverse=inverse)
    for triple in zip(found, rounded, exact, strict=True):
        check_rounded(*triple)


@each_shape
def test_energy(dim: int, hidden: int, depth: int) -> None:
    parameters, z = energy_parameters(dim, hidden, depth), points(dim)
    found = mlp_energy(z, parameters, precision="tf32")
    with backend("reference"):
        exact = mlp_energy(z.double(), double(parameters))
        with TF32Products():
            rounded = mlp_energy(z.double(), double(parameters))
    check_rounded(found, rounded, exact)


def energy_gradient(z: Tensor, parameters: EnergyParameters, precision: Any = "ieee") -> tuple[Tensor, ...]:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(mlp_energy(z, parameters, precision=precision, activation="silu").sum(), z)


def flow_gradients(z: Tensor, parameters: FlowParameters, precision: Any = "ieee") -> tuple[Tensor, ...]:
    """Of z, and all that is not empty."""
    leaves = [t.detach().clone().requires_grad_() for t in (z, *parameters[:6]) if t is not None]
    x, log_det = coupling_flow(
        leaves[0], FlowParameters(*leaves[1:]), precision=precision, activation="silu", clamp=1.5
    )
    found = torch.autograd.grad(x.square().sum() + log_det.sum(), leaves, allow_unused=True)
    return tuple(one for one in found if one is not None and one.numel())


@each_shape
@pytest.mark.parametrize("kind", ["energy", "flow"])
def test_gradients(kind: str, dim: int, hidden: int, depth: int) -> None:
    """What products of the backward pass read is rounded too, and slopes are not."""
    gradients: Any = energy_gradient if kind == "energy" else flow_gradients
    parameters: Any = (energy_parameters if kind == "energy" else flow_parameters)(dim, hidden, depth)
    z = points(dim)
    found = gradients(z, parameters, "tf32")
    with backend("reference"):
        exact = gradients(z.double(), double(parameters))
        with TF32Products():
            rounded = gradients(z.double(), double(parameters))
    for triple in zip(found, rounded, exact, strict=True):
        check_rounded(*triple)


def test_sir_in_both_forms() -> None:
    """The weights are those of the rounded networks."""
    for dim, hidden, depth in SHAPES[:2]:
        flow, energy = flow_parameters(dim, hidden, depth), energy_parameters(dim, 20, 2)
        found = sir(3, 5, ROWS, 3, flow, energy, precision="tf32")
        with backend("reference"), TF32Products():
            rounded = sir(3, 5, ROWS, 3, flow, energy)
        with backend("reference"):
            exact = sir(3, 5, ROWS, 3, flow, energy)
        for name in ("log_mean_weight", "log_max"):
            triple = [getattr(drawn.diagnostics, name) for drawn in (found, rounded, exact)]
            check_rounded(triple[0], triple[1].double(), triple[2].double())
