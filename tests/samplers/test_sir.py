"""SIR: an exact draw from the weighted proposals, its diagnostics, and what it does with useless weights.

The statistical tests use a target p whose cells have known probabilities, and an affine flow as proposal g.
SIR with K proposals has a law of its own: to first order its density is p·(1 + (E_p[w] - w)/K), w = p/g. A
chi-square test of N samples sees that as a noncentrality of at most N·Var_p(w)/K². Here the weights are
bounded (by 1.7) and Var_p(w) = 0.08, so that N = 10⁵ and K = 64 give 2, where the statistic has a standard
deviation of 11: far below what the test can see. The broken samplers below are off by hundreds.
"""

import math

import pytest
import torch
from torch import Tensor

from evalp_fast.kernels import philox
from evalp_fast.models.flow import CouplingFlow, FlowConfig, standard_normal_log_prob
from evalp_fast.samplers import sir
from evalp_fast.samplers.base import draw
from evalp_fast.samplers.direct import FlowSampler
from evalp_fast.samplers.sir import LogWeight, SIRSampler

MEAN = (-0.12, -0.04)
SCALE = (1.14, 0.78)
SHEAR = -0.25
PROPOSALS = 64


def affine(u: Tensor) -> tuple[Tensor, Tensor]:
    """An affine flow that covers the mixture, column by column: a row's bits do not depend on the others."""
    first = MEAN[0] + SCALE[0] * u[:, 0]
    second = MEAN[1] + SHEAR * u[:, 0] + SCALE[1] * u[:, 1]
    return torch.stack((first, second), dim=1), u.new_full((len(u),), math.log(SCALE[0] * SCALE[1]))


def exact_weight(mixture) -> LogWeight:
    return lambda z, u, log_det: mixture.log_prob(z) - (standard_normal_log_prob(u) - log_det)


def test_chi_square_test_is_calibrated(mixture) -> None:
    """Exact draws pass, and a shift of one mode by a fiftieth of its width is seen."""
    values = [mixture.p_value(mixture.sample(100_000, seed=seed)) for seed in range(2, 12)]
    assert min(values) > 1e-3
    assert sum(value > 0.5 for value in values) in range(2, 9)
    samples = mixture.sample(100_000, seed=2)
    assert mixture.p_value(samples + 0.014 * (samples[:, :1] > 0)) < 1e-3


def test_law_is_the_target(mixture) -> None:
    """10⁵ samples against the exact law. Guards against weights without p0/g, and against a biased choice."""
    sampler = SIRSampler(affine, exact_weight(mixture), 2, PROPOSALS)
    draws = draw(sampler, 100_000, seed=1, tile=1024)
    assert mixture.p_value(draws.samples) > 1e-3
    # Each sample's mean weight estimates Z = 1 without bias; Var_g(w) is about 0.1.
    mean_weights = draws.diagnostics["log_mean_weight"].double().exp()
    error = float(mean_weights.std()) / math.sqrt(len(mean_weights))
    assert error < 2e-4
    assert abs(float(mean_weights.mean()) - 1.0) < 4 * error
    assert (draws.diagnostics["non_finite"] == 0).all()


BROKEN = {
    # the published weights: exp(-f) = p/p0, without p0/g
    "energy": lambda mixture: lambda z, u, log_det: mixture.log_prob(z) - standard_normal_log_prob(z),
    "no volume": lambda mixture: (
        lambda z, u, log_det: mixture.log_prob(z) - standard_normal_log_prob(u) - z[:, 0]
    ),
    "temperature": lambda mixture: lambda z, u, log_det: exact_weight(mixture)(z, u, log_det) / 2,
    "unweighted": lambda mixture: lambda z, u, log_det: torch.zeros(len(z)),
}


@pytest.mark.parametrize("bug", sorted(BROKEN))
def test_the_test_sees_wrong_weights(bug: str, mixture) -> None:
    sampler = SIRSampler(affine, BROKEN[bug](mixture), 2, 32)
    assert mixture.p_value(draw(sampler, 20_000, seed=1, tile=1024).samples) < 1e-9


