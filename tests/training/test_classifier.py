"""The classifier behind `fd_mnist_cnn`: its noise, its training, its files."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

import evalp_fast.training.classifier as classifier_module
from evalp_fast.data import epoch_permutation, load_dataset
from evalp_fast.metrics.features import load_classifier
from evalp_fast.models.classifier import MNISTClassifier, initialise
from evalp_fast.training.classifier import (
    ClassifierConfig,
    accuracy,
    epoch_shifts,
    save_classifier,
    shift_images,
    train_classifier,
    train_mnist_classifier,
)
from evalp_fast.training.run import DivergenceError

EXCERPT = Path(__file__).parents[1] / "data" / "mnist_excerpt.npz"
SHIPPED = Path(classifier_module.__file__).parents[1] / "pretrained" / "mnist_cnn"


def digits(split: str) -> tuple[Tensor, Tensor]:
    dataset = load_dataset("mnist", split=split, root=EXCERPT)
    assert dataset.labels is not None
    return dataset.images, dataset.labels


def state_of(model: MNISTClassifier) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_shift_images_against_roll() -> None:
    images = torch.randint(
        0, 256, (6, 1, 8, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    shifts = torch.tensor([[0, 0], [1, 0], [0, 2], [-2, 1], [2, -2], [-1, -1]])
    expected = torch.stack(
        [i.roll((int(v), int(h)), (1, 2)) for i, (v, h) in zip(images, shifts, strict=True)]
    )
    assert torch.equal(shift_images(images, shifts), expected)


def test_shifted_digits_lose_nothing() -> None:
    """The margin is wide enough: the sum of the pixels inside stays, and no column wraps around."""
    images, _ = digits("test")
    moved = shift_images(images, torch.full((len(images), 2), 2))
    assert torch.equal(moved[:, :, 4:, 4:], images[:, :, 2:30, 2:30])


def test_shifts_are_uniform_and_new_in_every_epoch() -> None:
    """Chi-square over the 25 shifts of 25,000 images: 24 degrees of freedom, 51 is the 0.1 % point."""
    config = ClassifierConfig(seed=1)
    first, second = epoch_shifts(config, 25_000, 0), epoch_shifts(config, 25_000, 1)
    for shifts in (first, second):
        counts = torch.bincount((shifts[:, 0] + 2) * 5 + shifts[:, 1] + 2, minlength=25)
        assert len(counts) == 25
        assert float((counts - 1000.0).square().sum() / 1000) < 51
    assert 0.02 < float((first == second).all(1).float().mean()) < 0.06
    assert torch.equal(epoch_shifts(config, 100, 1), second[:100])
    assert not epoch_shifts(ClassifierConfig(max_shift=0), 100, 0).any()


def test_shifts_do_not_follow_the_order() -> None:
    """Both come from one noise: with a column in common, an epoch would go from one shift to the other.

    The mean of 2,000 shifts of variance 2 has a standard deviation of 0.032.
    """
    shifts = epoch_shifts(ClassifierConfig(seed=1), 10_000, 0)
    order = epoch_permutation(10_000, seed=1, epoch=0)
    for part in shifts[order].split(2_000):
        assert float(part.double().mean(0).abs().max()) < 4 * 0.032


def test_initial_weights() -> None:
    """He's variance, independent layers, and nothing of the global generator."""
    first, second, third = MNISTClassifier(), MNISTClassifier(), MNISTClassifier()
    torch.manual_seed(0)
    initialise(first, 5)
    torch.manual_seed(1)
    initialise(second, 5)
    initialise(third, 6)
    for name, parameter in first.named_parameters():
        weight = parameter.detach()
        assert torch.equal(weight, second.get_parameter(name))
        if weight.ndim > 1:
            assert not torch.equal(weight, third.get_parameter(name))
            fan_in = weight[0].numel()
            # The standard deviation of n normals is uncertain by 1/√(2n).
            tolerance = 4 / math.sqrt(2 * weight.numel())
            assert float(weight.std()) == pytest.approx(math.sqrt(2 / fan_in), rel=tolerance)


