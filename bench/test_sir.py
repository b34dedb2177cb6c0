"""Sampling-importance-resampling with a flow's proposals: one of P for each sample, by exact weights.

The prior is p(z) ∝ N(z; 0, I)·exp(-f(z)), f an MLP. Rivals: what one writes in torch, with all proposals at
once, and in batches of proposals with the leader kept. The samples are compared with float64 from the same
noise and the same clocks: ours are functions of the samples' numbers, and torch's are drawn again from its
generator, to which every call gives a seed. Rounding may turn a close race, so a share has to agree.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import checks, test_energy, test_flow, textbook
from bench.harness import Call, Precision, Problem, Provider, Work, Workload, absent, compiled, needs_cuda
from bench.machine import DEVICE, ON_CUDA
from bench.modes import PRODUCTS, QUICKEST, not_at_small, suffix, tuned
from bench.sizes import Scale, pick
from bench.textbook import EnergyWeights, FlowWeights
from evalp_fast.kernels import launch, philox

COUPLINGS, FLOW_HIDDEN, ENERGY_HIDDEN, DEPTH = 8, 256, 200, 2
AT_ONCE = 8192 if not ON_CUDA else 1 << 20
CHECKED = 64
# Of one sample: root mean square of the error, relative; and the share of samples that agree so.
LIMITS: dict[str, float] = {"ieee": 1e-5, "tf32": 2e-3, "bf16": 1e-2}
SHARES: dict[str, float] = {"ieee": 0.95, "tf32": 0.9, "bf16": 0.75}
# Of the log of a sample's mean weight.
NATS: dict[str, float] = {"ieee": 1e-4, "tf32": 0.03, "bf16": 0.1}
ALL_AT_ONCE = "torch all at once"

not_there = absent("evalp_fast.kernels.sir", "sir")


def only_cuda() -> str | None:
    """For what a CPU has not."""
    return not_there() or needs_cuda()


class Networks(NamedTuple):
    """Proposal and energy."""

    flow: FlowWeights
    energy: EnergyWeights

    def double(self) -> "Networks":
        """In float64."""
        return Networks(self.flow.double(), self.energy.double())


def networks(dim: int) -> Networks:
    """A gentle energy, so that the effective sample size is a good share of the proposals."""
    energy = textbook.energy_weights(dim, ENERGY_HIDDEN, DEPTH)
    flow = textbook.flow_weights(dim, COUPLINGS, FLOW_HIDDEN, DEPTH)
    scaled = {name: 0.25 * getattr(flow, name) for name in ("weight_out", "bias_out")}
    return Networks(FlowWeights(**(vars(flow) | scaled)), energy)


def log_weight(
    nets: Networks, u: Tensor, product: textbook.Linear = textbook.linear
) -> tuple[Tensor, Tensor]:
    """Proposals `z = g(u)` and their log-weights `-f(z) - |z|²/2 + |u|²/2 + log|det dz/du|`."""
    z, log_det = textbook.flow_forward(nets.flow, textbook.shuffle(nets.flow.dim), u, product)
    base = 0.5 * (u.square().sum(dim=1) - z.square().sum(dim=1))
    return z, base + log_det - textbook.energy(nets.energy, z, product)


def ours(
    precision: Precision, n: int, proposals: int, backend: str | None = None
) -> Callable[[Networks], Call]:
    """The whole of it in one call, the look at the weights that are kept in bfloat16 included."""

    def make(nets: Networks) -> Call:
        from evalp_fast.kernels.sir import sir

        flow, energy = test_flow.module(nets.flow), test_energy.module(nets.energy)

        def call(start: int) -> Any:
            with launch.backend(backend):
                return sir(
                    0,
                    start,
                    n,
                    proposals,
                    flow.parameters_stacked(precision),
                    energy.parameters_in_order(precision),
                    precision=precision,
                    energy_activation="silu",
                )

        return call

    return make


def ours_composed(n: int, proposals: int) -> Callable[[Networks], Call]:
    """`SIRSampler` with the modules: noise, flow, energy, weight and race one after the other."""

    def make(nets: Networks) -> Call:
        from evalp_fast.samplers.sir import SIRSampler

        flow, energy = test_flow.module(nets.flow), test_energy.module(nets.energy)

        def weigh(z: Tensor, u: Tensor, log_det: Tensor) -> Tensor:
            return 0.5 * (u.square().sum(dim=1) - z.square().sum(dim=1)) + log_det - energy(z)

        sampler = SIRSampler(flow, weigh, nets.flow.dim, proposals)
        return lambda start: sampler(0, torch.arange(start, start + n, device=DEVICE)).samples

    return make


def numbers_at_once(n: int, proposals: int, at_once: int | None) -> int:
    """Proposals of a sample that torch evaluates together: one shape for all batches."""
    number = proposals if at_once is None else min(proposals, max(1, at_once // n))
    while proposals % number:
        number -= 1
    return number


def by_torch(
    product: textbook.Linear, n: int, proposals: int, at_once: int | None, mode: str | None = None
) -> Callable[[Networks], Call]:
    """All proposals at once, or in batches of `at_once` with the leader kept."""

    def make(nets: Networks) -> Call:
        def weigh(u: Tensor) -> tuple[Tensor, Tensor]:
            return log_weight(nets, u, product)

        function = weigh if mode is None else compiled(weigh, mode)
        number = numbers_at_once(n, proposals, at_once)

        def call(start: int) -> Tensor:
            generator = torch.Generator(DEVICE).manual_seed(start)
            best = torch.full((n,), -math.inf, device=DEVICE)
            chosen = torch.empty(n, nets.flow.dim, device=DEVICE)
            for _ in range(proposals // number):
                u, clocks = torch_noise(n, number, nets.flow.dim, generator)
                z, weights = function(u)
                leader, place = (weights.view(n, number) - clocks.log()).max(dim=1)
                rows = z.view(n, number, -1)[torch.arange(n, device=DEVICE), place]
                ahead = leader > best
                best = torch.where(ahead, leader, best)
                chosen = torch.where(ahead[:, None], rows, chosen)
            return chosen

        return call

    return make


# --- the same in float64 ------------------------------------------------------------------------------------

Blocks = Iterator[tuple[Tensor, Tensor]]
"""Proposals in order: their noise `[rows, number, D]`, and their clocks `[rows, number]`."""


def torch_noise(n: int, number: int, dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What a batch of torch draws: noise `[n·number, D]` and clocks `[n, number]`."""
    noise = torch.randn(n * number, dim, device=DEVICE, generator=generator)
    return noise, torch.empty(n, number, device=DEVICE).exponential_(generator=generator)


