"""The Metropolis-Hastings acceptance of a Langevin proposal (MALA), with the selection that follows it.

Roberts & Tweedie, "Exponential convergence of Langevin distributions and their discrete approximations",
Bernoulli 2(4), 1996, section 1.4.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chains import (
    NORM_UNIT,
    PerChain,
    State,
    as_column,
    as_list,
    check_drift,
    check_like,
    check_noise,
    check_per_chain,
    check_state,
    check_written,
    choose,
    clip_factor,
    clip_factor_of,
    copy_state,
    eager_on_cpu,
    flat_rows,
    needs_gradient,
    new_like,
    no_kernel,
    number_source,
    per_chain,
    split_number,
    widths_of,
    working_dtype,
)
from .checks import transformed
from .launch import LaunchConfig, cdiv, int64_offsets, launch, register_op, tl, triton, use_triton
from .metropolis_cpu import accept_on_cpu
from .philox import Stream, philox_words, uniform, uniform_of


class MalaStep(NamedTuple):
    """The state after a Metropolis-adjusted step, and what decided it; every field lies on the device."""

    x: Tensor | list[Tensor]  # as the argument x
    energy: Tensor  # [N]
    grad: Tensor | list[Tensor]  # as the argument grad
    accepted: Tensor  # bool [N]
    log_ratio: Tensor  # float32 [N] (float64 for float64 positions); NaN where the proposal was not finite


def mala_accept_reference(
    x: State,
    energy: Tensor,
    grad: State,
    proposal: State,
    proposal_energy: Tensor,
    proposal_grad: State,
    step_size: PerChain,
    *,
    temperature: PerChain = 1.0,
    seed: int | Tensor = 0,
    index: Tensor | None = None,
    step: int | Tensor = 0,
    stream: int = Stream.ACCEPTANCE,
    grad_clip: float | None = None,
    prior_precision: float | None = None,
    noise: Tensor | None = None,
) -> MalaStep:
    """What `mala_accept` computes, in plain torch; `noise`, `[N]` uniforms, replaces the draw."""
    dtype = working_dtype(as_list(x)[0].dtype)
    positions, proposals = flat_rows(x, dtype), flat_rows(proposal, dtype)
    grads, proposal_grads = flat_rows(grad, dtype), flat_rows(proposal_grad, dtype)
    precision = 0.0 if prior_precision is None else prior_precision
    step_size, temperature = as_column(step_size, dtype), as_column(temperature, dtype)
    finite = torch.isfinite(proposal_energy)
    for row in (*proposals, *proposal_grads):
        finite = finite & torch.isfinite(row).all(dim=1)
    if grad_clip is not None:
        before, after = clip_factor(grads, grad_clip), clip_factor(proposal_grads, grad_clip)
        grads, proposal_grads = [g * before for g in grads], [g * after for g in proposal_grads]

    # log q(x|x') - log q(x'|x) of the two Gaussians, without the squares that cancel; the prior's energy
    # difference, precision·(|x'|^2 - |x|^2)/2, cancels against the same term of the drifts.
    log_ratio = (energy - proposal_energy).to(dtype)
    for here, there, g, h in zip(positions, proposals, grads, proposal_grads, strict=True):
        drift, proposal_drift = g + precision * here, h + precision * there
        terms = 0.5 * (g + h) * (there - here)
        terms = terms - (0.125 * step_size) * (drift + proposal_drift) * (proposal_drift - drift)
        log_ratio = log_ratio + terms.sum(dim=1)
    log_ratio = log_ratio / (temperature.squeeze(1) if isinstance(temperature, Tensor) else temperature)
    log_ratio = torch.where(finite, log_ratio, torch.nan)
    if noise is None:
        if index is None:
            raise TypeError("mala_accept_reference needs index where noise is not given")
        noise = uniform(seed, index, step, stream, 1)[:, 0]
    accepted = torch.log(noise.to(dtype)) <= log_ratio  # NaN compares false: rejected

    def select(current: State, proposed: State) -> Tensor | list[Tensor]:
        selected = [
            torch.where(accepted.reshape(-1, *[1] * (kept.ndim - 1)), new, kept)
            for kept, new in zip(as_list(current), as_list(proposed), strict=True)
        ]
        return selected[0] if isinstance(current, Tensor) else selected

    return MalaStep(
        select(x, proposal),
        torch.where(accepted, proposal_energy, energy),
        select(grad, proposal_grad),
        accepted,
        log_ratio,
    )


def _write_step(result: MalaStep, out: Sequence[State], counts: Tensor | None) -> None:
    """Copy the state of a step to `out` (unless that is empty), and add its decisions to `counts`."""
    for targets, values in zip(out, result, strict=False):
        copy_state(targets, values)
    if counts is not None:
        counts += torch.stack((result.accepted, torch.isnan(result.log_ratio)), dim=1)


def _step_of(state: list[list[Tensor]], single: bool, accepted: Tensor, log_ratio: Tensor) -> MalaStep:
    """The result that names what was written: lists, or single tensors."""
    x, (energy,), grad = state
    return MalaStep(x[0] if single else x, energy, grad[0] if single else grad, accepted, log_ratio)


@triton.jit
def _tile(pointer, row, start, width, COLUMNS: tl.constexpr, rows, INT64: tl.constexpr):
    """A tile of a contiguous `[rows, width]` tensor in float32, 0 where there is none of it."""
    position, mask = _place(row, start, width, COLUMNS, rows, INT64)
    return tl.load(pointer + position, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _place(row, start, width, COLUMNS: tl.constexpr, rows, INT64: tl.constexpr):
    column = start + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows)[:, None] & (column < width)
    if INT64:
        row = row.to(tl.int64)
    return row[:, None] * width + column, mask


@triton.jit
def _clip_factor(grad, row, rows, unit, WIDTHS: tl.constexpr, COLUMNS: tl.constexpr, INT64: tl.constexpr):
    """The factor that clips each row's gradient over all its tensors; `unit` is NORM_UNIT/grad_clip."""
    total = tl.zeros((row.shape[0], COLUMNS), tl.float32)
    for k in range(len(WIDTHS)):
        grad_ptr, width = choose(grad, k), choose(WIDTHS, k)
        for start in range(0, width, COLUMNS):
            value = _tile(grad_ptr, row, start, width, COLUMNS, rows, INT64) * unit
            total += value * value
    return clip_factor_of(tl.sum(total, axis=1))[:, None]


