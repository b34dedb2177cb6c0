"""Stage one: the VAE."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from evalp_fast.data import DataOrder, ImageDataset, load_dataset, to_float
from evalp_fast.images import save_grid, to_uint8
from evalp_fast.kernels import philox
from evalp_fast.models.vae import VAEConfig
from evalp_fast.pipeline import EVaLP, EVaLPConfig
from evalp_fast.training.run import Run, command_line, cosine_schedule, set_learning_rate, versions

_VALIDATION_STEP = 2**31  # the step of the validation noise, which no training step reaches


@dataclass(frozen=True)
class VAETraining:
    """How a VAE is trained.

    Attributes:
        data: `mnist`, `cifar10`, `celeba64`, a folder of images, or a .npy/.npz file of uint8 images.
        model: the network's shape.
        kl_weight: factor on the KL beside the squared error (mean over channels, sum over pixels).
        epochs: passes over the training split.
        batch_size: images per step.
        learning_rate: of Adam.
        betas: of Adam.
        schedule: `cosine` to zero after 200 steps of warm-up, or `constant`.
        seed: of the initial weights, the data order and the posterior noise.
        limit: use only the first images of the training split.
        skip_broken: leave out image files that cannot be read, instead of stopping.
    """

    data: str = "mnist"
    model: VAEConfig = field(default_factory=VAEConfig)
    kl_weight: float = 0.1
    epochs: int = 15
    batch_size: int = 256
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "constant"] = "cosine"
    seed: int = 0
    limit: int | None = None
    skip_broken: bool = False

    def __post_init__(self) -> None:
        for name in ("kl_weight", "epochs", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def load_splits(config: VAETraining, *, progress: bool = False) -> tuple[ImageDataset, ImageDataset]:
    """The training and validation images that a VAE of this configuration is trained on."""
    train, validation = (
        load_dataset(
            config.data,
            split=split,
            image_size=config.model.image_size,
            channels=config.model.image_channels,
            skip_broken=config.skip_broken,
            limit=config.limit,
            progress=progress,
        )
        for split in ("train", "validation")
    )
    return train, validation


@torch.no_grad()
def validation_loss(model: EVaLP, images: torch.Tensor, config: VAETraining) -> dict[str, float]:
    """The loss and its parts on held-out images, in evaluation mode, with the same noise every time."""
    model.eval()
    totals: dict[str, float] = {}
    for first in range(0, len(images), 1000):
        chunk = images[first : first + 1000]
        index = torch.arange(first, first + len(chunk), device=images.device)
        noise = philox.normal(
            config.seed, index, _VALIDATION_STEP, philox.Stream.POSTERIOR, config.model.latent_dim
        )
        loss, parts = model.vae.loss(to_float(chunk), noise, config.kl_weight)
        for name, value in {"loss": loss, **parts}.items():
            totals[name] = totals.get(name, 0.0) + float(value) * len(chunk) / len(images)
    return totals


def train_vae(
    config: VAETraining,
    out: str | Path,
    *,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> EVaLP:
    """Train a VAE and leave a run in the folder `out`; returns the best model on validation images.

    Raises:
        DataError: the data are missing or broken.
        RunExistsError: `out` holds a run and `resume` is False, or holds another run.
        DivergenceError: the loss is no longer finite; what was saved before is kept.
    """
    run = Run(out, method="vae", config=config, resume=resume)
    train, validation = load_splits(config, progress=progress)
    images, held_out = train.images.to(device), validation.images.to(device)
    order = DataOrder(len(images), config.batch_size, config.seed)
    steps_per_epoch = len(images) // config.batch_size
    total = config.epochs * steps_per_epoch

    torch.manual_seed(config.seed)
    model = EVaLP(EVaLPConfig(config.model)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate, betas=config.betas, fused=True)
    parts = {"model": model, "optimizer": optimizer}
    saved = run.load(parts)
    step, best = saved.get("step", 0), saved.get("best", float("inf"))

    for epoch in range(step // steps_per_epoch, config.epochs):
        model.train()
        sums = {"loss": torch.zeros((), device=device), "kl": torch.zeros((), device=device)}
        bar = tqdm(
            total=steps_per_epoch, desc=f"VAE {epoch + 1}/{config.epochs}", disable=not progress, leave=False
        )
        for _ in range(steps_per_epoch):
            if config.schedule == "cosine":
                set_learning_rate(optimizer, config.learning_rate * cosine_schedule(step, total, 200))
            rows = order.batch(step).to(device)
            noise = philox.normal(config.seed, rows, epoch, philox.Stream.POSTERIOR, config.model.latent_dim)
            loss, terms = model.vae.loss(to_float(images[rows]), noise, config.kl_weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            sums["loss"] += loss.detach()
            sums["kl"] += terms["kl"]
            bar.update()
        bar.close()
        held = validation_loss(model, held_out, config)
        run.require_finite(step, loss=sums["loss"], validation_loss=held["loss"])
        run.log(
            step,
            {
                "epoch": epoch + 1,
                **{f"train_{name}": float(value) / steps_per_epoch for name, value in sums.items()},
                **{f"validation_{name}": value for name, value in held.items()},
            },
        )
        model.info = {
            "name": f"VAE on {train.name}",
            "training": [_stage(config, run, train, step, held)],
        }
        model.save_pretrained(run.directory / "last")
        if held["loss"] < best:
            best = held["loss"]
            model.save_pretrained(run.directory / "best")
        grid = model.reconstruct(held_out[:32])
        save_grid(
            torch.stack((held_out[:32], to_uint8(grid)), dim=1).flatten(0, 1),
            run.directory / "samples" / f"reconstructions-{epoch + 1:04d}.png",
            columns=16,
        )
        save_grid(
            model.sample(128, method="prior", output="uint8"),
            run.directory / "samples" / f"samples-{epoch + 1:04d}.png",
            columns=16,
        )
        run.save(step, {**parts, "best": best})
    run.close()
    return EVaLP.from_pretrained(run.directory, device=device)


def _stage(config: VAETraining, run: Run, data: ImageDataset, step: int, held: dict[str, float]) -> dict:
    return {
        "stage": "VAE",
        "command": command_line(),
        "data": data.name,
        "source": config.data,
        "images": len(data),
        "skipped_files": len(data.skipped),
        "kl_weight": config.kl_weight,
        "image_size": config.model.image_size,
        "seed": config.seed,
        "steps": step,
        "batch_size": config.batch_size,
        "minutes": run.seconds / 60,
        "validation": held,
        "versions": versions(),
    }
