"""What flow, energy, SIR and chain share as functions of torch: gradients of any subset of their tensors,
transforms, autocast, numbers that a compiler leaves open, numbers of samples of any stride, and programs
that take many tiles."""

import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from evalp_fast.kernels import philox
from evalp_fast.kernels.energy import EnergyParameters, mlp_energy, mlp_energy_and_gradient
from evalp_fast.kernels.flow import FlowParameters, Noise, coupling_flow
from evalp_fast.kernels.latent_chain import langevin_chain
from evalp_fast.kernels.launch import (
    HAS_TRITON,
    INTERPRETED,
    LaunchConfig,
    backend,
    cdiv,
    recorded_launches,
)
from evalp_fast.kernels.sir import sir

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED), reason="needs Triton, on a GPU or interpreted"
)
on_each_backend = pytest.mark.parametrize("name", [None, pytest.param("triton", marks=needs_kernel)])
DIM, HIDDEN, LAYERS = 5, 7, 2


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN, so that an element which no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


FLOW = FlowParameters(
    0.5 * normals(1, LAYERS, HIDDEN, 3),
    0.5 * normals(2, LAYERS, HIDDEN),
    0.3 * normals(3, LAYERS, 1, HIDDEN, HIDDEN),
    0.5 * normals(4, LAYERS, 1, HIDDEN),
    0.3 * normals(5, LAYERS, 4, HIDDEN),
    0.3 * normals(6, LAYERS, 4),
    0.3 * normals(7, LAYERS, DIM),
    0.3 * normals(8, LAYERS, DIM),
)
ENERGY = EnergyParameters(
    (0.5 * normals(9, HIDDEN, DIM), 0.5 * normals(10, HIDDEN, HIDDEN), normals(11, 1, HIDDEN)),
    (0.3 * normals(12, HIDDEN), 0.3 * normals(13, HIDDEN), 0.3 * normals(14, 1)),
)
Z = normals(15, 3, DIM)
CHAIN: dict[str, Any] = {"n_steps": 3, "step_size": 0.2, "adjusted": True}


def flow_of(z: Tensor, *stacks: Tensor) -> tuple[Tensor, ...]:
    return coupling_flow(z, FlowParameters(*stacks), activation="silu")


def energy_of(z: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return (mlp_energy(z, EnergyParameters(tensors[:3], tensors[3:]), activation="silu"),)


def gradient_of(z: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return mlp_energy_and_gradient(z, EnergyParameters(tensors[:3], tensors[3:]), activation="silu")


def chain_of(z: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return langevin_chain(z, EnergyParameters(tensors[:3], tensors[3:]), activation="silu", **CHAIN)[:3]


ENERGY_TENSORS = (*ENERGY.weights, *ENERGY.biases)
FUNCTIONS: dict[str, tuple[Callable[..., tuple[Tensor, ...]], tuple[Any, ...]]] = {
    "flow": (flow_of, tuple(FLOW)),
    "energy": (energy_of, ENERGY_TENSORS),
    "gradient": (gradient_of, ENERGY_TENSORS),
    "chain": (chain_of, ENERGY_TENSORS),
}
DIFFERENTIABLE = [
    (kind, k) for kind in ("flow", "energy", "gradient") for k in range(9 if kind == "flow" else 7)
]


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=tolerance, atol=tolerance)


# --- gradients ----------------------------------------------------------------------------------------------


@on_each_backend
@pytest.mark.parametrize(("kind", "which"), DIFFERENTIABLE)
def test_each_tensor_alone_has_its_gradient(name: str | None, kind: str, which: int) -> None:
    """Of z or one parameter, where nothing else needs one. Guards against asking one tensor whether any of
    them is to be differentiated, and against leaving the graph where z needs no gradient."""
    function, parameters = FUNCTIONS[kind]

    def gradient(dtype: torch.dtype) -> Tensor:
        tensors = [tensor.to(dtype, copy=True) for tensor in (Z, *parameters)]
        tensors[which].requires_grad_()
        loss = sum(result.sin().sum() for result in function(*tensors))
        return torch.autograd.grad(cast(Tensor, loss), tensors[which])[0]

    expected = gradient(torch.float64)
    assert float(expected.abs().max()) > 1e-3
    with backend(name):
        close([gradient(torch.float32)], [expected])


# --- transforms ---------------------------------------------------------------------------------------------


def transform(name: str, function: Callable[..., tuple[Tensor, ...]], parameters: tuple[Any, ...]) -> Any:
    def of_row(z: Tensor) -> Tensor:
        return function(z[None], *parameters)[-1].sum()

    if name == "vmap":
        return torch.vmap(lambda z: function(z, *parameters))(torch.stack((Z, 2.0 * Z)))
    if name == "vmap of parameters":
        return torch.vmap(lambda bias: function(Z, parameters[0], bias, *parameters[2:]))(
            torch.stack((parameters[1], 2.0 * parameters[1]))
        )
    if name == "jacrev":
        return [torch.func.jacrev(of_row)(Z[0])]
    if name == "hessian":
        return [torch.func.hessian(of_row)(Z[0])]
    if name == "jvp":
        return torch.func.jvp(of_row, (Z[0],), (Z[1],))
    with torch.autograd.forward_ad.dual_level():
        dual = function(torch.autograd.forward_ad.make_dual(Z, Z + 1.0), *parameters)[-1]
        return torch.autograd.forward_ad.unpack_dual(dual)


TRANSFORMS = ("vmap", "vmap of parameters", "jacrev", "hessian", "jvp", "forward_ad")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in FUNCTIONS
        for name in TRANSFORMS
        if kind != "chain" or name.startswith("vmap")  # nothing of a chain is differentiable
    ],
)
def test_transforms_take_the_reference(kind: str, name: str) -> None:
    """As on a GPU, where the kernel would be taken; and who asks for the kernel by name is told."""
    function, parameters = FUNCTIONS[kind]
    with backend("reference"):
        expected = transform(name, function, parameters)
    with recorded_launches():  # of CPU tensors it runs the ops' reference, which has no rules either
        close(transform(name, function, parameters), expected)
    if HAS_TRITON and INTERPRETED:
        with backend("triton"), pytest.raises(RuntimeError, match="no rules for vmap"):
            transform(name, function, parameters)


