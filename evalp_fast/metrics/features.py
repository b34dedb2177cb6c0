"""Named feature spaces for Fréchet distances: `features(name)` turns uint8 images into float32 vectors."""

import hashlib
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from zipfile import BadZipFile

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evalp_fast.files import load_safetensors, read_json
from evalp_fast.metrics.frechet import FeatureStatistics
from evalp_fast.models.classifier import MNISTClassifier

_CIFAR_MEAN = (0.485, 0.456, 0.406)
_CIFAR_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class FeatureExtractor:
    """A named map from images to vectors. Made by `features`."""

    name: str
    """`mnist_cnn`, `cifar_resnet56` or `inception`."""
    dim: int
    """Length of a feature vector."""
    image_shape: tuple[int | None, ...]
    """The (channels, height, width) that it takes; None stands for any."""
    device: torch.device
    """Where it computes and returns its features."""
    batch_size: int
    """Images in one pass of the network."""
    compute: Callable[[Tensor], Tensor]
    """uint8 images of one batch on `device` to features `[N, dim]`."""

    @property
    def distance_name(self) -> str:
        """What a Fréchet distance in this space is called: `fid` in Inception's features alone."""
        return "fid" if self.name == "inception" else f"fd_{self.name}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features, float32 `[N, dim]`, of uint8 images `[N, C, H, W]`, which may be on any device.

        Raises:
            TypeError: images of another dtype (pixels in [0, 1] have to be rounded: `(255·x).round()`).
            ValueError: images of another shape.
        """
        if images.dtype != torch.uint8:
            raise TypeError(
                f"images must be uint8, got {images.dtype}; round pixels in [0, 1] as (255·x).round()"
            )
        shape = self.image_shape
        if images.ndim != 4 or any(
            want not in (None, got) for want, got in zip(shape, images.shape[1:], strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{self.name} takes images [N, {wanted}], got {list(images.shape)}")
        if len(images) == 0:
            return torch.empty(0, self.dim, device=self.device)
        return torch.cat([self.compute(batch.to(self.device)) for batch in images.split(self.batch_size)])

    def statistics(self, batches: Iterable[Tensor]) -> FeatureStatistics:
        """Mean and covariance of the features of batches of images; neither images nor features are kept."""
        # Beside the features on a GPU; other accelerators may lack float64.
        result = FeatureStatistics(self.dim, self.device if self.device.type == "cuda" else "cpu")
        for batch in batches:
            for part in batch.split(self.batch_size):
                result.update(self(part))
        return result


class _BasicBlock(nn.Module):
    """Two 3×3 convolutions and the identity, subsampled and padded with zeros where the width doubles."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.padding = (channels - channels_in) // 2
        self.stride = 2 if self.padding else 1
        self.conv1 = nn.Conv2d(channels_in, channels, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(y + shortcut)


class CIFARResNet56(nn.Module):
    """ResNet-56 for CIFAR-10 (He et al. 2016, section 4.2, option A).

    Its tensors have the names of akamaster/pytorch_resnet_cifar10, whose weights it is meant for.
    Input: normalised float32 `[N, 3, 32, 32]`. `features`: float32 `[N, 64]`; `forward`: logits `[N, 10]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_BasicBlock(16, 16) for _ in range(9)))
        self.layer2 = nn.Sequential(_BasicBlock(16, 32), *(_BasicBlock(32, 32) for _ in range(8)))
        self.layer3 = nn.Sequential(_BasicBlock(32, 64), *(_BasicBlock(64, 64) for _ in range(8)))
        self.linear = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(images)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.features(images))


def normalise_cifar(images: Tensor) -> Tensor:
    """uint8 `[N, 3, H, W]` to the ResNet's input, `(x/255 - mean)/std` per channel."""
    mean = torch.tensor(_CIFAR_MEAN, device=images.device)[:, None, None]
    std = torch.tensor(_CIFAR_STD, device=images.device)[:, None, None]
    return (images.to(torch.float32) / 255 - mean) / std


def _load_state(model: nn.Module, file: Path) -> None:
    state = load_safetensors(file)
    # Batch counters serve only training, and converted files leave them out.
    expected = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    missing, unknown = sorted(expected - state.keys()), sorted(state.keys() - model.state_dict().keys())
    if missing or unknown:
        raise ValueError(
            f"the weights in {file} do not fit {type(model).__name__}: missing {missing[:3]}, "
            f"unknown {unknown[:3]}"
        )
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"the weights in {file} do not fit {type(model).__name__}: {error}") from error


