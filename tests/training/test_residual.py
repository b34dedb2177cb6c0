"""The residual recipe: its loss gives a density ratio, it resumes exactly, it repairs a prior hole."""

import dataclasses
import json
import math
import warnings
from pathlib import Path

import pytest
import torch

from evalp_fast.data import load_dataset
from evalp_fast.files import FileError, load_safetensors
from evalp_fast.kernels import philox
from evalp_fast.metrics.mmd import median_bandwidths, mmd2
from evalp_fast.models.energy import EnergyConfig, MLPEnergy
from evalp_fast.models.flow import CouplingFlow, FlowConfig
from evalp_fast.models.vae import VAEConfig
from evalp_fast.pipeline import EVaLP
from evalp_fast.training import latents as latents_module
from evalp_fast.training import residual as residual_module
from evalp_fast.training.latents import Posterior, encode
from evalp_fast.training.residual import ResidualTraining, contrast_loss, flow_draws, train_residual_prior
from evalp_fast.training.run import DivergenceError
from evalp_fast.training.vae import VAETraining, train_vae

# Four evaluations: after flow epochs 2 and 4, and after energy epochs 2 and 3, of 3 steps each.
CONFIG = ResidualTraining(
    couplings=2,
    flow_hidden=8,
    flow_epochs=4,
    flow_batch_size=90,
    energy_hidden=8,
    energy_epochs=3,
    energy_batch_size=90,
    moving_average=0.9,
    evaluate_every=2,
)


def train(vae: Path, out: Path, config: ResidualTraining = CONFIG, **options) -> EVaLP:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an effective sample size that is low for such networks
        return train_residual_prior(config, vae, out, limit=270, **options)


@pytest.fixture(scope="module")
def whole(vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("residual")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents_module, "_MMD_ROWS", 150)
        train(vae_folder, folder)
    return folder


def test_contrast_loss_by_hand() -> None:
    """The cross-entropy of the classifier with logit -r, data as class 1."""
    data, noise = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([-0.5, 4.0])
    right = torch.sigmoid(-data).log().mean() + (1 - torch.sigmoid(-noise)).log().mean()
    torch.testing.assert_close(contrast_loss(data, noise), -0.5 * right)
    assert contrast_loss(torch.tensor([200.0]), torch.tensor([-200.0])) == 200  # no overflow


def test_optimum_of_the_contrast_is_the_ratio() -> None:
    """On three cells, where a table of energies can be optimal exactly: -r = log(data/noise)."""
    data, noise = torch.tensor([30, 10, 60]), torch.tensor([20, 50, 30])
    table = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    cells = torch.arange(3)
    for _ in range(30):  # Newton's steps
        loss = contrast_loss(table[cells.repeat_interleave(data)], table[cells.repeat_interleave(noise)])
        (slope,) = torch.autograd.grad(loss, table, create_graph=True)
        curvature = torch.stack([torch.autograd.grad(s, table, retain_graph=True)[0] for s in slope])
        table = (table - torch.linalg.solve(curvature, slope)).detach().requires_grad_()
    torch.testing.assert_close(-table.detach(), (data / noise).double().log(), rtol=0, atol=1e-6)


def test_energy_learns_the_residual(gaussian_mixture) -> None:
    """Data from one Gaussian, noise from another: r becomes the log-ratio of the densities."""
    torch.manual_seed(0)
    law = gaussian_mixture((1.0,), ((0.6, -0.3),), ((0.8, 1.0),))
    other = gaussian_mixture((1.0,), ((0.0, 0.0),), ((1.0, 1.0),))
    energy = MLPEnergy(EnergyConfig(2, 32, 2, "silu", zero_init=True))
    optimizer = torch.optim.Adam(energy.parameters(), 1e-2)
    for step in range(200):
        data, noise = law.sample(1024, seed=2 * step), other.sample(1024, seed=2 * step + 1)
        loss = contrast_loss(energy(data), energy(noise))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    points = law.sample(2000, seed=999)
    error = -energy(points) - (law.log_prob(points) - other.log_prob(points))
    assert error.abs().mean() < 0.1


