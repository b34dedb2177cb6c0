"""The flow: its log-determinant is the Jacobian's, its inverse is one, its density is a density."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from evalp_fast.kernels.launch import HAS_TRITON, INTERPRETED, backend
from evalp_fast.models.flow import LOG_2PI, CouplingFlow, FlowConfig, standard_normal_log_prob


def random_flow(scale: float = 1.0, dtype: torch.dtype = torch.float64, **shape) -> CouplingFlow:
    """A flow with every parameter drawn at random: the last layers of a new flow are zero."""
    generator = torch.Generator().manual_seed(shape["dim"])
    flow = CouplingFlow(FlowConfig(**shape)).to(dtype)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / math.sqrt(8.0))
    return flow


def noise(rows: int, dim: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


SHAPES = [(dim, mixing, depth) for dim in (2, 5, 8) for mixing in ("shuffle", "swap") for depth in (1, 2, 3)]


@pytest.mark.parametrize(("dim", "mixing", "depth"), SHAPES)
@pytest.mark.parametrize("clamp", [1.5, None])
@pytest.mark.parametrize("normalization", ["none", "actnorm"])
def test_log_det_is_that_of_the_jacobian(
    dim: int, mixing: str, depth: int, clamp: float | None, normalization: str
) -> None:
    """Guards against a wrong sign, a column that is not counted, and a wrong split of an odd dim."""
    flow = random_flow(
        dim=dim,
        couplings=3,
        hidden=8,
        depth=depth,
        activation="silu",
        mixing=mixing,
        clamp=clamp,
        normalization=normalization,
    )
    u = noise(6, dim)
    z, log_det = flow(u)
    jacobians = torch.stack(
        [torch.autograd.functional.jacobian(lambda row: flow(row[None])[0][0], row) for row in u]
    )
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobians).logabsdet, rtol=0, atol=1e-10)
    assert log_det.abs().mean() > 0.05  # of a flow that does scale

    back, inverse_log_det = flow.inverse(z)
    torch.testing.assert_close(back, u, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-10)
    torch.testing.assert_close(flow.log_prob(z), standard_normal_log_prob(u) - log_det, rtol=0, atol=1e-10)


def test_standard_normal_log_prob() -> None:
    z = noise(4, 3)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=1)
    torch.testing.assert_close(standard_normal_log_prob(z), expected)


@pytest.mark.parametrize("mixing", ["shuffle", "swap"])
@pytest.mark.parametrize("dim", [2, 3, 7, 16])
@pytest.mark.parametrize("normalization", ["none", "actnorm"])
def test_new_flow_is_a_permutation(dim: int, mixing: str, normalization: str) -> None:
    flow = CouplingFlow(FlowConfig(dim, couplings=5, hidden=8, mixing=mixing, normalization=normalization))
    u = noise(5, dim, torch.float32)
    z, log_det = flow(u)
    assert torch.equal(log_det, torch.zeros(5))
    assert torch.equal(z.sort(dim=1).values, u.sort(dim=1).values)
    torch.testing.assert_close(flow.log_prob(z), standard_normal_log_prob(z))


def meetings(dim: int, couplings: int, mixing: str) -> tuple[Tensor, Tensor]:
    """Pairs of columns of which one has conditioned the other `[dim, dim]`, and changes of each column."""
    flow = CouplingFlow(FlowConfig(dim, couplings=1, hidden=1, mixing=mixing)).requires_grad_(False)
    order = flow(torch.arange(dim, dtype=torch.float32)[None])[0][0].long()  # a new coupling only mixes
    passed, column = (dim + 1) // 2, torch.arange(dim)
    met = torch.eye(dim, dtype=torch.bool)
    changes = torch.zeros(dim, dtype=torch.int64)
    for _ in range(couplings):
        first, second = column[:passed], column[passed:]
        met[first[:, None], second] = met[second[:, None], first] = True
        changes[second] += 1
        column = column[order]
    return met, changes


@pytest.mark.parametrize("dim", [2, 3, 4, 5, 6, 8, 11, 16, 32, 64, 100, 128])
def test_shuffle_brings_every_pair_of_columns_together(dim: int) -> None:
    """Guards against a shuffle that leaves a column, or a pair, in one half for good."""
    couplings = (dim - 1).bit_length() if dim.bit_count() == 1 else (dim - 1).bit_length() + 1
    met, _ = meetings(dim, couplings, "shuffle")
    assert met.all()
    _, changes = meetings(dim, 12 * couplings, "shuffle")
    assert changes.min() >= 3 * couplings


@pytest.mark.parametrize("dim", [2, 5, 8])
def test_swap_changes_every_column(dim: int) -> None:
    _, changes = meetings(dim, 2 if dim % 2 == 0 else dim, "swap")
    assert changes.min() >= 1


@pytest.mark.parametrize("mixing", ["shuffle", "swap"])
@pytest.mark.parametrize("dim", [4, 7])
def test_every_output_depends_on_every_input(dim: int, mixing: str) -> None:
    flow = random_flow(dim=dim, couplings=dim, hidden=8, activation="silu", mixing=mixing)
    jacobian = torch.autograd.functional.jacobian(lambda row: flow(row[None])[0][0], noise(1, dim)[0])
    assert (jacobian != 0).all()


@pytest.mark.parametrize("mixing", ["shuffle", "swap"])
def test_density_integrates_to_one(mixing: str) -> None:
    flow = random_flow(0.7, dim=2, couplings=4, hidden=8, mixing=mixing, clamp=1.0)
    # Smooth, and below 1e-12 at the edges: the trapezoidal sum is accurate far beyond 1e-3.
    side = torch.linspace(-20.0, 20.0, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        density = flow.log_prob(grid).exp()
    assert density.view(401, 401)[[0, -1]].max() < 1e-12
    assert float(density.sum()) * (40.0 / 400) ** 2 == pytest.approx(1.0, abs=1e-3)
    assert (density - standard_normal_log_prob(grid).exp()).abs().max() > 0.05  # not the one of a new flow


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_gradients(direction: str) -> None:
    flow = random_flow(dim=3, couplings=2, hidden=4, depth=2, activation="silu")
    names = [name for name, _ in flow.named_parameters()]

    def outputs(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        values = dict(zip(names, parameters, strict=True))
        if direction == "forward":
            return torch.func.functional_call(flow, values, (x,))
        # functional_call only calls `forward`; the same values are put in place for the other direction.
        with torch.nn.utils.stateless._reparametrize_module(flow, values):
            return flow.inverse(x)

    arguments = (
        noise(3, 3).requires_grad_(),
        *(p.detach().clone().requires_grad_() for p in flow.parameters()),
    )
    assert torch.autograd.gradcheck(outputs, arguments)


@pytest.mark.parametrize("normalization", ["none", "actnorm"])
def test_likelihood_reaches_every_parameter(normalization: str) -> None:
    flow = random_flow(dim=6, couplings=3, hidden=8, normalization=normalization)
    flow.log_prob(noise(64, 6)).mean().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_bf16_is_close_and_consistent() -> None:
    """bf16 products, float32 maps. A whole flow in bf16 is off by more than a nat; this one by hundredths."""
    flow = random_flow(0.5, torch.float32, dim=16, couplings=8, hidden=64, clamp=2.0)
    u = noise(512, 16, torch.float32)
    z, log_det = flow(u)
    z_bf16, log_det_bf16 = flow(u, precision="bf16")
    assert z_bf16.dtype == log_det_bf16.dtype == torch.float32
    assert 0 < (log_det_bf16 - log_det).abs().mean() < 0.1
    assert (z_bf16 - z).square().mean().sqrt() < 0.05 * z.std()
    # The pair stays one of a map and its own Jacobian: the inverse in the same precision undoes it.
    back, _ = flow.inverse(z_bf16, precision="bf16")
    assert (back - u).abs().median() < 1e-3


def test_ieee_and_tf32_are_float32_on_cpu() -> None:
    flow = random_flow(0.5, torch.float32, dim=4, couplings=2, hidden=8)
    u = noise(8, 4, torch.float32)
    assert torch.equal(flow(u, precision="ieee")[0], flow(u)[0])
    assert torch.equal(flow(u, precision="tf32")[0], flow(u)[0])


def test_log_det_is_bounded_by_the_clamp() -> None:
    flow = random_flow(200.0, torch.float32, dim=4, couplings=3, hidden=8, clamp=0.5)
    z, log_det = flow(noise(100, 4, torch.float32))
    assert z.isfinite().all()
    assert log_det.abs().max() <= 3 * 2 * 0.5 + 1e-5


def test_no_rows() -> None:
    flow = CouplingFlow(FlowConfig(5, couplings=2, hidden=4))
    for z, log_det in (flow(torch.zeros(0, 5)), flow.inverse(torch.zeros(0, 5))):
        assert z.shape == (0, 5)
        assert log_det.shape == (0,)
    assert flow.log_prob(torch.zeros(0, 5)).shape == (0,)


def test_state_is_parameters_alone() -> None:
    """The permutations follow from the configuration and are not saved."""
    names = set(CouplingFlow(FlowConfig(4)).state_dict())
    assert names == {"weight_in", "bias_in", "weight_hidden", "bias_hidden", "weight_out", "bias_out"}
    normalized = set(CouplingFlow(FlowConfig(4, normalization="actnorm")).state_dict())
    assert normalized == names | {"norm_log_scale", "norm_shift"}


def test_actnorm_ends_every_coupling() -> None:
    """With the last layers at zero a coupling is the mixing, then x·exp(log_scale) + shift of each column, in
    the order of the columns as they then are. Guards against a scale that misses its column, or is applied
    before the mixing or the shift."""
    flow = CouplingFlow(FlowConfig(5, couplings=2, hidden=4, normalization="actnorm")).double()
    assert flow.norm_log_scale is not None
    assert flow.norm_shift is not None
    with torch.no_grad():
        flow.norm_log_scale.copy_(noise(2, 5, seed=1))
        flow.norm_shift.copy_(noise(2, 5, seed=2))
    u = noise(4, 5)
    x = u
    for log_scale, shift in zip(flow.norm_log_scale, flow.norm_shift, strict=True):
        x = x[:, [3, 0, 4, 1, 2]] * log_scale.exp() + shift  # b0 a0 b1 a1 a2
    z, log_det = flow(u)
    torch.testing.assert_close(z, x)
    torch.testing.assert_close(log_det, flow.norm_log_scale.sum().expand(4))


def test_actnorm_does_not_depend_on_data() -> None:
    """Its parameters move by training alone: no first batch, nor `train()`, sets them, and a row's result is
    the same whatever the others are."""
    flow = CouplingFlow(FlowConfig(6, couplings=3, hidden=8, normalization="actnorm")).train()
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    u = 5.0 + 3.0 * noise(64, 6, torch.float32)
    flow.log_prob(u).mean().backward()
    z = flow(u)[0]
    for name, value in flow.state_dict().items():
        assert torch.equal(value, before[name]), name
    torch.testing.assert_close(flow(u[:1])[0], z[:1])


def test_actnorm_fits_what_couplings_start_from() -> None:
    """Scale and shift of the columns are learned as such: from data far from the noise, the likelihood
    becomes that of the diagonal Gaussian in a few steps of the normalisation alone."""
    flow = CouplingFlow(FlowConfig(4, couplings=2, hidden=4, normalization="actnorm"))
    data = noise(4000, 4, torch.float32) * torch.tensor([0.1, 1.0, 3.0, 0.5]) + torch.tensor([2.0, 0, -1, 1])
    optimizer = torch.optim.Adam([flow.norm_log_scale, flow.norm_shift], 0.05)  # type: ignore[list-item]
    for _ in range(250):
        optimizer.zero_grad()
        loss = -flow.log_prob(data).mean()
        loss.backward()
        optimizer.step()
    entropy = 0.5 * 4 * (1 + LOG_2PI) + float(data.std(dim=0, correction=0).log().sum())
    assert loss.item() == pytest.approx(entropy, abs=0.02)  # the least that a diagonal Gaussian can have


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_actnorm_has_one_meaning_on_every_path(direction: str, precision: Any) -> None:
    """Without gradients (the loops of the CPU), with (the reference), and in the kernel."""
    flow = random_flow(0.7, torch.float32, dim=6, couplings=3, hidden=16, normalization="actnorm")
    x = noise(40, 6, torch.float32)
    call = flow if direction == "forward" else flow.inverse
    exact = copy.deepcopy(flow).double()
    expected = (exact if direction == "forward" else exact.inverse)(x.double())
    paths = {"gradients": call(x, precision=precision)}
    with torch.no_grad():
        paths["loops"] = call(x, precision=precision)
        if HAS_TRITON and INTERPRETED and precision == "ieee":  # the interpreter has no bfloat16 products
            with backend("triton"):
                paths["kernel"] = call(x, precision=precision)
    tolerance = 1e-5 if precision == "ieee" else 0.03
    for name, (z, log_det) in paths.items():
        assert (z - expected[0]).abs().max() < tolerance * expected[0].abs().max(), name
        assert (log_det - expected[1]).abs().max() < tolerance * 10, name


@pytest.mark.parametrize("normalization", ["none", "actnorm"])
def test_state_brings_back_the_flow(normalization: str) -> None:
    flow = random_flow(0.7, torch.float32, dim=5, couplings=2, hidden=8, normalization=normalization)
    loaded = CouplingFlow(flow.config)
    loaded.load_state_dict(flow.state_dict())
    u = noise(9, 5, torch.float32)
    assert torch.equal(loaded(u)[0], flow(u)[0])
    other = "none" if normalization == "actnorm" else "actnorm"
    with pytest.raises(RuntimeError, match="norm_log_scale"):
        CouplingFlow(replace(flow.config, normalization=other)).load_state_dict(flow.state_dict())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 1),
        ("couplings", 0),
        ("hidden", 0),
        ("depth", 0),
        ("clamp", 0.0),
        ("clamp", math.nan),
        ("mixing", "random"),
        ("normalization", "batchnorm"),
        ("normalization", None),
        ("activation", "tanh"),
    ],
)
def test_bad_configuration_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        FlowConfig(**({"dim": 4} | {field: value}))


def test_bad_shape_is_named() -> None:
    flow = CouplingFlow(FlowConfig(4))
    with pytest.raises(ValueError, match=r"u must have shape \[N, 4\], got \(2, 3\)"):
        flow(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"z must have shape \[N, 4\], got \(4,\)"):
        flow.inverse(torch.zeros(4))
    with pytest.raises(ValueError, match="z must have shape"):
        flow.log_prob(torch.zeros(2, 5))
