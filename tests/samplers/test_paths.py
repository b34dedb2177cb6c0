"""Which path draws a prior's samples, what `Draws.info` says of it, and that both draw the same."""

import math
from typing import Any, Literal

import pytest
import torch
from small_prior import DIM, LANGEVIN, METHODS, new_prior
from torch import Tensor, nn

from evalp_fast.kernels import energy as energy_module
from evalp_fast.kernels import flow as flow_module
from evalp_fast.kernels import launch
from evalp_fast.kernels.latent_chain import langevin_chain
from evalp_fast.models.energy import EnergyConfig, MLPEnergy
from evalp_fast.models.flow import CouplingFlow, FlowConfig
from evalp_fast.priors import EnergyPrior, PriorConfig, SamplingOptions
from evalp_fast.samplers.direct import FunctionSampler, GaussianSampler
from evalp_fast.samplers.langevin import LangevinSampler, langevin

needs_interpreter = pytest.mark.skipif(
    not (launch.HAS_TRITON and launch.INTERPRETED), reason="needs Triton's interpreter"
)
IN_NOISE = "its chains move in noise space, through the flow"


class OwnEnergy(MLPEnergy):
    """A user's network. A subclass may compute anything: no kernel knows it."""


class OwnFlow(nn.Module):
    def __init__(self, flow: CouplingFlow):
        super().__init__()
        self.inside = flow
        self.bias_in = flow.bias_in

    def forward(self, u: Tensor, *, precision: str | None = None) -> tuple[Tensor, Tensor]:
        return self.inside(u, precision=precision)  # type: ignore[arg-type]

    def inverse(self, z: Tensor, *, precision: str | None = None) -> tuple[Tensor, Tensor]:
        return self.inside.inverse(z, precision=precision)  # type: ignore[arg-type]

    def log_prob(self, z: Tensor, *, precision: str | None = None) -> Tensor:
        return self.inside.log_prob(z, precision=precision)  # type: ignore[arg-type]


def with_own_energy(prior: EnergyPrior) -> EnergyPrior:
    energy = OwnEnergy(prior.config.energy)
    energy.load_state_dict(prior.energy_net.state_dict())
    prior.energy_net = energy
    return prior.requires_grad_(False)


def with_own_flow(prior: EnergyPrior) -> EnergyPrior:
    prior.flow = OwnFlow(prior.flow)  # type: ignore[assignment]
    return prior


def info_of(prior: EnergyPrior, name: str) -> dict[str, str]:
    """Of the samples, which must be that of every other number of samples too."""
    with_samples = dict(prior.draw(3, **METHODS[name]).info)
    assert dict(prior.draw(0, **METHODS[name]).info) == with_samples
    assert [dict(draws.info) for draws in prior.stream(3, batch_size=2, **METHODS[name])] == [
        with_samples
    ] * 2
    return with_samples


@pytest.mark.parametrize("name", METHODS)
def test_info_on_the_cpu(name: str) -> None:
    info = info_of(new_prior(), name)
    assert set(info) == {"path", "reason", "precision"}
    assert info["path"] == "composed"
    assert (IN_NOISE if name == "noise" else "on the CPU") in info["reason"]


