"""The MLP energy: kernels against the float64 reference, the reference against automatic differentiation."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from networks import double
from torch import Tensor

from evalp_fast.kernels import energy_device, latent_chain, layers_device
from evalp_fast.kernels.energy import (
    EnergyParameters,
    mlp_energy,
    mlp_energy_and_gradient,
    mlp_energy_and_gradient_reference,
    mlp_energy_reference,
)
from evalp_fast.kernels.energy_device import energy_fits, energy_shape
from evalp_fast.kernels.launch import (
    HAS_TRITON,
    INTERPRETED,
    backend,
    force_int64_offsets,
    recorded_launches,
)
from evalp_fast.kernels.layers_device import rest_widths
from evalp_fast.models.energy import EnergyConfig, MLPEnergy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED), reason="needs Triton, on a GPU or interpreted"
)
ACTIVATIONS = ("relu", "leaky_relu", "silu")
# Float32 sums of at most 200 terms of size 1, through three layers whose maps do not amplify.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}
ops: Any = torch.ops.evalp_fast


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN, so that an element which no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernel() -> Iterator[None]:
    with backend("triton"):
        yield


def make(
    dim: int, hidden: int, depth: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> EnergyParameters:
    """An energy whose gradient is of order 1; every layer has another bias."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [dim, *[hidden] * depth, 1]

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE, dtype)

    return EnergyParameters(
        tuple(draw(sizes[i + 1], sizes[i], scale=1.5 / sizes[i] ** 0.5) for i in range(depth + 1)),
        tuple(draw(size, scale=0.3) for size in sizes[1:]),
    )


def points(n: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator).to(DEVICE, dtype)


def flat(parameters: EnergyParameters) -> list[Tensor]:
    return [*parameters.weights, *parameters.biases]


def leaves(parameters: EnergyParameters) -> EnergyParameters:
    return EnergyParameters(*(tuple(t.detach().requires_grad_() for t in group) for group in parameters))


def module_of(parameters: EnergyParameters, activation: Any) -> MLPEnergy:
    hidden, dim = parameters.weights[0].shape
    energy = MLPEnergy(EnergyConfig(dim, hidden, len(parameters.weights) - 1, activation)).to(DEVICE)
    with torch.no_grad():
        for layer, weight, bias in zip(energy.layers, *parameters, strict=True):
            layer.weight.copy_(weight)  # type: ignore[operator]
            layer.bias.copy_(bias)  # type: ignore[operator]
    return energy


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_references_are_the_module(depth: int, activation: Any) -> None:
    parameters, z = make(5, 12, depth), points(9, 5).requires_grad_()
    energy = module_of(parameters, activation)
    wanted = energy(z)
    (slope,) = torch.autograd.grad(wanted.sum(), z)
    value, gradient = mlp_energy_and_gradient_reference(z, parameters, "ieee", activation)
    torch.testing.assert_close(value, wanted, **CLOSE)
    torch.testing.assert_close(gradient, slope, **CLOSE)
    torch.testing.assert_close(mlp_energy(z, parameters, activation=activation), wanted, **CLOSE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_reference_is_the_module(activation: Any) -> None:
    """Its products round as `linear(..., "bf16")` does, and automatic differentiation of it likewise."""
    parameters, z = make(5, 12, 2), points(9, 5).requires_grad_()
    wanted = module_of(parameters, activation)(z, precision="bf16")
    (slope,) = torch.autograd.grad(wanted.sum(), z)
    value, gradient = mlp_energy_and_gradient_reference(z, parameters, "bf16", activation)
    torch.testing.assert_close(value, wanted, **CLOSE)
    torch.testing.assert_close(gradient, slope, **CLOSE)
    exact = mlp_energy_reference(z.detach().double(), double(parameters), "ieee", activation)
    assert (value - exact).abs().max() > 1e-4  # it does round
    torch.testing.assert_close(value.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("depth", [1, 3])
def test_gradcheck_in_float64(depth: int, activation: Any) -> None:
    parameters = leaves(make(3, 5, depth, torch.float64))
    z = points(4, 3, torch.float64).requires_grad_()

    def value(z: Tensor, *tensors: Tensor) -> Tensor:
        split = EnergyParameters(tensors[: depth + 1], tensors[depth + 1 :])
        return mlp_energy(z, split, activation=activation)

    def both(z: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        split = EnergyParameters(tensors[: depth + 1], tensors[depth + 1 :])
        return mlp_energy_and_gradient(z, split, activation=activation)

    inputs = (z, *flat(parameters))
    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs)
    assert torch.autograd.gradcheck(both, inputs)


@needs_kernel
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("depth", "dim", "hidden", "rows"),
    [
        (1, 1, 16, 1),
        (1, 16, 40, 7),
        (1, 33, 100, 70),
        (2, 2, 24, 7),
        (2, 5, 90, 33),
        (2, 130, 64, 5),
        (2, 16, 1, 3),
        (3, 33, 70, 7),
        (3, 16, 40, 70),
        (2, 7, 9, 0),
    ],
)
def test_kernel_against_float64(
    kernel: None, depth: int, dim: int, hidden: int, rows: int, activation: Any
) -> None:
    """One tile and several along every size, sizes that no tile divides, and no row at all."""
    parameters, z = make(dim, hidden, depth), points(rows, dim)
    wanted = mlp_energy_and_gradient_reference(z.double(), double(parameters), "ieee", activation)
    value = mlp_energy(z, parameters, activation=activation)
    both = mlp_energy_and_gradient(z, parameters, activation=activation)
    assert (value.dtype, both[0].dtype, both[1].dtype) == (torch.float32,) * 3
    torch.testing.assert_close(value.double(), wanted[0], **CLOSE)
    torch.testing.assert_close(both[0].double(), wanted[0], **CLOSE)
    torch.testing.assert_close(both[1].double(), wanted[1], **CLOSE)


@needs_kernel
def test_kernel_with_int64_offsets_and_strides(kernel: None) -> None:
    """z is every second column, or every third row, of a wider tensor; offsets are 64 bits."""
    parameters = make(6, 20, 2)
    wide = points(40, 12)
    for z in (wide[:, ::2], wide[::3, :6], wide.t()[:6].t(), wide[:6, :6].t()):
        wanted = mlp_energy_and_gradient(z.contiguous(), parameters)
        with force_int64_offsets():
            got = mlp_energy_and_gradient(z, parameters)
            assert torch.equal(mlp_energy(z, parameters), mlp_energy(z.contiguous(), parameters))
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])


