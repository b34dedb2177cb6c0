"""Flows whose hidden layers are in memory, beside those that have them in registers: both forms of a kernel
against float64, whatever the table of shapes takes for which."""

from typing import Any

import pytest
import torch
from networks import DEVICE, double, flow_parameters
from torch import Tensor

from evalp_fast.kernels import flow, flow_backward
from evalp_fast.kernels.energy import EnergyParameters
from evalp_fast.kernels.flow import FlowParameters, coupling_flow
from evalp_fast.kernels.launch import HAS_TRITON, INTERPRETED, backend, recorded_launches
from evalp_fast.kernels.sir import sir

pytestmark = [
    pytest.mark.skipif(
        not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED),
        reason="needs Triton, on a GPU or interpreted",
    ),
    pytest.mark.usefixtures("unrounded_tf32"),
]

# dim, hidden, depth, couplings, options: an odd and an even number of couplings (of which the last leaves
# the state in the other memory), odd dimensions, hidden layers of several tiles and a rest, halves of several
# tiles of outputs.
CASES: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "smallest": (2, 3, 1, 1, {}),
    "odd": (7, 20, 2, 2, {"activation": "silu"}),
    "odd, swapped": (9, 72, 3, 3, {"activation": "leaky_relu", "mixing": "swap", "clamp": None}),
    "odd, normalised": (5, 12, 2, 3, {"normalised": True}),
    "swapped, normalised": (6, 12, 1, 2, {"normalised": True, "mixing": "swap", "clamp": 1.5}),
    "several tiles": (134, 130, 2, 1, {}),
    "wider than its hidden layers": (70, 12, 1, 2, {"activation": "silu"}),
}
each_case = pytest.mark.parametrize("name", list(CASES))
both_ways = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


