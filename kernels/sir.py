"""Sampling-importance-resampling with a flow as the proposal and an MLP energy in the target, in one launch.

SIR (Rubin, "Using the SIR algorithm to simulate posterior distributions", 1988) for the prior of EVaLP: a
sample is one of `proposals` draws z = g(u) of the flow, u ~ N(0, T·I), chosen in proportion to its weight.
The choice is a Gumbel-max race (Maddison, Tarlow and Minka, "A* sampling", NeurIPS 2014, section 2, with
exponential clocks): proposal k rings at E_k / w_k, and the first to ring is k with probability w_k / Σ w. So
a running winner is enough: proposals are never kept, and memory does not grow with their number.

The log-weight is that of p^(1/T) against the law of z at temperature T:

    base "gaussian", p ∝ N(z; 0, I)·exp(-scale·f)     -scale·f/T - |z|²/2T + |u|²/2T + log|det dz/du| + c
    base "flow",     p ∝ g(z)·exp(-scale·f)           -scale·f/T + (1 - 1/T)·log|det dz/du| + c
    weights "energy", what published code has         -scale·f/T, which samples another law

with c = D/2·((1 - 1/T)·log 2π + log T), so that the mean weight estimates ∫ p^(1/T) of the unnormalised p
without bias.

What rounding does. Whatever way s(a) and t(a) of a coupling are computed, it maps b to b·exp(s) + t and
leaves a: its Jacobian is triangular, and its determinant is exp(Σ s) of the very s that was applied. With
bfloat16 products the flow is a slightly different flow, and its proposals' density is exactly the one that
their weight divides by (up to float32 rounding of exp and of sums). What bfloat16 does change is the target:
f is evaluated in it too, and the law that is sampled is the one of that f. Hence the z that is returned is
computed by the very code that computed the z that was weighed, never by another pass of another precision.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from . import philox
from .checks import (
    NO_RULES,
    check_choice,
    check_finite,
    check_integer,
    check_numbers_of_samples,
    check_positive,
    check_seed,
    compiling,
    transformed,
)
from .energy import EnergyParameters, check_energy
from .energy_device import (
    EnergyShape,
    energy_fits,
    energy_memory,
    energy_pointers,
    energy_shape,
    energy_value,
)
from .flow import FlowOptions, FlowParameters, check_flow
from .flow_device import (
    FlowShape,
    flow_fits,
    flow_forward,
    noise_state,
    normalisation_log_det,
    pointers,
    state_squares,
    write_state,
)
from .flow_layers_device import flow_form, held_forward, held_memory
from .launch import (
    LaunchConfig,
    cdiv,
    int64_offsets,
    launch,
    persistent_programs,
    register_op,
    tl,
    triton,
    use_triton,
)
from .layers_device import Layers
from .opaque_device import anew, opaque
from .philox_device import exponential4, int64_of, philox_words
from .sir_reference import (
    SIRDiagnostics,
    SIRResult,
    Weighting,
    flow_dim,
    log_weight_of,
    sir_reference,
    weighting,
)

_PROPOSAL = tl.constexpr(int(philox.Stream.PROPOSAL))
_SELECTION = tl.constexpr(int(philox.Stream.SELECTION))
_MOST_PROPOSALS = 1 << 30
_WIDEST_GROUP = 16


# --- the kernel ---------------------------------------------------------------------------------------------


@triton.jit
def _log_clock(seed, index, proposal):
    """Log of each row's clock for its proposal, `[ROWS]`: one of the four numbers of a block."""
    w0, w1, w2, w3 = philox_words(seed, index, proposal // 4, _SELECTION, tl.zeros_like(proposal))
    place = proposal % 4
    word = tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))
    clock, _, _, _ = exponential4(word, word, word, word)
    return tl.log(clock)


