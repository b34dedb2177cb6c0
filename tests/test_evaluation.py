"""`evaluate` and `demo` from Python: every figure against one that is computed in another way."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from evalp_fast import EVaLP
from evalp_fast.demo import run_demo
from evalp_fast.evaluation import (
    REFERENCE_FILE,
    Reference,
    evaluate_method,
    evaluate_model,
    format_report,
    format_table,
    mmd2_floor,
)
from evalp_fast.files import FileError
from evalp_fast.images import to_uint8
from evalp_fast.metrics.features import FeatureExtractor, features
from evalp_fast.metrics.frechet import FeatureStatistics, frechet_distance
from evalp_fast.metrics.mmd import mmd2
from evalp_fast.model_card import model_card
from evalp_fast.training.latents import Posterior, PriorMonitor


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> EVaLP:
    return EVaLP.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def digits(padded_excerpt: Path) -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(padded_excerpt) as arrays:
        train, test = (torch.from_numpy(arrays[f"{split}_images"])[:, None] for split in ("train", "test"))
    return train, test


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return features("mnist_cnn")


@pytest.fixture(scope="module")
def reference(model, digits, extractor) -> Reference:
    train, test = digits
    return Reference.from_data(model, test, train, name="500 digits", extractor=extractor)


@pytest.fixture(scope="module")
def report(model, reference, extractor, digits) -> dict:
    train, test = digits
    return evaluate_model(
        model,
        reference,
        n=400,
        proposals=20,
        extractor=extractor,
        train_images=train,
        test_images=test,
    )


def test_a_saved_reference_measures_the_same(reference, tmp_path, model, extractor):
    path = tmp_path / REFERENCE_FILE
    reference.save(path)
    loaded = Reference.load(path)
    assert loaded.held_out().equal(reference.held_out())
    assert loaded.train_draws is not None
    assert loaded.train_draws.equal(reference.train_draws)
    assert loaded.statistics is not None
    assert loaded.statistics.scatter.equal(reference.statistics.scatter)
    assert (loaded.name, loaded.features, loaded.reconstructions) == (
        reference.name,
        reference.features,
        reference.reconstructions,
    )
    loaded.check(model, extractor)


def test_a_reference_of_ten_thousand_images_is_about_a_megabyte(tmp_path):
    part = torch.zeros(10_000, 16)
    statistics = FeatureStatistics(64)
    statistics.update(torch.randn(10, 64))
    path = tmp_path / REFERENCE_FILE
    Reference("x", part, part, part, "", "mnist_cnn", torch.zeros(2, 64), statistics, {}).save(path)
    assert path.stat().st_size < 1_050_000


def test_training_and_held_out_draws_have_independent_noise(model, digits):
    """Guards against the same (seed, index, step) for both, which makes the floor too low.

    The same images on both sides leave the noise as the only difference.
    """
    _, test = digits
    reference = Reference.from_data(model, test, test, name="x")
    assert reference.train_draws is not None
    deviation = torch.exp(0.5 * reference.log_variance)
    held_out = (reference.held_out() - reference.mean) / deviation
    train = (reference.train_draws - reference.mean) / deviation
    assert held_out.std() == pytest.approx(1, abs=0.05)
    assert train.std() == pytest.approx(1, abs=0.05)
    correlation = torch.corrcoef(torch.stack((held_out.flatten(), train.flatten())))[0, 1]
    assert abs(float(correlation)) < 4 / math.sqrt(held_out.numel())
    assert mmd2_floor(reference)["low"] < 0


def test_a_reference_of_another_model_or_other_features_is_refused(reference, model, extractor, tiny_vae):
    other = EVaLP.from_pretrained(tiny_vae / "last")
    with torch.no_grad():
        other.vae.to_posterior.bias += 1e-3
    with pytest.raises(FileError, match="another VAE"):
        reference.check(other, extractor)
    retrained = features("mnist_cnn")
    changed = FeatureExtractor(
        retrained.name,
        retrained.dim,
        retrained.image_shape,
        retrained.device,
        retrained.batch_size,
        lambda images: 1.1 * retrained.compute(images),
    )
    with pytest.raises(FileError, match="other weights"):
        reference.check(model, changed)
    without = Reference.from_data(model, torch.zeros(2, 1, 32, 32, dtype=torch.uint8), name="x")
    with pytest.raises(ValueError, match="holds features"):
        evaluate_model(model, without, extractor=extractor)


def test_a_file_that_is_not_a_reference_is_refused(tmp_path, tiny_model):
    with pytest.raises(FileError, match="does not exist"):
        Reference.load(tmp_path / "none.safetensors")
    with pytest.raises(FileError, match="not a reference"):
        Reference.load(tiny_model / "best" / "model.safetensors")


def test_numbers_that_are_compared_are_of_one_precision(model, reference, extractor, monkeypatch):
    """On every machine, whatever `sample` takes there."""

    def measured() -> tuple:
        _, images = evaluate_method(model, "flow", reference, n=50, extractor=extractor)
        report = evaluate_model(model, methods=("flow",), n=50)
        assert report["conditions"]["precision"] == "ieee"
        prior = model.prior.diagnostics(reference.held_out(), n=200, proposals=8)
        validation = Posterior(*model.posterior(images))
        return images, prior, PriorMonitor(validation, 0).measure(model, proposals=8)

    images, *expected = measured()
    monkeypatch.setattr("evalp_fast.kernels.processor.BFLOAT16_PAYS", True)
    assert not torch.equal(model.sample(50, output="uint8"), images)
    found, *others = measured()
    assert torch.equal(found, images)
    assert others == expected


@pytest.mark.parametrize("method", ["prior", "flow", "sir"])
def test_metrics_are_those_of_the_images_that_sample_gives(method, model, reference, extractor):
    options = {"proposals": 20} if method == "sir" else {}
    result = evaluate_method(model, method, reference, n=300, seed=5, proposals=20, extractor=extractor)
    draws = model.sample_with_diagnostics(300, method=method, seed=5, output="latent", **options)
    images = model.sample(300, method=method, seed=5, output="uint8", **options)
    assert result.images.equal(images)
    found = result.metrics
    distance = frechet_distance(extractor.statistics([images]), reference.statistics)
    assert found["fd_mnist_cnn"]["value"] == pytest.approx(distance, rel=1e-6)
    assert found["fd_mnist_cnn"]["low"] < distance < found["fd_mnist_cnn"]["high"]
    expected = mmd2(draws.samples, reference.held_out())
    assert found["mmd2"] == {"value": expected.value, "low": expected.low, "high": expected.high}
    assert found["samples_per_second"] > 0
    if method == "sir":
        assert found["ess"] == pytest.approx(float(draws.diagnostics["ess"].mean()))
        assert found["lowest_ess"] == float(draws.diagnostics["ess"].min())
        assert found["non_finite_weights"] == 0
    else:
        assert "ess" not in found


def test_reconstructions_are_compared_with_their_originals(model, reference, extractor, digits):
    _, test = digits
    rebuilt = extractor.statistics([to_uint8(model.reconstruct(test))])
    expected = frechet_distance(rebuilt, extractor.statistics([test]))
    assert reference.reconstructions["value"] == pytest.approx(expected, rel=1e-6)


def test_the_report_has_what_was_asked_for(report, reference, model):
    assert list(report["methods"]) == ["prior", "flow", "sir", "langevin"]
    for metrics in report["methods"].values():
        assert {
            "fd_mnist_cnn",
            "mmd2",
            "samples_per_second",
            "memorised_share",
            "nearest_ratio",
        } <= metrics.keys()
    assert 1 <= report["methods"]["sir"]["lowest_ess"] <= report["methods"]["sir"]["ess"] <= 20
    assert 0 < report["methods"]["langevin"]["acceptance"] <= 1
    z = report["log_partition"]
    assert z["lower_bound"] <= z["value"] <= z["upper_bound"]
    assert z["low"] <= z["value"] <= z["high"]
    latents = reference.held_out().double()
    gaussian = torch.distributions.Normal(0, 1).log_prob(latents).sum(1).mean()
    assert report["nll"]["gaussian"] == pytest.approx(-float(gaussian), rel=1e-5)
    assert report["nll"]["flow"] == pytest.approx(
        -float(model.prior.flow.log_prob(latents.float()).detach().mean()), rel=1e-5
    )
    assert "not_measured" not in report
    json.dumps(report)


def test_the_likelihood_of_a_prior_without_energy_is_the_flows(model, reference):
    zero = EVaLP(model.config).eval()
    zero.load_state_dict(model.state_dict())
    with torch.no_grad():
        zero.prior.energy_net.layers[-1].weight.zero_()
        zero.prior.energy_net.layers[-1].bias.fill_(0.7)  # a constant energy changes log Z and nothing else
    report = evaluate_model(zero, reference, methods=("flow",), n=2)
    assert report["log_partition"]["value"] == pytest.approx(-0.7, abs=1e-5)
    assert report["nll"]["prior"] == pytest.approx(report["nll"]["flow"], abs=1e-4)


def test_a_vae_alone_is_measured_by_its_gaussian_prior(tiny_vae, reference, extractor):
    report = evaluate_model(EVaLP.from_pretrained(tiny_vae), reference, n=50, extractor=extractor)
    assert list(report["methods"]) == ["prior"]
    assert report["not_measured"].keys() == {"flow", "sir", "langevin"}
    assert "log_partition" not in report


def test_without_a_reference_speed_and_diagnostics_remain(model):
    report = evaluate_model(model, methods=("sir",), n=50, proposals=5, not_measured={"fd": "no data"})
    assert report["methods"]["sir"].keys() == {
        "samples_per_second",
        "ess",
        "lowest_ess",
        "non_finite_weights",
    }
    assert "nll" not in report
    assert "not measured: fd, because no data" in format_report(report)


def test_bad_arguments_are_named(model):
    with pytest.raises(ValueError, match="n must be at least 2"):
        evaluate_method(model, "flow", n=1)
    with pytest.raises(ValueError, match="methods must be"):
        evaluate_model(model, methods=("gibbs",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 test images"):
        Reference.from_data(model, torch.zeros(1, 1, 32, 32, dtype=torch.uint8), name="x")


def test_the_table_is_aligned_and_the_card_understands_the_report(report):
    text = format_report(report)
    for word in ("fd_mnist_cnn", "MMD2 x 1e4", "(reconstructions)", "(train posterior)", "log Z", "langevin"):
        assert word in text
    table = format_table({"a": {"samples_per_second": 1234.5}, "longer": {"samples_per_second": 9.0}})
    assert table.splitlines() == ["        images/s", "a          1,234", "longer         9"]
    card = model_card({"metrics": report}, {})
    assert "| langevin |" in card
    assert "log partition" in card


def test_the_demo_needs_neither_data_nor_network(
    model, reference, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    reference.save(folder / REFERENCE_FILE)

    def refuse(*_, **__):
        raise AssertionError("the demo read data or the network")

    monkeypatch.setattr("evalp_fast.data.load_dataset", refuse)
    monkeypatch.setattr("evalp_fast.pipeline.snapshot_download", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    rows = run_demo(model_name=str(folder), n=300, proposals=10, out=tmp_path / "demo.png")
    assert list(rows)[:4] == ["prior", "flow", "sir", "langevin"]
    assert all("fd_mnist_cnn" in rows[name] for name in [*list(rows)[:4], "(reconstructions)"])
    assert "mmd2" in rows["(train posterior)"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert str(tmp_path / "demo.png") in shown
    assert "fd_mnist_cnn" in shown

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"evalp-fast\[plot\]"):
        run_demo(model_name=str(folder))


def test_a_model_that_repeats_its_training_images_is_found_out(model, digits, monkeypatch):
    train, test = digits
    copies = train.split(256)
    monkeypatch.setattr("evalp_fast.evaluation._decode", lambda _, z, __: next(source)[: len(z)])
    source = iter([copies[0], *copies])
    repeated = evaluate_method(model, "flow", n=600, train_images=train, control=test)
    source = iter([test[:256], test[:256], test[256:]])
    new = evaluate_method(model, "flow", n=500, train_images=train, control=test)
    assert repeated.metrics["memorised_share"] == 1.0
    assert new.metrics["memorised_share"] == pytest.approx(0.01, abs=0.005)
    assert new.metrics["nearest_ratio"] == pytest.approx(1)
