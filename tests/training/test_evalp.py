"""EVaLP's alternating game: its losses by hand, what each objective fits, resumption, published settings."""

import dataclasses
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from evalp_fast.data import load_dataset
from evalp_fast.files import load_safetensors
from evalp_fast.models.energy import EnergyConfig, MLPEnergy
from evalp_fast.models.flow import CouplingFlow, FlowConfig, standard_normal_log_prob
from evalp_fast.pipeline import EVaLP
from evalp_fast.training import evalp as evalp_module
from evalp_fast.training import latents as latents_module
from evalp_fast.training.evalp import EVaLPTraining, energy_loss, sampler_loss, train_evalp_prior
from evalp_fast.training.presets import PRIOR_PRESETS
from evalp_fast.training.run import DivergenceError, cosine_schedule, set_learning_rate

# Three evaluations, after epochs 2, 4 and 5 of 3 steps each; the flow moves at every second step.
CONFIG = EVaLPTraining(
    couplings=2,
    flow_hidden=8,
    energy_hidden=8,
    energy_steps=2,
    epochs=5,
    batch_size=90,
    moving_average=0.9,
    evaluate_every=2,
    kl_weight=0.5,
)


def train(vae: Path, out: Path, config: EVaLPTraining = CONFIG, **options) -> EVaLP:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an effective sample size that is low for such networks
        return train_evalp_prior(config, vae, out, limit=270, **options)