@triton.jit(do_not_specialize=["rows", "seed", "step"])
def _accept_kernel(
    x_out,
    energy_out_ptr,
    grad_out,
    accepted_ptr,
    log_ratio_ptr,
    counts_ptr,
    x,
    energy_ptr,
    grad,
    proposal,
    proposal_energy_ptr,
    proposal_grad,
    index_ptr,
    step_size,
    temperature,
    seed,
    step,
    grad_clip,
    prior_precision,
    rows,
    WIDTHS: tl.constexpr,
    STREAM: tl.constexpr,
    STEP_SIZE_SOURCE: tl.constexpr,
    TEMPERATURE_SOURCE: tl.constexpr,
    SEED_SOURCE: tl.constexpr,
    STEP_SOURCE: tl.constexpr,
    CLIP: tl.constexpr,
    COUNT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INT64: tl.constexpr,
):
    """The log ratio, the decision and the selection of ROWS chains.

    x, grad, proposal, proposal_grad: pointers of the states' tensors, `[rows, WIDTHS[k]]` each, contiguous.
    x_out, grad_out: where the selected state goes; IN_PLACE says that they are x and grad, and then only what
    was accepted is written.
    energy_ptr, proposal_energy_ptr, energy_out_ptr: `[rows]`.
    accepted_ptr, log_ratio_ptr: uint8 and float32 `[rows]`, written.
    counts_ptr: int64 `[rows, 2]`, accepted and non-finite proposals, added to where COUNT.
    index_ptr: int64 `[rows]`.
    step_size, temperature, seed, step: numbers or pointers, as their SOURCE tells (see `per_chain`).

    A program reads and writes whole rows, and no other program touches them: so it may write in place. It
    reads the four tensors once for the ratio (before that, both gradients once for their norms where CLIP),
    then of each row the half that was selected, which is still in the cache unless rows are very long. Per
    element in float32: 16 bytes read (8 more where CLIP), 8 read again for what is written, and 8 written; a
    row that IN_PLACE keeps has neither of the last two.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    eta = per_chain(step_size, row, inside, STEP_SIZE_SOURCE, tl.float32)
    heat = per_chain(temperature, row, inside, TEMPERATURE_SOURCE, tl.float32)
    eighth = (0.125 * eta + tl.zeros((ROWS,), tl.float32))[:, None]
    precision = tl.full((), prior_precision, tl.float32)
    factor = tl.full((ROWS, 1), 1.0, tl.float32)
    proposal_factor = factor
    if CLIP:
        unit = NORM_UNIT / tl.full((), grad_clip, tl.float32)
        factor = _clip_factor(grad, row, rows, unit, WIDTHS, COLUMNS, INT64)
        proposal_factor = _clip_factor(proposal_grad, row, rows, unit, WIDTHS, COLUMNS, INT64)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    # Loops at run time, so that the code does not grow with the number of tensors.
    for k in range(len(WIDTHS)):
        width = choose(WIDTHS, k)
        x_ptr, proposal_ptr = choose(x, k), choose(proposal, k)
        grad_ptr, proposal_grad_ptr = choose(grad, k), choose(proposal_grad, k)
        for start in range(0, width, COLUMNS):
            here = _tile(x_ptr, row, start, width, COLUMNS, rows, INT64)
            there = _tile(proposal_ptr, row, start, width, COLUMNS, rows, INT64)
            g = _tile(grad_ptr, row, start, width, COLUMNS, rows, INT64) * factor
            h = _tile(proposal_grad_ptr, row, start, width, COLUMNS, rows, INT64)
            finite = (tl.abs(there) < float("inf")) & (tl.abs(h) < float("inf"))
            h *= proposal_factor
            drift = g + precision * here
            proposal_drift = h + precision * there
            term = 0.5 * (g + h) * (there - here) - eighth * (drift + proposal_drift) * (
                proposal_drift - drift
            )
            total += tl.where(finite, term, float("nan"))

    energy = tl.load(energy_ptr + row, mask=inside, other=0.0)
    proposal_energy = tl.load(proposal_energy_ptr + row, mask=inside, other=0.0)
    difference = energy.to(tl.float32) - proposal_energy.to(tl.float32)
    log_ratio = (difference + tl.sum(total, axis=1)) / heat
    log_ratio = tl.where(tl.abs(proposal_energy.to(tl.float32)) < float("inf"), log_ratio, float("nan"))
    word, _, _, _ = philox_words(
        per_chain(seed, row, inside, SEED_SOURCE, tl.int64),
        tl.load(index_ptr + row, mask=inside, other=0),
        per_chain(step, row, inside, STEP_SOURCE, tl.int64),
        STREAM,
        tl.zeros((ROWS,), tl.int32),
    )
    accepted = tl.log(uniform_of(word)) <= log_ratio  # NaN compares false
    tl.store(energy_out_ptr + row, tl.where(accepted, proposal_energy, energy), mask=inside)
    tl.store(accepted_ptr + row, accepted.to(tl.uint8), mask=inside)
    tl.store(log_ratio_ptr + row, log_ratio, mask=inside)
    if COUNT:
        count = counts_ptr + 2 * row
        tl.store(count, tl.load(count, mask=inside, other=0) + accepted.to(tl.int64), mask=inside)
        failed = (log_ratio != log_ratio).to(tl.int64)
        tl.store(count + 1, tl.load(count + 1, mask=inside, other=0) + failed, mask=inside)

    moved = accepted[:, None]
    for k in range(len(WIDTHS)):
        width = choose(WIDTHS, k)
        x_ptr, proposal_ptr, x_out_ptr = choose(x, k), choose(proposal, k), choose(x_out, k)
        grad_ptr, proposal_grad_ptr = choose(grad, k), choose(proposal_grad, k)
        grad_out_ptr = choose(grad_out, k)
        for start in range(0, width, COLUMNS):
            position, mask = _place(row, start, width, COLUMNS, rows, INT64)
            _select(x_out_ptr, x_ptr, proposal_ptr, position, mask, moved, IN_PLACE)
            _select(grad_out_ptr, grad_ptr, proposal_grad_ptr, position, mask, moved, IN_PLACE)


@triton.jit
def _select(out_ptr, kept_ptr, proposed_ptr, position, mask, moved, IN_PLACE: tl.constexpr):
    """Write the proposed rows where `moved`, the kept ones elsewhere; only what is written is read."""
    value = tl.load(proposed_ptr + position, mask=mask & moved, other=0.0)
    if IN_PLACE:
        mask &= moved
    else:
        value = tl.where(moved, value, tl.load(kept_ptr + position, mask=mask & (moved == 0), other=0.0))
    tl.store(out_ptr + position, value, mask=mask)


def _launch_accept(
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
    rows, widths, device = x[0].shape[0], widths_of(x), x[0].device
    accepted = torch.empty(rows, dtype=torch.bool, device=device)
    log_ratio = torch.empty(rows, dtype=torch.float32, device=device)
    states = [tuple(t.contiguous() for t in state) for state in (x, grad, proposal, proposal_grad)]
    outputs = [*x_out, energy_out, *grad_out, *([] if counts is None else [counts])]
    # A strided output goes through a contiguous copy, which starts with what the kernel may leave as it is.
    written = [t.contiguous() for t in outputs]
    in_place = all(a is b for a, b in zip((*x_out, *grad_out), (*x, *grad), strict=True))
    # As if there were many rows, so that a row is added up in the same order alone and in a batch.
    config = LaunchConfig.by_rows(1 << 30, max(widths), max_columns=1024)
    launch(
        _accept_kernel,
        (cdiv(rows, config.block_rows),),
        tuple(written[: len(x)]),
        written[len(x)],
        tuple(written[len(x) + 1 : 2 * len(x) + 1]),
        accepted.view(torch.uint8),
        log_ratio,
        written[-1],
        states[0],
        energy.contiguous(),
        states[1],
        states[2],
        proposal_energy.contiguous(),
        states[3],
        index.contiguous(),
        step_size if step_sizes is None else step_sizes.contiguous(),
        temperature if temperatures is None else temperatures.contiguous(),
        seed if seeds is None else seeds,
        step if steps is None else steps.contiguous(),
        1.0 if grad_clip is None else grad_clip,
        0.0 if prior_precision is None else prior_precision,
        rows,
        WIDTHS=widths,
        STREAM=stream,
        STEP_SIZE_SOURCE=number_source(step_sizes),
        TEMPERATURE_SOURCE=number_source(temperatures),
        SEED_SOURCE=number_source(seeds),
        STEP_SOURCE=number_source(steps),
        CLIP=grad_clip is not None,
        COUNT=counts is not None,
        IN_PLACE=in_place,
        ROWS=config.block_rows,
        COLUMNS=config.block_columns,
        INT64=int64_offsets(*states[0]),
        config=config,
        device=device,
    )
    for target, value in zip(outputs, written, strict=True):
        if target is not value:
            target.copy_(value)
    return accepted, log_ratio


def _accept_fake(x_out: list[Tensor], energy_out: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    count = energy_out.shape[0]
    return (
        energy_out.new_empty(count, dtype=torch.bool),
        energy_out.new_empty(count, dtype=working_dtype(x_out[0].dtype)),
    )


_accept = register_op(
    "mala_accept",
    "(Tensor(a!)[] x_out, Tensor(b!) energy_out, Tensor(c!)[] grad_out, Tensor(d!)? counts, Tensor[] x,"
    " Tensor energy, Tensor[] grad, Tensor[] proposal, Tensor proposal_energy, Tensor[] proposal_grad,"
    " Tensor index, Tensor? step_sizes, float step_size, Tensor? temperatures, float temperature,"
    " Tensor? seeds, SymInt seed, Tensor? steps, SymInt step, int stream, float? grad_clip,"
    " float? prior_precision) -> (Tensor, Tensor)",
    launcher=_launch_accept,
    reference=accept_on_cpu,
    fake=_accept_fake,
)


def mala_accept(
    x: State,
    energy: Tensor,
    grad: State,
    proposal: State,
    proposal_energy: Tensor,
    proposal_grad: State,
    step_size: PerChain,
    *,
    temperature: PerChain = 1.0,
    seed: int | Tensor,
    index: Tensor,
    step: int | Tensor,
    stream: int = Stream.ACCEPTANCE,
    grad_clip: float | None = None,
    prior_precision: float | None = None,
    counts: Tensor | None = None,
    out: Sequence[State] | None = None,
) -> MalaStep:
    """Accept or reject the proposals of `mala_propose`, which makes exp(-U/temperature) the invariant law.

        accept with probability min(1, exp(-(U(x') - U(x))/T)·q(x|x')/q(x'|x)),
        q(.|x) = N(x - (step_size/2)·∇U(x), step_size·T·I)

    where U = energy + prior_precision·|x|²/2. With `grad_clip` the drift of q is the clipped one (the
    truncated drift of Roberts & Tweedie, MALTA), so that the step stays exact. It is exact up to the rounding
    of positions: keep them in float32.

    A proposal whose position, energy or gradient is not finite is rejected, and its `log_ratio` is NaN.

    Args:
        x: positions `[N, ...]`, or a list of such tensors (one sample spans all of them).
        energy: `[N]`, the energy at x without the prior's term.
        grad: its gradient, of the shapes of x.
        proposal, proposal_energy, proposal_grad: the same for the proposal.
        step_size, temperature, prior_precision, grad_clip: what `mala_propose` was given.
        seed, index, step: as for `mala_propose`; the uniforms come from another stream.
        counts: int64 `[N, 2]`, to which accepted and non-finite proposals are added per chain, on the device.
        out: the triple of x, energy and grad to be written; the inputs themselves may be given, each in its
            own place. Otherwise it shares no memory with them.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    positions = check_state("x", x)
    count, device = positions[0].shape[0], positions[0].device
    check_like("proposal", proposal, "x", x, dtype=True)
    check_like("grad", grad, "x", x, dtype=False)
    check_like("proposal_grad", proposal_grad, "grad", grad, dtype=True)
    for name, value in (("energy", energy), ("proposal_energy", proposal_energy)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor of shape [{count}]")
        if value.shape != (count,) or value.device != device or value.dtype != energy.dtype:
            raise ValueError(
                f"{name} must be {energy.dtype} of shape [{count}] on {device}, "
                f"got {value.dtype} {tuple(value.shape)} on {value.device}"
            )
    check_per_chain("step_size", step_size, count, device)
    check_per_chain("temperature", temperature, count, device)
    check_noise(seed, index, step, stream, count, device)
    check_drift(grad_clip, prior_precision)
    if counts is not None:
        if not isinstance(counts, Tensor):
            raise TypeError(f"counts must be None or an int64 tensor, got {type(counts).__name__}")
        got = f"{counts.dtype} {tuple(counts.shape)} on {counts.device}"
        if counts.dtype != torch.int64 or counts.shape != (count, 2) or counts.device != device:
            raise ValueError(f"counts must be int64 [{count}, 2] on {device}, got {got}")
        check_written("counts", counts)
    if out is not None:
        if not isinstance(out, tuple | list):
            raise TypeError(f"out must be the triple of x, energy and grad, got {type(out).__name__}")
        if len(out) != 3:
            raise ValueError(f"out must be the triple of x, energy and grad, got {len(out)} entries")
        check_like("out[0]", out[0], "x", x, dtype=True)
        check_like("out[1]", out[1], "energy", energy, dtype=True)
        check_like("out[2]", out[2], "grad", grad, dtype=True)
        for place, target in enumerate(out):
            check_written(f"out[{place}]", target)
    states = [*positions, *as_list(grad), *as_list(proposal), *as_list(proposal_grad)]
    differentiated = needs_gradient(*states, energy, proposal_energy, step_size, temperature)
    if differentiated and out is not None:
        raise ValueError("out must be None where a gradient is needed: call under torch.no_grad()")
    wrapped = transformed(*states, energy, proposal_energy, step_size, temperature, seed, index, step, counts)
    unsupported = no_kernel(positions, differentiated, wrapped)
    if energy.dtype == torch.float64:
        unsupported = "float64 has no kernel"
    uses_kernel = use_triton(*positions, unsupported=unsupported)
    if uses_kernel or eager_on_cpu(states, differentiated, wrapped):
        current = (x, energy, grad)
        targets = [new_like(s) for s in current] if out is None else [as_list(s) for s in out]
        accept: Any = _accept if uses_kernel else accept_on_cpu
        accepted, log_ratio = accept(
            targets[0],
            targets[1][0],
            targets[2],
            counts,
            positions,
            energy,
            as_list(grad),
            as_list(proposal),
            proposal_energy,
            as_list(proposal_grad),
            index,
            *split_number(step_size),
            *split_number(temperature),
            *split_number(seed),
            *split_number(step),
            int(stream),
            grad_clip,
            prior_precision,
        )
        return _step_of(targets, isinstance(x, Tensor), accepted, log_ratio)
    result = mala_accept_reference(
        x,
        energy,
        grad,
        proposal,
        proposal_energy,
        proposal_grad,
        step_size,
        temperature=temperature,
        seed=seed,
        index=index,
        step=step,
        stream=stream,
        grad_clip=grad_clip,
        prior_precision=prior_precision,
    )
    _write_step(result, () if out is None else out, counts)
    if out is None:
        return result
    return _step_of([as_list(s) for s in out], isinstance(x, Tensor), result.accepted, result.log_ratio)


__all__ = ["MalaStep", "mala_accept", "mala_accept_reference"]