# --- autocast -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "with gradients"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_autocast_changes_nothing(kind: str, recorded: bool) -> None:
    """The precision is an argument. Guards against products in bfloat16 that nobody asked for."""
    function, parameters = FUNCTIONS[kind]
    tensors = [tensor.clone().requires_grad_(recorded) for tensor in (Z, *parameters)]
    expected = function(*tensors)
    with torch.autocast(DEVICE, torch.bfloat16):
        results = function(*tensors)
    assert all(result.dtype == torch.float32 for result in results)
    close(results, expected, 1e-6)
    if recorded and kind != "chain":
        with torch.autocast(DEVICE, torch.bfloat16):
            results = function(*tensors)
        gradients = [
            torch.autograd.grad(found[-1].sum(), tensors, materialize_grads=True)
            for found in (results, expected)
        ]
        close(gradients[0], gradients[1], 1e-6)


def test_autocast_changes_no_sir() -> None:
    expected = sir(1, 0, 4, 6, FLOW, ENERGY)
    with torch.autocast(DEVICE, torch.bfloat16):
        close(sir(1, 0, 4, 6, FLOW, ENERGY)[:2], expected[:2], 1e-6)


# --- torch.compile ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "values"),
    [
        (lambda n: coupling_flow((3, 2, n), FLOW)[0], (4, 6, 7, 9)),
        (lambda start: coupling_flow((3, start, 4), FLOW)[0], (3, 5, 6, 7)),
        (lambda seed: coupling_flow((seed, 2, 4), FLOW)[0], (3, 5, 6, 7)),
        (lambda n_steps: langevin_chain(Z, ENERGY, n_steps=n_steps, step_size=0.1)[0], (2, 3, 5, 4)),
        (lambda first: langevin_chain(Z, ENERGY, **CHAIN, first_step=first)[0], (2, 3, 5, 4)),
    ],
    ids=["n", "start", "seed", "n_steps", "first_step"],
)
def test_a_number_may_be_left_open(function: Callable[[int], Tensor], values: tuple[int, ...]) -> None:
    """One graph for all of them: no loop of Python runs over it, and it is no constant."""
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    with torch.no_grad():
        for value in values:
            torch.testing.assert_close(compiled(value), function(value), rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 1


# --- noise --------------------------------------------------------------------------------------------------


@on_each_backend
def test_numbers_of_samples_may_have_any_stride(name: str | None) -> None:
    """Guards against a kernel that reads what lies between them."""
    spread = torch.arange(40, 60, device=DEVICE)[::5]
    index, z = spread.contiguous(), normals(16, 4, DIM)
    assert not spread.is_contiguous()
    with backend(name):
        for pair in (
            [coupling_flow(Noise(3, numbers), FLOW) for numbers in (spread, index)],
            [sir(3, 0, 4, 3, FLOW, ENERGY, index=numbers)[:2] for numbers in (spread, index)],
            [langevin_chain(z, ENERGY, **CHAIN, index=numbers)[:3] for numbers in (spread, index)],
        ):
            assert all(torch.equal(one, other) for one, other in zip(*pair, strict=True))


@on_each_backend
def test_the_step_of_the_noise_is_used(name: str | None) -> None:
    index = torch.tensor([4, 9, 2], device=DEVICE)
    u = philox.normal(3, index, 6, philox.Stream.PROPOSAL, DIM)
    with backend(name):
        close(coupling_flow(Noise(3, index, 6), FLOW), coupling_flow(u, FLOW))


@on_each_backend
@pytest.mark.parametrize("adjusted", [False, True])
def test_a_chain_goes_on_as_if_it_had_not_stopped(name: str | None, adjusted: bool) -> None:
    """By `first_step`, a number or a tensor. Guards against noise that starts anew."""
    options: dict[str, Any] = {"step_size": 0.3, "adjusted": adjusted, "seed": 5, "activation": "silu"}
    with backend(name):
        whole = langevin_chain(Z, ENERGY, n_steps=6, **options)
        for second in (2, torch.tensor([2], device=DEVICE)):
            begun = langevin_chain(Z, ENERGY, n_steps=2, **options)
            ended = langevin_chain(begun.samples, ENERGY, n_steps=4, first_step=second, **options)
            close([ended.samples, ended.energy], [whole.samples, whole.energy])
            close([(2 * begun.acceptance + 4 * ended.acceptance) / 6], [whole.acceptance])


# --- tiles --------------------------------------------------------------------------------------------------


def rows_of(kind: str, rows: int) -> tuple[Tensor, ...]:
    """A kind of kernel on so many rows, with noise made inside where it can be.

    In "tf32" such a flow has its hidden layers in registers, otherwise in memory.
    """
    z = normals(16, rows, DIM)
    options: Any = {"precision": "tf32"} if kind.endswith("tf32") else {}
    kind = kind.removesuffix(" tf32")
    if kind == "sir":
        result = sir(3, 5, rows, 3, FLOW, ENERGY, **options)
        return result.z, result.log_weight, *result.diagnostics
    if kind in ("flow", "inverse"):
        return coupling_flow(z, FLOW, inverse=kind == "inverse", **options)
    if kind.startswith("slopes"):
        tensors = [z.requires_grad_(), *(stack.detach().requires_grad_(kind == "slopes") for stack in FLOW)]
        x, log_det = coupling_flow(tensors[0], FlowParameters(*tensors[1:]))
        return torch.autograd.grad((x.sin().sum() + log_det.sum()), tensors if kind == "slopes" else [z])
    if kind == "noise":
        return coupling_flow((3, 5, rows), FLOW, **options)
    function, tensors = FUNCTIONS[kind]
    return function(z, *tensors)


@needs_kernel
@pytest.mark.parametrize(
    "kind",
    [
        *("flow", "flow tf32", "inverse", "inverse tf32", "noise", "noise tf32", "slopes", "slopes of z"),
        *("energy", "gradient", "chain", "sir", "sir tf32"),
    ],
)
def test_programs_take_one_tile_after_another(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for all tiles, three for seven, and one each: the same bits, in whole tiles and in a last
    one of few rows. Guards against a tile that no program takes, and against what one tile leaves in a
    program's memory for the next."""
    names = ("flow", "flow_backward", "energy", "latent_chain", "sir")
    modules = [sys.modules[f"evalp_fast.kernels.{name}"] for name in names]
    counted: list[int] = []

    def of(wanted: int) -> Callable[..., int]:
        def programs(device: torch.device, rows: int, config: LaunchConfig) -> int:
            counted.append(cdiv(rows, config.block_rows))
            return min(counted[-1], wanted)

        return programs

    found = []
    for wanted in (1, 3, 1000):
        for module in modules:
            monkeypatch.setattr(module, "persistent_programs", of(wanted))
        with backend("triton"):
            found.append(rows_of(kind, 197))
    assert min(counted) >= 6
    for results in found[1:]:
        for one, other in zip(results, found[0], strict=True):
            assert torch.equal(one, other)
            assert not one.isnan().any()
