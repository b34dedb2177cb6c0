"""Feature spaces: their weights, shapes and errors; the statistics of Inception's features."""

import json
import os
import pickle
import shutil
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evalp_fast.data import load_dataset
from evalp_fast.metrics import features as features_module
from evalp_fast.metrics.features import (
    FEATURE_NAMES,
    CIFARResNet56,
    features,
    load_classifier,
    normalise_cifar,
)
from evalp_fast.metrics.frechet import frechet_distance

EXCERPT = Path(__file__).parents[1] / "data" / "mnist_excerpt.npz"
SHIPPED = Path(features_module.__file__).parents[1] / "pretrained" / "mnist_cnn"


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """500 digits of the test set, which the classifier has not seen, and their labels."""
    dataset = load_dataset("mnist", split="test", root=EXCERPT)
    assert dataset.labels is not None
    return dataset.images, dataset.labels


# ---------------------------------------------------------------------------------------------------------
# mnist_cnn


def test_mnist_cnn(digits: tuple[Tensor, Tensor]) -> None:
    extractor = features("mnist_cnn")
    assert (extractor.name, extractor.dim, extractor.distance_name) == ("mnist_cnn", 64, "fd_mnist_cnn")
    vectors = extractor(digits[0])
    assert vectors.shape == (500, 64)
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad
    assert vectors.min() >= 0
    # A feature that is constant tells nothing.
    assert (vectors.std(0) > 0.1).all()


def test_mnist_cnn_classifies_digits(digits: tuple[Tensor, Tensor]) -> None:
    """Guards against weights, padding or pixel scale that do not go together; 98 % is four sigma below."""
    model = load_classifier()
    correct = model(digits[0].float() / 255).argmax(1) == digits[1]
    assert correct.float().mean() >= 0.98
    vectors = features("mnist_cnn")(digits[0])
    torch.testing.assert_close(
        model.classifier(vectors), model(digits[0].float() / 255), rtol=1e-4, atol=1e-4
    )


@pytest.mark.full_data
def test_shipped_classifier_is_as_accurate_as_it_says() -> None:
    dataset = load_dataset("mnist", split="test", root=os.environ["EVALP_DATA"])
    assert dataset.labels is not None
    model = load_classifier()
    correct = [
        (model(images.float() / 255).argmax(1) == labels).sum()
        for images, labels in zip(dataset.images.split(1000), dataset.labels.split(1000), strict=True)
    ]
    accuracy = int(sum(correct)) / 10_000
    stated = json.loads((SHIPPED / "config.json").read_text())["test_accuracy"]
    # Another CPU may round a borderline digit to the other side.
    assert accuracy == pytest.approx(stated, abs=2e-4)
    assert accuracy >= 0.99


def test_features_do_not_depend_on_the_batch(digits: tuple[Tensor, Tensor]) -> None:
    whole = features("mnist_cnn")(digits[0])
    torch.testing.assert_close(features("mnist_cnn", batch_size=7)(digits[0]), whole, rtol=1e-5, atol=1e-5)
    empty = features("mnist_cnn")(digits[0][:0])
    assert empty.shape == (0, 64)
    assert empty.dtype == torch.float32


def test_statistics_stream(digits: tuple[Tensor, Tensor]) -> None:
    extractor = features("mnist_cnn", batch_size=64)
    result = extractor.statistics(iter(digits[0].split([100, 300, 0, 100])))
    vectors = extractor(digits[0]).double().numpy()
    assert result.count == 500
    np.testing.assert_allclose(result.mean.numpy(), vectors.mean(0), atol=1e-5)
    np.testing.assert_allclose(result.covariance.numpy(), np.cov(vectors, rowvar=False), atol=1e-4)


def test_distance_grows_with_damage(digits: tuple[Tensor, Tensor]) -> None:
    extractor = features("mnist_cnn")
    reference = extractor.statistics([digits[0][:250]])
    noise = torch.randint(0, 256, digits[0].shape, generator=torch.Generator().manual_seed(0))

    def distance(share: float) -> float:
        damaged = ((1 - share) * digits[0] + share * noise).round().to(torch.uint8)
        return frechet_distance(extractor.statistics([damaged[250:]]), reference)

    assert distance(0.0) < distance(0.2) < distance(0.4)


def test_bad_images(digits: tuple[Tensor, Tensor]) -> None:
    extractor = features("mnist_cnn")
    with pytest.raises(TypeError, match=r"must be uint8, got torch\.float32"):
        extractor(digits[0].float())
    for bad in (digits[0][:, :, 2:30, 2:30], digits[0].expand(-1, 3, -1, -1), digits[0][0]):
        with pytest.raises(ValueError, match=r"mnist_cnn takes images \[N, 1, 32, 32\]"):
            extractor(bad)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"mnist_cnn, cifar_resnet56, inception, got 'vgg'"):
        features("vgg")
    with pytest.raises(ValueError, match="batch_size"):
        features("mnist_cnn", batch_size=0)
    assert FEATURE_NAMES == ("mnist_cnn", "cifar_resnet56", "inception")


