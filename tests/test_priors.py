"""The prior: its weights and log Z against a law that is known, its samplers, its errors."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from evalp_fast.models.energy import EnergyConfig
from evalp_fast.models.flow import CouplingFlow, FlowConfig, standard_normal_log_prob
from evalp_fast.priors import (
    METHODS,
    EnergyPrior,
    PriorConfig,
    SamplingOptions,
    sampling_options,
)
from evalp_fast.samplers.base import draw

LOG_Z = 0.7
SHAPE = FlowConfig(2, couplings=6, hidden=32)


class Analytic(nn.Module):
    """An energy that is a formula, in the place of the network."""

    def __init__(self, formula):
        super().__init__()
        self.formula = formula

    def forward(self, z: Tensor, *, precision: str | None = None) -> Tensor:
        return self.formula(z)


def prior_of(law, flow: CouplingFlow, base: str = "gaussian", kl_weight: float = 1.0) -> EnergyPrior:
    """The prior whose density is `law` and whose Z is exp(LOG_Z), with `flow` as its sampler."""
    prior = EnergyPrior(PriorConfig(flow.config, EnergyConfig(2), base, kl_weight))
    prior.flow = flow

    def formula(z: Tensor) -> Tensor:
        log_base = standard_normal_log_prob(z) if base == "gaussian" else flow.log_prob(z)
        return kl_weight * (log_base - law.log_prob(z) - LOG_Z)

    prior.energy_net = Analytic(formula)
    return prior.requires_grad_(False)


@pytest.fixture(scope="module")
def separate(gaussian_mixture):
    """Two modes with little between them."""
    return gaussian_mixture((0.6, 0.4), ((-1.6, 0.5), (1.7, -0.6)), ((0.6, 0.7), (0.5, 0.6)))


@pytest.fixture(scope="module")
def fitted(separate) -> CouplingFlow:
    """A flow fitted to the mixture by maximum likelihood: a good proposal, not a perfect one."""
    torch.manual_seed(0)
    flow = CouplingFlow(SHAPE)
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    data = separate.sample(20_000)
    for step in range(300):
        loss = -flow.log_prob(data[step * 512 % 19_456 :][:512]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flow.requires_grad_(False)


@pytest.fixture(scope="module")
def bent() -> CouplingFlow:
    """A flow whose volume element varies, with a law not far from a Gaussian."""
    torch.manual_seed(1)
    flow = CouplingFlow(FlowConfig(2, couplings=2, hidden=8, clamp=0.7))
    with torch.no_grad():
        flow.weight_out.normal_(std=0.3)
    return flow.requires_grad_(False)


CASES = [("gaussian", 1.0), ("gaussian", 0.1), ("flow", 1.0)]


@pytest.mark.parametrize(("base", "kl_weight"), CASES)
def test_log_partition(base: str, kl_weight: float, separate, fitted) -> None:
    """Guards against f in the place of f/w, a missing p0/g, and bounds that are exchanged."""
    estimate = prior_of(separate, fitted, base, kl_weight).log_partition(seed=1)
    assert abs(estimate.value - LOG_Z) < 0.02
    assert estimate.low < LOG_Z < estimate.high
    assert estimate.high - estimate.low < 0.02
    assert estimate.n == 65_536
    # E_g[log w] = log Z - KL(g|p) and E_p[log w] = log Z + KL(p|g), the latter from exact draws of p.
    assert estimate.lower_bound < LOG_Z < estimate.upper_bound
    exact = separate.sample(50_000, seed=5)
    terms = (separate.log_prob(exact) - fitted.log_prob(exact)).double()
    error = float(terms.std()) / math.sqrt(len(terms))
    assert 0.001 < float(terms.mean()) < 0.3
    assert estimate.upper_bound - LOG_Z == pytest.approx(float(terms.mean()), abs=6 * error)
    draws = fitted(torch.randn(50_000, 2, generator=torch.Generator().manual_seed(6)))[0]
    terms = (fitted.log_prob(draws) - separate.log_prob(draws)).double()
    error = float(terms.std()) / math.sqrt(len(terms))
    assert LOG_Z - estimate.lower_bound == pytest.approx(float(terms.mean()), abs=6 * error)


def test_interval_covers_as_often_as_it_says(separate, fitted) -> None:
    """20 series of 2,000 weights. Guards against an interval of the weights, or of another size of sample."""
    prior = prior_of(separate, fitted)
    estimates = [prior.log_partition(2000, seed=seed, replicates=100) for seed in range(20)]
    # Of 20 intervals at 95 %, fewer than 16 cover with probability 0.003.
    assert sum(e.low < LOG_Z < e.high for e in estimates) >= 16
    for e in estimates:
        width = 2 * 1.96 * math.sqrt((e.n / e.ess - 1) / e.n)
        assert e.high - e.low == pytest.approx(width, rel=0.4)
    assert len({e.value for e in estimates}) == 20


@pytest.mark.parametrize(("base", "kl_weight"), CASES)
def test_sir_draws_from_the_prior(base: str, kl_weight: float, separate, fitted) -> None:
    """With 32 proposals the bias of SIR is far below what 10,000 samples show: see test_sir.py."""
    prior = prior_of(separate, fitted, base, kl_weight)
    draws = prior.draw(10_000, method="sir", proposals=32, seed=3)
    assert separate.p_value(draws.samples) > 1e-3
    assert draws.diagnostics["ess"].mean() > 20
    log_z = math.log(float(draws.diagnostics["log_mean_weight"].double().exp().mean()))
    assert log_z == pytest.approx(LOG_Z, abs=0.01)


def test_published_weights_draw_from_another_law(separate, fitted) -> None:
    """exp(-f) without p0/g: here the law g·p/p0, which the same test must reject; and the flow alone too."""
    prior = prior_of(separate, fitted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = prior.sample(5000, method="sir", proposals=32, weights="energy", seed=3)
    assert separate.p_value(samples) < 1e-9


def test_kl_weight_is_an_inverse_temperature(bent) -> None:
    """Guards against w dropped anywhere between the network and the weights."""
    prior = EnergyPrior(PriorConfig(bent.config, EnergyConfig(2), kl_weight=0.25)).requires_grad_(False)
    prior.flow = bent
    z = torch.randn(20, 2)
    energy = 4 * prior.energy_net(z)
    torch.testing.assert_close(prior.energy(z), energy)
    torch.testing.assert_close(prior.log_prob_unnormalized(z), standard_normal_log_prob(z) - energy)
    u, minus_log_det = bent.inverse(z)
    weight = prior.log_weight(z, u, -minus_log_det)
    expected = -energy - 0.5 * z.square().sum(1) + 0.5 * u.square().sum(1) - minus_log_det
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-5)


def test_residual_weight_is_the_energy_alone(bent) -> None:
    prior = EnergyPrior(PriorConfig(bent.config, EnergyConfig(2), "flow")).requires_grad_(False)
    prior.flow = bent
    u = torch.randn(20, 2)
    z, log_det = bent(u)
    assert torch.equal(prior.log_weight(z, u, log_det), -prior.energy(z))
    torch.testing.assert_close(
        prior.log_prob_unnormalized(z), bent.log_prob(z) - prior.energy(z), rtol=0, atol=1e-5
    )
    log_g = standard_normal_log_prob(u) - log_det
    torch.testing.assert_close(prior.log_prob_unnormalized(z, log_g), log_g - prior.energy(z))


def test_new_residual_prior_is_its_flow(bent) -> None:
    energy = EnergyConfig(2, zero_init=True)
    prior = EnergyPrior(PriorConfig(bent.config, energy, "flow")).requires_grad_(False)
    prior.flow = bent
    estimate = prior.log_partition(256)
    assert estimate.value == estimate.low == estimate.high == estimate.lower_bound == 0.0
    assert estimate.ess == pytest.approx(256)


@pytest.fixture(scope="module")
def normal(gaussian_mixture):
    """One Gaussian: its power 1/T is a Gaussian again, of T times the variance."""
    return gaussian_mixture((1.0,), ((0.2, -0.3),), ((0.9, 0.8),))


def tempered(gaussian_mixture, normal, temperature: float):
    return gaussian_mixture(
        (1.0,), ((0.2, -0.3),), ((normal.deviations[0] * math.sqrt(temperature)).tolist(),)
    )


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("base", ["gaussian", "flow"])
def test_sir_at_a_temperature(base: str, temperature: float, normal, gaussian_mixture, bent) -> None:
    """p^(1/T) by tempered proposals. Guards against weights of the proposals at T = 1."""
    prior = prior_of(normal, bent, base)
    law = tempered(gaussian_mixture, normal, temperature)
    draws = prior.draw(10_000, method="sir", proposals=32, temperature=temperature, seed=2)
    assert law.p_value(draws.samples) > 1e-3
    # ∫ (Z·p)^(1/T) = Z^(1/T)·(2π·s1·s2)^(1 - 1/T)·T
    area = 2 * math.pi * 0.9 * 0.8
    expected = LOG_Z / temperature + (1 - 1 / temperature) * math.log(area) + math.log(temperature)
    log_mean = math.log(float(draws.diagnostics["log_mean_weight"].double().exp().mean()))
    assert log_mean == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("base", ["gaussian", "flow"])
@pytest.mark.parametrize("space", ["latent", "noise"])
def test_langevin_at_a_temperature(
    space: str, base: str, temperature: float, normal, gaussian_mixture, bent
) -> None:
    """Both spaces have the law p^(1/T). Guards against a volume element that is left out, or tempered too."""
    prior = prior_of(normal, bent, base)
    options = SamplingOptions(
        temperature=temperature, n_steps=30, step_size=0.7, adjusted=True, space=space, initial="prior"
    )
    draws = prior.sampler("langevin", options=options)(4, torch.arange(10_000))
    assert tempered(gaussian_mixture, normal, temperature).p_value(draws.samples) > 1e-3
    assert 0.4 < draws.diagnostics["acceptance"].mean() < 0.999


@pytest.mark.parametrize("initial", ["flow", "prior"])
@pytest.mark.parametrize("space", ["latent", "noise"])
def test_langevin_starts_where_it_is_told(space: str, initial: str, bent, normal) -> None:
    """A chain of no steps is the flow's draw, or the Gaussian prior's."""
    prior = prior_of(normal, bent)
    options = {"n_steps": 0, "space": space, "initial": initial}
    start = prior.sample(50, method=initial, seed=2)
    torch.testing.assert_close(
        prior.sample(50, method="langevin", seed=2, **options), start, rtol=0, atol=1e-5
    )


def test_prior_and_flow_at_a_temperature(bent, normal) -> None:
    prior = prior_of(normal, bent)
    noise = prior.sample(50, method="prior")
    torch.testing.assert_close(prior.sample(50, method="prior", temperature=0.25), 0.5 * noise)
    torch.testing.assert_close(prior.sample(50, method="flow", temperature=0.25), bent(0.5 * noise)[0])


@pytest.fixture(scope="module")
def network() -> EnergyPrior:
    """A prior of networks with random weights, wide enough for its products to round differently by shape."""
    torch.manual_seed(0)
    prior = EnergyPrior(
        PriorConfig(FlowConfig(6, couplings=3, hidden=48), EnergyConfig(6, 64), kl_weight=0.5)
    )
    with torch.no_grad():
        prior.flow.weight_out.normal_(std=0.1)
    return prior


OPTIONS = {"prior": {}, "flow": {}, "sir": {"proposals": 20}, "langevin": {"n_steps": 3, "adjusted": True}}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_sample_is_a_function_of_its_number(method, precision, network: EnergyPrior) -> None:
    arguments = {"method": method, "precision": precision, "seed": 5, **OPTIONS[method]}
    whole = network.sample(520, **arguments)
    assert whole.shape == (520, 6)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    for n, start, batch_size in ((1, 0, None), (1, 519, None), (200, 250, 7), (520, 0, 100)):
        part = network.sample(n, start=start, batch_size=batch_size, **arguments)
        assert torch.equal(part, whole[start : start + n])
    # Nor does it depend on its place in a tile, except for rounding, which may turn a close choice: noise
    # that is numbered within the tile would repeat in every tile, and yet pass the lines above.
    options = SamplingOptions(**OPTIONS[method])
    other = draw(network.sampler(method, precision=precision, options=options), 520, seed=5, tile=48).samples
    tolerance = 1e-4 if precision is None else 0.1
    assert ((other - whole).abs() < tolerance).all(dim=1).float().mean() > 0.98
    batches = [draws.samples for draws in network.stream(300, batch_size=90, **arguments)]
    assert [len(batch) for batch in batches] == [90, 90, 90, 30]
    assert torch.equal(torch.cat(batches), whole[:300])
    assert network.sample(0, **arguments).shape == (0, 6)


@pytest.mark.parametrize("space", ["latent", "noise"])
@pytest.mark.parametrize("method", METHODS)
def test_the_callers_modes_change_no_sample(method, space: str, network: EnergyPrior) -> None:
    """Guards against chains without gradients in inference mode, and against autocast's rounding of products
    in the backward pass of a chain, which a block around the forward pass does not reach."""
    options = {**OPTIONS[method], "method": method, "space": space}
    expected = network.sample(20, **options)
    for mode in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        with mode:
            assert torch.equal(network.sample(20, **options), expected)


def test_default_method_is_the_flow(network: EnergyPrior) -> None:
    assert torch.equal(network.sample(10), network.sample(10, method="flow", seed=0, start=0))


def test_diagnostics(separate, fitted) -> None:
    prior = prior_of(separate, fitted)
    posterior = separate.sample(800, seed=8)
    report = prior.diagnostics(posterior, n=800, proposals=20, seed=1)
    assert report.proposals == 20
    assert 1 <= report.lowest_ess < report.mean_ess <= 20
    assert abs(report.log_partition.value - LOG_Z) < 0.02
    assert report.negative_log_likelihood == pytest.approx(
        -float(separate.log_prob(posterior).mean()), abs=0.02
    )
    assert set(report.prior_hole) == {"prior", "flow", "sir"}
    assert report.prior_hole["prior"].low > 10 * abs(report.prior_hole["sir"].value)


def test_diagnostics_without_a_posterior(network: EnergyPrior) -> None:
    report = network.diagnostics(n=200, proposals=5, seed=2)
    assert report.prior_hole == {}
    assert report.negative_log_likelihood is None
    ess = network.draw(200, method="sir", proposals=5, seed=2).diagnostics["ess"]
    assert report.mean_ess == pytest.approx(float(ess.mean()))
    assert report.lowest_ess == pytest.approx(float(ess.min()))


def test_low_ess_warns_once(normal, bent, gaussian_mixture) -> None:
    narrow = gaussian_mixture((1.0,), ((1.0, 1.0),), ((0.02, 0.02),))
    prior = prior_of(narrow, bent)
    with pytest.warns(UserWarning, match=r"effective sample size is \d\.\d of 50 proposals") as caught:
        prior.sample(300, method="sir", proposals=50)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior.sample(0, method="sir", proposals=50)
        prior_of(normal, bent).sample(300, method="sir", proposals=50)


def test_weights_that_are_all_useless_raise(bent) -> None:
    prior = EnergyPrior(PriorConfig(bent.config, EnergyConfig(2)))
    prior.energy_net = Analytic(lambda z: torch.full((len(z),), math.nan))
    with pytest.raises(ValueError, match="none of the 300 importance weights is positive and finite"):
        prior.log_partition(300)
    with pytest.raises(ValueError, match="sample 0: none of its 10 proposals"):
        prior.sample(3, method="sir", proposals=10)


def test_some_useless_weights_count_as_zero(separate, fitted) -> None:
    """Half of the plane has an energy of NaN: Z is what the other half holds."""
    prior = prior_of(separate, fitted)
    formula = prior.energy_net.formula
    prior.energy_net = Analytic(lambda z: torch.where(z[:, 0] > 0, torch.nan, formula(z)))
    standard = -separate.means[:, 0] / separate.deviations[:, 0]
    share = float((separate.shares * torch.special.ndtr(standard)).sum())
    assert prior.log_partition(20_000).value == pytest.approx(LOG_Z + math.log(share), abs=0.03)


def test_bf16_weights_belong_to_their_samples(network: EnergyPrior) -> None:
    """z and log g come from one pass, so that weights in bf16 give the same log Z."""
    exact = network.draw(2000, method="sir", proposals=10).diagnostics["log_mean_weight"].mean()
    rounded = (
        network.draw(2000, method="sir", proposals=10, precision="bf16").diagnostics["log_mean_weight"].mean()
    )
    assert float(rounded) == pytest.approx(float(exact), abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "gibbs"}, ValueError, "method must be one of prior, flow, sir, langevin, got 'gibbs'"),
        ({"precision": "fp8"}, ValueError, "precision must be one of ieee, tf32, bf16, got 'fp8'"),
        ({"steps": 3}, TypeError, "unknown sampling option 'steps'; known: temperature, proposals"),
        ({"weights": "all"}, ValueError, "weights must be one of exact, energy"),
        ({"space": "pixel"}, ValueError, "space must be one of latent, noise"),
        ({"initial": "zero"}, ValueError, "initial must be one of flow, prior"),
        ({"method": "sir", "proposals": 0}, ValueError, "proposals must be at least 1"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive"),
        ({"method": "langevin", "step_size": 0.0}, ValueError, "step_size must be positive"),
        ({"n": -1}, ValueError, "n must be at least 0"),
        ({"n": 2.5}, TypeError, "n must be an int"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"start": -4}, ValueError, "start must be at least 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, error, message: str, network: EnergyPrior) -> None:
    with pytest.raises(error, match=message):
        network.sample(**({"n": 4} | arguments))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"energy": EnergyConfig(3)}, "flow.dim 2 and energy.dim 3 must be equal"),
        ({"base": "uniform"}, "base must be 'gaussian' or 'flow'"),
        ({"kl_weight": 0.0}, r"kl_weight must be in \(0, 1\], got 0.0"),
        ({"kl_weight": 1.5}, r"kl_weight must be in \(0, 1\]"),
        ({"base": "flow", "kl_weight": 0.5}, "kl_weight must be 1 with base='flow'"),
    ],
)
def test_bad_configuration_is_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PriorConfig(**({"flow": SHAPE, "energy": EnergyConfig(2)} | values))


def test_log_partition_needs_two_weights(network: EnergyPrior) -> None:
    with pytest.raises(ValueError, match="n must be at least 2"):
        network.log_partition(1)


def test_options_are_checked_by_name() -> None:
    assert sampling_options({"proposals": 7}).proposals == 7
    assert sampling_options({}) == SamplingOptions()


@pytest.mark.gpu
def test_on_a_gpu(network: EnergyPrior) -> None:
    prior = EnergyPrior(network.config).cuda()
    prior.load_state_dict(network.state_dict())
    for method in METHODS:
        arguments = {"method": method, "precision": "ieee", "seed": 5, **OPTIONS[method]}
        whole = prior.sample(9000, **arguments)
        assert whole.device.type == "cuda"
        assert torch.equal(prior.sample(40, start=8180, batch_size=7, **arguments), whole[8180:8220])
        if method in ("prior", "flow"):
            torch.testing.assert_close(whole[:500].cpu(), network.sample(500, **arguments), rtol=0, atol=1e-4)
    here, there = network.log_partition(20_000), prior.log_partition(20_000)
    assert there.value == pytest.approx(here.value, abs=1e-4)
    assert there.low == pytest.approx(here.low, abs=1e-3)


def test_density_and_draws_in_one_pass(network) -> None:
    """The pair of `sample_and_log_prob` is consistent, is `sample`'s series, and `rsample` has gradients."""
    prior = network
    z, log_g = prior.sample_and_log_prob(40, seed=3, start=5)
    torch.testing.assert_close(z, prior.sample(40, seed=3, start=5), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_g, prior.flow.log_prob(z).detach(), rtol=0, atol=1e-4)
    assert not z.requires_grad
    drawn, density = prior.rsample(4)
    (drawn.sum() + density.sum()).backward()
    assert prior.flow.weight_out.grad.abs().sum() > 0
    unnormalised = prior.log_prob_unnormalized(z).detach()
    torch.testing.assert_close(prior.log_prob(z, log_partition=0.5).detach(), unnormalised - 0.5)
    torch.testing.assert_close(
        prior.log_prob(z).detach(), unnormalised - prior.log_partition().value, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("bad", [{"n": -1}, {"start": -1}, {"batch_size": 0}, {"method": "magic"}])
def test_stream_checks_before_the_first_batch(bad: dict, network) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        network.stream(**{"n": 3, **bad})


def test_interval_where_one_weight_counts(network: EnergyPrior, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resample may miss the only weight that counts: the interval then reaches -inf, and is never NaN."""
    monkeypatch.setattr(network, "log_weight", lambda z, u, log_det: 1e4 * z[:, 0])
    partition = network.log_partition(2048)
    assert partition.low == -math.inf
    assert partition.low < partition.value <= partition.high < math.inf
    assert partition.ess == pytest.approx(1.0)
