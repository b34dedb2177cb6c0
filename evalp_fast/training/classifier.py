"""Trains the MNIST classifier behind `fd_mnist_cnn`: `evalp-fast train classifier`."""

import dataclasses
import datetime
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from evalp_fast.data import epoch_permutation, load_dataset
from evalp_fast.files import save_safetensors_atomic, write_json_atomic
from evalp_fast.kernels.philox import Stream, words
from evalp_fast.models.classifier import MNISTClassifier, initialise
from evalp_fast.training.run import DivergenceError, command_line, versions

_EVALUATION_BATCH = 1_000


@dataclass(frozen=True)
class ClassifierConfig:
    """How the classifier is trained. The defaults take about three minutes on two CPU cores."""

    epochs: int = 8
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW: a linear warm-up over the first tenth of the steps, then a cosine to 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    max_shift: int = 2
    """Each image is moved by -max_shift..max_shift pixels in each direction, anew in every epoch."""
    seed: int = 0
    """Fixes the initial weights, the order of the images and their shifts."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.max_shift <= 2:
            raise ValueError(
                f"max_shift must be 0, 1 or 2 (the digits have a margin of 2 pixels), got {self.max_shift}"
            )


def _check_images(images: Tensor, labels: Tensor, name: str) -> None:
    shape = MNISTClassifier.image_shape
    if images.dtype != torch.uint8 or images.shape[1:] != shape or len(images) == 0:
        raise ValueError(
            f"{name} images must be uint8 [N, 1, 32, 32] with N > 0, got {images.dtype} {list(images.shape)}"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{name} labels must be int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}"
        )


def epoch_shifts(config: ClassifierConfig, number_of_images: int, epoch: int) -> Tensor:
    """The (vertical, horizontal) shift of each image in an epoch, int64 `[N, 2]` in -max_shift..max_shift.

    A function of `(seed, number of the image, epoch)`. Column 0 of the same noise orders the images
    (`epoch_permutation`), so columns 1 and 2 are taken.
    """
    noise = words(config.seed, torch.arange(number_of_images), epoch, Stream.DATA_ORDER, 3)[:, 1:]
    # (word·k) >> 32 is uniform on 0..k-1 up to k/2^32.
    return ((noise * (2 * config.max_shift + 1)) >> 32) - config.max_shift


def shift_images(images: Tensor, shifts: Tensor) -> Tensor:
    """Moves each image `[N, 1, H, W]` down and right by `shifts` `[N, 2]`, around the edges.

    The padded digits have an empty margin of two pixels, so nothing but zeros goes round up to two pixels.
    """
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=images.device) - shifts[:, :1]) % height
    columns = (torch.arange(width, device=images.device) - shifts[:, 1:]) % width
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return images[:, 0][sample, rows[:, :, None], columns[:, None, :]][:, None]


@torch.no_grad()
def accuracy(model: MNISTClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of the uint8 images `[N, 1, 32, 32]` whose most probable class is the label, int64 `[N]`."""
    device = next(model.parameters()).device
    model.eval()
    correct = 0
    for batch, target in zip(images.split(_EVALUATION_BATCH), labels.split(_EVALUATION_BATCH), strict=True):
        logits = model(batch.to(device, torch.float32) / 255)
        correct += int((logits.argmax(1) == target.to(device)).sum())
    return correct / len(images)