@pytest.fixture(scope="module")
def whole(vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("evalp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents_module, "_MMD_ROWS", 150)
        train(vae_folder, folder)
    return folder


def random_nets() -> tuple[CouplingFlow, MLPEnergy, Tensor, Tensor]:
    """A flow and an energy in float64, noise and data."""
    torch.manual_seed(0)
    flow = CouplingFlow(FlowConfig(3, couplings=2, hidden=6, activation="silu")).double()
    with torch.no_grad():
        flow.weight_out.normal_(std=0.3)
    energy = MLPEnergy(EnergyConfig(3, 6, activation="silu")).double()
    return flow, energy, torch.randn(7, 3).double(), torch.randn(7, 3).double()


def penalty_by_differences(energy: MLPEnergy, points: Tensor) -> Tensor:
    """E (|∇f| - 1)² with central differences for the gradient: differentiable in the parameters."""
    step = 1e-4
    slopes = []
    for column in range(points.shape[1]):
        shift = torch.zeros(points.shape[1], dtype=points.dtype)
        shift[column] = step
        slopes.append((energy(points + shift) - energy(points - shift)) / (2 * step))
    return (torch.stack(slopes, dim=1).norm(dim=1) - 1).square().mean()


def test_energy_loss_by_hand() -> None:
    """Guards against a turned sign, and a penalty at another point or one that moves nothing."""
    _, energy, samples, data = random_nets()
    place = torch.linspace(0, 1, 7, dtype=torch.float64)[:, None]
    between = place * data + (1 - place) * samples
    expected = energy(data).mean() - energy(samples).mean() + 10 * penalty_by_differences(energy, between)
    loss = energy_loss(energy, data, samples, place, 10.0)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    gradients = torch.autograd.grad(loss, list(energy.parameters()))
    by_differences = torch.autograd.grad(expected, list(energy.parameters()), allow_unused=True)
    for gradient, wanted in zip(gradients, by_differences, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5)
    assert max(float(g.abs().max()) for g in gradients) > 0.1


def sampler_loss_by_hand(flow, energy, noise, data, kl_weight, objective) -> Tensor:
    """With the density of the flow's own draws through its inverse, and torch's normal distribution."""
    normal = torch.distributions.Normal(0.0, 1.0)
    loss = noise.new_zeros(())
    if objective in ("reverse_kl", "both"):
        z = flow(noise)[0]
        kl = (flow.log_prob(z) - normal.log_prob(z).sum(dim=1)).mean()
        loss = loss + energy(z).mean() + kl_weight * kl
    if objective == "both":
        loss = loss - kl_weight * flow.log_prob(data).mean()
    if objective == "forward_kl":
        loss = loss - flow.log_prob(data).mean()
    return loss


@pytest.mark.parametrize("objective", ["reverse_kl", "forward_kl", "both"])
def test_sampler_loss_by_hand(objective: str) -> None:
    flow, energy, noise, data = random_nets()
    loss = sampler_loss(flow, energy, noise, data, 0.3, objective)
    expected = sampler_loss_by_hand(flow, energy, noise, data, 0.3, objective)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    # The slope along a random direction in the space of the flow's parameters.
    parameters = list(flow.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    values = []
    step = 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=sign * step)
            values.append(float(sampler_loss(flow, energy, noise, data, 0.3, objective)))
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(d, alpha=sign * step)
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)
    assert abs(slope) > 1e-3


class Formula(nn.Module):
    """An energy that is a formula."""

    def __init__(self, formula):
        super().__init__()
        self.formula = formula

    def forward(self, z: Tensor) -> Tensor:
        return self.formula(z)


def fit(law, objective: str, kl_weight: float, steps: int) -> CouplingFlow:
    """A flow trained on `sampler_loss` with the energy f = w·(log N - log p), whose prior is `law`."""
    torch.manual_seed(0)
    flow = CouplingFlow(FlowConfig(2, couplings=4, hidden=32))
    energy = Formula(lambda z: kl_weight * (standard_normal_log_prob(z) - law.log_prob(z)))
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    for step in range(steps):
        set_learning_rate(optimizer, 5e-3 * cosine_schedule(step, steps))
        noise = torch.randn(256, 2, generator=torch.Generator().manual_seed(step))
        loss = sampler_loss(flow, energy, noise, law.sample(256, seed=step), kl_weight, objective)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flow.requires_grad_(False)


def test_reverse_kl_fits_the_energy_over_w(gaussian_mixture) -> None:
    """With w = 0.1 the flow becomes N·exp(-f/w), not N·exp(-f). Guards against w on the wrong term."""
    law = gaussian_mixture((1.0,), ((0.8, -0.5),), ((0.5, 0.7),))
    z = fit(law, "reverse_kl", 0.1, 250)(torch.randn(5000, 2))[0]
    torch.testing.assert_close(z.mean(dim=0), law.means[0].float(), rtol=0, atol=0.06)
    torch.testing.assert_close(z.std(dim=0), law.deviations[0].float(), rtol=0.1, atol=0)


@pytest.mark.parametrize("objective", ["forward_kl", "both"])
def test_forward_kl_covers_both_modes(objective: str, gaussian_mixture) -> None:
    """Modes far apart, of which the reverse KL alone finds one: see below."""
    law = gaussian_mixture((0.7, 0.3), ((-3.0, 0.0), (3.0, 0.0)), ((0.5, 0.5), (0.5, 0.5)))
    z = fit(law, objective, 0.5, 250)(torch.randn(5000, 2))[0]
    assert 0.2 < float((z[:, 0] > 0).float().mean()) < 0.4


def test_reverse_kl_loses_a_mode(gaussian_mixture) -> None:
    """What the forward KL is offered for: so the test above can fail."""
    law = gaussian_mixture((0.7, 0.3), ((-0.5, 0.0), (6.0, 0.0)), ((0.5, 0.5), (0.5, 0.5)))
    z = fit(law, "reverse_kl", 0.5, 150)(torch.randn(5000, 2))[0]
    assert float((z[:, 0] > 3).float().mean()) < 0.02


def test_run_holds_what_it_should(whole: Path, vae_folder: Path) -> None:
    model = EVaLP.from_pretrained(whole)
    assert model.prior is not None
    assert model.prior.config.base == "gaussian"
    assert model.prior.config.kl_weight == 0.5
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 12, 15]
    best = min(lines, key=lambda line: line["mmd2_flow"])
    assert model.info["training"][-1]["steps"] == best["step"]
    assert "reverse_kl" in model.info["training"][-1]["stage"]
    last = load_safetensors(whole / "last/model.safetensors")
    state = load_safetensors(whole / "state.safetensors")
    for key, value in load_safetensors(vae_folder / "model.safetensors").items():
        assert torch.equal(last[key], value), key
    for key in (
        "weight_in",
        "weight_out",
        "bias_out",
    ):  # the flow is the average, the energy the last iterate
        assert torch.equal(last[f"prior.flow.{key}"], state[f"flow_average/{key}"])
    assert torch.equal(last["prior.energy_net.layers.0.weight"], state["energy/layers.0.weight"])
    # 15 energy steps, 7 of the flow
    assert int(state["energy_optimizer/0/step"]) == 15
    assert int(state["flow_optimizer/0/step"]) == 7


