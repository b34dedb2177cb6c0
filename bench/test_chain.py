"""Langevin chains on an energy-based prior, p(z) ∝ N(z; 0, I)·exp(-f(z)) f an MLP, many steps in one call.

Peers: the loop that one writes in torch, eager and with its step compiled, and torchebm's
`LangevinDynamics` on the same energy (its step size is half of ours, and it has no bf16 products but by
autocast, which it offers). Checked by statistics: mean energy and mean square at the end agree with float64
chains of other noise.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench import checks, textbook
from bench.harness import Call, Precision, Problem, Provider, Work, Workload, absent, compiled, needs_cuda
from bench.machine import DEVICE, ON_CUDA
from bench.sizes import SWEEP, Scale, pick
from bench.test_energy import module, our_parameters
from bench.textbook import EnergyWeights

DIM, HIDDEN, DEPTH = 128, 256, 2
STEP_SIZE = 0.05
CHECKED = 1024

not_there = absent("evalp_fast.kernels.latent_chain", "langevin_chain")


def only_cuda() -> str | None:
    """For what a CPU has not."""
    return not_there() or needs_cuda()


def ours(precision: Precision, steps: int, adjusted: bool) -> Callable[[EnergyWeights], Call]:
    """The whole chain in one call."""

    def make(weights: EnergyWeights) -> Call:
        from evalp_fast.kernels.latent_chain import langevin_chain

        parameters = our_parameters(weights, precision)

        def call(z: Tensor, index: Tensor) -> Any:
            return langevin_chain(
                z,
                parameters,
                n_steps=steps,
                step_size=STEP_SIZE,
                adjusted=adjusted,
                precision=precision,
                activation="silu",
                seed=0,
                index=index,
            )

        return call

    return make


def ours_composed(steps: int, adjusted: bool) -> Callable[[EnergyWeights], Call]:
    """`evalp_fast.langevin` on any energy: autograd, and one kernel a step."""

    def make(weights: EnergyWeights) -> Call:
        from evalp_fast.samplers.langevin import langevin

        energy = module(weights)

        def potential(z: Tensor) -> Tensor:
            return 0.5 * z.square().sum(dim=1) + energy(z)

        def call(z: Tensor, index: Tensor) -> Tensor:
            options = {"n_steps": steps, "step_size": STEP_SIZE, "adjusted": adjusted}
            return langevin(z, potential, **options, seed=0, index=index).samples

        return call

    return make


def potential_gradient(weights: EnergyWeights, z: Tensor, product: textbook.Linear) -> Tensor:
    """∇(|z|²/2 + f)."""
    return z + textbook.energy_and_gradient(weights, z, product)[1]


def by_torch(product: textbook.Linear, steps: int, compile_step: bool) -> Callable[[EnergyWeights], Call]:
    """The loop; the gradient is compiled, the noise is made outside of it, which is faster on a CPU."""

    def make(weights: EnergyWeights) -> Call:
        def value(z: Tensor) -> Tensor:
            return 0.5 * z.square().sum(dim=1) + textbook.energy(weights, z, product)

        function = compiled(value) if compile_step else value

        def call(z: Tensor, index: Tensor) -> Tensor:
            for _ in range(steps):
                with torch.enable_grad():
                    z = z.detach().requires_grad_()
                    (slope,) = torch.autograd.grad(function(z).sum(), z)
                z = z.detach() - 0.5 * STEP_SIZE * slope + math.sqrt(STEP_SIZE) * torch.randn_like(z)
            return z

        return call

    return make


def network(weights: EnergyWeights) -> nn.Sequential:
    """The energy as anybody would write it, its parameters fixed."""
    modules: list[nn.Module] = []
    for weight, bias in zip(weights.weights, weights.biases, strict=True):
        linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        modules += [linear, nn.SiLU()]
    return nn.Sequential(*modules[:-1]).requires_grad_(False)


def torchebm(steps: int) -> Callable[[EnergyWeights], Call]:
    """torchebm 0.8: https://github.com/soran-ghaderi/torchebm"""

    def make(weights: EnergyWeights) -> Call:
        core: Any = importlib.import_module("torchebm.core")
        samplers: Any = importlib.import_module("torchebm.samplers")

        class Potential(core.BaseModel):
            def __init__(self) -> None:
                super().__init__(device=DEVICE)
                self.energy = network(weights)

            def forward(self, x: Tensor) -> Tensor:
                return 0.5 * x.square().sum(dim=1) + self.energy(x).squeeze(-1)

        sampler = samplers.LangevinDynamics(
            Potential().to(DEVICE), step_size=STEP_SIZE / 2, noise_scale=1.0, device=DEVICE
        )
        return lambda z, index: sampler.sample(x=z, n_steps=steps)

    return make


def samples_of(result: Any) -> Tensor:
    """The end of the chains, whatever comes with it."""
    if isinstance(result, Tensor):
        return result
    return result.samples if hasattr(result, "samples") else result[0]