def train_classifier(
    config: ClassifierConfig,
    images: Tensor,
    labels: Tensor,
    *,
    validation: tuple[Tensor, Tensor] | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
    log: Callable[[dict[str, float]], None] | None = None,
) -> MNISTClassifier:
    """Trains on cross-entropy with AdamW; a function of its arguments alone on one device.

    Args:
        config: the hyperparameters.
        images: uint8 `[N, 1, 32, 32]`.
        labels: int64 `[N]`, 0..9.
        validation: images and labels that are scored after each epoch. They choose nothing: the learning rate
            ends at 0 and the last weights are returned.
        device: where to train.
        progress: shows a progress bar.
        log: called after each epoch with its number, mean training loss and validation accuracy.

    Returns:
        The trained model in evaluation mode.

    Raises:
        ValueError: a tensor of another dtype or shape.
        DivergenceError: the loss is not finite.
    """
    _check_images(images, labels, "training")
    if validation is not None:
        _check_images(*validation, "validation")
    model = MNISTClassifier()
    initialise(model, config.seed)
    model.to(device)
    images, labels = images.to(device), labels.to(device)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    steps_per_epoch = math.ceil(len(images) / config.batch_size)
    total, step = config.epochs * steps_per_epoch, 0
    warm_up = max(1, total // 10)
    with tqdm(total=total, disable=not progress, desc="train classifier", unit="step") as bar:
        for epoch in range(config.epochs):
            order = epoch_permutation(len(images), seed=config.seed, epoch=epoch).to(device)
            shifts = epoch_shifts(config, len(images), epoch).to(device)
            model.train()
            loss_sum = torch.zeros((), device=device)
            for chosen in order.split(config.batch_size):
                cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warm_up) / max(1, total - warm_up)))
                optimiser.param_groups[0]["lr"] = (
                    config.learning_rate * min(1.0, (step + 1) / warm_up) * cosine
                )
                batch = shift_images(images[chosen], shifts[chosen]).to(torch.float32) / 255
                loss = F.cross_entropy(model(batch), labels[chosen])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                loss_sum += loss.detach() * len(chosen)
                step += 1
                bar.update()
            mean_loss = float(loss_sum) / len(images)
            if not math.isfinite(mean_loss):
                raise DivergenceError(
                    f"training diverged in epoch {epoch + 1}: the loss is {mean_loss}; lower learning_rate "
                    f"(now {config.learning_rate})"
                )
            record = {"epoch": epoch + 1, "loss": mean_loss}
            if validation is not None:
                record["validation_accuracy"] = accuracy(model, *validation)
            bar.set_postfix({name: f"{value:.4g}" for name, value in record.items()})
            if log is not None:
                log(record)
    return model.eval()


def save_classifier(model: MNISTClassifier, out_dir: str | Path, description: dict[str, Any]) -> None:
    """Writes `model.safetensors`, then `config.json` (`description` and the SHA-256 of the weights).

    Each file is replaced as a whole. The digest ties the two together: a pair that a crash tore apart is
    refused by the loader.
    """
    weights = Path(out_dir) / "model.safetensors"
    save_safetensors_atomic(model.state_dict(), weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    write_json_atomic({**description, "weights_sha256": digest}, Path(out_dir) / "config.json")


def train_mnist_classifier(
    data_root: str | Path | None,
    out_dir: str | Path,
    config: ClassifierConfig,
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
    command: str | None = None,
) -> dict[str, Any]:
    """Trains on MNIST's first 55,000 training images, validates on the other 5,000, tests once, saves.

    Args:
        data_root: the folder that holds `MNIST/raw`; None: `$EVALP_DATA`, else a download.
        out_dir: receives `model.safetensors` and `config.json`.
        config: the hyperparameters.
        device: where to train.
        progress: shows a progress bar.
        command: recorded in `config.json`, so that a reader can repeat it. Default: that of this process.

    Returns:
        What `config.json` says: accuracies, losses, seconds, versions, date, hyperparameters.

    Raises:
        DataError: no MNIST under `data_root`. Nothing is written then.
        DivergenceError: the training diverged. Nothing is written then.
        ImportError: torchvision is not installed.
        OSError: `out_dir` cannot be written.
    """
    split = {}
    for name in ("train", "validation", "test"):
        dataset = load_dataset("mnist", split=name, root=data_root)
        if dataset.labels is None:
            raise ValueError(f"data_root must hold labelled images, {data_root} holds images alone")
        split[name] = (dataset.images, dataset.labels)
    history: list[dict[str, float]] = []
    start = time.perf_counter()
    model = train_classifier(
        config,
        *split["train"],
        validation=split["validation"],
        device=device,
        progress=progress,
        log=history.append,
    )
    description = {
        "format": 1,
        "architecture": "MNISTClassifier",
        "data": f"MNIST, padded to 32x32: {len(split['train'][0]):,} training images of the "
        f"training set, the other {len(split['validation'][0]):,} to validate",
        "test_accuracy": accuracy(model, *split["test"]),
        "validation_accuracy": history[-1]["validation_accuracy"],
        "config": dataclasses.asdict(config),
        "command": command or command_line(),
        "seconds": round(time.perf_counter() - start, 1),
        "device": str(device),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": versions(),
        "history": history,
    }
    save_classifier(model, out_dir, description)
    return description


__all__ = [
    "ClassifierConfig",
    "accuracy",
    "epoch_shifts",
    "save_classifier",
    "shift_images",
    "train_classifier",
    "train_mnist_classifier",
]