def test_draws_of_a_step_are_fresh() -> None:
    flow = CouplingFlow(FlowConfig(4, couplings=2, hidden=8))
    here = torch.device("cpu")
    first = flow_draws(flow, 50, seed=1, step=0, device=here)
    assert first.shape == (50, 4)
    assert not first.requires_grad
    assert torch.equal(first, flow_draws(flow, 50, seed=1, step=0, device=here))
    everything = torch.cat([first, *(flow_draws(flow, 50, seed=1, step=k, device=here) for k in (1, 2))])
    assert len(everything.unique(dim=0)) == 150
    noise = philox.normal(1, torch.arange(50, 100), 1, philox.Stream.PROPOSAL, 4)
    torch.testing.assert_close(flow(noise)[0], everything[50:100])


def test_run_holds_what_it_should(whole: Path, vae_folder: Path) -> None:
    model = EVaLP.from_pretrained(whole)
    assert model.prior is not None
    assert model.prior.config.base == "flow"
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 12, 18, 21]
    assert ["flow_loss" in line for line in lines] == [True, True, False, False]
    assert ["energy_loss" in line for line in lines] == [False, False, True, True]
    # Before the energy is trained it is zero: the prior is the flow, every weight is 1.
    assert lines[0]["ess"] == pytest.approx(100)
    assert lines[0]["log_partition"] == 0
    assert lines[0]["nll_prior"] == pytest.approx(lines[0]["nll_flow"])
    assert lines[1]["nll_flow"] < lines[0]["nll_flow"]
    # The flow is frozen while the energy is trained.
    assert lines[1]["nll_flow"] == lines[2]["nll_flow"] == lines[3]["nll_flow"]
    # Any energy is better than none; among energies the likelihood of validation latents decides.
    best = min(lines[2:], key=lambda line: line["nll_prior"])
    assert model.info["training"][-1]["steps"] == best["step"]
    assert model.info["training"][-1]["validation"]["nll_prior"] == best["nll_prior"]
    assert model.info["training"][0]["stage"] == "VAE"
    # The VAE is that of stage one, and the networks are the averages.
    vae, last = (
        load_safetensors(vae_folder / "model.safetensors"),
        load_safetensors(whole / "last/model.safetensors"),
    )
    for name, value in vae.items():
        assert torch.equal(last[name], value), name
    state = load_safetensors(whole / "state.safetensors")
    for name in ("flow", "energy"):
        part = "prior.flow" if name == "flow" else "prior.energy_net"
        keys = [key.removeprefix(f"{name}/") for key in state if key.startswith(f"{name}/")]
        assert keys
        for key in keys:
            assert torch.equal(last[f"{part}.{key}"], state[f"{name}_average/{key}"])
    assert not torch.equal(state["flow/weight_out"], state["flow_average/weight_out"])


@pytest.mark.parametrize(
    ("moment", "evaluation"),
    [
        ("training", 2),
        ("before save", 2),
        ("after save", 2),
        ("training", 4),
        ("before save", 4),
    ],
)
@pytest.mark.usefixtures("few_rows")
def test_resumes_exactly(
    moment: str, evaluation: int, vae_folder: Path, whole: Path, tmp_path: Path, kill, assert_same_run
) -> None:
    """Killed while the flow is trained, between the two phases, and while the energy is trained."""
    kill(moment, evaluation, lambda: train(vae_folder, tmp_path))
    train(vae_folder, tmp_path, resume=True)
    assert_same_run(whole, tmp_path)