def test_training_learns_and_is_a_function_of_its_arguments() -> None:
    images, labels = digits("train")
    config = ClassifierConfig(epochs=3, seed=1)
    records: list[dict[str, float]] = []
    torch.manual_seed(0)
    first = train_classifier(config, images, labels, validation=digits("validation"), log=records.append)
    assert not first.training
    assert accuracy(first, *digits("test")) > 0.85
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert records[0]["loss"] > records[2]["loss"]
    assert records[2]["validation_accuracy"] > 0.8
    torch.manual_seed(1)
    # Validation scores the model; it must not change what is learnt.
    second = train_classifier(config, images, labels)
    for name, tensor in state_of(first).items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    third = train_classifier(ClassifierConfig(epochs=1, seed=2), images[:64], labels[:64])
    fourth = train_classifier(ClassifierConfig(epochs=1, seed=3), images[:64], labels[:64])
    assert not torch.equal(third.classifier.weight, fourth.classifier.weight)


def test_train_save_and_load(tmp_path: Path) -> None:
    """The whole way on the excerpt, whose test images are scored once, at the end."""
    config = ClassifierConfig(epochs=2, batch_size=64)
    description = train_mnist_classifier(
        EXCERPT, tmp_path / "run", config, progress=False, command="the command"
    )
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {**description, "weights_sha256": written["weights_sha256"]} == written
    assert written["command"] == "the command"
    assert written["config"]["epochs"] == 2
    assert written["config"]["seed"] == 0
    assert set(written["versions"]) >= {"python", "torch", "evalp_fast"}
    assert len(written["date"]) == 10
    assert len(written["history"]) == 2
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "model.safetensors"]
    model = load_classifier(tmp_path / "run")
    assert accuracy(model, *digits("test")) == written["test_accuracy"]
    assert accuracy(model, *digits("validation")) == written["validation_accuracy"]


def test_divergence_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match="lower learning_rate"):
        train_mnist_classifier(
            EXCERPT, tmp_path / "run", ClassifierConfig(epochs=1, learning_rate=1e30), progress=False
        )
    assert not (tmp_path / "run").exists()


def test_a_pair_torn_apart_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new weights are written, the new description is not: the old description does not fit them."""
    model = MNISTClassifier()
    initialise(model, 0)
    save_classifier(model, tmp_path, {"format": 1, "architecture": "MNISTClassifier"})
    load_classifier(tmp_path)
    initialise(model, 1)

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(classifier_module, "write_json_atomic", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_classifier(model, tmp_path, {"format": 1, "architecture": "MNISTClassifier"})
    with pytest.raises(ValueError, match=r"not the file that config\.json describes"):
        load_classifier(tmp_path)


def test_shipped_classifier() -> None:
    description = json.loads((SHIPPED / "config.json").read_text())
    assert description["test_accuracy"] >= 0.99
    assert description["config"] == vars(ClassifierConfig())
    assert (SHIPPED / "model.safetensors").stat().st_size <= 300_000
    load_classifier()


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("batch_size", 0), ("learning_rate", 0.0), ("weight_decay", -1.0), ("max_shift", 3)],
)
def test_bad_configuration(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        ClassifierConfig(**{name: value})  # type: ignore[arg-type]


def test_bad_data(tmp_path: Path) -> None:
    images, labels = digits("test")
    config = ClassifierConfig(epochs=1)
    for bad in (images.float(), images[:, :, 2:30, 2:30], images[:0]):
        with pytest.raises(ValueError, match="training images"):
            train_classifier(config, bad, labels)
    with pytest.raises(ValueError, match="training labels"):
        train_classifier(config, images, labels[:5])
    with pytest.raises(ValueError, match="validation labels"):
        train_classifier(config, images, labels, validation=(images, labels.float()))
    with pytest.raises(ValueError, match=r"MNIST/raw"):
        train_mnist_classifier(tmp_path, tmp_path / "run", config, progress=False)
    assert not (tmp_path / "run").exists()