def torch_blocks(rows: Tensor, start: int, n: int, number: int, proposals: int, dim: int) -> Blocks:
    """These rows of what torch's generator gives a call."""
    generator = torch.Generator(DEVICE).manual_seed(start)
    for _ in range(proposals // number):
        u, clocks = torch_noise(n, number, dim, generator)
        yield u.view(n, number, dim)[rows], clocks[rows]


def our_blocks(seed: int, index: Tensor, proposals: int, dim: int) -> Blocks:
    """Those of the samples with these numbers: four clocks a counter, four proposals a block."""
    for first in range(0, proposals, 4):
        steps = range(first, min(first + 4, proposals))
        u = torch.stack([philox.normal(seed, index, k, philox.Stream.PROPOSAL, dim) for k in steps], dim=1)
        clocks = philox.exponential(seed, index, first // 4, philox.Stream.SELECTION, 4)
        yield u, clocks[:, : len(steps)]


def problem(dim: int, n: int, proposals: int, scale: Scale) -> Problem:
    """n samples of so many proposals each."""
    nets = networks(dim)

    def setup() -> Workload:
        exact, rows = nets.double(), checks.some(n, CHECKED)

        @functools.cache  # one race for all of ours, one for torch's of each size of a batch
        def wanted(start: int, at_once: int | None) -> tuple[Tensor, Tensor]:
            if at_once is None:
                blocks = our_blocks(0, start + rows, proposals, dim)
            else:
                blocks = torch_blocks(rows, start, n, at_once, proposals, dim)
            return textbook.race(lambda u: log_weight(exact, u), blocks)

        def check(provider: Provider, result: Any, start: int) -> None:
            is_ours = provider.name.startswith("evalp_fast")
            whole = provider.name == ALL_AT_ONCE
            at_once = None if is_ours else numbers_at_once(n, proposals, None if whole else AT_ONCE)
            winner, log_mean = wanted(start, at_once)
            samples = result if isinstance(result, Tensor) else result[0]
            assert samples.shape == (n, dim), f"shape {tuple(samples.shape)}, not {(n, dim)}"
            assert samples.dtype == torch.float32, f"dtype {samples.dtype}, not float32"
            checks.finite(samples, "a sample")
            limit, share = LIMITS[provider.precision], SHARES[provider.precision]
            checks.rows_agree(samples[rows], winner, limit, share, "the samples")
            if not isinstance(result, Tensor):
                found = result.diagnostics.log_mean_weight[rows]
                checks.absolute_error(found, log_mean, NATS[provider.precision], "the mean log-weight")

        return Workload(nets, [(k * n,) for k in range(2)], check)

    rivals = [
        Provider(ALL_AT_ONCE, by_torch(textbook.linear, n, proposals, None)),
        Provider("torch in batches", by_torch(textbook.linear, n, proposals, AT_ONCE)),
        Provider("torch in batches bf16", by_torch(textbook.linear_bf16, n, proposals, AT_ONCE), "bf16"),
        Provider(
            f"torch.compile in batches{suffix(QUICKEST)}",
            by_torch(PRODUCTS[QUICKEST], n, proposals, AT_ONCE, "default"),
            QUICKEST,
            (lambda: None) if proposals == 100 else not_at_small(scale, "it is compiled for 100 proposals"),
            compiles=True,
        ),
        Provider(
            f"torch.compile max-autotune in batches{suffix(QUICKEST)}",
            by_torch(PRODUCTS[QUICKEST], n, proposals, AT_ONCE, "max-autotune"),
            QUICKEST,
            tuned,
            compiles=True,
        ),
    ]
    flops = n * proposals * (nets.flow.flops() + nets.energy.flops())
    return Problem(
        "sir",
        f"race, dim {dim}, {n:,} samples, {proposals:,} proposals",
        {
            "batch": n,
            "proposals": proposals,
            "dim": dim,
            "couplings": COUPLINGS,
            "hidden": FLOW_HIDDEN,
            "energy_hidden": ENERGY_HIDDEN,
        },
        n,
        setup,
        (
            Provider("evalp_fast bf16", ours("bf16", n, proposals), "bf16", not_there, compiles=True),
            Provider("evalp_fast tf32", ours("tf32", n, proposals), "tf32", only_cuda, compiles=True),
            Provider("evalp_fast", ours("ieee", n, proposals), "ieee", not_there, compiles=True),
            Provider("evalp_fast composed", ours_composed(n, proposals)),
            *(
                [Provider("evalp_fast reference", ours("ieee", n, proposals, "reference"), "ieee", not_there)]
                if ON_CUDA
                else []
            ),
            *rivals,
        ),
        Work(
            bytes=4.0 * n * (dim + 1),
            flops=flops,
            normals=float(n * proposals * dim),
            memory=4.0 * n * proposals * (3 * FLOW_HIDDEN + 6 * dim),
        ),
    )


def problems(scale: Scale) -> list[Problem]:
    """Growing numbers of proposals: time grows with them, memory should not."""
    if scale == "sweep":
        return [problem(128, 1 << p, 100, scale) for p in range(8, 19, 2)]
    dim, n, counts = pick(
        scale, (64, 128, (25, 100)), (128, 256, (10, 100, 1000)), (128, 1 << 16, (10, 100, 1000))
    )
    return [problem(dim, n, proposals, scale) for proposals in counts]


def test_sir(case: Any, timed: Any) -> None:
    timed(case)