@pytest.mark.usefixtures("few_rows")
def test_test_split_is_never_loaded(vae_folder: Path, tmp_path: Path, monkeypatch) -> None:
    splits = []

    def spy(*arguments, split: str, **options):
        splits.append(split)
        return load_dataset(*arguments, split=split, **options)

    monkeypatch.setattr(latents_module, "load_dataset", spy)
    train(vae_folder, tmp_path, dataclasses.replace(CONFIG, flow_epochs=1, energy_epochs=0))
    assert sorted(splits) == ["train", "validation"]


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.usefixtures("few_rows")
def test_divergence_keeps_the_last_good_state(
    how: str, vae_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """A loss that is NaN, and a last gradient that is NaN behind a loss that is not."""
    calls = [0]

    def failing(energy_of_data: torch.Tensor, energy_of_noise: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        loss = contrast_loss(energy_of_data, energy_of_noise)
        if how == "loss":
            return loss * math.nan if calls[0] > 4 else loss
        return loss + (0 * energy_of_data.sum()).sqrt() if calls[0] == 6 else loss

    monkeypatch.setattr(residual_module, "contrast_loss", failing)
    what = "energy_loss" if how == "loss" else "parameters"
    with pytest.raises(DivergenceError, match=f"diverged at step 18: {what} is nan; the last good state"):
        train(vae_folder, tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert all(value.isfinite().all() for value in load_safetensors(tmp_path / "state.safetensors").values())
    assert EVaLP.from_pretrained(tmp_path).sample(2).isfinite().all()


def test_posteriors_are_those_of_the_vae(vae_folder: Path, excerpt: str) -> None:
    encoded = encode(vae_folder, None, limit=50)
    assert encoded.source == excerpt
    assert encoded.images == len(encoded.train.mean) == 50
    images = load_dataset(excerpt, split="validation", limit=50).images
    mean, log_variance = EVaLP.from_pretrained(vae_folder).posterior(images)
    assert torch.equal(encoded.validation.mean, mean)
    assert torch.equal(encoded.validation.log_variance, log_variance)
    assert not torch.equal(encoded.train.mean, mean)


def test_posterior_draws_are_numbered() -> None:
    posterior = Posterior(torch.zeros(20, 3), torch.zeros(20, 3))
    rows = torch.tensor([4, 17])
    draws = posterior.draw(rows, seed=1, step=8)
    assert torch.equal(draws, posterior.draw_all(seed=1, step=8)[rows])
    assert not torch.equal(draws, posterior.draw(rows, seed=1, step=9))


def test_vae_that_does_not_name_its_data(vae_folder: Path, tmp_path: Path) -> None:
    model = EVaLP.from_pretrained(vae_folder)
    model.info = {}
    model.save_pretrained(tmp_path / "vae")
    with pytest.raises(FileError, match="does not say which images it was trained on: pass --data"):
        train(tmp_path / "vae", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["flow_epochs", "flow_batch_size", "energy_batch_size", "evaluate_every", "energy_epochs"]
)
def test_bad_configuration_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        ResidualTraining(**{name: -1})


@pytest.mark.full_data
def test_prior_hole_on_real_mnist_is_repaired(tmp_path: Path) -> None:
    """On 5,000 images: the flow's latents are far closer to the held-out posterior than those of N(0, I)."""
    vae = VAETraining(
        "mnist",
        VAEConfig(1, 32, 8, (8, 16, 32), (32, 16, 8, 8)),
        kl_weight=0.05,
        epochs=4,
        learning_rate=3e-3,
        limit=5000,
    )
    train_vae(vae, tmp_path / "vae")
    config = ResidualTraining(
        couplings=6,
        flow_hidden=64,
        flow_epochs=25,
        flow_batch_size=256,
        flow_learning_rate=3e-3,
        energy_hidden=64,
        energy_epochs=3,
        energy_batch_size=256,
        moving_average=0.98,
        evaluate_every=25,
    )
    model = train_residual_prior(config, tmp_path / "vae", tmp_path / "prior", limit=5000)
    assert model.prior is not None
    held_out = model.posterior_sample(load_dataset("mnist", split="validation", limit=2000).images)
    bandwidths = median_bandwidths(held_out)
    distance = {
        method: mmd2(model.prior.sample(2000, method=method), held_out, bandwidths=bandwidths)
        for method in ("prior", "flow")
    }
    assert distance["prior"].low > 0
    assert distance["flow"].high < 0.5 * distance["prior"].low
