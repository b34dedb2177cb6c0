"""The CPU forms of flow, energy and chain: the numbers of the references."""

import math
import platform
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import double
from torch import Tensor
from torch.autograd import forward_ad

from evalp_fast.kernels import flow_cpu, launch, mlp_cpu
from evalp_fast.kernels.chain_cpu import langevin_chain_on_cpu
from evalp_fast.kernels.chain_reference import ChainOptions, langevin_chain_reference
from evalp_fast.kernels.energy import (
    EnergyParameters,
    mlp_energy,
    mlp_energy_and_gradient,
    mlp_energy_and_gradient_reference,
)
from evalp_fast.kernels.energy_cpu import mlp_energy_and_gradient_on_cpu, mlp_energy_on_cpu
from evalp_fast.kernels.flow import FlowOptions, FlowParameters, coupling_flow, coupling_flow_reference
from evalp_fast.kernels.flow_cpu import coupling_flow_on_cpu
from evalp_fast.kernels.processor import FUSES
from evalp_fast.kernels.weights_cpu import kept_matrices

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


def no_couplings() -> FlowParameters:
    """Of two columns and hidden features, whose couplings do nothing."""
    return FlowParameters(*(torch.zeros_like(stack) for stack in flow_parameters(2, hidden=2)[:6]))  # type: ignore[arg-type]


def energy_parameters(dim: int, hidden: int = 24, depth: int = 2) -> EnergyParameters:
    torch.manual_seed(dim)
    sizes = [(hidden, dim), *[(hidden, hidden)] * (depth - 1), (1, hidden)]
    weights = tuple(torch.randn(size) / size[1] ** 0.5 for size in sizes)
    return EnergyParameters(weights, tuple(0.3 * torch.randn(size[0]) for size in sizes))


# The activations by torch.
TORCH = {"relu": F.relu, "leaky_relu": F.leaky_relu, "silu": F.silu}


