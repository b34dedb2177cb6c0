"""The normalising constant of a prior, from importance weights: its estimate, interval and bounds."""

from typing import NamedTuple

import torch
from torch import Tensor

from evalp_fast.kernels import philox


class LogPartition(NamedTuple):
    """An estimate of log Z = log ∫ base(z)·exp(-energy(z)) dz.

    Attributes:
        value: log of the mean importance weight.
        low, high: 95 % bootstrap interval of `value`.
        lower_bound: E_g[log w], the bound of the sampler's training (Jensen).
        upper_bound: E_p[log w], estimated with self-normalised weights.
        ess: effective sample size of the weights, out of `n`.
        n: number of weights.
        non_finite: how many of them are NaN or +inf, and count as weight zero.
    """

    value: float
    low: float
    high: float
    lower_bound: float
    upper_bound: float
    ess: float
    n: int
    non_finite: int


def log_partition_of(log_weights: Tensor, *, seed: int = 0, replicates: int = 200) -> LogPartition:
    """log Z from the log-weights `[N]` of N draws of a proposal, in float64.

    Args:
        log_weights: log of unnormalised target over proposal; -inf is weight zero.
        seed: of the bootstrap.
        replicates: of the bootstrap.

    Raises:
        ValueError: when no weight is positive and finite.
    """
    log_weights = log_weights.double()
    n = log_weights.shape[0]
    finite = log_weights.masked_fill(~log_weights.isfinite(), -torch.inf)
    if torch.isneginf(finite).all():
        raise ValueError(f"none of the {n} importance weights is positive and finite")
    shift = finite.max()
    weights = torch.exp(finite - shift)
    means = bootstrap_means(weights, replicates, seed)
    # Order statistics, not between two: where few weights count, log of a mean may be -inf.
    low = torch.quantile(means, 0.025, interpolation="lower").log() + shift
    high = torch.quantile(means, 0.975, interpolation="higher").log() + shift
    share = weights / weights.sum()
    kept = share > 0
    return LogPartition(
        value=float(weights.mean().log() + shift),
        low=float(low),
        high=float(high),
        lower_bound=float(finite.mean()),
        upper_bound=float((share[kept] * finite[kept]).sum()),
        ess=float(1.0 / share.square().sum()),
        n=n,
        non_finite=int((~log_weights.isfinite() & ~log_weights.isneginf()).sum()),
    )


def bootstrap_means(values: Tensor, replicates: int, seed: int) -> Tensor:
    """Means of `replicates` resamples of `values` `[N]` with replacement: `[replicates]`."""
    n = values.shape[0]
    means = []
    for replicate in range(replicates):
        index = torch.tensor([replicate], device=values.device)
        words = philox.words(seed, index, 0, philox.Stream.BOOTSTRAP, n)[0]
        means.append(values[(words * n) >> 32].mean())
    return torch.stack(means)


__all__ = ["LogPartition", "bootstrap_means", "log_partition_of"]
