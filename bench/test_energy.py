"""An MLP energy: its value, and value and gradient together.

Peers: the same MLP in torch (autograd for the gradient), eager and by Inductor.
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
from bench.sizes import SWEEP, Scale, pick
from bench.textbook import EnergyWeights

DIM, HIDDEN, DEPTH = 128, 256, 2
# Root mean square, relative.
LIMITS: dict[str, float] = {"ieee": 1e-5, "tf32": 2e-3, "bf16": 2e-2}
CHECKED = 1 << 14

not_there = absent("evalp_fast.kernels.energy", "mlp_energy")


def only_cuda() -> str | None:
    """For what a CPU has not."""
    return not_there() or needs_cuda()


def our_parameters(weights: EnergyWeights, precision: Precision) -> Any:
    """The weights as our kernel takes them; in bf16 with copies made once, as a module holds them."""
    from evalp_fast.kernels.energy import EnergyParameters

    *hidden, last = weights.weights
    if precision == "bf16":
        hidden = [weight.bfloat16() for weight in hidden]
    return EnergyParameters((*hidden, last), weights.biases)


def ours(precision: Precision, gradient: bool) -> Callable[[EnergyWeights], Call]:
    """The public functions."""

    def make(weights: EnergyWeights) -> Call:
        from evalp_fast.kernels.energy import mlp_energy, mlp_energy_and_gradient

        parameters = our_parameters(weights, precision)
        function = mlp_energy_and_gradient if gradient else mlp_energy
        return lambda z: function(z, parameters, precision=precision, activation="silu")

    return make


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


def ours_composed(gradient: bool) -> Callable[[EnergyWeights], Call]:
    """The module and autograd."""

    def make(weights: EnergyWeights) -> Call:
        energy = module(weights)
        return energy.gradient if gradient else energy

    return make


def by_torch(
    product: textbook.Linear, gradient: bool, mode: str | None = None
) -> Callable[[EnergyWeights], Call]:
    """The textbook's; what is compiled is the value, and autograd of it."""

    def make(weights: EnergyWeights) -> Call:
        def value(z: Tensor) -> Tensor:
            return textbook.energy(weights, z, product)

        function = value if mode is None else compiled(value, None if mode == "default" else mode)

        def with_gradient(z: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                energy = function(z)
                (slope,) = torch.autograd.grad(energy.sum(), z)
            return energy.detach(), slope

        return with_gradient if gradient else function

    return make


def problem(n: int, gradient: bool) -> Problem:
    """n energies."""
    weights = textbook.energy_weights(DIM, HIDDEN, DEPTH)

    def setup() -> Workload:
        exact = weights.double()

        def check(provider: Provider, result: Any, z: Tensor) -> None:
            values = result if gradient else (result,)
            wanted = textbook.energy_and_gradient(exact, z[:CHECKED].double())
            for value, right, name in zip(values, wanted, ("an energy", "a gradient"), strict=False):
                assert value.shape[0] == n, f"{name} has {value.shape[0]} rows, not {n}"
                checks.relative_error(value[:CHECKED], right, LIMITS[provider.precision], name)

        return Workload(weights, input_sets(lambda: (torch.randn(n, DIM, device=DEVICE),)), check)

    products: dict[Precision, textbook.Linear] = {"ieee": textbook.linear, "bf16": textbook.linear_bf16}
    rivals = [
        Provider(
            f"torch {name}{'' if p == 'ieee' else ' bf16'}",
            by_torch(product, gradient, mode),
            p,
            compiles=mode is not None,
        )
        for name, mode in (
            ("eager", None),
            ("compile", "default"),
            *([("compile max-autotune", "max-autotune")] if ON_CUDA else []),
        )
        for p, product in products.items()
    ]
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
            Provider("evalp_fast module", ours_composed(gradient)),
            *rivals,
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
    return [problem(n, gradient) for gradient in (False, True) for n in batches]


def test_energy(case: Any, timed: Any) -> None:
    timed(case)
