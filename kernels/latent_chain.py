"""Many steps of Langevin dynamics on an MLP energy in one launch, with or without Metropolis adjustment.

The chain of LEBM (Pang et al., "Learning Latent Space Energy-Based Prior Model", NeurIPS 2020, section 3): a
law proportional to exp(-U/T) with U(z) = energy_scale·f(z) + prior_precision·|z|²/2, and

    x <- x - (step_size/2)·∇U(x) + sqrt(step_size·T)·noise

State, gradient and noise stay on the chip for all steps. Noise and acceptance are those of `langevin.py` and
`metropolis.py` at the same (seed, index, step): so the chain is the composed one, up to rounding.
"""

from typing import Any

import torch
from torch import Tensor

from .chain_cpu import langevin_chain_on_cpu
from .chain_reference import ChainOptions, ChainResult, langevin_chain_reference
from .chains import check_noise, number_source, per_chain, split_number
from .checks import (
    NO_RULES,
    check_bool,
    check_finite,
    check_integer,
    check_not_negative,
    check_numbers_of_samples,
    check_positive,
    check_seed,
    compiling,
    transformed,
)
from .energy import (
    Activation,
    EnergyParameters,
    Precision,
    check_energy,
)
from .energy_device import (
    energy_and_stored_gradient,
    energy_fits,
    energy_memory,
    energy_pointers,
    energy_shape,
)
from .launch import (
    int64_offsets,
    launch,
    next_power_of_2,
    persistent_programs,
    register_op,
    tl,
    triton,
    use_triton,
)
from .mlp_cpu import plain_on_cpu
from .mlp_device import ACTIVATION_NAMES, ACTIVATIONS, PRECISION_NAMES, PRECISIONS
from .mlp_reference import without_autocast
from .opaque_device import opaque
from .philox import Stream
from .philox_device import interleave4, normal4, philox_words, uniform_of
from .processor import precision_on

MAX_CHAIN_DIM = 512

_NOISE, _ACCEPTANCE = tl.constexpr(int(Stream.LANGEVIN)), tl.constexpr(int(Stream.ACCEPTANCE))


