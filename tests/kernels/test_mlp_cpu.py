"""The CPU forms of flow, energy and chain: the references' numbers, and the same bits compiled or not."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from evalp_fast.kernels import launch, mlp_cpu
from evalp_fast.kernels.chain_cpu import ChainOptions, langevin_chain_on_cpu
from evalp_fast.kernels.energy import (
    EnergyParameters,
    mlp_energy,
    mlp_energy_and_gradient,
    mlp_energy_and_gradient_reference,
)
from evalp_fast.kernels.energy_cpu import mlp_energy_and_gradient_on_cpu, mlp_energy_on_cpu
from evalp_fast.kernels.flow import FlowOptions, FlowParameters, coupling_flow, coupling_flow_reference
from evalp_fast.kernels.flow_cpu import coupling_flow_on_cpu
from evalp_fast.kernels.latent_chain import langevin_chain_reference

# Of results against float64: rounding of float32 through a few layers, and of bfloat16 products.
TOLERANCE = {"ieee": 2e-5, "tf32": 2e-5, "bf16": 3e-2}


def flow_parameters(dim: int, hidden: int = 24, depth: int = 2, normalised: bool = False) -> FlowParameters:
    torch.manual_seed(dim)
    layers, passed, changed = 3, (dim + 1) // 2, dim // 2
    norms = (0.2 * torch.randn(layers, dim), 0.2 * torch.randn(layers, dim)) if normalised else (None, None)
    return FlowParameters(
        torch.randn(layers, hidden, passed) / passed**0.5,
        0.3 * torch.randn(layers, hidden),
        torch.randn(layers, depth - 1, hidden, hidden) / hidden**0.5,
        0.3 * torch.randn(layers, depth - 1, hidden),
        0.7 * torch.randn(layers, 2 * changed, hidden) / hidden**0.5,
        0.3 * torch.randn(layers, 2 * changed),
        *norms,
    )


def energy_parameters(dim: int, hidden: int = 24, depth: int = 2) -> EnergyParameters:
    torch.manual_seed(dim)
    sizes = [(hidden, dim), *[(hidden, hidden)] * (depth - 1), (1, hidden)]
    weights = tuple(torch.randn(size) / size[1] ** 0.5 for size in sizes)
    return EnergyParameters(weights, tuple(0.3 * torch.randn(size[0]) for size in sizes))


def double(parameters: Any) -> Any:
    """The same parameters in float64."""
    if isinstance(parameters, Tensor):
        return parameters.double()
    if parameters is None or isinstance(parameters, str | float):
        return parameters
    values = (double(value) for value in parameters)
    return type(parameters)(*values) if hasattr(parameters, "_fields") else type(parameters)(values)


def test_exponential() -> None:
    x = torch.linspace(-87.0, 88.0, 100_001)
    exact = torch.exp(x.double())
    assert ((mlp_cpu.exponential(x) - exact).abs() / exact).max() < 2.5e-7
    special = mlp_cpu.exponential(torch.tensor([math.nan, math.inf, -math.inf, 1000.0, -1000.0, 0.0]))
    assert special[0].isnan()
    assert special[1:].tolist() == [math.inf, 0.0, math.inf, 0.0, 1.0]


def test_tanh() -> None:
    x = torch.cat((torch.linspace(-15.0, 15.0, 100_001), torch.logspace(-30, 0, 1000)))
    exact = torch.tanh(x.double())
    assert ((mlp_cpu.tanh(x) - exact).abs() / exact.abs().clamp_min(1e-300)).nan_to_num().max() < 6e-7
    assert mlp_cpu.tanh(torch.tensor([math.inf, -math.inf])).tolist() == [1.0, -1.0]
    assert mlp_cpu.tanh(torch.tensor(math.nan)).isnan()


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("dim", "depth", "activation", "clamp", "mixing", "normalised"),
    [
        (16, 2, "relu", 2.0, "shuffle", False),
        (5, 1, "silu", None, "shuffle", True),
        (7, 3, "leaky_relu", 1.0, "swap", False),
        (2, 2, "silu", 2.0, "swap", True),
    ],
)
def test_flow_is_the_reference(
    dim: int, depth: int, activation: str, clamp: float | None, mixing: str, normalised: bool, inverse: bool,
    precision: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("evalp_fast.kernels.flow_cpu.chunk_rows", lambda *_: 20)  # several chunks
    parameters = flow_parameters(dim, depth=depth, normalised=normalised)
    options = FlowOptions(inverse, precision, activation, clamp, mixing)
    z = torch.randn(49, dim)
    x, log_det = coupling_flow_on_cpu(z, parameters, options)
    exact = coupling_flow_reference(z.double(), double(parameters), options._replace(precision="ieee"))
    scale = exact[0].abs().max()
    assert (x - exact[0]).abs().max() < TOLERANCE[precision] * scale
    assert (log_det - exact[1]).abs().max() < TOLERANCE[precision] * max(dim, 4)
    assert torch.equal(x, coupling_flow(z, parameters, **options._asdict())[0])  # it is what the op runs


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
@pytest.mark.parametrize(("dim", "depth"), [(1, 1), (5, 2), (16, 3)])
def test_energy_is_the_reference(
    dim: int, depth: int, activation: str, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evalp_fast.kernels.energy_cpu.chunk_rows", lambda *_: 20)
    parameters = energy_parameters(dim, depth=depth)
    z = torch.randn(49, dim)
    arguments: Any = {"activation": activation, "precision": precision}
    value, gradient = mlp_energy_and_gradient_on_cpu(z, *parameters, **arguments)
    exact = mlp_energy_and_gradient_reference(z.double(), double(parameters), "ieee", activation)
    assert (value - exact[0]).abs().max() < TOLERANCE[precision] * exact[0].abs().max()
    if activation == "silu" or precision == "ieee":  # a rounded ReLU may be on its other side
        assert (gradient - exact[1]).abs().max() < TOLERANCE[precision] * exact[1].abs().max()
    assert torch.equal(value, mlp_energy_on_cpu(z, *parameters, **arguments))
    assert torch.equal(value, mlp_energy(z, parameters, **arguments))
    assert torch.equal(gradient, mlp_energy_and_gradient(z, parameters, **arguments)[1])


@pytest.mark.parametrize("adjusted", [False, True])
def test_chain_is_the_reference(adjusted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against chunks that restart the noise, and against a scale that misses energy or gradient."""
    monkeypatch.setattr("evalp_fast.kernels.chain_cpu.chunk_rows", lambda *_: 8)
    parameters, z, index = energy_parameters(5), torch.randn(19, 5), torch.arange(100, 119)
    options = ChainOptions(7, 1.2, 1.5, adjusted, 0.8, 2.5, "ieee", "silu", 3, 11, 3, True)
    found = langevin_chain_on_cpu(z, *parameters, index, options)
    exact = langevin_chain_reference(z.double(), double(parameters), index, **options._asdict())
    assert found[3] is not None
    assert found[3].shape == (2, 19, 5)
    for value, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=2e-5)
    if adjusted:
        assert 0.0 < found[1].mean() < 1.0, found[1]