@pytest.mark.parametrize(
    ("optimizer", "moment"),
    [("adam", "training"), ("adam", "before save"), ("adam", "after save"), ("rmsprop", "training")],
)
@pytest.mark.usefixtures("few_rows")
def test_resumes_exactly(
    optimizer: str,
    moment: str,
    vae_folder: Path,
    whole: Path,
    tmp_path: Path,
    kill,
    assert_same_run,
) -> None:
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    if optimizer != CONFIG.optimizer:
        whole = tmp_path / "whole"
        train(vae_folder, whole, config)
    kill(moment, 2, lambda: train(vae_folder, tmp_path / "run", config))
    train(vae_folder, tmp_path / "run", config, resume=True)
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler_objective": "forward_kl"},
        {"sampler_objective": "both", "mixing": "swap", "schedule": "constant"},
    ],
    ids=lambda changes: changes["sampler_objective"],
)
@pytest.mark.usefixtures("few_rows")
def test_objectives_train(changes: dict, vae_folder: Path, whole: Path, tmp_path: Path) -> None:
    model = train(vae_folder, tmp_path, dataclasses.replace(CONFIG, **changes))
    assert model.sample(2).isfinite().all()
    other = EVaLP.from_pretrained(whole)
    assert not torch.equal(model.sample(4, output="latent"), other.sample(4, output="latent"))


@pytest.mark.usefixtures("few_rows")
def test_test_split_is_never_loaded(vae_folder: Path, tmp_path: Path, monkeypatch) -> None:
    splits = []

    def spy(*arguments, split: str, **options):
        splits.append(split)
        return load_dataset(*arguments, split=split, **options)

    monkeypatch.setattr(latents_module, "load_dataset", spy)
    train(vae_folder, tmp_path, dataclasses.replace(CONFIG, epochs=1))
    assert sorted(splits) == ["train", "validation"]


@pytest.mark.usefixtures("few_rows")
def test_divergence_keeps_the_last_good_state(vae_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """The flow breaks in a step whose loss is finite, and no loss of the evaluated step shows it."""
    calls = [0]

    def failing(flow, energy, noise, *arguments) -> Tensor:
        calls[0] += 1
        loss = sampler_loss(flow, energy, noise, *arguments)
        return loss + (0 * flow(noise)[0].sum()).sqrt() if calls[0] == 7 else loss

    monkeypatch.setattr(evalp_module, "sampler_loss", failing)
    with pytest.raises(DivergenceError, match=r"diverged at step 15: \w+ is nan; the last good state"):
        train(vae_folder, tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert all(value.isfinite().all() for value in load_safetensors(tmp_path / "state.safetensors").values())
    assert EVaLP.from_pretrained(tmp_path).sample(2).isfinite().all()


@pytest.mark.parametrize(
    ("name", "flow", "energy", "rate", "optimizer", "kl_weight", "energy_steps", "batch", "epochs"),
    [
        ("mnist-published", (2, 128), 128, 5e-4, "adam", 1e-8, 5, 64, 100),
        ("cifar10-published", (4, 512), 200, 5e-4, "adam", 1e-8, 5, 100, 100),
        ("celeba64-published", (4, 256), 200, 5e-5, "rmsprop", 1e-3, 1, 100, 70),
    ],
)
def test_published_settings(
    name, flow, energy, rate, optimizer, kl_weight, energy_steps, batch, epochs
) -> None:
    """As in the code of Dutta et al. (2025)."""
    preset = PRIOR_PRESETS[name]
    assert isinstance(preset, EVaLPTraining)
    assert (preset.couplings, preset.flow_hidden) == flow
    assert (preset.energy_hidden, preset.energy_depth) == (energy, 2)
    assert preset.energy_learning_rate == preset.flow_learning_rate == rate
    assert preset.optimizer == optimizer
    assert (preset.kl_weight, preset.gradient_penalty) == (kl_weight, 10.0)
    assert (preset.energy_steps, preset.batch_size, preset.epochs) == (energy_steps, batch, epochs)
    assert (preset.sampler_objective, preset.mixing, preset.schedule) == ("reverse_kl", "swap", "constant")


@pytest.mark.parametrize("name", ["energy_steps", "epochs", "batch_size", "evaluate_every"])
def test_bad_counts_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        EVaLPTraining(**{name: 0})


@pytest.mark.parametrize("kl_weight", [0.0, 1.5, math.nan])
def test_bad_kl_weight_is_named(kl_weight: float) -> None:
    with pytest.raises(ValueError, match="kl_weight must be in"):
        EVaLPTraining(kl_weight=kl_weight)
