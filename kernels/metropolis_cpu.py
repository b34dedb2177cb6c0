"""The acceptance of `metropolis.py` on the CPU: rows that stay in the cache, and the reference's bits."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .chains import CACHED, PerChain, as_column, clip_factor, flat_rows, rows_of, widths_of, working_dtype
from .philox import uniform

# From this many elements on, copying whole tensors and then the rows of the minority is quicker than a choice
# for each element.
_BY_ROWS = 1 << 16


def accept_on_cpu(
    x_out: list[Tensor],
    energy_out: Tensor,
    grad_out: list[Tensor],
    counts: Tensor | None,
    x: list[Tensor],
    energy: Tensor,
    grad: list[Tensor],
    proposal: list[Tensor],
    proposal_energy: Tensor,
    proposal_grad: list[Tensor],
    index: Tensor,
    step_sizes: Tensor | None,
    step_size: float,
    temperatures: Tensor | None,
    temperature: float,
    seeds: Tensor | None,
    seed: int,
    steps: Tensor | None,
    step: int,
    stream: int,
    grad_clip: float | None,
    prior_precision: float | None,
) -> tuple[Tensor, Tensor]:
    """The op of `mala_accept`: writes the outputs and `counts`, returns what was accepted and its ratios."""
    sizes: Any = step_size if step_sizes is None else step_sizes
    heats: Any = temperature if temperatures is None else temperatures
    noise = uniform(seed if seeds is None else seeds, index, step if steps is None else steps, stream, 1)[
        :, 0
    ]
    states = x, grad, proposal, proposal_grad
    count = max(1, CACHED // max(sum(widths_of(x)), 1))
    parts = [slice(top, top + count) for top in range(0, index.shape[0], count)]
    ratios = [
        _log_ratio(
            tuple([tensor[part] for tensor in state] for state in states),
            (energy - proposal_energy)[part],
            torch.isfinite(proposal_energy)[part],
            rows_of(sizes, part),
            rows_of(heats, part),
            grad_clip,
            prior_precision,
        )
        for part in parts
    ]
    log_ratio = torch.cat(ratios) if ratios else energy.new_empty(0, dtype=working_dtype(x[0].dtype))
    accepted = torch.log(noise.to(log_ratio.dtype)) <= log_ratio  # NaN compares false: rejected
    _select_on_cpu(
        accepted,
        (*x_out, energy_out, *grad_out),
        (*x, energy, *grad),
        (*proposal, proposal_energy, *proposal_grad),
    )
    if counts is not None:
        counts += torch.stack((accepted, torch.isnan(log_ratio)), dim=1)
    return accepted, log_ratio


def _select_on_cpu(
    accepted: Tensor, out: Sequence[Tensor], current: Sequence[Tensor], proposed: Sequence[Tensor]
) -> None:
    """The accepted rows of `proposed` and the others of `current`, which `out` may be."""
    if len(accepted) * sum(widths_of(current)) < _BY_ROWS:
        for target, kept, new in zip(out, current, proposed, strict=True):
            torch.where(accepted.reshape(-1, *[1] * (kept.ndim - 1)), new, kept, out=target)
        return
    mostly = 2 * int(accepted.sum()) > len(accepted)
    rest = (~accepted if mostly else accepted).nonzero().squeeze(1)
    for target, kept, new in zip(out, current, proposed, strict=True):
        most, few = (new, kept) if mostly else (kept, new)
        rows = few.index_select(0, rest)
        if target is not most:
            target.copy_(most)
        target.index_copy_(0, rest, rows)


def _log_ratio(
    states: tuple[list[Tensor], ...],
    difference: Tensor,
    finite: Tensor,
    step_size: PerChain,
    temperature: PerChain,
    grad_clip: float | None,
    prior_precision: float | None,
) -> Tensor:
    """The reference's, with intermediate results in place and fewer looks: the same bits.

    A finite sum shows that all that was added is finite, in one look.
    """
    dtype = working_dtype(states[0][0].dtype)
    positions, grads, proposals, proposal_grads = (flat_rows(state, dtype) for state in states)
    usual = all(math.isfinite(row.sum()) for row in (*proposals, *proposal_grads))
    if not usual:
        for row in (*proposals, *proposal_grads):
            finite = finite & torch.isfinite(row).all(dim=1)
    usual = usual and prior_precision is None and all(math.isfinite(row.sum()) for row in positions)
    if grad_clip is not None:
        before, after = clip_factor(grads, grad_clip), clip_factor(proposal_grads, grad_clip)
        grads, proposal_grads = [g * before for g in grads], [g * after for g in proposal_grads]
    step_size, temperature = as_column(step_size, dtype), as_column(temperature, dtype)
    log_ratio = difference.to(dtype)
    for here, there, g, h in zip(positions, proposals, grads, proposal_grads, strict=True):
        both = g + h
        if usual:  # where no 0·inf is lost
            total, change = both.clone(), h - g
        else:
            precision = 0.0 if prior_precision is None else prior_precision
            drift, proposal_drift = g + precision * here, h + precision * there
            total, change = drift + proposal_drift, proposal_drift.sub_(drift)
        terms = both.mul_(0.5).mul_(there - here)
        log_ratio = log_ratio + terms.sub_(total.mul_(0.125 * step_size).mul_(change)).sum(dim=1)
    log_ratio = log_ratio / (temperature.squeeze(1) if isinstance(temperature, Tensor) else temperature)
    return torch.where(finite, log_ratio, torch.nan)


__all__ = ["accept_on_cpu"]