@triton.jit
def _samples(
    tile, seed, index_ptr, start, n, zero,
    SEED_IN_MEMORY: tl.constexpr, INDEX_IN_MEMORY: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The seed, and the row of the results and the number of each row's sample, `[ROWS]`.

    With another `zero` they, and the keys of the noise, are computed anew.
    """
    row = opaque(tile * (ROWS // GROUP), zero) + tl.arange(0, ROWS) // GROUP
    index = int64_of(start, False) + row
    if INDEX_IN_MEMORY:
        index = tl.load(index_ptr + row, row < n, 0)
    return opaque(int64_of(seed, SEED_IN_MEMORY), zero), row, index


@triton.jit
def _winner_of_sample(best, winner, GROUP: tl.constexpr):
    """The winner among the rows of each row's sample, `[ROWS]`: of the best arrivals the first proposal."""
    ROWS: tl.constexpr = best.shape[0]
    SAMPLES: tl.constexpr = ROWS // GROUP
    if GROUP == 1:
        # It moves nothing: without it Triton 3.9 fails to find a layout for what a turn hands to the next.
        return tl.gather(winner, tl.arange(0, ROWS), 0)
    else:
        arrival = tl.reshape(best, (SAMPLES, GROUP))
        first = arrival == tl.max(arrival, 1, keep_dims=True)
        winner = tl.where(first, tl.reshape(winner, (SAMPLES, GROUP)), 2147483647)
        chosen = tl.min(winner, 1, keep_dims=True)
        return tl.reshape(tl.broadcast_to(chosen, (SAMPLES, GROUP)), (ROWS,))


@triton.jit
def _store_diagnostics(
    ess_ptr, log_mean_ptr, log_max_ptr, non_finite_ptr, first, n, proposals,
    largest, total, squares, missing, offset, GROUP: tl.constexpr,
):  # fmt: skip
    """Merges the rows of each sample and writes what they say of the weights, to whose logs `offset` is added
    here alone: it may be so large that float32 would round away what sets them apart."""
    SAMPLES: tl.constexpr = largest.shape[0] // GROUP
    row = first + tl.arange(0, SAMPLES)
    inside = row < n
    maxima = tl.reshape(largest, (SAMPLES, GROUP))
    log_max = tl.max(maxima, 1, keep_dims=True)
    scale = tl.exp(maxima - tl.where(log_max == -float("inf"), 0.0, log_max))
    total = tl.sum(tl.reshape(total, (SAMPLES, GROUP)) * scale, 1)
    squares = tl.sum(tl.reshape(squares, (SAMPLES, GROUP)) * scale * scale, 1)
    log_max = tl.max(maxima, 1)
    alive = total > 0.0
    log_mean = log_max + (tl.log(tl.where(alive, total, 1.0)) - tl.log(tl.full((), proposals, tl.float32)))
    tl.store(ess_ptr + row, total * total / tl.where(alive, squares, 1.0), inside)
    tl.store(log_mean_ptr + row, tl.where(alive, log_mean + offset, -float("inf")), inside)
    tl.store(log_max_ptr + row, log_max + offset, inside)
    tl.store(non_finite_ptr + row, tl.sum(tl.reshape(missing, (SAMPLES, GROUP)), 1).to(tl.int64), inside)


@triton.jit(do_not_specialize=["seed", "start", "n", "proposals"])
def _sir_kernel(
    z_ptr, log_weight_ptr, ess_ptr, log_mean_ptr, log_max_ptr, non_finite_ptr,
    states_ptr, memory_ptr, race_ptr, index_ptr, seed, start, n, proposals, memory_step,
    flow, flow_memory, weights, biases,
    noise_scale, energy_factor, square_factor, log_det_factor, offset,
    F: tl.constexpr, M: tl.constexpr, E: tl.constexpr, SQUARES: tl.constexpr, LOG_DET: tl.constexpr,
    INDEX_IN_MEMORY: tl.constexpr, SEED_IN_MEMORY: tl.constexpr, INT64: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """All proposals of ROWS // GROUP samples at a time, and the winners.

    Row r of a tile takes proposals r % GROUP, r % GROUP + GROUP, ... of sample r // GROUP, one a turn: noise,
    flow, energy, weight, clock. From turn to turn it keeps six numbers, and no proposal. In one more turn
    every row of a sample draws the winner again, by the same instructions, and the first of them writes it
    with its log-weight. How many rows share a sample is decided by `proposals` alone, so that a sample's sums
    are in the same order in any batch.

    A program owns tiles, every num_programs-th: it alone writes their samples' elements of z and of the five
    vectors. The state of its tile, the energy's layers, and what it keeps from turn to turn lie in memory
    that it alone uses and that stays in the caches: in registers they would take the room of the networks'
    tiles. What could be kept beside them (rows, numbers, keys of the noise) is computed anew where it is
    used: see `opaque_device.py`. Nothing else is written, and but for an index in memory (8 bytes a sample)
    only parameters are read.

    Roofline. Bytes per sample: 4·D + 24 written. FLOPs per sample: proposals·(2·L·M + 2·(H·D + (depth - 1)·H²
    + H)), M as in `_flow_kernel`, H and depth of the energy; (ceil(proposals / GROUP) + 1)·GROUP / proposals
    times as many are done (1.08 at 100 proposals, where GROUP is 4). D 128, 8 couplings, H 256 x 2, energy
    200 x 2, 100 proposals: 197 MFLOP and 536 bytes a sample, some 370,000 FLOPs a byte: memory does not bound
    it. Every turn of a tile of 128 rows reads all parameters from the L2 cache, 2.0 MB in bfloat16, and
    moves 4·D bytes a row and coupling of the state, 0.5 MB, and some 0.3 MB of the energy's layers: 90 FLOPs
    for each byte, so that 400 TFLOP/s ask 4.4 TB/s of it. Where it gives less, its bandwidth bounds it,
    else the latency of layers that depend on each other: of 8 warps with more than 128 registers a thread a
    multiprocessor holds one program.

    Args:
        z_ptr: float32 `[n, D]`, contiguous, written.
        log_weight_ptr, ess_ptr, log_mean_ptr, log_max_ptr: float32 `[n]`, written.
        non_finite_ptr: int64 `[n]`, written.
        states_ptr: float32 `[programs, ROWS, D]`, scratch: the state of each program's tile.
        memory_ptr: scratch, memory_step elements for each program: see `energy_memory`.
        race_ptr: float32 `[programs, 7, ROWS]`, scratch, by row: the first arrival, negated; the largest
            log-weight; the sum of weights and of their squares, over those of the largest; where SQUARES |u|²
            of the turn, while the flow needs all registers; and as int32 the winner, and how many weights
            were not finite.
        index_ptr: int64 `[n]`, read where INDEX_IN_MEMORY; else the samples are `start` and those behind it.
        seed: an int, or where SEED_IN_MEMORY a pointer to an int64.
        flow, weights, biases: what `pointers` and `energy_pointers` made; read.
        flow_memory: scratch, what `held_memory` made; None where M is.
        noise_scale: the square root of the temperature.
        energy_factor, square_factor, log_det_factor, offset: the fields of a `Weighting`.
    """
    SAMPLES: tl.constexpr = ROWS // GROUP
    D: tl.constexpr = F.passed + F.changed
    # One address for both: the compiler has no registers for more.
    race_ptr += tl.program_id(0) * (7 * ROWS)
    count_ptr = (race_ptr + 5 * ROWS).to(tl.pointer_type(tl.int32))
    constant = normalisation_log_det(flow, F)
    turns = tl.cdiv(proposals, GROUP)
    if INT64:
        n = tl.full((), n, tl.int64)
    state_ptr = states_ptr + tl.program_id(0) * (ROWS * D)
    memory_ptr += tl.program_id(0) * memory_step
    for tile in tl.range(tl.program_id(0), tl.cdiv(n, SAMPLES), tl.num_programs(0), disable_licm=True):
        if INT64:
            tile = tl.cast(tile, tl.int64)  # in the interpreter it is a Python int
        each = tl.arange(0, ROWS)
        for k in tl.static_range(4):
            start_value = tl.full((ROWS,), -float("inf") if k < 2 else 0.0, tl.float32)
            tl.store(race_ptr + (k * ROWS + each), start_value)
        for k in tl.static_range(2):
            tl.store(count_ptr + (k * ROWS + each), tl.zeros((ROWS,), tl.int32))
        for turn in tl.range(0, turns + 1, disable_licm=True):
            own = anew(flow, turn)
            tl.debug_barrier()
            seed_value, row, index = _samples(
                tile, seed, index_ptr, start, n, own[-1], SEED_IN_MEMORY, INDEX_IN_MEMORY, ROWS, GROUP
            )
            step = turn * GROUP + tl.arange(0, ROWS) % GROUP
            if turn == turns:
                step = _winner_of_sample(tl.load(race_ptr + each), tl.load(count_ptr + each), GROUP)
            weight = noise_state(
                state_ptr, seed_value, index, step[:, None], noise_scale, own[-1], _PROPOSAL, SQUARES, F
            )
            if SQUARES:
                tl.store(race_ptr + own[-1] + (4 * ROWS + each), weight)
            if M is None:
                log_det = flow_forward(state_ptr + own[-1], own, ROWS, F)
            else:
                log_det = held_forward(state_ptr + own[-1], flow_memory, own, ROWS, F, M)
            if SQUARES:
                weight = tl.load(race_ptr + own[-1] + (4 * ROWS + each))
                weight = square_factor * (weight - state_squares(state_ptr, own[-1], ROWS, F))
            if LOG_DET:
                weight += log_det_factor * (log_det + constant)
            if turn == turns:
                _, row, _ = _samples(
                    tile, seed, index_ptr, start, n, 2 * own[-1], SEED_IN_MEMORY, INDEX_IN_MEMORY, ROWS, GROUP
                )
                write_state(state_ptr, z_ptr, row, (row < n) & (tl.arange(0, ROWS) % GROUP == 0), own[-1], F)
            f = energy_value(state_ptr, each, each < ROWS, D, memory_ptr, weights, biases, E)
            weight -= energy_factor * f
            usable = weight < float("inf")  # a comparison with NaN is false
            weight = tl.where(usable, weight, -float("inf"))
            tl.debug_barrier()
            seed_value, row, index = _samples(
                tile, seed, index_ptr, start, n, 3 * own[-1], SEED_IN_MEMORY, INDEX_IN_MEMORY, ROWS, GROUP
            )
            proposal = turn * GROUP + tl.arange(0, ROWS) % GROUP
            written = (row < n) & (proposal >= turns * GROUP) & (tl.arange(0, ROWS) % GROUP == 0)
            tl.store(log_weight_ptr + row, weight + offset, written)
            there = proposal < proposals
            weight = tl.where(there, weight, -float("inf"))
            arrival = weight - _log_clock(seed_value, index, proposal)
            best, before = tl.load(race_ptr + each), tl.load(race_ptr + (ROWS + each))
            total, squares = tl.load(race_ptr + (2 * ROWS + each)), tl.load(race_ptr + (3 * ROWS + each))
            missing = tl.load(count_ptr + (ROWS + each))
            tl.debug_barrier()  # several threads read what one writes
            largest = tl.maximum(before, weight)
            shift = tl.where(largest == -float("inf"), 0.0, largest)
            scale, part = tl.exp(before - shift), tl.exp(weight - shift)
            tl.store(race_ptr + each, tl.maximum(best, arrival))
            tl.store(race_ptr + (ROWS + each), largest)
            tl.store(race_ptr + (2 * ROWS + each), total * scale + part)
            tl.store(race_ptr + (3 * ROWS + each), squares * (scale * scale) + part * part)
            tl.store(count_ptr + each, proposal, arrival > best)
            tl.store(count_ptr + (ROWS + each), missing + 1, there & (usable == 0))
        tl.debug_barrier()
        largest, missing = tl.load(race_ptr + (ROWS + each)), tl.load(count_ptr + (ROWS + each))
        total, squares = tl.load(race_ptr + (2 * ROWS + each)), tl.load(race_ptr + (3 * ROWS + each))
        tl.debug_barrier()
        _store_diagnostics(
            ess_ptr, log_mean_ptr, log_max_ptr, non_finite_ptr, tile * SAMPLES, n,
            opaque(proposals, tile * flow[-1]), largest, total, squares, missing, offset, GROUP,
        )  # fmt: skip


def group_of(proposals: int, rows: int) -> int:
    """How many rows of a tile share a sample: as many as cost at most a twentieth more turns of the flow.

    One row a sample wastes least and takes longest; a few samples should not leave most of a GPU idle. The
    number of samples has no say, so that it cannot change the order of a sample's sums.
    """
    group = 1
    while 2 * group <= min(rows, _WIDEST_GROUP):
        if (cdiv(proposals, 2 * group) + 1) * 2 * group > 1.05 * (proposals + 1):
            break
        group *= 2
    return group


def sir_shape(
    flow: FlowParameters, energy: EnergyParameters, options: FlowOptions, energy_activation: str
) -> tuple[FlowShape, Layers | None, EnergyShape, LaunchConfig]:
    """What is compiled into the kernel, and how it is launched: by shape, never by the number of samples."""
    flow_part, held, config = flow_form(flow, options)
    hidden, dim = energy.weights[0].shape
    energy_part, _ = energy_shape(dim, hidden, energy_activation, options.precision, one_width=True)
    return flow_part, held, energy_part, config


def sir_fits(flow: FlowParameters, energy: EnergyParameters) -> str | None:
    """Why there is no kernel for these networks, or None where there is one."""
    if flow.bias_in.dtype == torch.float64:
        return "the parameters are float64, which has no kernel"
    depth = flow.weight_hidden.shape[1] + 1
    reason = flow_fits(flow_dim(flow), flow.bias_in.shape[1], depth)
    if reason is not None:
        return f"the flow: {reason}"
    energy_depth = len(energy.weights) - 1
    reason = energy_fits(flow_dim(flow), energy.weights[0].shape[0], energy_depth, flow.bias_in.device)
    return None if reason is None else f"the energy: {reason}"


# --- the op -------------------------------------------------------------------------------------------------


def _launch_sir(
    index: Tensor | None,
    seed_tensor: Tensor | None,
    seed: int,
    start: int,
    n: int,
    proposals: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    flow, energy, rule, temperature, options, activation = _split(*rest)
    out = _sir_fake(index, seed_tensor, seed, start, n, proposals, *rest)
    flow_part, held, energy_part, config = sir_shape(flow, energy, options, activation)
    group = group_of(proposals, config.block_rows)
    device = out[0].device
    programs = persistent_programs(device, n * group, config)
    memory = energy_memory(energy_part, len(energy.weights) - 1, programs, config, device, gradient=False)
    launch(
        _sir_kernel,
        (programs,),
        *out,
        out[0].new_empty((programs * config.block_rows, out[0].shape[1])),
        memory,
        out[0].new_empty((programs, 7, config.block_rows)),
        out[-1] if index is None else index.contiguous(),
        seed if seed_tensor is None else seed_tensor,
        start,
        n,
        proposals,
        memory.stride(0),
        pointers(flow, options.precision),
        None if held is None else held_memory(flow_part, held, programs, config, device),
        *energy_pointers(*energy, options.precision),
        math.sqrt(temperature),
        *rule,
        F=flow_part,
        M=held,
        E=energy_part,
        SQUARES=rule.squares != 0.0,
        LOG_DET=rule.log_det != 0.0,
        INDEX_IN_MEMORY=index is not None,
        SEED_IN_MEMORY=seed_tensor is not None,
        INT64=int64_offsets(out[0]),
        ROWS=config.block_rows,
        GROUP=group,
        config=config,
        device=device,
    )
    return out


def _split(*rest: Any) -> tuple[FlowParameters, EnergyParameters, Weighting, float, FlowOptions, str]:
    """The networks, the weighting, the temperature, the flow's options and the energy's activation."""
    flow, energy = FlowParameters(*rest[:8]), EnergyParameters(tuple(rest[8]), tuple(rest[9]))
    precision, flow_activation, activation, clamp, mixing = rest[15:]
    options = FlowOptions(False, precision, flow_activation, clamp, mixing)
    return flow, energy, Weighting(*rest[10:14]), rest[14], options, activation


def _sir_fake(
    index: Tensor | None,
    seed_tensor: Tensor | None,
    seed: int,
    start: int,
    n: int,
    proposals: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    flow = FlowParameters(*rest[:8])
    like = flow.bias_in
    vectors = (like.new_empty((n,)) for _ in range(4))
    return like.new_empty((n, flow_dim(flow))), *vectors, like.new_empty((n,), dtype=torch.int64)


def _sir_on_cpu(
    index: Tensor | None,
    seed_tensor: Tensor | None,
    seed: int,
    start: int,
    n: int,
    proposals: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    flow, energy, rule, temperature, options, activation = _split(*rest)
    if index is None:
        index = torch.arange(start, start + n, device=flow.bias_in.device)
    source = seed if seed_tensor is None else seed_tensor
    result = sir_reference(source, index, proposals, flow, energy, rule, temperature, options, activation)
    return result.z, result.log_weight, *result.diagnostics


_sir = register_op(
    "sir",
    "(Tensor? index, Tensor? seed_tensor, SymInt seed, SymInt start, SymInt n, int proposals,"
    " Tensor weight_in, Tensor bias_in, Tensor weight_hidden, Tensor bias_hidden, Tensor weight_out,"
    " Tensor bias_out, Tensor? norm_log_scale, Tensor? norm_shift, Tensor[] weights, Tensor[] biases,"
    " float energy_factor, float square_factor, float log_det_factor, float offset, float temperature,"
    " str precision, str flow_activation, str energy_activation, float? clamp, str mixing)"
    " -> (Tensor z, Tensor log_weight, Tensor ess, Tensor log_mean, Tensor log_max, Tensor non_finite)",
    launcher=_launch_sir,
    reference=_sir_on_cpu,
    fake=_sir_fake,
)


# --- the public function ------------------------------------------------------------------------------------


def _check_numbers(
    seed: object, index: object, start: object, n: int, proposals: object, device: torch.device
) -> None:
    check_seed("seed", seed, device)
    check_integer("n", n, 0, 1 << 56, "in [0, 2^56)")
    check_integer("start", start, 0, (1 << 56) - n + 1, "in [0, 2^56 - n]")
    check_integer("proposals", proposals, 1, _MOST_PROPOSALS + 1, "in [1, 2^30]")
    if index is None:
        return
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be an int64 tensor or None, got {got}")
    if index.shape != (n,):
        raise ValueError(f"index must have shape [n] = [{n}], got {tuple(index.shape)}")
    if index.device != device:
        raise ValueError(f"index must be on the parameters' device {device}, got {index.device}")
    check_numbers_of_samples("index", index)


def _check_device(device: object, expected: torch.device) -> None:
    if device is None:
        return
    try:
        kind = torch.device(device).type  # pyright: ignore[reportCallIssue, reportArgumentType]
    except (RuntimeError, TypeError):
        kind = "none"
    if kind != expected.type:
        raise ValueError(f"device must be the parameters' device {expected} or None, got {device}")


def _require_winners(log_max: Tensor, index: Tensor | None, start: int, proposals: int) -> None:
    """Raise where a sample has no winner. While a graph is traced or captured the device asserts it later."""
    useless = torch.isneginf(log_max)
    message = (
        f"none of its {proposals} proposals has a positive finite weight; the energy or the flow gives values"
        " that are not finite, or they share no support"
    )
    tracing = compiling()
    if tracing or (log_max.is_cuda and torch.cuda.is_current_stream_capturing()):
        torch.ops.aten._assert_async.msg(useless.logical_not().all(), f"sir: of a sample {message}")
    elif useless.any():
        row = int(useless.nonzero()[0, 0])
        raise ValueError(f"sample {start + row if index is None else int(index[row])}: {message}")


@torch.no_grad()
def sir(
    seed: int | Tensor,
    start: int,
    n: int,
    proposals: int,
    flow: FlowParameters,
    energy: EnergyParameters,
    *,
    base: Literal["gaussian", "flow"] = "gaussian",
    weights: Literal["exact", "energy"] = "exact",
    energy_scale: float = 1.0,
    temperature: float = 1.0,
    precision: Literal["ieee", "tf32", "bf16"] = "ieee",
    flow_activation: Literal["relu", "leaky_relu", "silu"] = "relu",
    energy_activation: Literal["relu", "leaky_relu", "silu"] = "leaky_relu",
    clamp: float | None = 2.0,
    mixing: Literal["shuffle", "swap"] = "shuffle",
    index: Tensor | None = None,
    device: torch.device | str | None = None,
) -> SIRResult:
    """Samples of p(z) ∝ base(z)·exp(-energy_scale·f(z)) by importance resampling of a flow's draws.

    Each sample is one of `proposals` draws of its own, chosen with probability w/Σw (see the module's
    docstring for the weights). Sample i of the result is number `start + i` of the series `seed`: its noise
    depends on nothing else, and on a GPU its result does not depend on the batch, to the last bit. There,
    where `sir_fits` has no objection, it is one launch that keeps no proposal; elsewhere the reference, in
    blocks of proposals. In memory there are n·(4·D + 24) bytes of results. In bfloat16 the weight is that of
    the sample as drawn.

    Args:
        seed: of 64 bits: an int, or an int64 tensor of one element (a captured graph reads it anew).
        start: number of the first sample.
        n: how many samples.
        proposals: draws of the flow per sample, 1 to 2^30; 1 gives the flow's own draws. At most a few
            million keep the sums of weights, which are float32, accurate.
        flow, energy: float32, or float64 (which has no kernel); of one dimension, dtype and device. With
            "bf16" the matrices may be bfloat16 already.
        base: "gaussian" for the prior N(z; 0, I)·exp(-f), "flow" for the residual g(z)·exp(-f).
        weights: "exact", or "energy" for exp(-f) alone, as the published code has it, which samples another
        law.
        energy_scale: factor of f: 1/w for a KL weight w of the sampler's training.
        temperature: T; the target is p^(1/T), and the flow's noise is N(0, T·I).
        precision: of the operands of matrix products, as in `coupling_flow`.
        flow_activation, energy_activation: of the hidden layers.
        clamp, mixing: of the flow, as in `coupling_flow`.
        index: int64 `[n]`, the samples' numbers, each in [0, 2^56), in place of `start`. On a GPU they are
            not checked, which would wait for it.
        device: the parameters' device, or None for it.

    Returns:
        z `[n, D]`, the winners' log-weights `[n]` and the diagnostics, in the dtype of the parameters. Not
        differentiable, and nothing that vmap can map, as it looks for samples without a winner.

    Raises:
        TypeError, ValueError: naming the argument; ValueError also where no proposal of a sample has a
            positive finite weight, naming the sample (under `torch.compile` and graph capture an assertion on
            the device).
    """
    options = FlowOptions(False, precision, flow_activation, clamp, mixing)
    check_flow(flow, options)
    dim, like = flow_dim(flow), flow.bias_in
    first = energy.weights[0] if isinstance(energy, EnergyParameters) and energy.weights else None
    if isinstance(first, Tensor) and first.ndim == 2 and first.shape[1] != dim:
        raise ValueError(f"energy must be of the flow's dimension {dim}, got one of {first.shape[1]}")
    check_energy(like.new_empty((0, dim)), energy, precision, energy_activation)
    check_choice("base", base, ("gaussian", "flow"))
    check_choice("weights", weights, ("exact", "energy"))
    check_finite("energy_scale", energy_scale)
    check_positive("temperature", temperature)
    _check_numbers(seed, index, start, n, proposals, like.device)
    _check_device(device, like.device)
    rule = weighting(base, weights, energy_scale, temperature, dim)
    seed_tensor, number = (seed, 0) if isinstance(seed, Tensor) else (None, seed)
    networks = (*flow, list(energy.weights), list(energy.biases))
    settings = (precision, flow_activation, energy_activation, clamp, mixing)
    arguments = (index, seed_tensor, number, start, n, proposals, *networks, *rule, temperature, *settings)
    wrapped = transformed(seed, index, *flow, *energy.weights, *energy.biases)
    unsupported = NO_RULES if wrapped else sir_fits(flow, energy)
    # The reference loops in Python, which a traced graph would hold unrolled.
    by_op = use_triton(like, unsupported=unsupported) or (compiling() and not like.is_cuda)
    z, log_weight, *diagnostics = (_sir if by_op else _sir_on_cpu)(*arguments)
    _require_winners(diagnostics[2], index, start, proposals)
    return SIRResult(z, log_weight, SIRDiagnostics(*diagnostics))


__all__ = [
    "SIRDiagnostics",
    "SIRResult",
    "Weighting",
    "group_of",
    "log_weight_of",
    "sir",
    "sir_fits",
    "sir_reference",
    "sir_shape",
    "weighting",
]
