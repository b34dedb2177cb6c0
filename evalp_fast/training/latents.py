"""Stage two's data: the posterior of every training image, encoded once, and what is measured against it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evalp_fast.data import load_dataset
from evalp_fast.files import FileError
from evalp_fast.images import save_grid
from evalp_fast.metrics.mmd import median_bandwidths, mmd2
from evalp_fast.pipeline import EVaLP, EVaLPConfig, draw_posterior
from evalp_fast.priors import PriorConfig
from evalp_fast.training.run import Run, command_line, versions

_VALIDATION_STEP = 2**31
_MMD_ROWS = 5000


@dataclass(frozen=True)
class Posterior:
    """Mean and log-variance of q(z|x), `[N, D]` each, of a set of images."""

    mean: Tensor
    log_variance: Tensor

    def draw(self, rows: Tensor, *, seed: int, step: int) -> Tensor:
        """A draw for each image in `rows`; its noise is that of `(seed, row, step)`."""
        return draw_posterior(self.mean[rows], self.log_variance[rows], rows, seed=seed, step=step)

    def draw_all(self, *, seed: int, step: int = _VALIDATION_STEP) -> Tensor:
        """One draw of every image: a sample of the aggregate posterior."""
        return self.draw(torch.arange(len(self.mean), device=self.mean.device), seed=seed, step=step)


class Latents(NamedTuple):
    """What a prior is trained on and measured against."""

    vae: EVaLP
    train: Posterior
    validation: Posterior
    source: str
    name: str
    images: int


def encode(
    vae: str | Path,
    data: str | None,
    *,
    device: str | torch.device = "cpu",
    limit: int | None = None,
    skip_broken: bool = False,
    progress: bool = False,
) -> Latents:
    """The posteriors of a trained VAE for its training and validation images.

    Args:
        vae: run, folder or name of the VAE (or of a model whose prior is to be trained anew).
        data: the images; by default those that the VAE was trained on.

    Raises:
        FileError: no such model, or no data given and none recorded in the model.
    """
    model = EVaLP.from_pretrained(vae, device=device)
    stages = model.info.get("training", [])
    source = data or (stages[0].get("source") if stages else None)
    if source is None:
        raise FileError(f"{vae} does not say which images it was trained on: pass --data")
    shape = model.config.vae
    posteriors = []
    names = []
    for split in ("train", "validation"):
        dataset = load_dataset(
            source,
            split=split,
            image_size=shape.image_size,
            channels=shape.image_channels,
            limit=limit,
            skip_broken=skip_broken,
            progress=progress,
        )
        posteriors.append(Posterior(*model.posterior(dataset.images)))
        names.append(dataset.name)
    train, validation = posteriors
    return Latents(model, train, validation, source, names[0], len(train.mean))


def models_with_new_prior(
    latents: Latents, shape: PriorConfig, *, seed: int, device: str | torch.device
) -> tuple[EVaLP, EVaLP]:
    """Two equal models of the trained VAE and a new prior: one to train, one to hold what is evaluated."""
    torch.manual_seed(seed)
    trained = EVaLP(EVaLPConfig(latents.vae.config.vae, shape)).to(device)
    trained.vae.load_state_dict(latents.vae.vae.state_dict())
    evaluated = EVaLP(trained.config).to(device).eval()
    evaluated.load_state_dict(trained.state_dict())
    return trained, evaluated


class PriorMonitor:
    """Measures of a prior on validation latents, the same draws at every evaluation."""

    def __init__(self, validation: Posterior, seed: int):
        self.latents = validation.draw_all(seed=seed)
        self.reference = self.latents[:_MMD_ROWS]
        self.bandwidths = median_bandwidths(self.reference)

    @torch.no_grad()
    def measure(self, model: EVaLP, *, proposals: int = 100) -> dict[str, float]:
        """MMD² of flow and SIR samples to the reference, ESS, and the negative log-likelihood in nats."""
        prior = model.prior
        assert prior is not None
        flow = prior.sample(_MMD_ROWS, method="flow", precision="ieee")
        sir = prior.draw(2048, method="sir", proposals=proposals, precision="ieee")
        partition = prior.log_partition(16_384, replicates=2)
        log_p = prior.log_prob_unnormalized(self.latents).double().mean()
        return {
            "mmd2_flow": mmd2(flow, self.reference, bandwidths=self.bandwidths).value,
            "mmd2_sir": mmd2(sir.samples, self.reference, bandwidths=self.bandwidths).value,
            "ess": float(sir.diagnostics["ess"].mean()),
            "log_partition": partition.value,
            "nll_flow": -float(prior.flow.log_prob(self.latents).double().mean()),
            "nll_prior": partition.value - float(log_p),
        }


def prior_stage(
    stage: str, latents: Latents, *, seed: int, step: int, minutes: float, **settings: Any
) -> dict[str, Any]:
    """What a model card says of the prior's training."""
    return {
        "stage": stage,
        "command": command_line(),
        "data": latents.name,
        "source": latents.source,
        "images": latents.images,
        "seed": seed,
        "steps": step,
        "minutes": minutes,
        **settings,
        "versions": versions(),
    }


def save_method_grids(model: EVaLP, run: Run, step: int) -> None:
    """One grid of 128 samples by flow and by SIR, from the same noise at every evaluation."""
    for method in ("flow", "sir"):
        save_grid(
            model.sample(128, method=method, output="uint8"),
            run.directory / "samples" / f"{method}-{step:06d}.png",
            columns=16,
        )
