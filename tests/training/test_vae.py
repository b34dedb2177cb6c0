"""Training the VAE: it learns, resumes exactly, never sees the test split, and stops when it diverges."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from evalp_fast.data import load_dataset
from evalp_fast.models.vae import VAE, VAEConfig
from evalp_fast.pipeline import EVaLP
from evalp_fast.training import vae as vae_module
from evalp_fast.training.run import DivergenceError, RunExistsError
from evalp_fast.training.vae import VAETraining, train_vae

MOMENTS = ("training", "before save", "after save")


@pytest.fixture
def config(excerpt: str, small_vae: VAEConfig) -> VAETraining:
    return VAETraining(
        excerpt, small_vae, kl_weight=0.3, epochs=3, batch_size=100, learning_rate=3e-3, limit=300
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vae") / "whole"


def test_run_holds_what_it_should(config: VAETraining, whole: Path) -> None:
    model = train_vae(config, whole)
    assert not model.training
    assert model.prior is None
    assert {path.name for path in whole.iterdir()} >= {
        "config.json",
        "state.safetensors",
        "metrics.jsonl",
        "best",
        "last",
        "samples",
    }
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    best = min(line["validation_loss"] for line in lines)
    assert model.info["training"][0]["validation"]["loss"] == best
    stage = model.info["training"][0]
    assert (stage["source"], stage["images"], stage["kl_weight"]) == (config.data, 300, config.kl_weight)
    assert len(list((whole / "samples").glob("*.png"))) == 6
    # The evaluation-mode loss of the best model is what its line says, and the model that is returned is it.
    held_out = load_dataset(config.data, split="validation", limit=300).images
    assert vae_module.validation_loss(model, held_out, config)["loss"] == pytest.approx(best, rel=1e-5)
    loaded = EVaLP.from_pretrained(whole)
    assert torch.equal(loaded.sample(4, method="prior"), model.sample(4, method="prior"))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("evaluation", [1, 2])
def test_resumes_exactly(
    moment: str, evaluation: int, config: VAETraining, whole: Path, tmp_path: Path, kill, assert_same_run
) -> None:
    """Killed in an epoch, between metrics and state, and after both: the run ends as if it had not been."""
    if not (whole / "state.safetensors").exists():
        train_vae(config, whole)
    kill(moment, evaluation, lambda: train_vae(config, tmp_path / "run"))
    train_vae(config, tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_resuming_a_finished_run_changes_nothing(
    config: VAETraining, tmp_path: Path, assert_same_run, whole
) -> None:
    if not (whole / "state.safetensors").exists():
        train_vae(config, whole)
    before = (whole / "state.safetensors").read_bytes()
    train_vae(config, whole, resume=True)
    assert (whole / "state.safetensors").read_bytes() == before
    with pytest.raises(RunExistsError, match="holds a run already"):
        train_vae(config, whole)
    with pytest.raises(RunExistsError, match=r"config.kl_weight was 0.3, now 0.5"):
        train_vae(dataclasses.replace(config, kl_weight=0.5), whole, resume=True)


def test_seed_matters(config: VAETraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(config, epochs=1)
    first = train_vae(config, tmp_path / "a")
    torch.manual_seed(123)  # global state must not
    again = train_vae(config, tmp_path / "b")
    other = train_vae(dataclasses.replace(config, seed=1), tmp_path / "c")
    weights = [model.vae.from_latent.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_test_split_is_never_loaded(config: VAETraining, tmp_path: Path, monkeypatch) -> None:
    splits = []

    def spy(*arguments, split: str, **options):
        splits.append(split)
        return load_dataset(*arguments, split=split, **options)

    monkeypatch.setattr(vae_module, "load_dataset", spy)
    train_vae(dataclasses.replace(config, epochs=1), tmp_path)
    assert sorted(splits) == ["train", "validation"]


def test_divergence_keeps_the_last_good_state(config: VAETraining, tmp_path: Path, monkeypatch) -> None:
    loss, calls = VAE.loss, [0]

    def failing(self: VAE, *arguments):
        value, parts = loss(self, *arguments)
        calls[0] += self.training
        return (value * math.nan if calls[0] >= 5 else value), parts

    monkeypatch.setattr(VAE, "loss", failing)
    with pytest.raises(DivergenceError, match=r"diverged at step 6: loss is nan; the last good state"):
        train_vae(config, tmp_path)
    monkeypatch.undo()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3]
    assert EVaLP.from_pretrained(tmp_path).sample(2, method="prior").isfinite().all()
    train_vae(config, tmp_path, resume=True)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["kl_weight", "epochs", "batch_size", "learning_rate"])
def test_bad_configuration_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        VAETraining(**{name: 0})


def test_batch_larger_than_the_data_is_named(config: VAETraining, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at most the number of images, 300"):
        train_vae(dataclasses.replace(config, batch_size=301), tmp_path)