def load_classifier(folder: str | Path | None = None) -> MNISTClassifier:
    """The classifier that `evalp-fast train classifier` wrote to `folder`; by default the one that ships.

    Raises:
        ValueError: no such files, damaged ones, or files that do not belong together.
    """
    location = (
        Path(str(resources.files("evalp_fast.pretrained"))) / "mnist_cnn" if folder is None else Path(folder)
    )
    config, weights = read_json(location / "config.json"), location / "model.safetensors"
    if not isinstance(config, dict) or config.get("architecture") != "MNISTClassifier":
        raise ValueError(
            f"{location} must hold a classifier that evalp-fast trained; its config.json says otherwise"
        )
    if config.get("format") != 1:
        raise ValueError(f"{location} has format {config.get('format')}, this evalp_fast reads format 1")
    model = MNISTClassifier()
    _load_state(model, weights)
    if hashlib.sha256(weights.read_bytes()).hexdigest() != config.get("weights_sha256"):
        raise ValueError(f"{weights} is not the file that config.json describes: copy both from one place")
    return model.eval().requires_grad_(False)


def _mnist_cnn(weights: Path | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    model = load_classifier(weights).to(device)
    return lambda images: model.features(images.to(torch.float32) / 255)


def _cifar_resnet56(weights: Path | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    if weights is None:
        raise ValueError("cifar_resnet56 needs its weights: pass --weights FILE (a safetensors file)")
    model = CIFARResNet56()
    _load_state(model, weights)
    model.eval().requires_grad_(False).to(device)
    return lambda images: model.features(normalise_cifar(images))


def _inception(weights: Path | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError("inception features need torch-fidelity: pip install 'evalp-fast[fid]'") from error
    if weights is not None:
        # torch-fidelity unpickles whatever the file holds; a file that passes here can hold tensors only.
        try:
            torch.load(weights, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, BadZipFile, pickle.UnpicklingError) as error:
            raise ValueError(
                f"weights must be torch-fidelity's Inception file; {weights} is not ({error})"
            ) from error
    path = None if weights is None else str(weights)
    try:
        model = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=path
        )
    except OSError as error:
        raise ValueError(
            f"the Inception weights could not be downloaded ({error}): pass --weights FILE, "
            "torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
        ) from error
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"weights must be torch-fidelity's Inception file; {path} is not ({error})"
        ) from error
    model.to(device)

    def compute(images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"inception takes images with 1 or 3 channels, got {images.shape[1]}")
        return model(images.expand(-1, 3, -1, -1))[0]

    return compute


_Factory = Callable[[Path | None, torch.device], Callable[[Tensor], Tensor]]
_EXTRACTORS: dict[str, tuple[int, tuple[int | None, ...], int, _Factory]] = {
    "mnist_cnn": (MNISTClassifier.feature_dim, MNISTClassifier.image_shape, 500, _mnist_cnn),
    "cifar_resnet56": (64, (3, 32, 32), 250, _cifar_resnet56),
    "inception": (2048, (None, None, None), 50, _inception),
}
FEATURE_NAMES = tuple(_EXTRACTORS)


def features(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    batch_size: int | None = None,
) -> FeatureExtractor:
    """The feature space of that name.

    - `mnist_cnn`: 64 features of the small MNIST classifier that ships with the package, images
      `[N, 1, 32, 32]`; `weights` may name the folder of another one.
    - `cifar_resnet56`: 64 features of a CIFAR-10 ResNet-56, images `[N, 3, 32, 32]`; `weights` names its
      safetensors file.
    - `inception`: the 2,048 features of FID through torch-fidelity, images of any size with 3 channels or 1
      (which is repeated); `weights` names its file, which is downloaded otherwise.

    Args:
        name: one of `FEATURE_NAMES`.
        weights: see above.
        device: where to compute.
        batch_size: images in one pass of the network; by default what fits in 1 GB.

    Raises:
        ValueError: unknown name, batch_size below 1, or weights that are missing or do not fit.
        ImportError: `inception` without torch-fidelity.
    """
    if name not in _EXTRACTORS:
        raise ValueError(f"features must be one of {', '.join(FEATURE_NAMES)}, got {name!r}")
    dim, image_shape, default_batch_size, factory = _EXTRACTORS[name]
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = torch.device(device)
    compute = factory(None if weights is None else Path(weights), device)
    return FeatureExtractor(name, dim, image_shape, device, batch_size or default_batch_size, compute)


__all__ = [
    "FEATURE_NAMES",
    "CIFARResNet56",
    "FeatureExtractor",
    "features",
    "load_classifier",
    "normalise_cifar",
]