def test_offsets_are_64_bits_where_z_is_long() -> None:
    parameters = EnergyParameters(*(tuple(t.to("meta") for t in group) for group in make(128, 20, 2)))
    for rows, wide in ((1 << 10, False), (1 << 25, True)):
        for function in (mlp_energy, mlp_energy_and_gradient):
            with recorded_launches() as launches:
                function(torch.empty(rows, 128, device="meta"), parameters)
            assert [launch.constants["INT64"] for launch in launches] == [wide]


@needs_kernel
def test_strided_parameters(kernel: None) -> None:
    parameters, z = make(6, 20, 2), points(9, 6)
    strided = EnergyParameters(
        tuple(weight.t().contiguous().t() for weight in parameters.weights),
        tuple(bias.repeat_interleave(2)[::2] for bias in parameters.biases),
    )
    for got, wanted in zip(
        mlp_energy_and_gradient(z, strided), mlp_energy_and_gradient(z, parameters), strict=True
    ):
        assert torch.equal(got, wanted)


@needs_kernel
@pytest.mark.parametrize("depth", [1, 2])
def test_a_row_does_not_depend_on_its_batch(kernel: None, depth: int) -> None:
    parameters, z = make(10, 40, depth), points(100, 10)
    value, gradient = mlp_energy_and_gradient(z, parameters, activation="silu")
    value_alone = mlp_energy(z, parameters, activation="silu")
    for rows in (slice(0, 1), slice(37, 38), slice(63, 90)):
        alone = mlp_energy_and_gradient(z[rows], parameters, activation="silu")
        assert torch.equal(alone[0], value[rows])
        assert torch.equal(alone[1], gradient[rows])
        assert torch.equal(mlp_energy(z[rows], parameters, activation="silu"), value_alone[rows])


@needs_kernel
def test_nan_stays_in_its_row(kernel: None) -> None:
    parameters, z = make(6, 20, 2), points(9, 6)
    clean = mlp_energy_and_gradient(z, parameters)
    z[4, 2] = float("nan")
    value, gradient = mlp_energy_and_gradient(z, parameters)
    others = torch.arange(9, device=DEVICE) != 4
    assert value[4].isnan()
    assert torch.equal(value[others], clean[0][others])
    assert torch.equal(gradient[others], clean[1][others])