def problem(n: int, steps: int, adjusted: bool, scale: Scale) -> Problem:
    """n chains of so many steps."""
    weights = textbook.energy_weights(DIM, HIDDEN, DEPTH)

    def setup() -> Workload:
        exact = weights.double()
        inputs = [
            (torch.randn(n, DIM, device=DEVICE), torch.arange(k * n, (k + 1) * n, device=DEVICE))
            for k in range(2)
        ]
        z = inputs[0][0][:CHECKED].double()
        if not adjusted:
            for _ in range(steps):
                slope = potential_gradient(exact, z, textbook.linear)
                z = z - 0.5 * STEP_SIZE * slope + math.sqrt(STEP_SIZE) * torch.randn_like(z)
        else:
            z = exact_chain(exact, z, steps)
        wanted = {"the energy": textbook.energy(exact, z), "the mean square": z.square().mean(dim=1)}

        def check(provider: Provider, result: Any, start: Tensor, index: Tensor) -> None:
            end = samples_of(result)
            assert end.shape == (n, DIM), f"shape {tuple(end.shape)}, not {(n, DIM)}"
            assert not torch.equal(end, start), "the chains did not move"
            end = end.double()
            found = {"the energy": textbook.energy(exact, end), "the mean square": end.square().mean(dim=1)}
            for name, value in wanted.items():
                checks.mean_close(found[name], value, name)

        return Workload(weights, inputs, check)

    rivals: list[Provider] = []
    if not adjusted:
        products: dict[Precision, textbook.Linear] = {"ieee": textbook.linear, "bf16": textbook.linear_bf16}
        rivals = [
            Provider(
                f"torch {'compile' if compile_step else 'eager'}{'' if p == 'ieee' else ' bf16'}",
                by_torch(product, steps, compile_step),
                p,
                compiles=compile_step,
            )
            for compile_step in (False, True)
            for p, product in products.items()
            if ON_CUDA or scale != "small" or (p == "bf16") == compile_step
        ]
        rivals.append(Provider("torchebm", torchebm(steps), missing=absent("torchebm.samplers")))
    return Problem(
        "chain",
        f"{'MALA' if adjusted else 'Langevin'}, dim {DIM}, {n:,} chains, {steps} steps",
        {"batch": n, "dim": DIM, "hidden": HIDDEN, "depth": DEPTH, "steps": steps, "adjusted": adjusted},
        n,
        setup,
        (
            Provider("evalp_fast bf16", ours("bf16", steps, adjusted), "bf16", not_there, compiles=True),
            Provider("evalp_fast tf32", ours("tf32", steps, adjusted), "tf32", only_cuda, compiles=True),
            Provider("evalp_fast", ours("ieee", steps, adjusted), "ieee", not_there, compiles=True),
            Provider("evalp_fast composed", ours_composed(steps, adjusted)),
            *rivals,
        ),
        Work(
            bytes=8.0 * n * DIM,
            flops=2.0 * steps * n * weights.flops(),
            normals=float(steps * n * DIM),
            memory=4.0 * n * (6 * HIDDEN + 6 * DIM),
        ),
        unit="chains",
    )


def exact_chain(weights: EnergyWeights, z: Tensor, steps: int) -> Tensor:
    """Metropolis-adjusted Langevin in the dtype of its arguments (Roberts & Tweedie 1996)."""

    def state(z: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = textbook.energy_and_gradient(weights, z)
        return 0.5 * z.square().sum(dim=1) + value, z + slope

    value, slope = state(z)
    for _ in range(steps):
        proposal = z - 0.5 * STEP_SIZE * slope + math.sqrt(STEP_SIZE) * torch.randn_like(z)
        new_value, new_slope = state(proposal)
        forward = (proposal - z + 0.5 * STEP_SIZE * slope).square().sum(dim=1)
        backward = (z - proposal + 0.5 * STEP_SIZE * new_slope).square().sum(dim=1)
        log_ratio = value - new_value - (backward - forward) / (2 * STEP_SIZE)
        accepted = torch.rand_like(log_ratio).log() <= log_ratio
        z = torch.where(accepted[:, None], proposal, z)
        slope = torch.where(accepted[:, None], new_slope, slope)
        value = torch.where(accepted, new_value, value)
    return z


def problems(scale: Scale) -> list[Problem]:
    """50 unadjusted steps; beyond `small` the adjusted ones too."""
    if scale == "sweep":
        return [problem(n, 50, False, scale) for n in SWEEP]
    n = pick(scale, 4096, 4096, 1 << 18)
    steps = pick(scale, 50, 50, 60)
    return [
        problem(n, steps, adjusted, scale) for adjusted in ((False,) if scale == "small" else (False, True))
    ]


def test_chain(case: Any, timed: Any) -> None:
    timed(case)
