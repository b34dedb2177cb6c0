"""Sampling-importance-resampling (Rubin 1988) with a flow as the proposal."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from evalp_fast.kernels import philox
from evalp_fast.kernels.importance import summarize
from evalp_fast.samplers.base import Draws
from evalp_fast.samplers.direct import Proposal, check_temperature

LogWeight = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(z [N, D], u [N, D], log|det dz/du| [N])` to the log-weights `[N]` of the proposals `z = g(u)`."""

_ROWS = 8192  # proposals evaluated at once: their hidden layers fit in a CPU's cache


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

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.proposals < 1:
            raise ValueError(f"proposals must be at least 1, got {self.proposals}")

    def __call__(self, seed: int, index: Tensor) -> Draws:
        count = index.shape[0]
        # One clock per proposal, exponential with rate w: the first to ring is a draw with probability w/Σw.
        log_clock = philox.exponential(seed, index, 0, philox.Stream.SELECTION, self.proposals).log()
        best = torch.full((count,), -torch.inf, device=index.device)
        chosen = torch.zeros(count, self.dim, device=index.device)
        all_weights = torch.empty(count, self.proposals, device=index.device)
        at_once = max(1, _ROWS // count)
        for first in range(0, self.proposals, at_once):
            steps = torch.arange(first, min(first + at_once, self.proposals), device=index.device)
            u = philox.normal(
                seed,
                index.repeat_interleave(len(steps)),
                steps.repeat(count),
                philox.Stream.PROPOSAL,
                self.dim,
            )
            u = u * self.temperature**0.5
            z, log_det = self.proposal(u)
            weights = self.log_weight(z, u, log_det).float().reshape(count, len(steps))
            all_weights[:, first : first + len(steps)] = weights
            score = (
                weights.masked_fill(~weights.isfinite(), -torch.inf)
                - log_clock[:, first : first + len(steps)]
            )
            leader, place = score.max(dim=1)
            ahead = leader > best
            best = torch.where(ahead, leader, best)
            rows = z.reshape(count, len(steps), self.dim)[torch.arange(count, device=index.device), place]
            chosen = torch.where(ahead[:, None], rows, chosen)
        summary = summarize(all_weights)
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
                "log_mean_weight": summary.log_mean,
                "non_finite": summary.non_finite,
            },
        )