@needs_kernel
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_behind_the_kernel(kernel: None, activation: Any) -> None:
    """First and second derivatives, of value and gradient penalty, as automatic differentiation has them."""
    found = []
    for name in ("triton", "reference"):
        parameters, z = leaves(make(5, 24, 2)), points(8, 5).requires_grad_()
        with backend(name):
            value = mlp_energy(z, parameters, activation=activation)
            (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
            penalty = (value.sin() + slope.square().sum(dim=1)).sum()
            by_value = torch.autograd.grad(penalty, [z, *flat(parameters)], allow_unused=True)
            value, slope = mlp_energy_and_gradient(z, parameters, activation=activation)
            penalty = (value.sin() + slope.square().sum(dim=1)).sum()
            by_both = torch.autograd.grad(penalty, [z, *flat(parameters)], allow_unused=True)
            value = mlp_energy(z.detach(), parameters, activation=activation)
            by_parameters = torch.autograd.grad(value.sin().sum(), flat(parameters))
            fixed = EnergyParameters(*(tuple(t.detach() for t in group) for group in parameters))
            for energy in (parameters, fixed):
                (slope,) = torch.autograd.grad(mlp_energy(z, energy, activation=activation).sin().sum(), z)
                by_parameters = (*by_parameters, slope)
        found.append([*by_value, *by_both, *by_parameters])
    assert len(found[0]) == 2 * 7 + 6 + 2
    for got, wanted in zip(*found, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@needs_kernel
def test_only_the_gradient_that_is_asked_for_is_launched(
    kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value alone where z needs no gradient; value and gradient at once, and no second launch, where it
    does."""
    from evalp_fast.kernels import energy

    launched: list[str] = []
    true_launch = energy.launch

    def record(function: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(function.__name__)
        true_launch(function, *args, **kwargs)

    monkeypatch.setattr(energy, "launch", record)
    parameters, z = leaves(make(3, 8, 2)), points(4, 3)
    mlp_energy(z, parameters).sum().backward()
    assert launched == ["_energy_kernel"]
    launched.clear()
    z.requires_grad_()
    mlp_energy(z, parameters).sum().backward()
    assert launched == ["_energy_gradient_kernel"]
    with torch.no_grad():
        mlp_energy(z, parameters)
    assert launched[1:] == ["_energy_kernel"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic: bool) -> None:
    torch.compiler.reset()
    parameters = make(6, 20, 2)

    def function(z: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        split = EnergyParameters(tensors[:3], tensors[3:])
        return mlp_energy(z, split), *mlp_energy_and_gradient(z, split, activation="silu")

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 9):
        z = points(rows, 6)
        for got, wanted in zip(compiled(z, *flat(parameters)), function(z, *flat(parameters)), strict=True):
            torch.testing.assert_close(got, wanted, **CLOSE)


@needs_kernel
@pytest.mark.parametrize("name", ["reference", "triton"])
def test_compiles_with_inductor_and_backward(name: str) -> None:
    torch.compiler.reset()
    parameters, z = leaves(make(4, 12, 1)), points(5, 4).requires_grad_()

    def function(z: Tensor, *tensors: Tensor) -> Tensor:
        return mlp_energy(z, EnergyParameters(tensors[:2], tensors[2:])).sin()

    wanted = torch.autograd.grad(function(z, *flat(parameters)).sum(), [z, *flat(parameters)])
    with backend(name):
        value = torch.compile(function, fullgraph=True)(z, *flat(parameters))
        got = torch.autograd.grad(value.sum(), [z, *flat(parameters)])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("name", ["mlp_energy", "mlp_energy_and_gradient"])
def test_opcheck(name: str) -> None:
    parameters = make(4, 12, 2)
    args = (points(5, 4), list(parameters.weights), list(parameters.biases), 0, 1)
    torch.library.opcheck(getattr(ops, name).default, args)


def test_shapes_without_a_kernel_take_the_reference() -> None:
    assert energy_fits(128, 256, 2) is None
    for shape, word in (
        ((2000, 16, 1), "columns"),
        ((4, 600, 1), "features"),
        ((4, 16, 4), "hidden layers"),
    ):
        reason = energy_fits(*shape)
        assert reason is not None
        assert word in reason
    with backend("triton"), pytest.raises(RuntimeError, match="4 hidden layers"):
        mlp_energy(points(2, 3), make(3, 4, 4))


@pytest.mark.parametrize(
    ("version", "capability", "rocm", "trusted"),
    [
        ("3.6.0", (10, 0), False, False),
        ("3.8.1", (12, 0), False, False),
        ("3.9.0", (10, 0), False, True),
        ("3.10.0+git1", (10, 0), False, True),
        ("3.6.0", (9, 0), False, True),
        ("3.6.0", (11, 0), True, True),
    ],
)
def test_a_compiler_that_drops_the_kernel_is_not_trusted(
    version: str, capability: tuple[int, int], rocm: bool, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against silent nonsense: an empty kernel leaves the outputs as they were allocated."""
    monkeypatch.setattr(layers_device.triton, "__version__", version, raising=False)
    monkeypatch.setattr(energy_device, "TOO_OLD", None)
    monkeypatch.setattr(torch.version, "cuda", None if rocm else "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    for fits in (energy_device.energy_fits, latent_chain.chain_fits):
        reason = fits(16, 256, 3, torch.device("cuda", 0))
        assert reason is None if trusted else reason is not None and f"Triton {version}" in reason
        assert fits(16, 256, 3, torch.device("cpu")) is None


@needs_kernel
@pytest.mark.parametrize("depth", [2, 3])
def test_features_that_nobody_wrote_have_no_say(depth: int) -> None:
    """Guards against products that read behind a layer's last feature: 40 are made as 48 and read as 64."""
    parameters, z = make(5, 40, depth), points(3, 5)
    with backend("triton"):
        found = mlp_energy_and_gradient(z, parameters, precision="tf32")
        values = mlp_energy(z, parameters, precision="tf32")
    expected = mlp_energy_and_gradient_reference(z.double(), double(parameters))
    for one, other in zip((*found, values), (*expected, expected[0]), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-3, atol=2e-3)


def test_tiles_cover_every_size_with_little_to_spare() -> None:
    for size in range(128):
        widths = rest_widths(size)
        assert len(widths) <= 2
        assert all(width & (width - 1) == 0 and width >= 16 for width in widths)
        assert 0 <= sum(widths) - size < 32
    for hidden in range(1, 513):
        shape = energy_shape(7, hidden, "silu", "bf16")[0].layers
        starts = (*range(0, shape.whole, shape.width), *shape.rest_starts)
        widths = (shape.width,) * (shape.whole // shape.width) + shape.rests
        assert starts == tuple(sum(widths[:k]) for k in range(len(widths)))
        assert hidden <= sum(widths) <= shape.features


def test_errors_name_the_argument() -> None:
    parameters, z = make(4, 6, 2), points(3, 4)
    weights, biases = parameters
    first = (weights[0][:, :3], *weights[1:])
    cases: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "z must be a tensor", lambda: mlp_energy(cast(Any, [1.0]), parameters)),
        (ValueError, r"z must have shape \[N, D\]", lambda: mlp_energy(z[0], parameters)),
        (TypeError, "z must be float32 or float64", lambda: mlp_energy(z.half(), parameters)),
        (ValueError, "precision must be", lambda: mlp_energy(z, parameters, precision=cast(Any, "fp8"))),
        (ValueError, "activation must be", lambda: mlp_energy(z, parameters, activation=cast(Any, "elu"))),
        (TypeError, "parameters must be EnergyParameters", lambda: mlp_energy(z, cast(Any, z))),
        (
            ValueError,
            r"weights\[0\] must have shape \[6, 4\]",
            lambda: mlp_energy(z, EnergyParameters(first, biases)),
        ),
        (
            ValueError,
            "biases must hold 3",
            lambda: mlp_energy(z, EnergyParameters(weights, biases[:2])),
        ),
        (
            ValueError,
            "weights must hold at least 2",
            lambda: mlp_energy(z, EnergyParameters(weights[:1], biases[:1])),
        ),
        (
            ValueError,
            r"weights\[2\] must have shape \[1, 6\]",
            lambda: mlp_energy(z, EnergyParameters((*weights[:2], weights[1]), biases)),
        ),
        (TypeError, r"weights\[0\] must be torch.float64", lambda: mlp_energy(z.double(), parameters)),
        (
            TypeError,
            r"weights\[1\] must be torch.float32",
            lambda: mlp_energy(z, EnergyParameters((weights[0], weights[1].bfloat16(), weights[2]), biases)),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def test_bfloat16_copies_of_the_hidden_weights_are_taken() -> None:
    parameters, z = make(4, 6, 2), points(3, 4)
    copies = EnergyParameters(
        (*(weight.bfloat16() for weight in parameters.weights[:-1]), parameters.weights[-1]),
        parameters.biases,
    )
    wanted = mlp_energy_and_gradient(z, parameters, precision="bf16")
    for got, value in zip(mlp_energy_and_gradient(z, copies, precision="bf16"), wanted, strict=True):
        assert torch.equal(got, value)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "bound"), [("ieee", 1e-5), ("tf32", 2e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("dim", "hidden", "depth"),
    [(16, 192, 2), (128, 200, 2), (128, 256, 2), (64, 256, 1), (33, 100, 3), (512, 256, 2), (1024, 512, 1)],
)
def test_precisions_on_a_gpu(
    dim: int, hidden: int, depth: int, activation: Any, precision: Any, bound: float
) -> None:
    """Relative to the root mean square over the rows, against float64."""
    parameters, z = make(dim, hidden, depth), points(5000, dim)
    wanted = mlp_energy_and_gradient_reference(z.double(), double(parameters), "ieee", activation)
    got = mlp_energy_and_gradient(z, parameters, precision=precision, activation=activation)
    alone = mlp_energy(z, parameters, precision=precision, activation=activation)
    for one, other in ((got[0], wanted[0]), (alone, wanted[0]), (got[1], wanted[1])):
        assert (one.double() - other).square().mean().sqrt() <= bound * other.square().mean().sqrt()
