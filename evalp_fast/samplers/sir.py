"""Sampling-importance-resampling (Rubin 1988) with a flow as the proposal."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from evalp_fast.kernels import philox
from evalp_fast.kernels.checks import check_integer, check_positive
from evalp_fast.kernels.importance import WeightStatistics, finish, merge, weight_statistics
from evalp_fast.samplers.base import Draws
from evalp_fast.samplers.direct import Proposal

LogWeight = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(z [N, D], u [N, D], log|det dz/du| [N])` to the log-weights `[N]` of the proposals `z = g(u)`."""

_ROWS = 8192  # proposals evaluated at once: their hidden layers fit in a CPU's cache
_CLOCKS = 4


@dataclass(frozen=True)
class SIRSampler:
    """Each sample is one of `proposals` draws of the flow, chosen in proportion to its weight.

    The choice is a Gumbel-max race that runs along with the proposals: only the leader is kept, so memory
    does not grow with their number. A weight that is not finite counts as zero and is counted.

    Attributes:
        proposal: the flow's forward pass.
        log_weight: the log-weight of a proposal; `-inf` is weight zero.
        dim: latent dimension.
        proposals: draws per sample. Proposal 0 of a sample is what `FlowSampler` draws for it.
        temperature: T of the noise; the caller's `log_weight` must be that of the proposals at T.
        offset: what `log_weight` leaves out because all proposals share it, in case it is so large that
            float32 would round away what sets them apart; it is added to `log_mean_weight`.
        dtype: of the noise and the weights, float32 or float64.

    Diagnostics per sample: `ess` (effective sample size (Σw)²/Σw², of at most `proposals`),
    `log_mean_weight` (an unbiased estimate of Z in the log), `non_finite`.

    Raises:
        ValueError: when no proposal of a sample has a positive finite weight, naming the sample.
    """

    proposal: Proposal
    log_weight: LogWeight
    dim: int
    proposals: int = 100
    temperature: float = 1.0
    offset: float = 0.0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_integer("proposals", self.proposals, 1)

    def __call__(self, seed: int, index: Tensor) -> Draws:
        count = index.shape[0]
        best = torch.full((count,), -torch.inf, dtype=self.dtype, device=index.device)
        chosen = torch.zeros(count, self.dim, dtype=self.dtype, device=index.device)
        statistics: WeightStatistics | None = None
        at_once = max(1, _ROWS // (count * _CLOCKS)) * _CLOCKS
        for first in range(0, self.proposals, at_once):
            number = min(at_once, self.proposals - first)
            z, weights = self._propose(seed, index, first, number)
            part = weight_statistics(weights)
            statistics = part if statistics is None else merge(statistics, part)
            usable = weights.masked_fill(~weights.isfinite(), -torch.inf)
            leader, place = (usable - self._log_clocks(seed, index, first, number)).max(dim=1)
            ahead = leader > best
            best = torch.where(ahead, leader, best)
            rows = z[torch.arange(count, device=index.device), place]
            chosen = torch.where(ahead[:, None], rows, chosen)
        assert statistics is not None
        summary = finish(statistics)
        if torch.isneginf(best).any():
            row = int(index[torch.isneginf(best)][0])
            raise ValueError(
                f"sample {row}: none of its {self.proposals} proposals has a positive finite weight; "
                "the energy or the flow gives values that are not finite, or they share no support"
            )
        return Draws(
            chosen,
            {
                "ess": summary.ess,
                "log_mean_weight": summary.log_mean + self.offset,
                "non_finite": summary.non_finite,
            },
        )

    def _propose(self, seed: int, index: Tensor, first: int, number: int) -> tuple[Tensor, Tensor]:
        """Proposals `first .. first+number-1` of each sample, `[N, number, D]`, and their log-weights."""
        steps = torch.arange(first, first + number, device=index.device).repeat(len(index))
        of = index.repeat_interleave(number)
        noise = philox.normal(seed, of, steps, philox.Stream.PROPOSAL, self.dim, dtype=self.dtype)
        u = noise * self.temperature**0.5
        z, log_det = self.proposal(u)
        weights = self.log_weight(z, u, log_det).to(self.dtype)
        return z.reshape(-1, number, self.dim), weights.reshape(-1, number)

    def _log_clocks(self, seed: int, index: Tensor, first: int, number: int) -> Tensor:
        """Log of a standard exponential clock per proposal, `[N, number]`.

        Divided by its weight a clock has rate w, and the first to ring is a draw with probability w/Σw. Four
        proposals share a step, as noise comes in fours.
        """
        blocks = torch.arange(first // _CLOCKS, -(-(first + number) // _CLOCKS), device=index.device)
        of = index.repeat_interleave(len(blocks))
        steps = blocks.repeat(len(index))
        clocks = philox.exponential(seed, of, steps, philox.Stream.SELECTION, _CLOCKS, dtype=self.dtype)
        return clocks.log().reshape(len(index), -1)[:, :number]
