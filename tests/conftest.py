"""Shared by all tests: the Triton interpreter where there is no GPU, the markers, and a law that is known."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

Pair = tuple[float, float]

if not torch.cuda.is_available():
    # Read when triton is first imported, so it must be set before any kernel is.
    os.environ.setdefault("TRITON_INTERPRET", "1")

MNIST_EXCERPT = Path(__file__).parent / "data" / "mnist_excerpt.npz"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    root = os.environ.get("EVALP_DATA", "")
    no_data = pytest.mark.skip(
        reason="needs the complete MNIST: set EVALP_DATA to the folder that holds MNIST/raw"
    )
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "full_data" in item.keywords and not (root and (Path(root) / "MNIST" / "raw").is_dir()):
            item.add_marker(no_data)


@pytest.fixture
def unrounded_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter "tf32" without the rounding of its operands: those kernels, as exact as "ieee"."""
    if not torch.cuda.is_available():
        for name in ("mlp_device", "weights_gpu"):
            monkeypatch.setattr(f"evalp_fast.kernels.{name}.tf32", lambda value: value)


@pytest.fixture(autouse=True)
def bfloat16_products() -> Iterator[None]:
    """On every CPU "bf16" rounds in tests, though a user may be given float32 because that is faster; and no
    test takes it by default, though a user may. Not by a test's own `monkeypatch`, which it may undo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evalp_fast.kernels.processor.BFLOAT16_PAYS", None)
        yield


class GaussianMixture:
    """A 2-D mixture of axis-aligned Gaussians, whose density and cell probabilities are known."""

    def __init__(self, shares: Sequence[float], means: Sequence[Pair], deviations: Sequence[Pair]):
        self.shares = torch.tensor(shares, dtype=torch.float64)
        self.means = torch.tensor(means, dtype=torch.float64)
        self.deviations = torch.tensor(deviations, dtype=torch.float64)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log p of the rows of `z` `[N, 2]`, in its dtype: `[N]`."""
        law = torch.distributions.Normal(self.means.to(z), self.deviations.to(z))
        return torch.logsumexp(law.log_prob(z[:, None]).sum(dim=2) + self.shares.log().to(z), dim=1)

    def sample(self, n: int, seed: int = 0) -> torch.Tensor:
        """`n` exact draws, float32 `[n, 2]`."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.shares, n, replacement=True, generator=generator)
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return (self.means[which] + self.deviations[which] * noise).float()

    def p_value(self, samples: torch.Tensor, cells: int = 8, expected: float = 20.0) -> float:
        """Chi-square test of independent `samples` `[N, 2]` against the exact law in `cells`² cells.

        The edges are marginal quantiles of exact draws, and the outer cells are unbounded. Cells that expect
        fewer than `expected` samples are counted as one.
        """
        quantiles = torch.arange(1, cells, dtype=torch.float64) / cells
        edges = torch.quantile(self.sample(10_000, seed=1).double(), quantiles, dim=0)
        infinite = torch.full((1, 2), math.inf, dtype=torch.float64)
        bounds = torch.cat((-infinite, edges, infinite))
        standard = (bounds[:, None] - self.means) / self.deviations
        sides = torch.special.ndtr(standard).diff(dim=0)  # [cells, components, 2]
        probability = torch.einsum("k,ik,jk->ij", self.shares, sides[..., 0], sides[..., 1]).flatten()
        place = [torch.bucketize(samples[:, d].double(), edges[:, d].contiguous()) for d in (0, 1)]
        counts = torch.bincount(place[0] * cells + place[1], minlength=cells**2).double()
        rare = probability * len(samples) < expected
        observed = torch.cat((counts[~rare], counts[rare].sum().view(1)))
        wanted = torch.cat((probability[~rare], probability[rare].sum().view(1))) * len(samples)
        if wanted[-1] < expected:  # no cell is rare, or all of them together still are
            observed = torch.cat((observed[:-2], observed[-2:].sum().view(1)))
            wanted = torch.cat((wanted[:-2], wanted[-2:].sum().view(1)))
        return float(scipy.stats.chisquare(observed.numpy(), wanted.numpy()).pvalue)


@pytest.fixture(scope="session")
def mixture() -> GaussianMixture:
    """Two unequal modes, close enough for one Gaussian to cover both with bounded weights."""
    return GaussianMixture((0.6, 0.4), ((-0.8, 0.2), (0.9, -0.4)), ((0.7, 0.7), (0.6, 0.6)))


@pytest.fixture(scope="session")
def gaussian_mixture() -> type[GaussianMixture]:
    """To make other mixtures."""
    return GaussianMixture


@pytest.fixture(scope="session")
def padded_excerpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The excerpt of MNIST, padded to 32x32, as an array file with splits."""
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    with np.load(MNIST_EXCERPT) as arrays:
        images = {
            name: np.pad(arrays[name], ((0, 0), (2, 2), (2, 2))) for name in ("train_images", "test_images")
        }
    np.savez(path, **images)
    return path


@pytest.fixture(scope="session")
def tiny_vae(padded_excerpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a small VAE, trained for seconds on the excerpt."""
    from evalp_fast.models.vae import VAEConfig
    from evalp_fast.training.vae import VAETraining, train_vae

    shape = VAEConfig(latent_dim=4, encoder_channels=(8, 16), decoder_channels=(16, 8, 8))
    out = tmp_path_factory.mktemp("tiny") / "vae"
    train_vae(VAETraining(str(padded_excerpt), shape, epochs=2, batch_size=64, learning_rate=3e-3), out)
    return out


@pytest.fixture(scope="session")
def tiny_model(tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a small EVaLP on `tiny_vae`."""
    from evalp_fast.training.residual import ResidualTraining, train_residual_prior

    config = ResidualTraining(
        couplings=2,
        flow_hidden=16,
        flow_epochs=4,
        flow_batch_size=128,
        energy_hidden=16,
        energy_epochs=2,
        energy_batch_size=128,
        evaluate_every=4,
        moving_average=0.9,
    )
    out = tmp_path_factory.mktemp("tiny") / "prior"
    train_residual_prior(config, tiny_vae, out)
    return out