def test_noise_alone_has_no_path() -> None:
    assert new_prior().draw(3, method="prior").info == {}


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_info_of_the_precision(name: str, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what was computed, not what was asked for."""
    monkeypatch.setattr("evalp_fast.kernels.processor.BFLOAT16_PAYS", pays)
    for precision, computed in (("tf32", "ieee"), ("bf16", "bf16" if pays else "ieee")):
        assert new_prior().draw(3, precision=precision, **METHODS[name]).info["precision"] == computed


@pytest.mark.parametrize("pays", [True, False, None])
@pytest.mark.parametrize("name", ["flow", "sir"])
def test_the_default_precision_is_the_quick_one(
    name: str, pays: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of flow and SIR, to the last bit. Guards against a user who is left with the slow one, and against a
    bfloat16 that nobody asked for where it may be slower."""
    monkeypatch.setattr("evalp_fast.kernels.processor.BFLOAT16_PAYS", pays)
    prior, precision = new_prior(), "bf16" if pays else "ieee"
    draws = prior.draw(40, seed=3, **METHODS[name])
    expected = prior.draw(40, seed=3, precision=precision, **METHODS[name])
    assert torch.equal(draws.samples, expected.samples)
    assert draws.info == expected.info
    assert draws.info["precision"] == precision


@pytest.mark.parametrize("name", METHODS)
def test_what_stays_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains; a user's own networks, of which nothing is known; and double precision."""
    priors = {
        "own energy": with_own_energy(new_prior()),
        "own flow": with_own_flow(new_prior()),
        "double": new_prior().double(),
    }
    if name in ("latent", "noise"):
        priors["chain"] = new_prior()
    options = METHODS[name]
    expected = {key: prior.sample(40, seed=3, **options) for key, prior in priors.items()}
    monkeypatch.setattr("evalp_fast.kernels.processor.BFLOAT16_PAYS", True)
    for key, prior in priors.items():
        assert torch.equal(prior.sample(40, seed=3, **options), expected[key]), key
        assert not torch.equal(prior.sample(40, seed=3, precision="bf16", **options), expected[key]), key


@needs_interpreter
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_kernel_takes_the_precision_that_is_asked_for(
    precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evalp_fast.kernels.processor.BFLOAT16_PAYS", False)
    with launch.backend("triton"):
        for method in ("flow", "sir"):
            sampler: Any = new_prior().sampler(method, precision=precision)
            assert sampler.info == {"path": "one launch", "precision": precision}


def test_info_of_a_residual_prior() -> None:
    prior = new_prior("flow", 1.0)
    reason = "the flow is part of the energy"
    assert info_of(prior, "latent") == {"path": "composed", "reason": reason, "precision": "ieee"}
    assert "on the CPU" in info_of(prior, "sir")["reason"]


@pytest.mark.parametrize("name", METHODS)
def test_info_of_own_networks(name: str) -> None:
    """Guards against a user's network that a kernel silently replaces by the shape of its configuration."""
    for prior, reason, unused in (
        (with_own_energy(new_prior()), "energy_net is a OwnEnergy, not a MLPEnergy", "flow"),
        (with_own_flow(new_prior()), "flow is a OwnFlow, not a CouplingFlow", "latent"),
    ):
        info = info_of(prior, name)
        assert set(info) == {"path", "reason"}
        assert info["path"] == "composed"
        if name == unused:
            assert "on the CPU" in info["reason"]
        else:
            assert info["reason"] == (IN_NOISE if name == "noise" else reason)


@pytest.mark.parametrize("name", METHODS)
def test_own_networks_draw_their_own_law(name: str) -> None:
    """They give the samples of the fused path where they compute the same, and others where they do not."""
    options = {**METHODS[name], "seed": 3, "proposals": 4}
    expected = new_prior().sample(40, **options)
    for prior in (with_own_energy(new_prior()), with_own_flow(new_prior())):
        torch.testing.assert_close(prior.sample(40, **options), expected, rtol=0, atol=1e-4)
    other = with_own_energy(new_prior())
    other.energy_net.forward = lambda z, precision=None: 3.0 * z.square().sum(dim=1)  # type: ignore[method-assign]
    assert (name == "flow") == torch.allclose(other.sample(40, **options), expected, rtol=0, atol=1e-3)


def options_of(name: str) -> SamplingOptions:
    return SamplingOptions(**{key: value for key, value in METHODS[name].items() if key != "method"})


@needs_interpreter
@pytest.mark.parametrize("name", ["flow", "sir", "latent"])
def test_one_launch(name: str) -> None:
    """It says so, and draws what the composed path draws; where it has no kernel it says why."""
    prior = new_prior()
    index, draws = torch.arange(300, 330), {}
    for backend in ("triton", "reference"):
        with launch.backend(backend):
            sampler = prior.sampler(METHODS[name]["method"], options=options_of(name))
            draws[backend] = sampler(2, index)
    assert draws["triton"].info == {"path": "one launch", "precision": "ieee"}
    assert draws["reference"].info["path"] == "composed"
    assert "'reference' was asked for" in draws["reference"].info["reason"]
    torch.testing.assert_close(draws["triton"].samples, draws["reference"].samples, rtol=0, atol=1e-4)


@needs_interpreter
def test_shapes_without_a_kernel_are_named() -> None:
    wide = new_prior(hidden=1 << 14)
    with launch.backend("triton"):
        for name in ("sir", "latent"):
            sampler: Any = wide.sampler(METHODS[name]["method"], options=options_of(name))
            assert sampler.info["path"] == "composed"
            assert "16384" in sampler.info["reason"]


@pytest.mark.parametrize("name", METHODS)
def test_float64_has_no_kernel(name: str) -> None:
    """All methods draw in it, on the composed path, which says why. Guards against the kernel's name for what
    torch computed, and against noise in float32 for networks in float64."""
    prior = new_prior(hidden=1024).double()
    draws = prior.draw(3, seed=2, **METHODS[name])
    assert draws.samples.dtype == torch.float64
    expected = new_prior(hidden=1024).draw(3, seed=2, **METHODS[name]).samples.double()
    wide = prior.draw(3, seed=2, **METHODS["flow"]).samples
    assert wide.dtype == torch.float64
    reason = {
        "sir": "the parameters are float64",
        "flow": "the parameters are float64",
        "latent": "z is float64",
    }
    with launch.recorded_launches():  # as on a GPU
        info: Any = prior.sampler(METHODS[name]["method"], options=options_of(name)).info  # type: ignore[attr-defined]
    assert info["path"] == "composed"
    assert info["reason"] == (IN_NOISE if name == "noise" else f"{reason[name]}, which has no kernel")
    for own in (with_own_energy(new_prior(hidden=1024)), with_own_flow(new_prior(hidden=1024))):
        assert own.double().draw(3, seed=2, **METHODS[name]).samples.dtype == torch.float64
    # The words of the noise are the same, which float64 makes other numbers of, but near ones.
    torch.testing.assert_close(draws.samples, expected, rtol=0, atol=1e-3)


def test_float64_elsewhere() -> None:
    prior = new_prior().double()
    assert prior.sample(3, method="prior").dtype == torch.float64
    assert prior.sample(3, method="langevin", initial="prior", **LANGEVIN).dtype == torch.float64
    z, log_g = prior.sample_and_log_prob(4)
    assert z.dtype == log_g.dtype == torch.float64
    assert math.isfinite(prior.log_partition(64).value)


@pytest.mark.parametrize("precision", [None, "tf32", "bf16"])
@pytest.mark.parametrize("dim", [5, 300, 1024])
def test_every_precision_has_a_kernel(dim: int, precision: Any) -> None:
    """In every width of the flow. Guards against a sampler that knows less than the kernels take."""
    shape = FlowConfig(dim, couplings=1, hidden=8)
    prior = EnergyPrior(PriorConfig(shape, EnergyConfig(dim, hidden=8))).requires_grad_(False)
    with launch.recorded_launches():  # as on a GPU
        for name in ("flow", "sir", "latent"):
            method = METHODS[name]["method"]
            sampler: Any = prior.sampler(method, precision=precision, options=options_of(name))
            wide = name == "latent" and dim > 512  # than the state of a chain
            assert sampler.info["path"] == ("composed" if wide else "one launch"), name


@pytest.mark.parametrize("name", METHODS)
def test_the_precision_reaches_the_products(name: str) -> None:
    """Of the energy's chain too, which starts where the flow has no part."""
    options: dict[str, Any] = METHODS[name] | ({"initial": "prior"} if name == "latent" else {})
    exact = new_prior().sample(40, seed=3, **options)
    rounded = new_prior().sample(40, seed=3, precision="bf16", **options)
    distance = (rounded - exact).abs().median()
    assert 1e-6 < distance < 5e-2


@pytest.mark.parametrize("base", ["gaussian", "flow"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("weights", ["exact", "energy"])
def test_both_paths_of_sir_weigh_alike(base: str, temperature: float, weights: Any) -> None:
    """Guards against an energy that is not divided by w, a temperature, or a constant, on one of them."""
    priors = [new_prior(base, 0.25 if base == "gaussian" else 1.0) for _ in range(2)]
    for prior in priors:
        prior.energy_net.layers[-1].weight.mul_(20.0)  # type: ignore[union-attr, operator]
    options: dict[str, Any] = {"proposals": 20, "temperature": temperature, "weights": weights, "seed": 4}
    fused = priors[0].draw(30, method="sir", **options)
    composed = with_own_energy(priors[1]).draw(30, method="sir", **options)
    torch.testing.assert_close(fused.samples, composed.samples, rtol=0, atol=1e-4)
    assert float(fused.diagnostics["ess"].min()) < 15  # else the weights hardly matter
    for name in ("ess", "log_mean_weight"):
        pair = fused.diagnostics[name], composed.diagnostics[name]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own", [False, True])
def test_sir_at_a_low_temperature_is_accurate(own: bool) -> None:
    """Against float64, in 128 columns, where a constant of a million is common to all log-weights."""
    torch.manual_seed(0)
    config = PriorConfig(FlowConfig(128, couplings=1, hidden=16), EnergyConfig(128, hidden=16))
    priors = [EnergyPrior(config).requires_grad_(False) for _ in range(2)]
    priors[0].flow.weight_out.normal_(std=1e-3)
    priors[0].energy_net.layers[-1].weight.mul_(0.2)  # type: ignore[union-attr, operator]
    priors[1].load_state_dict(priors[0].state_dict())
    if own:
        with_own_energy(priors[0])
    options: dict[str, Any] = {"method": "sir", "proposals": 20, "temperature": 1e-4, "seed": 4}
    found, exact = priors[0].draw(8, **options), priors[1].double().draw(8, **options)
    torch.testing.assert_close(found.samples.double(), exact.samples, rtol=0, atol=1e-5)
    ess = exact.diagnostics["ess"]
    assert 1.5 < float(ess.min()) < float(ess.max()) < 19.0
    torch.testing.assert_close(found.diagnostics["ess"].double(), ess, rtol=5e-3, atol=0)
    means = found.diagnostics["log_mean_weight"].double(), exact.diagnostics["log_mean_weight"]
    torch.testing.assert_close(*means, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flow", "sir", "latent"])
def test_one_launch_on_a_gpu(name: str) -> None:
    """It says so, and draws what the composed path draws; a choice may turn on a rounding."""
    prior = new_prior().cuda()
    usual = "ieee" if name == "latent" or torch.cuda.get_device_capability() < (8, 0) else "bf16"
    assert prior.draw(3, **METHODS[name]).info == {"path": "one launch", "precision": usual}
    fused = prior.draw(500, seed=2, precision="ieee", **METHODS[name])
    assert fused.info == {"path": "one launch", "precision": "ieee"}
    with launch.backend("reference"):
        composed = prior.draw(500, seed=2, precision="ieee", **METHODS[name])
    close = (fused.samples - composed.samples).abs().amax(dim=1) < 1e-3
    assert close.float().mean() > 0.99


def composed_chain(prior: EnergyPrior, adjusted: bool, **options: Any) -> LangevinSampler:
    """The latent chain of a prior with a Gaussian base, by the general sampler."""
    return LangevinSampler(
        GaussianSampler(DIM), lambda z: -prior.log_prob_unnormalized(z), adjusted=adjusted, **options
    )


def one_launch(prior: EnergyPrior, adjusted: bool, **options: Any) -> Any:
    settings = SamplingOptions(adjusted=adjusted, space="latent", initial="prior", **options)
    return prior.sampler("langevin", options=settings)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("n_steps", [0, 1, 12])
@pytest.mark.parametrize("adjusted", [False, True])
def test_chain_is_the_composed_chain(adjusted: bool, n_steps: int, temperature: float) -> None:
    """Same noise, same steps, same choices. Guards against an energy that is not divided by w, a base that is
    left out or counted twice, a temperature of the noise alone, and noise of another step or sample."""
    prior = new_prior()
    options = {"n_steps": n_steps, "step_size": 0.5, "temperature": temperature}
    index = torch.arange(1000, 1200)
    fused = one_launch(prior, adjusted, **options)(6, index)
    composed = composed_chain(prior, adjusted, **options)(6, index)
    torch.testing.assert_close(fused.samples, composed.samples, rtol=1e-5, atol=1e-5)
    assert torch.equal(fused.diagnostics["acceptance"], composed.diagnostics["acceptance"])
    start = GaussianSampler(DIM)(6, index).samples
    if n_steps == 0:
        assert torch.equal(fused.samples, start)
    elif not adjusted:
        assert (fused.samples != start).all()
    elif n_steps == 12:  # of 2,400 proposals some are refused, or nothing is shown
        assert 0.5 < fused.diagnostics["acceptance"].mean() < 0.99


def test_chain_of_one_step_is_the_formula() -> None:
    """x - (η/2)·(∇f/w + x) + sqrt(η·T)·ξ, from autograd."""
    prior = new_prior(kl_weight=0.25)
    step_size, temperature, index = 0.3, 0.6, torch.arange(7, 27)
    options = {"n_steps": 1, "step_size": step_size, "temperature": temperature}
    x = GaussianSampler(DIM)(3, index).samples.requires_grad_()
    (slope,) = torch.autograd.grad(prior.energy_net(x).sum(), x)
    still = one_launch(prior, False, **(options | {"temperature": 1e-30}))(3, index).samples
    expected = x - 0.5 * step_size * (4.0 * slope + x)
    torch.testing.assert_close(still, expected.detach(), rtol=1e-5, atol=1e-5)
    moved = one_launch(prior, False, **options)(3, index).samples
    noise = (moved - still) / math.sqrt(step_size * temperature)
    hot = one_launch(prior, False, **(options | {"temperature": 4 * temperature}))(3, index).samples
    torch.testing.assert_close(hot - still, 2.0 * (moved - still), rtol=1e-4, atol=1e-4)
    # 100 standard normals: mean square within four of its standard errors
    assert abs(float(noise.square().mean()) - 1.0) < 4 * math.sqrt(2 / 100)


@pytest.mark.parametrize("thin", [1, 2, 3, 7])
@pytest.mark.parametrize("adjusted", [False, True])
def test_trajectories_agree(adjusted: bool, thin: int) -> None:
    """Guards against a state that is recorded before its step, and a last one that is left out."""
    prior = new_prior()
    index, x = torch.arange(40, 60), torch.randn(20, DIM, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {
        "n_steps": 6,
        "step_size": 0.4,
        "adjusted": adjusted,
        "seed": 9,
        "index": index,
    }
    options |= {"thin": thin, "return_trajectory": True}
    composed = langevin(x, lambda z: -prior.log_prob_unnormalized(z), **options)
    parameters = prior.energy_net.parameters_in_order()
    fused = langevin_chain(x, parameters, activation="silu", energy_scale=2.0, **options)
    assert fused.trajectory is not None
    assert composed.trajectory is not None
    assert fused.trajectory.shape == composed.trajectory.shape == (6 // thin, 20, DIM)
    torch.testing.assert_close(fused.trajectory, composed.trajectory, rtol=1e-5, atol=1e-5)
    if 6 % thin == 0:
        assert torch.equal(fused.trajectory[-1], fused.samples)


@pytest.mark.parametrize("space", ["latent", "noise"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("adjusted", [False, True])
@pytest.mark.parametrize("n_steps", [0, 3])
def test_start_that_is_not_finite_raises(space: str, bad: float, adjusted: bool, n_steps: int) -> None:
    """It must not pass for a sample, also where no step is taken, or every proposal would be refused."""
    prior = new_prior()
    prior.flow.bias_out[-1, -1] = bad
    with pytest.raises(ValueError, match=r"chains .*(NaN|no longer finite)"):
        prior.sample(
            3,
            method="langevin",
            space=space,
            initial="flow",
            adjusted=adjusted,
            n_steps=n_steps,
            step_size=0.1,
        )


@pytest.mark.parametrize("space", ["latent", "noise"])
def test_more_chains_run_together_on_a_cpu(space: Literal["latent", "noise"]) -> None:
    """A step's calls cost a CPU as much for 256 rows; on a GPU more chains would take memory."""
    prior, options = new_prior(), SamplingOptions(space=space)
    on_cpu = prior.sampler("langevin", precision="ieee", options=options)
    elsewhere = prior.to("meta").sampler("langevin", precision="ieee", options=options)
    assert isinstance(on_cpu, FunctionSampler)
    assert isinstance(elsewhere, FunctionSampler)
    assert (on_cpu.tiles, elsewhere.tiles) == (4, 1)


@pytest.mark.parametrize(
    ("base", "space", "flow", "energy", "tiles"),
    [
        ("gaussian", "latent", 1024, 64, 4),
        ("gaussian", "latent", 8, 1024, 1),
        ("flow", "latent", 1024, 64, 1),
        ("gaussian", "noise", 1024, 64, 1),
        ("flow", "noise", 64, 64, 4),
    ],
)
def test_chains_of_large_networks_run_in_the_usual_tiles(
    base: str, space: str, flow: int, energy: int, tiles: int
) -> None:
    """More of them gain nothing there, and a single sample would take four times as long."""
    shapes = FlowConfig(DIM, couplings=1, hidden=flow), EnergyConfig(DIM, hidden=energy)
    prior = EnergyPrior(PriorConfig(*shapes, base, 1.0))  # type: ignore[arg-type]
    options = SamplingOptions(space=space)  # type: ignore[arg-type]
    assert prior.sampler("langevin", options=options).tiles == tiles  # type: ignore[attr-defined]
    assert with_own_energy(prior).sampler("langevin", options=options).tiles == 1  # type: ignore[attr-defined]


@needs_interpreter
@pytest.mark.parametrize("space", ["latent", "noise"])
def test_a_chain_computes_the_gradient_of_its_state_alone(
    space: Literal["latent", "noise"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against backward passes of all weights that ask for a gradient: several times the work."""
    computed: list[bool] = []
    flow_backward, pull_back = flow_module.flow_backward, energy_module._pull_back

    def of_the_flow(*args: Any) -> Any:
        computed.append(args[11])
        return flow_backward(*args)

    def of_the_energy(*args: Any) -> Any:
        computed.append(True)
        return pull_back(*args)

    monkeypatch.setattr(flow_module, "flow_backward", of_the_flow)
    monkeypatch.setattr(energy_module, "_pull_back", of_the_energy)
    prior = new_prior("flow", 1.0).requires_grad_(True)
    with launch.backend("triton"):
        prior.sample(3, method="langevin", space=space, **LANGEVIN)
        assert computed == [False] * (1 + LANGEVIN["n_steps"]), "passes of the flow"
        prior.log_prob_unnormalized(torch.zeros(3, DIM)).sum().backward()
        assert computed[-1] is True, "what this test looks at is there"


@pytest.mark.parametrize(("adjusted", "n_steps"), [(False, 0), (True, 0), (True, 3)])
def test_infinite_start_of_finite_energy_raises(adjusted: bool, n_steps: int) -> None:
    """ReLU makes of -inf a finite energy: the position itself must be looked at."""
    prior = new_prior(hidden=1, depth=1, activation="relu")
    prior.energy_net.layers[0].weight.fill_(1.0)  # type: ignore[union-attr, operator]
    prior.flow.bias_out[-1, -1] = -math.inf
    options: dict[str, Any] = {"adjusted": adjusted, "n_steps": n_steps, "step_size": 0.1, "initial": "flow"}
    with launch.backend("reference"):
        start = prior.sample(3)
        assert (start == -math.inf).any()
        assert prior.energy(start).isfinite().all()
        with pytest.raises(ValueError, match=r"(\d+) of \1 chains are no longer finite"):
            prior.sample(3, method="langevin", space="latent", **options)


@pytest.mark.parametrize("space", ["latent", "noise"])
@pytest.mark.parametrize("adjusted", [False, True])
def test_energy_that_is_nan_raises(space: str, adjusted: bool) -> None:
    prior = new_prior()
    prior.energy_net.layers[-1].bias.fill_(math.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="NaN"):
        prior.sample(3, method="langevin", space=space, adjusted=adjusted, n_steps=3, step_size=0.1)


@pytest.mark.parametrize("space", ["latent", "noise"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_an_adjusted_chain_that_starts_at_infinity_raises(bad: float, space: str) -> None:
    """It would accept nothing, and pass its start for a sample. Unadjusted it goes where the gradient leads,
    which the constant does not change."""
    prior, finite = new_prior(), new_prior()
    options: dict[str, Any] = {"method": "langevin", "space": space, **LANGEVIN}
    prior.energy_net.layers[-1].bias.fill_(bad)  # type: ignore[union-attr, operator]
    for n_steps in (0, 2):
        with pytest.raises(ValueError, match="NaN or infinite"):
            prior.sample(3, adjusted=True, **(options | {"n_steps": n_steps}))
    torch.testing.assert_close(prior.sample(3, **options), finite.sample(3, **options))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("space", ["latent", "noise"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("step_size", 0.0),
        ("step_size", math.inf),
        ("n_steps", -1),
        ("n_steps", 1.5),
        ("n_steps", None),
        ("n_steps", True),
        ("step_size", "1"),
        ("temperature", None),
        ("adjusted", "False"),
        ("adjusted", math.nan),
        ("adjusted", 1),
        ("proposals", None),
        ("proposals", 0),
        ("seed", 1.7),
        ("seed", "1"),
        ("seed", None),
        ("seed", True),
        ("seed", 1 << 63),
    ],
)
def test_bad_options_are_named_on_every_path(option: str, value: Any, space: str, own: bool) -> None:
    """The same error whichever path would have run, also for no samples at all."""
    prior = with_own_energy(new_prior()) if own else new_prior()
    for n in (0, 2):
        with pytest.raises((TypeError, ValueError), match=f"^{option} must be"):
            prior.sample(n, **{"method": "langevin", "space": space, **LANGEVIN, option: value})
