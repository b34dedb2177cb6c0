"""Langevin chains on an energy-based prior, p(z) ∝ N(z; 0, I)·exp(-f(z)) f an MLP, many steps in one call.

Peers: the loop that one writes in torch, eager and with its gradient compiled, and torchebm's
`LangevinDynamics` on the same energy (its step size is half of ours), on a GPU also in its mixed precision.
The ends are compared with float64 chains of the same noise: ours is a function of the chains' numbers, and
torch's is drawn again from its generator, to which every call gives the same seed. Rounding may turn an
acceptance, and so of the adjusted chains a share has to agree.
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench import checks, textbook
from bench.harness import Call, Precision, Problem, Provider, Work, Workload, absent, compiled, needs_cuda
from bench.machine import DEVICE, ON_CUDA
from bench.modes import QUICKEST, in_modes
from bench.sizes import SWEEP, Scale, pick
from bench.test_energy import module
from bench.textbook import EnergyWeights
from evalp_fast.kernels import launch
from evalp_fast.kernels.philox import Stream, normal, uniform

DIM, HIDDEN, DEPTH = 128, 256, 2
STEP_SIZE = 0.05
CHECKED = 512
SEED = 7  # of the generator of every call of torch
# Root mean square of the errors, relative. Measured on a CPU: 1.6e-7 and 2.1e-4.
LIMITS: dict[str, float] = {"ieee": 5e-6, "tf32": 2e-4, "bf16": 1e-3}
# Share of adjusted chains that agree so.
SHARES: dict[str, float] = {"ieee": 0.98, "tf32": 0.95, "bf16": 0.75}

not_there = absent("evalp_fast.kernels.latent_chain", "langevin_chain")


def only_cuda() -> str | None:
    """For what a CPU has not."""
    return not_there() or needs_cuda()


def ours(
    precision: Precision, steps: int, adjusted: bool, backend: str | None = None
) -> Callable[[EnergyWeights], Call]:
    """The whole chain in one call, the look at the weights that are kept in bfloat16 included."""

    def make(weights: EnergyWeights) -> Call:
        from evalp_fast.kernels.latent_chain import langevin_chain

        energy = module(weights)

        def call(z: Tensor, index: Tensor) -> Any:
            with launch.backend(backend):
                return langevin_chain(
                    z,
                    energy.parameters_in_order(precision),
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


def by_torch(
    product: textbook.Linear, steps: int, mode: str | None = None
) -> Callable[[EnergyWeights], Call]:
    """The loop; the gradient is compiled, the noise is made outside of it, which is faster on a CPU."""

    def make(weights: EnergyWeights) -> Call:
        def value(z: Tensor) -> Tensor:
            return 0.5 * z.square().sum(dim=1) + textbook.energy(weights, z, product)

        function = value if mode is None else compiled(value, mode)

        def call(z: Tensor, index: Tensor) -> Tensor:
            generator = torch.Generator(DEVICE).manual_seed(SEED)
            for _ in range(steps):
                noise = torch.randn(z.shape, device=DEVICE, generator=generator)
                with torch.enable_grad():
                    z = z.detach().requires_grad_()
                    (slope,) = torch.autograd.grad(function(z).sum(), z)
                z = z.detach() - 0.5 * STEP_SIZE * slope + math.sqrt(STEP_SIZE) * noise
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


def torchebm(precision: Precision, steps: int) -> Callable[[EnergyWeights], Call]:
    """torchebm 0.8: https://github.com/soran-ghaderi/torchebm. Its mixed precision is autocast, on a GPU."""

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
        if precision == "bf16":
            sampler.setup_mixed_precision(True, torch.bfloat16)

        def call(z: Tensor, index: Tensor) -> Tensor:
            generator = torch.Generator(DEVICE).manual_seed(SEED)
            return sampler.sample(x=z, n_steps=steps, generator=generator)

        return call

    return make


def samples_of(result: Any) -> Tensor:
    """The end of the chains, whatever comes with it."""
    if isinstance(result, Tensor):
        return result
    return result.samples if hasattr(result, "samples") else result[0]


def our_noise(index: Tensor) -> Callable[[int], Tensor]:
    """Step to the noise of the chains with these numbers, seed 0."""
    return lambda step: normal(0, index, step, Stream.LANGEVIN, DIM)


def torch_noise(start: Tensor, rows: Tensor) -> Callable[[int], Tensor]:
    """Step, in order, to these rows of what torch's generator gives a call."""
    generator = torch.Generator(DEVICE).manual_seed(SEED)
    return lambda step: torch.randn(start.shape, device=DEVICE, generator=generator)[rows]


def problem(n: int, steps: int, adjusted: bool, scale: Scale) -> Problem:
    """n chains of so many steps."""
    weights = textbook.energy_weights(DIM, HIDDEN, DEPTH)

    def setup() -> Workload:
        exact = weights.double()
        inputs = [
            (torch.randn(n, DIM, device=DEVICE), torch.arange(k * n, (k + 1) * n, device=DEVICE))
            for k in range(2)
        ]
        rows = checks.some(n, CHECKED)

        @functools.cache  # one chain for all of ours, one for all of torch's
        def wanted(is_ours: bool, number: int) -> Tensor:
            start, index = inputs[number]
            noise = our_noise(index[rows]) if is_ours else torch_noise(start, rows)

            def potential(z: Tensor) -> Tensor:
                return 0.5 * z.square().sum(dim=1) + textbook.energy(exact, z)

            def places(step: int) -> Tensor:
                return uniform(0, index[rows], step, Stream.ACCEPTANCE, 1)[:, 0]

            return textbook.langevin(
                potential, start[rows].double(), steps, STEP_SIZE, noise, places if adjusted else None
            )

        def check(provider: Provider, result: Any, start: Tensor, index: Tensor) -> None:
            end = samples_of(result)
            assert end.shape == (n, DIM), f"shape {tuple(end.shape)}, not {(n, DIM)}"
            assert end.dtype == torch.float32, f"dtype {end.dtype}, not float32"
            checks.finite(end, "the end of a chain")
            number = int(index[0]) // n
            right, limit = wanted(provider.name.startswith("evalp_fast"), number), LIMITS[provider.precision]
            if adjusted:
                checks.rows_agree(end[rows], right, limit, SHARES[provider.precision], "the ends")
            else:
                checks.relative_error(end[rows], right, limit, "the end of a chain")

        return Workload(weights, inputs, check)

    rivals: list[Provider] = []
    if not adjusted:
        rivals = in_modes(
            lambda product, mode: by_torch(product, steps, mode), scale, small=(("default", QUICKEST),)
        )
        there = absent("torchebm.samplers")
        rivals.append(Provider("torchebm", torchebm("ieee", steps), missing=there))
        rivals.append(
            Provider("torchebm bf16", torchebm("bf16", steps), "bf16", lambda: there() or needs_cuda())
        )
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
            *(
                [
                    Provider(
                        "evalp_fast reference", ours("ieee", steps, adjusted, "reference"), "ieee", not_there
                    )
                ]
                if ON_CUDA
                else []
            ),
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
