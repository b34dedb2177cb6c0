"""Importance weights: their summary, resampling of one long row and of many short ones, one draw a row.

Peers: what one writes in torch (eager, and by Inductor), and torch.multinomial, which takes at most 2^24
particles.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import DEVICE, Problem, check_draws, inductor, input_sets, size
from evalp_fast.kernels.importance import categorical, resample, summarize

SHAPES = {
    "one row": (1, size(1 << 18, 1 << 26)),
    "rows of 100": (size(1 << 12, 1 << 20), 100),
}
RESAMPLERS = [
    ("evalp_fast", "systematic"),
    ("eager", "systematic"),
    ("compile", "systematic"),
    ("evalp_fast", "multinomial"),
    ("eager", "multinomial"),
    ("torch.multinomial", "multinomial"),
]
MULTINOMIAL_LIMIT = 1 << 24

shapes = pytest.mark.parametrize("shape", SHAPES)


def problem(shape: str, check: Callable[..., None], bytes_per_element: float) -> Problem:
    """Log-weights of deviation 2."""
    rows, n = SHAPES[shape]
    inputs = input_sets(lambda: (2.0 * torch.randn(rows, n, device=DEVICE),))
    return Problem(inputs, check, rows * n, bytes_per_element)


def summary(log_weights: Tensor) -> tuple[Tensor, ...]:
    """Log of the mean weight, effective sample size, largest log-weight, number of those not usable."""
    total = torch.logsumexp(log_weights, dim=-1)
    ess = torch.exp(2 * total - torch.logsumexp(2 * log_weights, dim=-1))
    unusable = (~(log_weights < math.inf)).sum(dim=-1)
    return total - math.log(log_weights.shape[-1]), ess, log_weights.amax(dim=-1), unusable


SUMMARIES = {
    "evalp_fast": lambda: summarize,
    "eager": lambda: summary,
    "compile": lambda: inductor(summary),
}


@shapes
@pytest.mark.parametrize("provider", SUMMARIES)
def test_summarize(provider: str, shape: str, measured: Any) -> None:
    def check(values: tuple[Tensor, ...], log_weights: Tensor) -> None:
        for value, exact in zip(values, summary(log_weights.double()), strict=True):
            torch.testing.assert_close(value.double(), exact.double(), rtol=1e-4, atol=1e-4)

    measured(problem(shape, check, 4.0), SUMMARIES[provider]())


def searched(log_weights: Tensor, scheme: str) -> Tensor:
    """n draws a row by a cumulative sum in float64 and a search."""
    rows, n = log_weights.shape
    weights = torch.exp(log_weights - log_weights.amax(dim=1, keepdim=True)).double()
    total = weights.cumsum(dim=1)
    if scheme == "systematic":
        slots = torch.arange(n, device=weights.device) + torch.rand(rows, 1, device=weights.device).double()
        positions = slots / n
    else:
        positions = torch.rand(rows, n, device=weights.device, dtype=torch.float64)
    return torch.searchsorted(total, positions * total[:, -1:], right=True).clamp_max(n - 1)


def multinomial(log_weights: Tensor, num: int) -> Tensor:
    """torch's own draw."""
    return torch.multinomial(torch.softmax(log_weights, dim=1), num, replacement=True)


def resampler(provider: str, scheme: Any, n: int) -> Callable[[Tensor], Tensor]:
    """n draws a row of n."""
    if provider == "evalp_fast":
        return lambda log_weights: resample(log_weights, n, scheme=scheme)
    if provider == "torch.multinomial":
        return lambda log_weights: multinomial(log_weights, n)
    compiled = inductor(searched) if provider == "compile" else searched
    return lambda log_weights: compiled(log_weights, scheme)


@shapes
@pytest.mark.parametrize(("provider", "scheme"), RESAMPLERS)
def test_resample(provider: str, scheme: str, shape: str, measured: Any) -> None:
    n = SHAPES[shape][1]
    if provider == "torch.multinomial" and n > MULTINOMIAL_LIMIT:
        pytest.skip("torch.multinomial takes at most 2^24 particles")
    # Log-weights are read once, twice where the row is long, and an int64 written for each.
    bytes_per_element = 12.0 if shape == "rows of 100" else 16.0
    measured(problem(shape, check_draws, bytes_per_element), resampler(provider, scheme, n))


def race(log_weights: Tensor) -> Tensor:
    """One draw a row, as a Gumbel-max race."""
    return (log_weights - torch.empty_like(log_weights).exponential_().log()).argmax(dim=1)


DRAWS = {
    "evalp_fast": lambda: categorical,
    "evalp_fast resample": lambda: lambda log_weights: resample(log_weights, 1),
    "eager": lambda: race,
    "compile": lambda: inductor(race),
    "torch.multinomial": lambda: lambda log_weights: multinomial(log_weights, 1),
}


@pytest.mark.parametrize("provider", DRAWS)
def test_categorical(provider: str, measured: Any) -> None:
    def check(drawn: Tensor, log_weights: Tensor) -> None:
        check_draws(drawn.reshape(-1, 1), log_weights)

    measured(problem("rows of 100", check, 4.0), DRAWS[provider]())