def compiled_and_not(call: Callable[[], tuple[Tensor, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Asserts that compiling changes no bit."""
    monkeypatch.setattr(launch, "_COMPILE_AFTER", math.inf)
    before = call()
    monkeypatch.setattr(launch, "_COMPILE_AFTER", 0.0)
    for plain, compiled in zip(before, call(), strict=True):
        assert torch.equal(plain, compiled)


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_compiling_changes_no_bit(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an operation that rounds otherwise in a compiled loop (exp, a product with a bias):
    a sample would depend on how many were drawn before it."""
    torch._dynamo.reset()
    parameters, energy = flow_parameters(7, normalised=True), energy_parameters(7)
    z = torch.randn(203, 7)
    for inverse in (False, True):
        options = FlowOptions(inverse, precision, "silu", 2.0, "shuffle")
        compiled_and_not(lambda options=options: coupling_flow_on_cpu(z, parameters, options), monkeypatch)
    arguments: Any = {"activation": "silu", "precision": precision}
    compiled_and_not(lambda: mlp_energy_and_gradient_on_cpu(z, *energy, **arguments), monkeypatch)
    compiled_and_not(lambda: (mlp_energy_on_cpu(z, *energy, **arguments),), monkeypatch)


def test_gradients_and_tracing_take_the_reference() -> None:
    """The CPU form records nothing: where a gradient is asked for, it must not be what runs."""
    parameters = flow_parameters(4)
    z = torch.randn(6, 4, requires_grad=True)
    x, log_det = coupling_flow(z, parameters)
    torch.autograd.grad(x.sum() + log_det.sum(), z)
    energy = energy_parameters(4)
    f = mlp_energy(z, energy)
    assert f.requires_grad
    assert not mlp_cpu.plain_on_cpu(z)
    assert mlp_cpu.plain_on_cpu(z.detach())
    with torch.no_grad():
        assert mlp_cpu.plain_on_cpu(z)
        rows = torch.func.vmap(lambda row: mlp_energy(row[None], energy)[0])(z.detach())
    torch.testing.assert_close(rows, f.detach())
    with launch.backend("reference"):
        assert not mlp_cpu.plain_on_cpu(z.detach())