def test_the_test_sees_a_selection_that_reuses_noise(mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same clocks for every sample, and clocks made of the proposals' own noise."""
    sampler = SIRSampler(affine, exact_weight(mixture), 2, 32)
    original = philox.exponential

    def shared(seed: int, index: Tensor, *arguments, **options) -> Tensor:
        return original(seed, index * 0, *arguments, **options)

    def own(seed: int, index: Tensor, step: Tensor, stream: int, width: int, **options) -> Tensor:
        columns = [original(seed, index, width * step + k, philox.Stream.PROPOSAL, 1) for k in range(width)]
        return torch.cat(columns, dim=1)

    for broken in (shared, own):
        monkeypatch.setattr(sir.philox, "exponential", broken)
        assert mixture.p_value(draw(sampler, 20_000, seed=1, tile=1024).samples) < 1e-9


def proposals_of(seed: int, index: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """All proposals `[N, count, 2]` of the samples `index`, with u and log-determinant."""
    u = torch.stack([philox.normal(seed, index, k, philox.Stream.PROPOSAL, 2) for k in range(count)], dim=1)
    z, log_det = affine(u.flatten(0, 1))
    return z.view(u.shape), u, log_det.view(u.shape[:2])


def test_choice_and_diagnostics_by_brute_force(mixture) -> None:
    """All proposals at once, in float64: the winner of the race, the sums of the weights."""
    index, seed, count = torch.arange(1000, 1200), 4, 50
    draws = SIRSampler(affine, exact_weight(mixture), 2, count)(seed, index)
    z, u, log_det = proposals_of(seed, index, count)
    log_weight = exact_weight(mixture)(z.flatten(0, 1), u.flatten(0, 1), log_det.flatten()).view(200, count)
    weight = log_weight.double().exp()
    stream = philox.Stream.SELECTION
    fours = [philox.exponential(seed, index, k, stream, 4) for k in range(-(-count // 4))]
    clocks = torch.cat(fours, dim=1)[:, :count].double() / weight
    assert torch.equal(draws.samples, z[torch.arange(200), clocks.argmin(dim=1)])
    ess = weight.sum(dim=1).square() / weight.square().sum(dim=1)
    torch.testing.assert_close(draws.diagnostics["ess"].double(), ess, rtol=1e-5, atol=0)
    log_mean = weight.mean(dim=1).log()
    torch.testing.assert_close(draws.diagnostics["log_mean_weight"].double(), log_mean, rtol=0, atol=1e-5)


def test_weights_far_from_one_are_relative(mixture) -> None:
    """exp(±1000) is beyond float32: only differences of log-weights count, and log Z moves with them."""
    index = torch.arange(300)
    plain = SIRSampler(affine, exact_weight(mixture), 2, 20)(0, index)
    for shift in (-1000.0, 1000.0):
        shifted = SIRSampler(affine, lambda z, u, d: exact_weight(mixture)(z, u, d) + shift, 2, 20)(0, index)  # noqa: B023
        # log-weights of 1000 have an ulp of 6e-5, which may change a close race.
        assert (shifted.samples == plain.samples).all(dim=1).float().mean() > 0.99
        log_mean = shifted.diagnostics["log_mean_weight"] - shift
        torch.testing.assert_close(log_mean, plain.diagnostics["log_mean_weight"], rtol=0, atol=3e-4)


@pytest.mark.parametrize("rows", [1, 100, 700, 10**6])
def test_choice_does_not_depend_on_the_chunks(rows: int, mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a leader that is lost, or a proposal counted twice, between two chunks."""
    index = torch.arange(100)
    expected = SIRSampler(affine, exact_weight(mixture), 2, 23)(0, index)
    monkeypatch.setattr(sir, "_ROWS", rows)
    draws = SIRSampler(affine, exact_weight(mixture), 2, 23)(0, index)
    assert torch.equal(draws.samples, expected.samples)
    for name, value in expected.diagnostics.items():
        torch.testing.assert_close(draws.diagnostics[name], value, rtol=1e-5, atol=1e-5)


def test_memory_does_not_grow_with_proposals() -> None:
    """No tensor that a sampler makes has room for all proposals, or all weights, of its samples."""
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            out = function(*arguments, **(keywords or {}))
            largest = max(
                [largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))]
            )
            return out

    sizes = []
    for proposals in (100, 400, 1600):
        largest = 0
        with Largest():
            SIRSampler(affine, lambda z, u, d: -z[:, 0], 2, proposals)(0, torch.arange(256))
        sizes.append(largest)
    assert sizes[0] == sizes[1] == sizes[2]


def test_one_proposal_is_the_flow(mixture) -> None:
    index = torch.arange(50, 100)
    one = SIRSampler(affine, exact_weight(mixture), 2, 1, temperature=1.7)(3, index)
    assert torch.equal(one.samples, FlowSampler(affine, 2, 1.7)(3, index).samples)
    torch.testing.assert_close(one.diagnostics["ess"], torch.ones(50))


@pytest.fixture(scope="module")
def flow_sampler() -> SIRSampler:
    torch.manual_seed(0)
    flow = CouplingFlow(FlowConfig(6, couplings=3, hidden=32))
    with torch.no_grad():
        flow.weight_out.normal_(std=0.1)
    return SIRSampler(flow, lambda z, u, log_det: -z.square().sum(dim=1) / 3, 6, 40)


def test_sample_is_a_function_of_its_number(flow_sampler: SIRSampler) -> None:
    """To the last bit, diagnostics too."""
    whole = draw(flow_sampler, 600, seed=9)
    for n, start, batch_size in ((1, 0, None), (1, 599, None), (300, 255, 7), (600, 0, 100)):
        part = draw(flow_sampler, n, seed=9, start=start, batch_size=batch_size)
        assert torch.equal(part.samples, whole.samples[start : start + n])
        for name, value in part.diagnostics.items():
            assert torch.equal(value, whole.diagnostics[name][start : start + n]), name


def test_no_samples(flow_sampler: SIRSampler) -> None:
    draws = draw(flow_sampler, 0)
    assert draws.samples.shape == (0, 6)
    assert {name: tuple(value.shape) for name, value in draws.diagnostics.items()} == {
        "ess": (0,),
        "log_mean_weight": (0,),
        "non_finite": (0,),
    }


def test_non_finite_weights_are_zero_and_counted(mixture) -> None:
    """NaN and +inf count; -inf is a weight of zero like any other."""

    def spoilt(z: Tensor, u: Tensor, log_det: Tensor) -> Tensor:
        weight = exact_weight(mixture)(z, u, log_det)
        weight = torch.where(z[:, 0] > 0.8, torch.nan, weight)
        weight = torch.where(z[:, 0] < -1.5, torch.inf, weight)
        return torch.where(z[:, 1] > 0.7, -torch.inf, weight)

    index, count = torch.arange(400), 30
    draws = SIRSampler(affine, spoilt, 2, count)(2, index)
    assert draws.samples[:, 0].max() <= 0.8
    assert draws.samples[:, 0].min() >= -1.5
    assert draws.samples[:, 1].max() <= 0.7
    z, u, log_det = proposals_of(2, index, count)
    weight = spoilt(z.flatten(0, 1), u.flatten(0, 1), log_det.flatten()).view(400, count)
    counted = (weight.isnan() | weight.isposinf()).sum(dim=1)
    assert torch.equal(draws.diagnostics["non_finite"].long(), counted)
    assert counted.max() > 0
    kept = torch.where(weight.isfinite(), weight, -torch.inf).double().exp()
    ess = kept.sum(dim=1).square() / kept.square().sum(dim=1)
    torch.testing.assert_close(draws.diagnostics["ess"].double(), ess, rtol=1e-5, atol=0)


@pytest.mark.parametrize("useless", [-math.inf, math.nan, math.inf])
def test_row_without_weight_is_named(useless: float, mixture) -> None:
    z, _, _ = proposals_of(0, torch.tensor([1005]), 10)

    def weight(z_: Tensor, u: Tensor, log_det: Tensor) -> Tensor:
        return torch.where(torch.isin(z_[:, 0], z[0, :, 0]), useless, exact_weight(mixture)(z_, u, log_det))

    sampler = SIRSampler(affine, weight, 2, 10)
    with pytest.raises(
        ValueError, match="sample 1005: none of its 10 proposals has a positive finite weight"
    ):
        sampler(0, torch.arange(1000, 1010))
    assert sampler(0, torch.arange(1000, 1005)).samples.isfinite().all()


def test_tempered_proposals(mixture) -> None:
    """At T the noise is N(0, T·I), and a weight that knows it gives the same law."""
    temperature = 1.3

    def weight(z: Tensor, u: Tensor, log_det: Tensor) -> Tensor:
        log_u = standard_normal_log_prob(u / math.sqrt(temperature)) - math.log(temperature)
        return mixture.log_prob(z) - (log_u - log_det)

    sampler = SIRSampler(affine, weight, 2, 48, temperature)
    assert mixture.p_value(draw(sampler, 30_000, seed=3, tile=1024).samples) > 1e-3


@pytest.mark.parametrize("proposals", [0, -3])
def test_bad_options_are_named(proposals: int, mixture) -> None:
    with pytest.raises(ValueError, match="proposals must be at least 1"):
        SIRSampler(affine, exact_weight(mixture), 2, proposals)
    with pytest.raises(ValueError, match="temperature"):
        SIRSampler(affine, exact_weight(mixture), 2, 10, temperature=0.0)