@triton.jit
def _part(pointer, row, inside, start, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Addresses of columns `start..` of rows of a dense matrix `[rows, DIM]`, and which of them there are."""
    column = start + tl.arange(0, COLUMNS)[None, :]
    return pointer + row[:, None] * DIM + column, inside[:, None] & (column < DIM)


@triton.jit
def _log_ratio(
    x_ptr, proposal_ptr, gradient_ptr, proposal_gradient_ptr, row, inside, eta, prior_precision,
    DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """T times the logarithm of the Metropolis-Hastings ratio, less the energies of f: see `mala_accept`.

    NaN where the proposal is not finite.
    """
    total = tl.zeros(row.shape, tl.float32)
    for start in tl.range(0, DIM, COLUMNS):
        place, mask = _part(0, row, inside, start, DIM, COLUMNS)
        x = tl.load(x_ptr + place, mask, 0.0)
        proposal = tl.load(proposal_ptr + place, mask, 0.0)
        g = tl.load(gradient_ptr + place, mask, 0.0)
        h = tl.load(proposal_gradient_ptr + place, mask, 0.0)
        finite = (tl.abs(proposal) < float("inf")) & (tl.abs(h) < float("inf"))
        drift, proposal_drift = g + prior_precision * x, h + prior_precision * proposal
        term = 0.5 * (g + h) * (proposal - x)
        term -= 0.125 * eta * (drift + proposal_drift) * (proposal_drift - drift)
        total += tl.sum(tl.where(finite, term, float("nan")), 1)
    return total


@triton.jit(do_not_specialize=["seed", "first_step", "n_steps", "thin", "rows"])
def _chain_kernel(
    z_ptr, index_ptr, x_ptr, acceptance_ptr, energy_ptr, trajectory_ptr, proposal_ptr, gradient_ptr,
    proposal_gradient_ptr, memory_ptr, weights, biases, seed, first_step, n_steps, thin, step_size,
    temperature, prior_precision, energy_scale, rows, step_rows, z_row, memory_step, zero,
    E: tl.constexpr, ADJUSTED: tl.constexpr, TRAJECTORY: tl.constexpr, SEED_SOURCE: tl.constexpr,
    STEP_SOURCE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """All steps of ROWS chains.

    A program owns tiles of ROWS rows, `step_rows` apart: it alone reads and writes them in every tensor, and
    takes their chains from the first state to the last. The energy is evaluated n_steps + 1 times, in one
    place: in round t the proposal of round t - 1 is judged (that of round 0 is z), and the next one is made.
    What a step keeps for the next, the gradient between the products and the update, and the energy's layers
    lie in memory that only this program uses, which is so little (ROWS·D numbers, four times with ADJUSTED,
    and the layers) that it stays in the caches: in registers it would take the room of the energy's tiles. So
    would addresses, which each step computes anew (see `opaque_device.py`).

    Per row and step, with depth 2: 4·H·(D + H + 1) FLOPs of products, at D = 128, H = 200 some 263,000; and
    of order 100·D + 20·H instructions for noise, update and activations outside the matrix units. By the data
    sheet of an H200 (4,270 bf16 FLOPs and 128 lanes a cycle in each multiprocessor) that is 62 cycles for the
    first and some 130 for the second. From the L2 cache come the weights twice, in bf16 4.1 KB a row, some
    5.6 KB of layers, and 16·D bytes for the state (48·D with ADJUSTED), mostly from L1; from memory 8·D + 16
    bytes for the whole chain: nothing. So issuing instructions and L2 bound it, not the matrix units.

    Args:
        z_ptr: float32 `[rows, E.dim]` of row stride z_row, the first states, read.
        index_ptr: int64 `[rows]`, read.
        x_ptr: float32 `[rows, E.dim]`, dense, the states: the last ones stay.
        acceptance_ptr, energy_ptr: float32 `[rows]`, written.
        trajectory_ptr: float32 `[n_steps // thin, rows, E.dim]`, written where TRAJECTORY.
        proposal_ptr, gradient_ptr: as x_ptr, scratch, with ADJUSTED; else x_ptr and proposal_gradient_ptr.
        proposal_gradient_ptr: as x_ptr, scratch.
        memory_ptr: scratch, memory_step elements for each program: see `energy_memory`.
        weights, biases: see `energy_pointers`; read.
        seed, first_step: numbers or pointers to one, as their SOURCE tells (see `per_chain`).
        step_rows: ROWS times the number of programs.
        zero: that of `opaque_device.py`.
    """
    DIM: tl.constexpr = E.dim
    eta, heat = tl.full((), step_size, tl.float32), tl.full((), temperature, tl.float32)
    spread = tl.sqrt_rn(eta * heat)
    prior_precision = tl.full((), prior_precision, tl.float32)
    energy_scale = tl.full((), energy_scale, tl.float32)
    n_steps, thin = tl.full((), n_steps, tl.int32), tl.full((), thin, tl.int32)
    if INT64:
        rows = tl.full((), rows, tl.int64)
    memory_ptr += tl.program_id(0) * memory_step
    for begin in tl.range(tl.program_id(0) * ROWS, rows, step_rows, disable_licm=True):
        if INT64:
            begin = tl.cast(begin, tl.int64)  # in the interpreter it is a Python int
        row = opaque(begin, zero) + tl.arange(0, ROWS)
        inside = row < rows
        own_seed = per_chain(seed, row, inside, SEED_SOURCE, tl.int64)
        first = per_chain(first_step, row, inside, STEP_SOURCE, tl.int64)

        for start in tl.range(0, DIM, COLUMNS):
            place, mask = _part(proposal_ptr, row, inside, start, DIM, COLUMNS)
            column = start + tl.arange(0, COLUMNS)[None, :]
            tl.store(place, tl.load(z_ptr + row[:, None] * z_row + column, mask, 0.0), mask)
        value = tl.zeros((ROWS,), tl.float32)
        accepted = tl.zeros((ROWS,), tl.float32)
        for t in tl.range(0, n_steps + 1, disable_licm=True):
            rounds = tl.full((ROWS,), t, tl.int32)
            own = opaque(t, zero) * zero
            row = opaque(begin, own) + tl.arange(0, ROWS)
            inside = row < rows
            # Threads read what others have written: a barrier each time.
            tl.debug_barrier()
            proposal_value = energy_and_stored_gradient(
                proposal_ptr, row, inside, DIM, proposal_gradient_ptr, energy_scale, memory_ptr + own,
                weights, biases, E,
            )  # fmt: skip
            tl.debug_barrier()
            index = tl.load(index_ptr + row, inside, 0)  # each time, as it would take registers above
            moved = tl.full((ROWS,), 1, tl.int1)
            if ADJUSTED:
                kept = inside & (rounds > 0)
                log_ratio = _log_ratio(
                    x_ptr, proposal_ptr, gradient_ptr, proposal_gradient_ptr, row, kept, eta, prior_precision,
                    DIM, COLUMNS,
                )  # fmt: skip
                tl.debug_barrier()  # states are written below
                difference = energy_scale * value - energy_scale * proposal_value
                log_ratio = (log_ratio + difference) / heat
                log_ratio = tl.where(tl.abs(proposal_value) < float("inf"), log_ratio, float("nan"))
                column = tl.zeros((ROWS,), tl.int32)
                word, _, _, _ = philox_words(own_seed, index, first + t - 1, _ACCEPTANCE, column)
                moved = (tl.log(uniform_of(word)) <= log_ratio) | (rounds == 0)  # NaN compares false
                accepted += tl.where(moved & (rounds > 0), 1.0, 0.0)
            value = tl.where(moved, proposal_value, value)

            record = inside & (rounds > 0) & (rounds % thin == 0)
            recorded_ptr = trajectory_ptr + (t // thin - 1) * rows * DIM
            for start in tl.range(0, DIM, COLUMNS):
                place, mask = _part(0, row, inside, start, DIM, COLUMNS)
                x = tl.load(proposal_ptr + place, mask, 0.0)
                gradient = tl.load(proposal_gradient_ptr + place, mask, 0.0)
                if ADJUSTED:
                    chosen = mask & moved[:, None]
                    stay = mask & (moved == 0)[:, None]
                    x = tl.where(moved[:, None], x, tl.load(x_ptr + place, stay, 0.0))
                    gradient = tl.where(moved[:, None], gradient, tl.load(gradient_ptr + place, stay, 0.0))
                    tl.store(x_ptr + place, x, chosen)
                    tl.store(gradient_ptr + place, gradient, chosen)
                if TRAJECTORY:
                    tl.store(recorded_ptr + place, x, mask & record[:, None])
                block = start // 4 + tl.arange(0, COLUMNS // 4)[None, :]
                w0, w1, w2, w3 = philox_words(own_seed, index[:, None], first + t, _NOISE, block)
                n0, n1, n2, n3 = normal4(w0, w1, w2, w3)
                noise = interleave4(n0, n1, n2, n3)
                new = x - 0.5 * eta * (gradient + prior_precision * x) + spread * noise
                tl.store(proposal_ptr + place, new, mask & (rounds < n_steps)[:, None])

        tl.store(energy_ptr + row, value, inside)
        share = accepted / tl.maximum(n_steps, 1).to(tl.float32)
        if not ADJUSTED:
            share = accepted + 1.0
        tl.store(acceptance_ptr + row, tl.where(n_steps > 0, share, 1.0), inside)


def chain_fits(
    dim: int,
    hidden: int,
    depth: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> str | None:
    """Why there is no kernel for chains on such an energy, or None where there is: see `energy_fits`."""
    if dtype == torch.float64:
        return "z is float64, which has no kernel"
    if dim > MAX_CHAIN_DIM:
        return f"z has {dim} columns, and the kernel holds states of at most {MAX_CHAIN_DIM}"
    return energy_fits(dim, hidden, depth, device)


def _has_no_kernel(z: Tensor, parameters: EnergyParameters) -> str | None:
    """Why the composed chain runs, or None where the kernel does."""
    depth = len(parameters.weights) - 1
    return chain_fits(z.shape[1], parameters.weights[0].shape[0], depth, z.device, z.dtype)


def _launch_chain(
    z: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    index: Tensor,
    seeds: Tensor | None,
    seed: int,
    first_steps: Tensor | None,
    first_step: int,
    n_steps: int,
    step_size: float,
    temperature: float,
    adjusted: bool,
    prior_precision: float,
    energy_scale: float,
    precision: int,
    activation: int,
    thin: int,
    return_trajectory: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _chain_outputs(z, n_steps, thin, return_trajectory)
    rows, dim = z.shape
    name = PRECISION_NAMES[precision]
    shape, config = energy_shape(
        dim,
        weights[0].shape[0],
        ACTIVATION_NAMES[activation],
        name,
    )
    z = z if z.stride(1) == 1 else z.contiguous()
    samples, gradient = outputs[0], torch.empty_like(outputs[0])
    # Unadjusted, a proposal is the next sample.
    proposal, kept_gradient = samples, gradient
    if adjusted:
        proposal, kept_gradient = torch.empty_like(samples), torch.empty_like(samples)
    programs = persistent_programs(z.device, rows, config)
    memory = energy_memory(shape, len(weights) - 1, programs, config, z.device, gradient=True)
    launch(
        _chain_kernel,
        (programs,),
        z,
        index.contiguous(),
        *outputs,
        proposal,
        kept_gradient,
        gradient,
        memory,
        *energy_pointers(weights, biases, name),
        seed if seeds is None else seeds,
        first_step if first_steps is None else first_steps,
        n_steps,
        thin,
        float(step_size),
        float(temperature),
        float(prior_precision),
        float(energy_scale),
        rows,
        programs * config.block_rows,
        z.stride(0),
        memory.stride(0),
        0,
        E=shape,
        ADJUSTED=adjusted,
        TRAJECTORY=return_trajectory,
        SEED_SOURCE=number_source(seeds),
        STEP_SOURCE=number_source(first_steps),
        COLUMNS=min(next_power_of_2(max(dim, 4)), 32),
        ROWS=config.block_rows,
        INT64=int64_offsets(z, outputs[0], outputs[3], memory),
        config=config,
        device=z.device,
    )
    return outputs


def _chain_outputs(
    z: Tensor, n_steps: int, thin: int, return_trajectory: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    recorded = n_steps // thin if return_trajectory else 0
    rows = z.shape[0]
    return z.new_empty(z.shape), z.new_empty(rows), z.new_empty(rows), z.new_empty(recorded, *z.shape)


def _chain_fake(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _chain_outputs(z, rest[7], rest[-2], rest[-1])


def _composed(z: Tensor, parameters: EnergyParameters, index: Tensor, options: ChainOptions) -> ChainResult:
    """The chain step by step: by what is fast on a CPU, or by the reference."""
    if plain_on_cpu(z, *parameters.weights, *parameters.biases):
        return ChainResult(*langevin_chain_on_cpu(z, *parameters, index, options))
    with without_autocast(z.device):
        return langevin_chain_reference(z, parameters, index, options)


def _chain_on_cpu(
    z: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    index: Tensor,
    seeds: Tensor | None,
    seed: int,
    first_steps: Tensor | None,
    first_step: int,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *numbers, precision, activation, thin, return_trajectory = rest
    options = ChainOptions(
        *numbers,
        precision=PRECISION_NAMES[precision],
        activation=ACTIVATION_NAMES[activation],
        seed=seed if seeds is None else seeds,
        first_step=first_step if first_steps is None else first_steps,
        thin=thin,
        return_trajectory=return_trajectory,
    )
    result = _composed(z, EnergyParameters(tuple(weights), tuple(biases)), index, options)
    trajectory = z.new_empty(0, *z.shape) if result.trajectory is None else result.trajectory.contiguous()
    # Without a step the samples are z itself, which an op may not return.
    samples = result.samples.clone() if options.n_steps == 0 else result.samples
    return samples, result.acceptance, result.energy, trajectory


_chain = register_op(
    "langevin_chain",
    "(Tensor z, Tensor[] weights, Tensor[] biases, Tensor index, Tensor? seeds, SymInt seed,"
    " Tensor? first_steps, SymInt first_step, SymInt n_steps, float step_size, float temperature,"
    " bool adjusted, float prior_precision, float energy_scale, int precision, int activation, SymInt thin,"
    " bool return_trajectory) -> (Tensor, Tensor, Tensor, Tensor)",
    launcher=_launch_chain,
    reference=_chain_on_cpu,
    fake=_chain_fake,
)


def langevin_chain(
    z: Tensor,
    parameters: EnergyParameters,
    *,
    n_steps: int,
    step_size: float,
    temperature: float = 1.0,
    adjusted: bool = False,
    prior_precision: float = 1.0,
    energy_scale: float = 1.0,
    precision: Precision = "ieee",
    activation: Activation = "leaky_relu",
    seed: int | Tensor = 0,
    index: Tensor | None = None,
    first_step: int | Tensor = 0,
    thin: int = 1,
    return_trajectory: bool = False,
) -> ChainResult:
    """Run `n_steps` of Langevin dynamics from `z` on exp(-U/temperature), one chain a row.

        U(z) = energy_scale·f(z) + prior_precision·|z|²/2
        x <- x - (step_size/2)·∇U(x) + sqrt(step_size·temperature)·noise

    With `adjusted` each step is a proposal that is accepted with the Metropolis-Hastings probability (Roberts
    & Tweedie 1996), so that the law is exact at any step size. With a `precision` below "ieee" it is the law
    of the energy as it is then computed: the drift is that of the same rounded products, and any drift that
    is a function of the state leaves the step exact. A proposal whose position, energy or gradient is not
    finite is rejected. So a chain may stay for ever where it starts if the energy there is not finite: then
    the energy that comes back is not finite either.

    Nothing is recorded for automatic differentiation. In one launch where the shapes fit
    (`chain_fits` says why not), else step by step, as under the transforms of torch.func.

    Args:
        z: `[N, D]`, float32 or float64, the first states; not modified.
        parameters: of the energy f, of z's dtype and device.
        n_steps: 0 gives back the first states.
        step_size, temperature: positive.
        adjusted: MALA, else ULA.
        prior_precision: not negative; 0 leaves the prior's term out.
        energy_scale: finite; 0 leaves the energy out, where it is finite.
        precision, activation: as for `mlp_energy`.
        seed, index: the noise of chain i is that of `(seed, index[i])`; `index` is int64 `[N]`, each in
            [0, 2^56), which is not checked on a GPU; by default 0..N-1.
        first_step: the number of the first step: a chain may be continued, with the noise that it would have
            had. `seed` and `first_step` may be int64 tensors of one element on the device, which a captured
            graph reads anew at each replay.
        thin, return_trajectory: record the state after every `thin` steps.

    Returns:
        `ChainResult`, of z's dtype.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_energy(z, parameters, precision, activation)
    count, device = z.shape[0], z.device
    check_integer("n_steps", n_steps, 0, 1 << 31, "at least 0 and below 2^31")
    check_integer("thin", thin, 1, 1 << 31, "at least 1 and below 2^31")
    check_positive("step_size", step_size)
    check_positive("temperature", temperature)
    check_not_negative("prior_precision", prior_precision)
    check_finite("energy_scale", energy_scale)
    check_bool("adjusted", adjusted)
    check_bool("return_trajectory", return_trajectory)
    if index is None:
        index = torch.arange(count, device=device)
    check_noise(seed, index, 0, Stream.LANGEVIN, count, device)
    check_numbers_of_samples("index", index)
    if isinstance(first_step, Tensor):
        check_seed("first_step", first_step, device)
    else:
        check_integer("first_step", first_step, 0, (1 << 32) - n_steps + 1, "in [0, 2^32 - n_steps]")
    wrapped = transformed(z, index, seed, first_step, *parameters.weights, *parameters.biases)
    unsupported = NO_RULES if wrapped else _has_no_kernel(z, parameters)
    # The composed chain loops in Python, which a traced graph would hold unrolled.
    by_kernel = use_triton(z, unsupported=unsupported)
    by_op = by_kernel or (compiling() and z.is_cpu)
    computed = precision if by_kernel else precision_on(z.device, precision)
    options = ChainOptions(
        n_steps,
        step_size,
        temperature,
        adjusted,
        prior_precision,
        energy_scale,
        computed,
        activation,
        seed,
        first_step,
        thin,
        return_trajectory,
    )
    with torch.no_grad():
        if not by_op:
            return _composed(z, parameters, index, options)
        samples, acceptance, energy, trajectory = _chain(
            z,
            list(parameters.weights),
            list(parameters.biases),
            index,
            *split_number(seed),
            *split_number(first_step),
            *options[:6],
            PRECISIONS[computed],
            ACTIVATIONS[activation],
            thin,
            return_trajectory,
        )
    return ChainResult(samples, acceptance, energy, trajectory if return_trajectory else None)


__all__ = [
    "ChainResult",
    "chain_fits",
    "langevin_chain",
]