@pytest.fixture(params=["fused", "plain"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With oneDNN's fused layers, where there are any, and without."""
    if request.param == "plain":
        for dtype in FUSES:
            monkeypatch.setitem(FUSES, dtype, False)
    elif not all(FUSES.values()):
        pytest.skip("this processor, or this build of torch, has no fused layers")


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
def test_the_last_layer_is_in_float32(activation: Any) -> None:
    """With "bf16" too. All that comes before it is a small integer, exact in bfloat16 (SiLU's are large, and
    nearly integers), so that the error is that of the last layer alone, whose weights are not exact."""
    weights = (torch.tensor([[64.0, 32.0], [-64.0, 96.0]]), torch.tensor([[1.0 / 3.0, 0.1]]))
    parameters = EnergyParameters(weights, (torch.zeros(2), torch.tensor([0.7])))
    z = torch.tensor([[1.0, 1.0], [2.0, 3.0], [3.0, 3.0]])
    hidden = z @ weights[0].T
    assert torch.equal(hidden.bfloat16().float(), hidden)
    assert (hidden > 0).all()
    expected = (hidden.double() @ weights[1].double().T).squeeze(1) + 0.7
    options: dict[str, Any] = {"activation": activation, "precision": "bf16"}
    for value in (
        mlp_energy(z, parameters, **options),
        mlp_energy_and_gradient(z, parameters, **options)[0],
    ):
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 5, 300])
def test_activated_layer(name: str, dtype: torch.dtype, rows: int) -> None:
    """Operands and result are rounded to the weight's type, and nothing else: the bias 1 + 2^-12 is none of
    bfloat16's numbers. From rows with gaps, as the passed half of a state has them."""
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 14)[:, :7], torch.randn(9, 7).to(dtype)
    bias = torch.full((9,), 1.0 + 2.0**-12)
    exact = TORCH[name](x.to(dtype).double() @ weight.double().T + bias.double())
    (kept,), _ = kept_matrices(weight, "ieee" if dtype == torch.float32 else "bf16")
    found = mlp_cpu.activated_layer(x, kept, bias, name)
    assert found.dtype == dtype
    assert found.shape == (rows, 9)
    assert torch.equal(found, mlp_cpu.activated_layer(x, kept, bias, name, finite=True))
    torch.testing.assert_close(found, mlp_cpu.activated_layer(x, weight, bias, name))
    once = 2.0**-24 if dtype == torch.float32 else 2.0**-8
    # Without fusion the product comes back in bfloat16 as well.
    twice = 2.0**-8 * 12.0 if dtype == torch.bfloat16 and not FUSES[dtype] else 0.0
    assert ((found.double() - exact).abs() <= 1.01 * once * exact.abs() + twice + 3e-6).all()
    if FUSES[dtype] and dtype == torch.bfloat16:
        # The bias is added in float32: 2^-12 is left of it, where a rounded one would leave 0.
        minus, one = torch.full((rows, 1), -1.0), torch.ones(9, 1, dtype=dtype)
        assert torch.equal(mlp_cpu.layer(minus, one, bias), torch.full((rows, 9), 2.0**-12, dtype=dtype))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_goes_through_every_layer(name: str, dtype: torch.dtype) -> None:
    """oneDNN's own ReLU makes 0 of NaN: an energy of NaN would become a number, and its sample be drawn."""
    x = torch.zeros(5, 7)
    x[3, 2] = math.nan
    found = mlp_cpu.activated_layer(x, torch.ones(9, 7, dtype=dtype), torch.ones(9), name)
    assert found[3].isnan().all()
    assert found[[0, 1, 2, 4]].isfinite().all()
    energy = energy_parameters(7, depth=3)
    precision = "ieee" if dtype == torch.float32 else "bf16"
    value, gradient = mlp_energy_and_gradient_on_cpu(x, *energy, activation=name, precision=precision)
    assert value.isnan().tolist() == [False, False, False, True, False]
    assert gradient[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("place", [0, 1])
def test_nan_out_of_an_overflow_goes_through(place: int, precision: str) -> None:
    """Sums of finite numbers that are beyond float32 in one layer are infinities of both signs in the next,
    and their sum is NaN. A bound on x alone would not see it coming, and ReLU would make 0 of it."""
    weights = [torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0, -1.0], [0.5, 0.5]]), torch.ones(1, 2)]
    weights[place] = 1e30 * weights[place]
    if place == 1:
        weights.insert(2, torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
        weights[1] = weights[1].abs()
    biases = tuple(torch.zeros(weight.shape[0]) for weight in weights)
    x = torch.tensor([[1.0], [1e10]])
    for value in (
        mlp_energy_on_cpu(x, tuple(weights), biases, activation="relu", precision=precision),
        mlp_energy_and_gradient_on_cpu(x, tuple(weights), biases, activation="relu", precision=precision)[0],
    ):
        assert value.isnan().tolist() == [False, True]


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_the_reach_of_a_flow(precision: str, inverse: bool) -> None:
    """Couplings whose state is not looked at are bounded by those before: too low a bound lets oneDNN's ReLU
    make 0 of a NaN."""
    parameters, z = flow_parameters(6, hidden=8), 1e-2 * torch.randn(200, 6)
    parameters = parameters._replace(weight_out=100.0 * parameters.weight_out)
    options = FlowOptions(inverse, precision, "relu", 2.0, "shuffle")
    _, bounds = flow_cpu._turns(parameters, precision)
    reach = flow_cpu._Reach(bounds, options, normalised=False)
    order = (2, 1, 0) if inverse else (0, 1, 2)
    for count in (1, 2, 3):
        assert reach.stays_finite(z if count == 1 else torch.full((1, 1), math.nan))  # not looked at again
        some = FlowParameters(*(stack[sorted(order[:count])] for stack in parameters[:6]))  # type: ignore[index]
        x, _ = coupling_flow_on_cpu(z, some, options)
        assert x.abs().max() <= reach._largest
    for unknown in (options._replace(clamp=None), options._replace(clamp=1e30)):
        reach = flow_cpu._Reach(bounds, unknown, normalised=False)
        assert [reach.stays_finite(z), reach.stays_finite(torch.full((1, 1), math.nan))] == [True, False]
    reach = flow_cpu._Reach(bounds, options, normalised=True)
    assert [reach.stays_finite(z), reach.stays_finite(torch.full((1, 1), math.nan))] == [True, False]


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("inverse", [False, True])
def test_the_reach_grows_by_the_clamp(inverse: bool) -> None:
    """Where log-scales are at their bound and shifts are nothing."""
    zeros = no_couplings()
    zeros.bias_out[:, 0] = -1e3 if inverse else 1e3
    options = FlowOptions(inverse, "ieee", "relu", 5.0, "swap")
    z = torch.full((1, 2), 1e6)
    reach = flow_cpu._Reach(flow_cpu._turns(zeros, "ieee")[1], options, normalised=False)
    assert all(reach.stays_finite(z) for _ in range(3))
    x, _ = coupling_flow_on_cpu(z, zeros, options)
    assert 1e6 * math.exp(9.0) < x.abs().max() <= reach._largest


def test_a_bound_holds_for_rounded_operands() -> None:
    """Which may be larger than what was looked at."""
    x, weight = torch.full((1, 1), 1.0 + 2.0**-8 + 1e-5), torch.full((1, 1), 1.0 + 2.0**-7)
    kept = kept_matrices(weight, "bf16")
    found = mlp_cpu.layer(x, kept.each[0], None).item()
    largest = mlp_cpu.largest_of(x)
    assert largest * kept.norm < found <= mlp_cpu.bound_behind(largest, [mlp_cpu.Bound(kept.norm, 0.0)])


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_nan_out_of_an_overflow_goes_through_a_flow(normalised: bool, inverse: bool, precision: str) -> None:
    """The first coupling's shift is far, or a normalisation's scale; the next one's products of it are
    infinities, and their difference is NaN. That alone is read: of a ReLU that makes 0 of it all is
    finite."""
    parameters = no_couplings()
    first, second = (2, 1) if inverse else (0, 1)
    if normalised:
        log_scale, shift = torch.zeros(2, 3, 2)
        log_scale[second if inverse else first] = -87.0 if inverse else 87.0
        parameters = parameters._replace(norm_log_scale=log_scale, norm_shift=shift)
        parameters.weight_in[second] = 10.0  # too little for the weights alone to raise doubts
    else:
        parameters.weight_in[first] = 1.0
        parameters.weight_hidden[first] = torch.eye(2)
        parameters.weight_out[first, 1] = 1e18
        parameters.weight_in[second] = -1e25 if inverse else 1e25
    parameters.weight_hidden[second] = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    parameters.weight_out[second, :, 0] = 1.0
    z = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    options = FlowOptions(inverse, precision, "relu", 2.0, "swap")
    x, _ = coupling_flow_on_cpu(z, parameters, options)
    exact, _ = coupling_flow_reference(z, parameters, options)
    assert exact.isnan().any(dim=1).tolist() == [False, True]
    assert torch.equal(x.isnan(), exact.isnan())


def test_the_bound_of_finite_layers() -> None:
    bounds = [mlp_cpu.Bound(10.0, 1.0), mlp_cpu.Bound(1e-30, 0.0)]
    assert mlp_cpu.stays_finite(torch.tensor([[1.0, -2.0]]), bounds)
    assert mlp_cpu.stays_finite(torch.empty(0, 3), bounds)
    for worst in (3e36, -3e36, math.inf, -math.inf, math.nan):
        assert not mlp_cpu.stays_finite(torch.tensor([[1.0, worst]]), bounds)
    for bad in (mlp_cpu.Bound(1.0, math.inf), mlp_cpu.Bound(math.nan, 0.0), mlp_cpu.Bound(1.0, math.nan)):
        assert not mlp_cpu.stays_finite(torch.ones(1, 1), [bad])
    bias = torch.tensor([[1.0, -3.0], [0.0, 2.0]])
    assert mlp_cpu.layer_bound(kept_matrices(torch.ones(2, 2, 5), "ieee"), bias) == (5.0, 3.0)


@pytest.mark.usefixtures("form")
def test_relu_is_exact() -> None:
    """Guards against a leaky one in its place: a unit that a bias of -1e30 switches off must be off."""
    for dtype in (torch.float32, torch.bfloat16):
        x, bias = torch.rand(64, 3), torch.tensor([-1e30, -math.inf, -10.0, 0.0])
        for finite in (False, True):
            out = mlp_cpu.activated_layer(x, torch.ones(4, 3, dtype=dtype), bias, "relu", finite=finite)
            assert (out[:, :3] == 0.0).all()
            assert (out[:, 3] > 0.0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_of_any_stride(dtype: torch.dtype) -> None:
    """oneDNN does not look at its strides: it would read past the end of an expanded one."""
    x, weight = torch.randn(5, 7), torch.randn(9, 7).to(dtype)
    for bias in (torch.ones(1).expand(9), torch.randn(18)[::2], torch.randn(9, 3)[:, 1]):
        for function in (mlp_cpu.layer, partial(mlp_cpu.activated_layer, activation="silu")):
            assert torch.equal(function(x, weight, bias), function(x, weight, bias.clone()))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("clamp", [0.3, 4.0, 4.1, 1e3, 1e8, 2e38])
def test_clamps_of_any_size(clamp: float, inverse: bool) -> None:
    """Guards against a difference of large numbers: the sigmoid's error is 1e-7 of the clamp."""
    parameters, z = flow_parameters(6), torch.randn(40, 6)
    options = FlowOptions(inverse, "ieee", "leaky_relu", clamp, "shuffle")
    found = coupling_flow_on_cpu(z, parameters, options)
    exact = coupling_flow_reference(z.double(), double(parameters), options)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-5, atol=4e-6)


def test_autocast_changes_nothing() -> None:
    """The precision is an argument: under autocast "ieee" must stay float32, and the result too."""
    parameters, z = energy_parameters(6), torch.randn(50, 6)
    expected = mlp_energy_and_gradient(z, parameters), mlp_energy(z, parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mlp_energy_and_gradient(z, parameters), mlp_energy(z, parameters)
    for one, other in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True):
        assert torch.equal(one, other)


def test_forward_derivatives_take_the_reference() -> None:
    """The CPU form writes in place, which loses tangents, or makes wrong ones of them."""
    flow, energy = flow_parameters(4), energy_parameters(4)
    z, tangent = torch.randn(6, 4), torch.randn(6, 4)
    for function in (lambda z: coupling_flow(z, flow)[0], lambda z: mlp_energy(z, energy)):
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(function(forward_ad.make_dual(z, tangent))).tangent
        expected = torch.func.jvp(function, (z,), (tangent,))[1]
        torch.testing.assert_close(found, expected)


def test_chunks_are_whole_vectors() -> None:
    """But for the last: what a loop over vectors leaves over may round otherwise."""
    for count in (1000, 1025, 2340, 4096):
        seen: list[int] = []
        step = lambda x: (seen.append(len(x)) or x,)  # noqa: B023, E731
        mlp_cpu.in_chunks(step, (torch.zeros(count, 1),), 1024)
        assert sum(seen) == count
        assert len(seen) == -(-count // 1024)
        assert all(size % 64 == 0 for size in seen[:-1])
        assert max(seen) - min(seen) <= 64 * len(seen)


@pytest.mark.parametrize("count", [0, 1, 19, 20, 21, 40, 41, 99, 100])
def test_in_chunks(count: int) -> None:
    """Guards against rows lost, repeated or left unwritten where one chunk ends and the next begins."""
    seen: list[int] = []

    def step(x: Tensor, number: Tensor) -> tuple[Tensor, ...]:
        seen.append(len(x))
        assert torch.equal(x[:, 0].long(), number)
        return 2.0 * x, number + 1, x[:, :1, None].bfloat16()

    x = torch.arange(float(count))[:, None] + torch.zeros(1, 3)
    doubled, more, narrow = mlp_cpu.in_chunks(step, (x, torch.arange(count)), 20)
    assert torch.equal(doubled, 2.0 * x)
    assert torch.equal(more, torch.arange(count) + 1)
    assert torch.equal(narrow, x[:, :1, None].bfloat16())
    assert [found.dtype for found in (doubled, more, narrow)] == [torch.float32, torch.int64, torch.bfloat16]
    assert len(seen) == max(-(-count // 20), 1)
    assert max(seen) <= 20


def test_chunks_fill_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread's rows of a hidden layer take as much as its cache holds."""
    monkeypatch.setattr(mlp_cpu, "CACHE_BYTES", 1 << 20)
    for threads in (1, 6):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert mlp_cpu.chunk_rows(128, "ieee") == mlp_cpu.chunk_rows(128, "tf32") == threads * 2048
        assert mlp_cpu.chunk_rows(128, "bf16") == threads * 4096
        assert mlp_cpu.chunk_rows(8, "ieee") == mlp_cpu.chunk_rows(64, "ieee") == threads * 4096
    monkeypatch.undo()
    assert mlp_cpu.chunk_rows(1 << 25, "ieee") == 64


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("inverse", [False, True])
def test_bf16_of_the_flow_rounds_operands(inverse: bool) -> None:
    """Matrices that were rounded before are the same; each product's operands are rounded, and nothing else:
    a state in bfloat16 would be off by 2^-9."""
    parameters, z = flow_parameters(6, normalised=True), torch.randn(50, 6)
    options = FlowOptions(inverse, "bf16", "silu", 2.0, "shuffle")
    x, log_det = coupling_flow_on_cpu(z, parameters, options)
    names = ("weight_in", "weight_hidden", "weight_out")
    before = parameters._replace(**{name: getattr(parameters, name).bfloat16() for name in names})
    again = coupling_flow_on_cpu(z, before, options)
    assert torch.equal(again[0], x)
    assert torch.equal(again[1], log_det)
    plain = coupling_flow_on_cpu(z, parameters, options._replace(precision="ieee"))
    tf32 = coupling_flow_on_cpu(z, parameters, options._replace(precision="tf32"))
    assert torch.equal(tf32[0], plain[0])
    assert (x - plain[0]).abs().max() > 1e-4
    passed = flow_parameters(6)
    unmoved = passed._replace(weight_out=0.0 * passed.weight_out, bias_out=0.0 * passed.bias_out)
    still, _ = coupling_flow_on_cpu(z, unmoved, options)
    assert torch.equal(still.sort(dim=1).values, z.sort(dim=1).values)


@pytest.mark.usefixtures("form")
def test_bf16_of_the_energy_rounds_operands() -> None:
    parameters, z = energy_parameters(6), torch.randn(50, 6)
    arguments: Any = {"activation": "silu", "precision": "bf16"}
    value, gradient = mlp_energy_and_gradient_on_cpu(z, *parameters, **arguments)
    *hidden, last = parameters.weights
    before = (*(weight.bfloat16() for weight in hidden), last)
    again = mlp_energy_and_gradient_on_cpu(z, before, parameters.biases, **arguments)
    assert torch.equal(again[0], value)
    assert torch.equal(again[1], gradient)
    plain = mlp_energy_and_gradient_on_cpu(z, *parameters, **(arguments | {"precision": "ieee"}))
    assert (value - plain[0]).abs().max() > 1e-4
    assert (gradient - plain[1]).abs().max() > 1e-4
    # The last layer is in float32: with hidden layers that pass on what bfloat16 holds, it is exact.
    one = EnergyParameters(
        (torch.eye(6), torch.full((1, 6), 1.0 + 2.0**-12)), (torch.zeros(6), torch.ones(1))
    )
    ones = mlp_energy_on_cpu(torch.ones(3, 6), *one, activation="relu", precision="bf16")
    assert torch.equal(ones, torch.full((3,), 7.0 + 6 * 2.0**-12))


@pytest.mark.usefixtures("form")
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


@pytest.mark.usefixtures("form")
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
    alone = mlp_energy_on_cpu(z, *parameters, **arguments)
    assert (alone - exact[0]).abs().max() < TOLERANCE[precision] * exact[0].abs().max()
    assert torch.equal(alone, mlp_energy(z, parameters, **arguments))
    assert torch.equal(gradient, mlp_energy_and_gradient(z, parameters, **arguments)[1])


@pytest.mark.parametrize("adjusted", [False, True])
def test_chain_is_the_reference(adjusted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against chunks that restart the noise, and against a scale that misses energy or gradient."""
    monkeypatch.setattr("evalp_fast.kernels.chain_cpu.chunk_rows", lambda *_: 8)
    parameters, z, index = energy_parameters(5), torch.randn(19, 5), torch.arange(100, 119)
    options = ChainOptions(7, 1.2, 1.5, adjusted, 0.8, 2.5, "ieee", "silu", 3, 11, 3, True)
    found = langevin_chain_on_cpu(z, *parameters, index, options)
    exact = langevin_chain_reference(z.double(), double(parameters), index, options)
    assert found[3] is not None
    assert found[3].shape == (2, 19, 5)
    for value, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=2e-5)
    if adjusted:
        assert 0.0 < found[1].mean() < 1.0, found[1]


def test_gradients_and_tracing_take_the_reference() -> None:
    """The CPU form records nothing: where a gradient is asked for, it must not be what runs."""
    parameters = flow_parameters(4)
    z = torch.randn(6, 4, requires_grad=True)
    x, log_det = coupling_flow(z, parameters)
    torch.autograd.grad(x.sum() + log_det.sum(), z)
    energy, taken = energy_parameters(4), []
    f = mlp_energy(z, energy)
    assert f.requires_grad
    assert not mlp_cpu.plain_on_cpu(z)
    assert not mlp_cpu.plain_on_cpu(z.detach(), None, z)
    assert not mlp_cpu.plain_on_cpu(z.detach().double())
    assert not mlp_cpu.plain_on_cpu(torch.zeros(3, device="meta"))
    assert mlp_cpu.plain_on_cpu(z.detach(), None)
    with torch.no_grad():
        assert mlp_cpu.plain_on_cpu(z)
        rows = torch.func.vmap(lambda row: mlp_energy(row[None], energy)[0])(z.detach())
        torch.func.vmap(lambda row: taken.append(mlp_cpu.plain_on_cpu(row)) or row)(z.detach())
    assert taken == [False]
    torch.testing.assert_close(rows, f.detach())
    with launch.backend("reference"):
        assert not mlp_cpu.plain_on_cpu(z.detach())


_PAGES = """
import resource
import torch
from evalp_fast.models.flow import CouplingFlow, FlowConfig

flow = CouplingFlow(FlowConfig(dim=64, couplings=8, hidden=256)).requires_grad_(False)
z = torch.randn(2048, 64)
for _ in range(3):
    flow.log_prob(z)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    flow.log_prob(z)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc gives memory back")
def test_memory_is_not_taken_from_the_system_anew_at_each_call() -> None:
    """Guards against page faults: thousands a call, which the system answers with cleared pages."""
    command = [sys.executable, "-c", _PAGES]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 200
