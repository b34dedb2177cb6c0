"""From images to the statistics of a Fréchet distance: features per second, end to end.

Rival: torch-fidelity's own loop over a dataset, with its own statistics, on the same network. `mnist_cnn`
is the classifier that ships, registered with torch-fidelity as one of its feature extractors. Inception's
trained weights are a download; what is timed is the same network with random weights, which take the same
time and give no FID. torch-fidelity reads its dataset with worker processes, as it does by default, and also
without them, which suits images that are in memory already. Everything is in float32: cuDNN would take TF32.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import checks
from bench.harness import Call, Problem, Provider, Workload, absent
from bench.machine import DEVICE, ON_CUDA
from bench.sizes import Scale, pick
from evalp_fast.kernels.matmul_precision import matmul_precision
from evalp_fast.metrics.features import FeatureExtractor, features, load_classifier
from evalp_fast.metrics.frechet import FeatureStatistics

BATCHES = {"mnist_cnn": 500, "inception": 50}
SHAPES = {"mnist_cnn": (1, 32, 32), "inception": (3, 32, 32)}

needs_fidelity = absent("torch_fidelity")


def untrained_inception() -> Any:
    """torch-fidelity's Inception with random weights: its constructor insists on a file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> Any:
            return None

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "none.pth"
        torch.save({}, path)
        return Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)).to(DEVICE)


def our_extractor(name: str) -> FeatureExtractor:
    """The feature space, on the device."""
    if name != "inception":
        return features(name, device=DEVICE)
    network = untrained_inception()
    return FeatureExtractor(
        "inception", 2048, (None, None, None), DEVICE, 50, lambda images: network(images)[0]
    )


def exact_features(name: str, images: Tensor) -> Tensor:
    """Of the networks as they are, without what reads or batches the images; the classifier's in float64."""
    parts = images.split(BATCHES[name])
    if name == "inception":
        network = untrained_inception()
        with matmul_precision("ieee"):
            return torch.cat([network(part.to(DEVICE))[0] for part in parts]).double()
    classifier = load_classifier().double().to(DEVICE)
    return torch.cat([classifier.features(part.to(DEVICE).double() / 255) for part in parts])


def ours(extractor: FeatureExtractor) -> Call:
    """Streaming statistics in float64; neither images nor features are kept."""

    def call(images: Tensor) -> tuple[Tensor, Tensor]:
        with matmul_precision("ieee"):
            found: FeatureStatistics = extractor.statistics(images.split(extractor.batch_size))
        return found.mean, found.covariance

    return call


def fidelity(name: str, workers: bool) -> Callable[[FeatureExtractor], Call]:
    """torch-fidelity's loop and its statistics, with the workers of its default or without."""

    def make(_: FeatureExtractor) -> Call:
        from torch_fidelity.feature_extractor_base import FeatureExtractorBase
        from torch_fidelity.metric_fid import fid_features_to_statistics
        from torch_fidelity.utils import get_featuresdict_from_dataset

        class Classifier(FeatureExtractorBase):
            def __init__(self) -> None:
                super().__init__("mnist_cnn", ["64"])
                self.network = load_classifier()

            @staticmethod
            def get_provided_features_list() -> tuple[str, ...]:
                return ("64",)

            def forward(self, input: Tensor) -> tuple[Tensor]:
                return (self.network.features(input.to(torch.float32) / 255),)

        class Images(torch.utils.data.Dataset):
            def __init__(self, images: Tensor):
                self.images = images

            def __len__(self) -> int:
                return len(self.images)

            def __getitem__(self, index: int) -> Tensor:
                return self.images[index]

        extractor = (untrained_inception() if name == "inception" else Classifier()).to(DEVICE).eval()
        (layer,) = extractor.get_requested_features_list()

        def call(images: Tensor) -> tuple[Tensor, Tensor]:
            with matmul_precision("ieee"):
                found = get_featuresdict_from_dataset(
                    Images(images), extractor, BATCHES[name], ON_CUDA, not workers, False
                )
            statistics = fid_features_to_statistics(found[layer])
            return torch.from_numpy(statistics["mu"]), torch.from_numpy(statistics["sigma"])

        return call

    return make


def problem(name: str, n: int) -> Problem:
    """The statistics of n uint8 images that lie on the host."""

    def setup() -> Workload:
        torch.manual_seed(0)
        images = torch.randint(0, 256, (n, *SHAPES[name]), dtype=torch.uint8)
        extractor = our_extractor(name)
        exact = exact_features(name, images)
        mean, covariance = exact.mean(dim=0), torch.cov(exact.T)

        def check(provider: Provider, found: tuple[Tensor, Tensor], images: Tensor) -> None:
            assert found[0].shape == mean.shape, f"a mean of shape {tuple(found[0].shape)}"
            assert found[1].shape == covariance.shape, f"a covariance of shape {tuple(found[1].shape)}"
            checks.relative_error(found[0].to(DEVICE), mean, 1e-4, "the mean")
            checks.relative_error(found[1].to(DEVICE), covariance, 1e-3, "the covariance")

        return Workload(extractor, [(images,)], check)

    missing = needs_fidelity if name == "inception" else lambda: None
    return Problem(
        "fid",
        f"{name}{' untrained' if name == 'inception' else ''}, {n:,} images",
        {"batch": n, "network": name},
        n,
        setup,
        (
            Provider("evalp_fast", ours, missing=missing),
            *(
                Provider(label, fidelity(name, workers), missing=absent("torch_fidelity.metric_fid"))
                for label, workers in (("torch-fidelity", True), ("torch-fidelity without workers", False))
            ),
        ),
        unit="images",
    )


def problems(scale: Scale) -> list[Problem]:
    """The shipped classifier; beyond `small` Inception too."""
    if scale == "sweep":
        return [problem("mnist_cnn", 1 << p) for p in range(10, 17, 2)]
    found = [problem("mnist_cnn", pick(scale, 4000, 20_000, 50_000))]
    if scale != "small":
        found.append(problem("inception", pick(scale, 64, 100, 5000)))
    return found


def test_fid(case: Any, timed: Any) -> None:
    timed(case)