@pytest.fixture(autouse=True)
def poison() -> Any:
    """Uninitialised memory is NaN, so that an element which is read before it is written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# A small flow has its hidden layers in memory in "ieee", and in registers in "tf32". 1e-5 is some forty
# roundings.
TOLERANCE = {"ieee": 1e-5, "tf32": 1e-5 if INTERPRETED else 2e-3}
each_form = pytest.mark.parametrize("precision", list(TOLERANCE), ids=["memory", "registers"])


def case(name: str) -> tuple[FlowParameters, dict[str, Any]]:
    dim, hidden, depth, couplings, options = CASES[name]
    rest = {name: option for name, option in options.items() if name != "normalised"}
    normalised = options.get("normalised", False)
    return flow_parameters(dim, hidden, depth, layers=couplings, normalised=normalised), rest


def points(rows: int, parameters: FlowParameters) -> Tensor:
    dim = parameters.weight_in.shape[2] + parameters.weight_out.shape[1] // 2
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@both_ways
@each_case
@each_form
@pytest.mark.parametrize("rows", [1, 37])
def test_both_forms_against_float64(name: str, inverse: bool, rows: int, precision: Any) -> None:
    """Of one row, and of more than a tile of rows."""
    parameters, options = case(name)
    z = points(rows, parameters)
    with backend("triton"):
        found = coupling_flow(z, parameters, inverse=inverse, precision=precision, **options)
    with backend("reference"):
        exact = coupling_flow(z.double(), double(parameters), inverse=inverse, **options)
    for actual, expected in zip(found, exact, strict=True):
        # The log-determinant of a single row may be a sum that nearly cancels.
        error = (actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1.0)
        assert float(error) < TOLERANCE[precision]


def gradients(z: Tensor, parameters: FlowParameters, *, of_all: bool, **options: Any) -> list[Tensor]:
    """Of z, and of all parameters that are there."""
    leaves = [
        t.detach().clone().requires_grad_(of_all or k == 0)
        for k, t in enumerate((z, *parameters))
        if t is not None
    ]
    x, log_det = coupling_flow(leaves[0], FlowParameters(*leaves[1:]), **options)
    generator = torch.Generator().manual_seed(2)
    drawn = (
        torch.randn(shape, generator=generator, dtype=torch.float32) for shape in (x.shape, log_det.shape)
    )
    weights = (weight.to(z) for weight in drawn)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return list(torch.autograd.grad((x, log_det), wanted, tuple(weights), materialize_grads=True))


@both_ways
@each_case
@pytest.mark.parametrize("of_all", [False, True], ids=["of z", "of all"])
def test_gradients_against_float64(name: str, inverse: bool, of_all: bool) -> None:
    """In one launch of all layers; or in one each, that also writes what the gradients of parameters need."""
    parameters, options = case(name)
    z = points(37, parameters)
    with backend("triton"):
        found = gradients(z, parameters, of_all=of_all, inverse=inverse, **options)
    with backend("reference"):
        exact = gradients(z.double(), double(parameters), of_all=of_all, inverse=inverse, **options)
    assert len(found) == (1 + len([p for p in parameters if p is not None]) if of_all else 1)
    for k, (actual, expected) in enumerate(zip(found, exact, strict=True)):
        if actual.numel():
            error = (actual.double() - expected).abs().max() / expected.abs().max()
            assert float(error) < 1e-5, k


def test_scratch_is_float32_whatever_the_default() -> None:
    """Guards against memory of which every second number is read."""
    parameters, options = case("odd")
    z = points(37, parameters)
    with backend("triton"):
        expected = (
            coupling_flow(z, parameters, **options)[0],
            *gradients(z, parameters, of_all=True, **options),
        )
        torch.set_default_dtype(torch.float64)
        try:
            found = (
                coupling_flow(z, parameters, **options)[0],
                *gradients(z, parameters, of_all=True, **options),
            )
        finally:
            torch.set_default_dtype(torch.float32)
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("couplings", [1, 2])
def test_sir_draws_what_the_reference_draws(couplings: int) -> None:
    """From tile to tile and turn to turn, in the memory of one program or two. The winner too: a wrong one is
    another sample, far beyond the tolerance."""
    flow = flow_parameters(6, 20, 2, layers=couplings)
    widths = (6, 10, 1)
    draw = [
        torch.randn(widths[k + 1], widths[k] + 1, generator=torch.Generator().manual_seed(k)) for k in (0, 1)
    ]
    energy = EnergyParameters(
        tuple(both[:, 1:].contiguous().to(DEVICE) for both in draw),
        tuple(both[:, 0].contiguous().to(DEVICE) for both in draw),
    )
    with backend("reference"):
        expected = sir(3, 11, 70, 5, flow, energy)
    with backend("triton"):
        actual = sir(3, 11, 70, 5, flow, energy)
    torch.testing.assert_close(actual.z, expected.z, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(actual.log_weight, expected.log_weight, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("dim", "hidden", "depth", "precision", "in_memory"),
    [
        (16, 32, 2, "ieee", True),
        (512, 512, 2, "bf16", False),
        (513, 8, 1, "bf16", True),
        (64, 256, 3, "bf16", True),
        (64, 128, 3, "tf32", False),
        (1024, 512, 3, "tf32", True),
    ],
)
def test_which_flows_have_their_layers_in_memory(
    dim: int, hidden: int, depth: int, precision: Any, in_memory: bool
) -> None:
    """By shape and precision, never by the batch."""
    parameters = flow_parameters(dim, hidden, depth, layers=1)
    for rows in (1, 300):
        with backend("triton"), recorded_launches() as launches:
            coupling_flow((0, 0, rows), parameters, precision=precision)
        assert launches[-1].kernel.__name__ == "_flow_kernel"
        assert (launches[-1].constants["M"] is not None) == in_memory


def test_layers_that_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU for which the installed Triton may compile them to nothing, flows that fit in registers keep
    their kernel, others have none, and no gradient has. Guards against outputs that stay as they were
    allocated."""
    for module in (flow, flow_backward):
        monkeypatch.setattr(module, "layers_untrusted", lambda device: "not trusted")
    assert flow.flow_has_no_kernel(flow_parameters(8, 16, 2, layers=1), "tf32") is None
    assert flow.flow_has_no_kernel(flow_parameters(8, 16, 2, layers=1), "ieee") == "not trusted"
    parameters, options = case("odd")
    with backend("triton"), pytest.raises(RuntimeError, match="not trusted"):
        gradients(points(5, parameters), parameters, of_all=True, precision="tf32", **options)
