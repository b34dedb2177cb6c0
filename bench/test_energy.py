"""An MLP energy: its value, and value and gradient together.

Peers: the same MLP in torch (autograd for the gradient), eager and by Inductor. Ours are called as a user
does, through the module, which looks at each call whether the rounded weights that it keeps are still true.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import checks, textbook
from bench.harness import (
    Call,
    Precision,
    Problem,
    Provider,
    Work,
    Workload,
    absent,
    compiled,
    input_sets,
    needs_cuda,
)
from bench.machine import DEVICE, ON_CUDA
from bench.modes import in_modes
from bench.sizes import SWEEP, Scale, pick
from bench.textbook import EnergyWeights
from evalp_fast.kernels import launch

DIM, HIDDEN, DEPTH = 128, 256, 2
# Root mean square, relative. Measured with the textbook on a CPU: 4e-7 and 5e-3.
LIMITS: dict[str, float] = {"ieee": 5e-6, "tf32": 2e-3, "bf16": 1.5e-2}
CHECKED = 1 << 14

not_there = absent("evalp_fast.kernels.energy", "mlp_energy")


def only_cuda() -> str | None:
    """For what a CPU has not."""
    return not_there() or needs_cuda()


def module(weights: EnergyWeights) -> Any:
    """`MLPEnergy` with these weights."""
    from evalp_fast.models.energy import EnergyConfig, MLPEnergy

    dim, hidden = weights.weights[0].shape[1], weights.weights[0].shape[0]
    energy = MLPEnergy(EnergyConfig(dim, hidden, len(weights.weights) - 1, "silu")).to(DEVICE).eval()
    with torch.no_grad():
        for layer, weight, bias in zip(energy.layers, weights.weights, weights.biases, strict=True):
            layer.weight.copy_(weight)  # type: ignore[union-attr,operator]
            layer.bias.copy_(bias)  # type: ignore[union-attr,operator]
    return energy.requires_grad_(False)


def ours(precision: Precision, gradient: bool, backend: str | None = None) -> Callable[[EnergyWeights], Call]:
    """The module."""

    def make(weights: EnergyWeights) -> Call:
        energy = module(weights)
        function = energy.gradient if gradient else energy

        def call(z: Tensor) -> Any:
            with launch.backend(backend):
                return function(z, precision=precision)

        return call

    return make


def by_torch(
    product: textbook.Linear, gradient: bool, mode: str | None = None
) -> Callable[[EnergyWeights], Call]:
    """The textbook's; what is compiled is the value, and autograd of it."""

    def make(weights: EnergyWeights) -> Call:
        def value(z: Tensor) -> Tensor:
            return textbook.energy(weights, z, product)

        function = value if mode is None else compiled(value, mode)

        def with_gradient(z: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                energy = function(z)
                (slope,) = torch.autograd.grad(energy.sum(), z)
            return energy.detach(), slope

        return with_gradient if gradient else function

    return make


def problem(n: int, gradient: bool, scale: Scale) -> Problem:
    """n energies."""
    weights = textbook.energy_weights(DIM, HIDDEN, DEPTH)

    def setup() -> Workload:
        exact = weights.double()
        rows = checks.some(n, CHECKED)

        def check(provider: Provider, result: Any, z: Tensor) -> None:
            values = result if gradient else (result,)
            assert len(values) == 1 + gradient, f"{len(values)} results, not {1 + gradient}"
            wanted = textbook.energy_and_gradient(exact, z[rows].double())
            for value, right, name in zip(values, wanted, ("an energy", "a gradient"), strict=False):
                shape = (n, *right.shape[1:])
                assert value.shape == shape, f"{name} has shape {tuple(value.shape)}, not {shape}"
                assert value.dtype == torch.float32, f"{name} has dtype {value.dtype}, not float32"
                checks.finite(value, name)
                checks.relative_error(value[rows], right, LIMITS[provider.precision], name)

        return Workload(weights, input_sets(lambda: (torch.randn(n, DIM, device=DEVICE),)), check)

    kind = "value and gradient" if gradient else "value"
    return Problem(
        "energy",
        f"{kind}, dim {DIM}, batch {n:,}",
        {"batch": n, "dim": DIM, "hidden": HIDDEN, "depth": DEPTH, "gradient": gradient},
        n,
        setup,
        (
            Provider("evalp_fast bf16", ours("bf16", gradient), "bf16", not_there, compiles=True),
            Provider("evalp_fast tf32", ours("tf32", gradient), "tf32", only_cuda, compiles=True),
            Provider("evalp_fast", ours("ieee", gradient), "ieee", not_there, compiles=True),
            *(
                [Provider("evalp_fast reference", ours("ieee", gradient, "reference"), "ieee", not_there)]
                if ON_CUDA
                else []
            ),
            *in_modes(
                lambda product, mode: by_torch(product, gradient, mode),
                scale,
                small=(("default", "ieee"), ("default", "bf16")),
            ),
        ),
        Work(
            bytes=4.0 * n * (DIM + 1 + (DIM if gradient else 0)),
            flops=n * weights.flops() * (2 if gradient else 1),
            memory=4.0 * n * (6 * HIDDEN + 3 * DIM),
        ),
        unit="energies",
        clock="device",
    )


def problems(scale: Scale) -> list[Problem]:
    """The value alone, and with its gradient."""
    batches = SWEEP if scale == "sweep" else pick(scale, (4096,), (65_536,), (1 << 20,))
    return [problem(n, gradient, scale) for gradient in (False, True) for n in batches]


def test_energy(case: Any, timed: Any) -> None:
    timed(case)
