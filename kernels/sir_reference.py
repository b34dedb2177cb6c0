"""SIR in plain torch: its weights, and the ops that `sir` is made of, one after the other. See `sir.py`."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import philox
from .energy import EnergyParameters, mlp_energy
from .flow import FlowOptions, FlowParameters, coupling_flow
from .importance import WeightStatistics, finish, merge, weight_statistics
from .launch import cdiv

# Proposals that share a block of the clocks' noise, which comes in fours.
_CLOCKS = 4
# Proposals that are evaluated at once: their hidden layers fit in a CPU's cache.
_AT_ONCE = 8192


class SIRDiagnostics(NamedTuple):
    """What the weights of a sample's proposals say, `[n]` each.

    Attributes:
        ess: effective sample size (Σw)²/Σw², of at most `proposals`.
        log_mean_weight: log of their mean; the mean is an unbiased estimate of the normalising constant.
        log_max: the largest log-weight.
        non_finite: int64, how many were NaN or +inf; they have weight zero.
    """

    ess: Tensor
    log_mean_weight: Tensor
    log_max: Tensor
    non_finite: Tensor


class SIRResult(NamedTuple):
    """Samples `z` `[n, D]`, the log-weight of each one's winner `[n]`, and the diagnostics."""

    z: Tensor
    log_weight: Tensor
    diagnostics: SIRDiagnostics


def flow_dim(flow: FlowParameters) -> int:
    """The dimension D."""
    return flow.weight_in.shape[2] + flow.weight_out.shape[1] // 2


class Weighting(NamedTuple):
    """A log-weight: `offset - energy·f + squares·(|u|² - |z|²) + log_det·log|det dz/du|`.

    A term of squares or log_det whose factor is 0 is left out, so that it cannot turn a weight into 0·inf;
    that of the energy never is.
    """

    energy: float
    squares: float
    log_det: float
    offset: float


def weighting(base: str, weights: str, energy_scale: float, temperature: float, dim: int) -> Weighting:
    """The log-weight that the arguments of `sir` mean."""
    energy = energy_scale / temperature
    if weights == "energy":
        return Weighting(energy, 0.0, 0.0, 0.0)
    rest = 1.0 - 1.0 / temperature
    offset = 0.5 * dim * (rest * math.log(2.0 * math.pi) + math.log(temperature))
    if base == "flow":
        return Weighting(energy, 0.0, rest, offset)
    return Weighting(energy, 0.5 / temperature, 1.0, offset)


def log_weight_of(weighting: Weighting, z: Tensor, u: Tensor, log_det: Tensor, energy: Tensor) -> Tensor:
    """The log-weights `[N]` of proposals z = g(u), float32 or float64, but for the offset, which all share:
    it grows with D/T, until float32 rounds away what sets the weights apart. Add it to what is made of them.
    """
    weight = -weighting.energy * energy
    if weighting.squares != 0.0:
        weight = weight + weighting.squares * (u.square().sum(1) - z.square().sum(1))
    if weighting.log_det != 0.0:
        weight = weight + weighting.log_det * log_det
    return weight


def sir_reference(
    seed: int | Tensor,
    index: Tensor,
    proposals: int,
    flow: FlowParameters,
    energy: EnergyParameters,
    rule: Weighting,
    temperature: float,
    options: FlowOptions,
    energy_activation: str,
) -> SIRResult:
    """What `sir` computes, from the ops that it is made of: specification, CPU path and oracle of the tests.

    Proposals come in blocks of a fixed size, of which only the leader is kept. `index` is int64 `[n]`.
    Proposal k of a sample has the noise of step k, and its clock is column k % 4 of the selection's step k //
    4. In a sample without a usable weight the result means nothing, and its log-weight is -inf.
    """
    parts = [
        _sir_block(seed, part, proposals, flow, energy, rule, temperature, options, energy_activation)
        for part in index.split(_AT_ONCE // _CLOCKS)
    ]
    if len(parts) == 1:
        return parts[0]
    diagnostics = zip(*(part.diagnostics for part in parts), strict=True)
    return SIRResult(
        torch.cat([part.z for part in parts]),
        torch.cat([part.log_weight for part in parts]),
        SIRDiagnostics(*(torch.cat(field) for field in diagnostics)),
    )


def _sir_block(
    seed: int | Tensor,
    index: Tensor,
    proposals: int,
    flow: FlowParameters,
    energy: EnergyParameters,
    rule: Weighting,
    temperature: float,
    options: FlowOptions,
    energy_activation: str,
) -> SIRResult:
    """The reference for as many samples as are drawn at once."""
    like, count, dim = flow.bias_in, index.shape[0], flow_dim(flow)
    best = like.new_full((count,), -math.inf)
    log_weight, z = best.clone(), like.new_zeros((count, dim))
    statistics: WeightStatistics | None = None
    at_once = max(1, _AT_ONCE // (max(count, 1) * _CLOCKS)) * _CLOCKS
    settings: dict[str, Any] = options._asdict() | {"inverse": False}
    for first in range(0, proposals, at_once):
        number = min(at_once, proposals - first)
        step = torch.arange(first, first + number, device=index.device).repeat(count)
        of = index.repeat_interleave(number)
        noise = philox.normal(seed, of, step, philox.Stream.PROPOSAL, dim, dtype=like.dtype)
        u = noise * math.sqrt(temperature)
        drawn, log_det = coupling_flow(u, flow, **settings)
        value = mlp_energy(
            drawn,
            energy,
            precision=settings["precision"],
            activation=energy_activation,  # pyright: ignore[reportArgumentType]
        )
        weights = log_weight_of(rule, drawn, u, log_det, value).view(count, number)
        part = weight_statistics(weights)
        statistics = part if statistics is None else merge(statistics, part)
        usable = torch.where(weights < math.inf, weights, -math.inf)
        arrival, place = (usable - _log_clocks(seed, index, first, number, like.dtype)).max(dim=1)
        ahead = arrival > best
        best = torch.where(ahead, arrival, best)
        log_weight = torch.where(ahead, usable.gather(1, place[:, None]).squeeze(1), log_weight)
        leader = drawn.view(count, number, dim)[torch.arange(count, device=index.device), place]
        z = torch.where(ahead[:, None], leader, z)
    assert statistics is not None
    summary = finish(statistics)
    offset = rule.offset
    diagnostics = SIRDiagnostics(
        summary.ess, summary.log_mean + offset, summary.log_max + offset, summary.non_finite
    )
    return SIRResult(z, log_weight + offset, diagnostics)


def _log_clocks(seed: int | Tensor, index: Tensor, first: int, number: int, dtype: torch.dtype) -> Tensor:
    """Log of the clocks of `number` proposals from `first`, a multiple of 4: `[n, number]`."""
    blocks = torch.arange(first // _CLOCKS, cdiv(first + number, _CLOCKS), device=index.device)
    of, step = index.repeat_interleave(len(blocks)), blocks.repeat(len(index))
    clocks = philox.exponential(seed, of, step, philox.Stream.SELECTION, _CLOCKS, dtype=dtype)
    return clocks.log().view(len(index), _CLOCKS * len(blocks))[:, :number]


__all__ = [
    "SIRDiagnostics",
    "SIRResult",
    "Weighting",
    "flow_dim",
    "log_weight_of",
    "sir_reference",
    "weighting",
]
