"""The law that Langevin steps sample, and the independence of their noise."""

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from evalp_fast.kernels.langevin import langevin_step
from evalp_fast.kernels.philox import Stream, normal


def stationary_p_value(
    step_size: float, temperature: float, *, drift: float = 1.0, noise: float = 1.0
) -> float:
    """How well 30 steps keep the stationary law of the unadjusted step on U = x²/2, which is known exactly.

    x' = (1 - η/2)x + √(ηT)ξ has the variance ηT/(1 - (1 - η/2)²) = T/(1 - η/4). The chains start in that law;
    half of the energy is the gradient's and half the prior's. `drift` and `noise` break the step on purpose.
    """
    count, columns = 20_000, 4
    deviation = math.sqrt(temperature / (1.0 - step_size / 4.0))
    index = torch.arange(count)
    x = deviation * normal(3, index, 0, Stream.INITIAL, columns)
    for step in range(30):
        # A wrong factor of the drift is a wrong step size; it is undone in the noise.
        wrong = step_size * drift
        heat = temperature / drift * noise**2
        x = langevin_step(
            x, 0.5 * x, wrong, temperature=heat, seed=4, index=index, step=step, prior_precision=0.5
        )
    return scipy.stats.kstest((x / deviation).flatten().numpy(), "norm").pvalue


@pytest.mark.parametrize(("step_size", "temperature"), [(0.1, 1.0), (1.0, 1.0), (1.0, 0.3), (2.5, 2.0)])
def test_stationary_law_is_exact(step_size: float, temperature: float) -> None:
    assert stationary_p_value(step_size, temperature) > 1e-3


@pytest.mark.parametrize(
    "broken",
    [
        {"noise": math.sqrt(0.5)},  # half the variance
        {"noise": 0.5},  # half the noise
        {"noise": 0.95},
        {"drift": 2.0},  # η instead of η/2
        {"drift": 0.5},
    ],
    ids=str,
)
def test_the_law_of_a_broken_step_is_told_apart(broken: dict) -> None:
    """The power of the test above; a missing square root is the case `noise` = √(ηT)."""
    assert stationary_p_value(0.6, 1.0, **broken) < 1e-6
    assert stationary_p_value(0.6, 1.0, noise=math.sqrt(0.6)) < 1e-6


def independent_p_value(first: Tensor, second: Tensor) -> float:
    """Chi-square test of independence of two sets of normals, in eight equally likely classes each."""
    classes = [
        torch.floor(8 * torch.special.ndtr(t.flatten().double())).clamp(0, 7).long() for t in (first, second)
    ]
    table = torch.bincount(8 * classes[0] + classes[1], minlength=64).reshape(8, 8)
    return scipy.stats.chi2_contingency(table.numpy()).pvalue


def test_noise_is_independent() -> None:
    """Guards against streams that overlap (a step added to the seed, an index that shares a counter)."""
    count, columns = 20_000, 8
    zero, index = torch.zeros(count, columns), torch.arange(count)

    def noise(seed: int, index: Tensor, step: int, stream: int = Stream.LANGEVIN) -> Tensor:
        moved = langevin_step(zero, zero, 1.0, seed=seed, index=index, step=step, stream=stream)
        assert isinstance(moved, Tensor)
        return moved

    base = noise(11, index, 5)
    others = {
        "next step": noise(11, index, 6),
        "next seed": noise(12, index, 5),
        "next seed, step before": noise(12, index, 4),
        "next sample": noise(11, index + 1, 5),
        "sample of the next high word": noise(11, index + (1 << 32), 5),
        "other stream": noise(11, index, 5, Stream.INITIAL),
        "next column": base.roll(1, dims=1),
        "next block": base.roll(4, dims=1),
    }
    p_values = {name: independent_p_value(base, other) for name, other in others.items()}
    assert min(p_values.values()) > 1e-3, p_values
    assert independent_p_value(base, base + 0.2 * others["next step"]) < 1e-9
