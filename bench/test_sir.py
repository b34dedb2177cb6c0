"""Sampling-importance-resampling with a flow's proposals: one of P for each sample, by exact weights.

The prior is p(z) ∝ N(z; 0, I)·exp(-f(z)), f an MLP. Rivals: what one writes in torch, with all proposals at
once, and in batches of proposals with the leader kept. Checked by statistics: mean energy and mean square
of the samples agree with float64 draws of other noise, and so does the mean log of the normaliser where it
is returned.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import checks, test_energy, test_flow, textbook
from bench.harness import Call, Precision, Problem, Provider, Work, Workload, absent, compiled, needs_cuda
from bench.machine import DEVICE, ON_CUDA
from bench.sizes import Scale, pick
from bench.textbook import EnergyWeights, FlowWeights

COUPLINGS, FLOW_HIDDEN, ENERGY_HIDDEN, DEPTH = 8, 256, 200, 2
AT_ONCE = 8192 if not ON_CUDA else 1 << 20
CHECKED = 512

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


def ours(precision: Precision, n: int, proposals: int) -> Callable[[Networks], Call]:
    """The whole of it in one call."""

    def make(nets: Networks) -> Call:
        from evalp_fast.kernels.sir import sir

        flow = test_flow.our_parameters(nets.flow, precision)
        energy = test_energy.our_parameters(nets.energy, precision)
        return lambda start: sir(
            0, start, n, proposals, flow, energy, precision=precision, energy_activation="silu"
        )

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


def by_torch(
    product: textbook.Linear, n: int, proposals: int, at_once: int | None, compile_weight: bool
) -> Callable[[Networks], Call]:
    """All proposals at once, or in batches of `at_once` with the leader kept."""

    def make(nets: Networks) -> Call:
        def weigh(u: Tensor) -> tuple[Tensor, Tensor]:
            return log_weight(nets, u, product)

        function = compiled(weigh) if compile_weight else weigh
        number = proposals if at_once is None else min(proposals, max(1, at_once // n))
        while proposals % number:  # one shape for all batches
            number -= 1

        def call(start: int) -> Tensor:
            best = torch.full((n,), -math.inf, device=DEVICE)
            chosen = torch.empty(n, nets.flow.dim, device=DEVICE)
            for _ in range(proposals // number):
                z, weights = function(torch.randn(n * number, nets.flow.dim, device=DEVICE))
                clocks = torch.empty(n, number, device=DEVICE).exponential_().log()
                leader, place = (weights.view(n, number) - clocks).max(dim=1)
                rows = z.view(n, number, -1)[torch.arange(n, device=DEVICE), place]
                ahead = leader > best
                best = torch.where(ahead, leader, best)
                chosen = torch.where(ahead[:, None], rows, chosen)
            return chosen

        return call

    return make


def problem(dim: int, n: int, proposals: int, scale: Scale) -> Problem:
    """n samples of so many proposals each."""
    nets = networks(dim)

    def setup() -> Workload:
        exact = nets.double()
        number = min(n, CHECKED)
        best = torch.full((number,), -math.inf, device=DEVICE, dtype=torch.float64)
        z = torch.empty(number, dim, device=DEVICE, dtype=torch.float64)
        generator = torch.Generator(DEVICE).manual_seed(5)

        def random(*shape: int) -> Tensor:
            return torch.empty(*shape, device=DEVICE, dtype=torch.float64)

        for _ in range(proposals):
            proposal, weight = log_weight(exact, random(number, dim).normal_(generator=generator))
            score = weight - random(number).exponential_(generator=generator).log()
            z = torch.where((score > best)[:, None], proposal, z)
            best = torch.maximum(score, best)
        wanted = {"the energy": textbook.energy(exact.energy, z), "the mean square": z.square().mean(dim=1)}

        def check(provider: Provider, result: Any, start: int) -> None:
            samples = result if isinstance(result, Tensor) else result[0]
            assert samples.shape == (n, dim), f"shape {tuple(samples.shape)}, not {(n, dim)}"
            samples = samples.double()
            found = {
                "the energy": textbook.energy(exact.energy, samples),
                "the mean square": samples.square().mean(dim=1),
            }
            for name, value in wanted.items():
                checks.mean_close(found[name], value, name)

        return Workload(nets, [(k * n,) for k in range(2)], check)

    rivals = [
        Provider("torch all at once", by_torch(textbook.linear, n, proposals, None, False)),
        Provider("torch in batches", by_torch(textbook.linear, n, proposals, AT_ONCE, False)),
    ]
    if ON_CUDA or scale != "small" or proposals == 100:
        rivals.append(
            Provider(
                "torch.compile in batches bf16",
                by_torch(textbook.linear_bf16, n, proposals, AT_ONCE, True),
                "bf16",
                compiles=True,
            )
        )
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