@pytest.mark.parametrize(
    "damage", ["no folder", "truncated", "other weights", "another model", "no digest", "later"]
)
def test_damaged_classifier(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "classifier"
    if damage != "no folder":
        shutil.copytree(SHIPPED, folder)
        config = json.loads((folder / "config.json").read_text())
        weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    if damage == "other weights":
        state = load_file(weights)
        state["classifier.bias"] = state["classifier.bias"] + 1
        save_file(state, weights)
    if damage == "another model":
        save_file({"weight": torch.zeros(3)}, weights)
    if damage == "no digest":
        del config["weights_sha256"]
        (folder / "config.json").write_text(json.dumps(config))
    if damage == "later":
        (folder / "config.json").write_text(json.dumps({**config, "format": 2}))
    with pytest.raises(ValueError, match="classifier"):
        features("mnist_cnn", weights=folder)


# ---------------------------------------------------------------------------------------------------------
# cifar_resnet56


@pytest.fixture
def random_resnet(tmp_path: Path) -> Path:
    model = CIFARResNet56()
    # As in the published file: no batch counters.
    state = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    save_file(state, tmp_path / "resnet.safetensors")
    return tmp_path / "resnet.safetensors"


def test_cifar_resnet56_with_random_weights(random_resnet: Path) -> None:
    images = torch.randint(
        0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    extractor = features("cifar_resnet56", weights=random_resnet, batch_size=4)
    assert (extractor.dim, extractor.distance_name) == (64, "fd_cifar_resnet56")
    vectors = extractor(images)
    assert vectors.shape == (6, 64)
    model = CIFARResNet56().eval()
    model.load_state_dict(load_file(random_resnet), strict=False)
    torch.testing.assert_close(
        vectors, model.features(normalise_cifar(images)).detach(), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"\[N, 3, 32, 32\]"):
        extractor(images[:, :1])


def test_cifar_resnet56_weights_that_are_missing_or_wrong(random_resnet: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--weights FILE"):
        features("cifar_resnet56")
    with pytest.raises(ValueError, match="does not exist"):
        features("cifar_resnet56", weights=tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match=r"missing \['bn1"):
        features("cifar_resnet56", weights=SHIPPED / "model.safetensors")
    state = load_file(random_resnet)
    save_file(state | {"linear.weight": torch.zeros(100, 64)}, random_resnet)
    with pytest.raises(ValueError, match=r"do not fit CIFARResNet56"):
        features("cifar_resnet56", weights=random_resnet)


def test_cifar_resnet56_recognises_cifar() -> None:
    """Guards against a wrong block, normalisation or channel order: each costs tens of points."""
    data = Path(os.environ.get("EVALP_DATA", "")).resolve()
    weights, images = data / "weights" / "cifar10_resnet56.safetensors", data / "cifar10_exact_partial.npz"
    if not (os.environ.get("EVALP_DATA") and weights.is_file() and images.is_file()):
        pytest.skip(
            "needs weights/cifar10_resnet56.safetensors and cifar10_exact_partial.npz under $EVALP_DATA"
        )
    arrays = np.load(images)
    pixels = torch.from_numpy(arrays["test_x"]).permute(0, 3, 1, 2)
    vectors = features("cifar_resnet56", weights=weights)(pixels)
    head = load_file(weights)
    predicted = (vectors @ head["linear.weight"].T + head["linear.bias"]).argmax(1)
    accuracy = float((predicted == torch.from_numpy(arrays["test_y"])).float().mean())
    # 92.7 % of these 1,017 images.
    assert accuracy == pytest.approx(0.927, abs=0.003)


# ---------------------------------------------------------------------------------------------------------
# inception


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file with the structure of torch-fidelity's, made of random numbers."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Untrained(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object) -> None:
            pass

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Untrained("untrained", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(model.state_dict(), path)
    return path


def test_inception(random_inception: Path) -> None:
    """The features are torch-fidelity's own, and stream into our statistics."""
    images = torch.randint(
        0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    extractor = features("inception", weights=random_inception, batch_size=2)
    assert (extractor.name, extractor.dim, extractor.distance_name) == ("inception", 2048, "fid")
    vectors = extractor(images)
    assert vectors.shape == (3, 2048)
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    theirs = module.FeatureExtractorInceptionV3(
        "theirs", ["2048"], feature_extractor_weights_path=str(random_inception)
    )
    torch.testing.assert_close(vectors, theirs(images)[0], rtol=1e-4, atol=1e-5)
    result = extractor.statistics([images[:2], images[2:]])
    assert result.count == 3
    np.testing.assert_allclose(result.mean.numpy(), vectors.double().numpy().mean(0), atol=1e-6)
    deviations = (vectors.double() - result.mean).square().sum()
    assert float(result.scatter.trace()) == pytest.approx(float(deviations), rel=1e-4)


def test_inception_repeats_a_grey_channel(random_inception: Path) -> None:
    grey = torch.randint(
        0, 256, (2, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    extractor = features("inception", weights=random_inception)
    torch.testing.assert_close(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        extractor(grey.repeat(1, 2, 1, 1))


def test_inception_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(module, "load_state_dict_from_url", no_network)
    with pytest.raises(ValueError, match=r"could not be downloaded.*pass --weights FILE"):
        features("inception")


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_inception_weights_that_are_wrong(random_inception: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    truncated, other, text = (tmp_path / name for name in ("truncated.pth", "other.pth", "text.pth"))
    truncated.write_bytes(random_inception.read_bytes()[:100_000])
    torch.save({"weight": torch.zeros(3)}, other)
    text.write_text("not weights")
    for path in (truncated, other, text, tmp_path / "absent.pth"):
        with pytest.raises(ValueError, match=f"Inception file; .*{path.name}"):
            features("inception", weights=path)


def test_inception_weights_run_no_code(tmp_path: Path) -> None:
    """torch-fidelity unpickles without restrictions; a file that would run code is refused before that."""
    pytest.importorskip("torch_fidelity")
    evidence, path = tmp_path / "evidence", tmp_path / "malicious.pth"
    with path.open("wb") as file:
        pickle.dump(_Payload(evidence), file, protocol=2)
    with pytest.raises(ValueError, match="Inception file"):
        features("inception", weights=path)
    assert not evidence.exists()
