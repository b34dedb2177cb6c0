"""Importance weights: their summary, resampling of one long row and of many short ones, one draw a row.

Peers: what one writes in torch (eager, and by Inductor), `torch.multinomial`, which takes at most 2^24
particles, and `particles`, which works on NumPy arrays of normalised weights, one row at a time, on one
core: its conversion from log-weights is timed with it, as everybody's is.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import checks
from bench.harness import Call, Problem, Provider, Work, Workload, absent, by_inductor, input_sets
from bench.machine import DEVICE
from bench.sizes import SWEEP, Scale, pick
from evalp_fast.kernels.importance import categorical, resample, summarize

MULTINOMIAL_LIMIT = 1 << 24
PARTICLES_ROWS = 1 << 12


def summary(log_weights: Tensor) -> tuple[Tensor, ...]:
    """Log of the mean weight, effective sample size, largest log-weight, number of those not usable.

    NaN and +inf are not usable: they count as weight zero.
    """
    usable = log_weights < math.inf
    log_weights = log_weights.masked_fill(~usable, -math.inf)
    total = torch.logsumexp(log_weights, dim=-1)
    ess = torch.exp(2 * total - torch.logsumexp(2 * log_weights, dim=-1))
    unusable = usable.logical_not().sum(dim=-1)
    return total - math.log(log_weights.shape[-1]), ess, log_weights.amax(dim=-1), unusable


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


def multinomial(log_weights: Tensor, num: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """torch's own draw. It sums the weights in their own dtype: float32 is not enough for a long row."""
    return torch.multinomial(torch.softmax(log_weights, dim=1, dtype=dtype), num, replacement=True)


def race(log_weights: Tensor) -> Tensor:
    """One draw a row, as a Gumbel-max race."""
    return (log_weights - torch.empty_like(log_weights).exponential_().log()).argmax(dim=1)


def particles_call(scheme: str) -> Callable[[Any], Call]:
    """`particles.resampling`, row by row."""

    def make(_: Any) -> Call:
        peer: Any = importlib.import_module("particles.resampling")

        draw = getattr(peer, scheme)

        def call(log_weights: Tensor) -> Tensor:
            rows = [draw(peer.exp_and_normalise(row)) for row in log_weights.cpu().double().numpy()]
            return torch.stack([torch.from_numpy(row) for row in rows]).to(log_weights.device)

        return call

    return make


def particles_missing(rows: int) -> Callable[[], str | None]:
    """particles takes one row at a time: thousands of rows are a loop in Python."""
    if rows > PARTICLES_ROWS:
        return lambda: f"takes one row at a time; {rows:,} rows are not its use"
    return absent("particles.resampling")


def multinomial_missing(n: int) -> Callable[[], str | None]:
    """torch.multinomial refuses more."""
    return lambda: "takes at most 2^24 particles" if n > MULTINOMIAL_LIMIT else None


def log_weights_of(rows: int, n: int) -> list[tuple[Tensor, ...]]:
    """Log-weights of deviation 2."""
    return input_sets(lambda: (2.0 * torch.randn(rows, n, device=DEVICE),))


def damaged_log_weights(rows: int, n: int) -> list[tuple[Tensor, ...]]:
    """The same, of which one in a hundred is NaN, +inf or, which is legal, -inf."""
    inputs = log_weights_of(rows, n)
    for (log_weights,) in inputs:
        for k, value in enumerate((math.nan, math.inf, -math.inf)):
            places = torch.randint(0, rows * n, (max(1, rows * n // 300),), device=DEVICE)
            log_weights.view(-1)[places[k:]] = value
    return inputs


def drawing(rows: int, n: int, num: int) -> Callable[[], Workload]:
    """Of `num` draws a row."""

    def setup() -> Workload:
        inputs = log_weights_of(rows, n)
        # What is checked is drawn from the first inputs, and after timing from the last.
        right = {inputs[k][0].data_ptr(): checks.Draws(inputs[k][0], num) for k in (0, -1)}
        return Workload(None, inputs, lambda _, drawn, log_weights: right[log_weights.data_ptr()](drawn))

    return setup


def check_summary(_: Provider, values: tuple[Tensor, ...], log_weights: Tensor) -> None:
    assert int(values[3].sum()) > 0, "none of the weights that cannot be used is counted"
    for value, exact in zip(values, summary(log_weights.double()), strict=True):
        torch.testing.assert_close(value.double(), exact.double(), rtol=1e-4, atol=1e-4)


def shaped(rows: int, n: int) -> tuple[str, dict[str, int]]:
    """How a shape is called, and its parameters."""
    return (f"{n:,}" if rows == 1 else f"{rows:,} x {n}"), {"batch": rows * n, "rows": rows}


def summarize_problem(rows: int, n: int) -> Problem:
    name, parameters = shaped(rows, n)
    providers = (
        Provider("evalp_fast", lambda _: summarize),
        Provider("torch eager", lambda _: summary),
        *by_inductor(summary),
    )
    return Problem(
        "resampling",
        f"summarize, {name}",
        parameters,
        rows * n,
        lambda: Workload(None, damaged_log_weights(rows, n), check_summary),
        providers,
        Work(bytes=4.0 * rows * n),
        unit="weights",
        clock="device",
    )


def resample_problem(rows: int, n: int, scheme: Any) -> Problem:
    name, parameters = shaped(rows, n)
    providers = [
        Provider("evalp_fast", lambda _: lambda log_weights: resample(log_weights, n, scheme=scheme)),
        Provider("torch eager", lambda _: lambda log_weights: searched(log_weights, scheme)),
    ]
    if scheme == "systematic":
        providers += by_inductor(lambda log_weights: searched(log_weights, scheme))
    else:
        providers += [
            Provider(
                name,
                lambda _, dtype=dtype: lambda log_weights: multinomial(log_weights, n, dtype),
                missing=multinomial_missing(n),
                known_wrong=wrong,
            )
            for name, dtype, wrong in (
                ("torch.multinomial", torch.float32, "its sums of a long row are float32"),
                ("torch.multinomial float64", torch.float64, None),
            )
        ]
    providers.append(Provider("particles", particles_call(scheme), missing=particles_missing(rows)))
    # Log-weights are read once, twice where the row is long, and an int64 written for each.
    return Problem(
        "resampling",
        f"{scheme}, {name}",
        parameters | {"scheme": scheme},
        rows * n,
        drawing(rows, n, n),
        tuple(providers),
        Work(bytes=(12.0 if rows > 1 else 16.0) * rows * n),
        unit="draws",
        clock="device",
    )


def categorical_problem(rows: int, n: int) -> Problem:
    name, parameters = shaped(rows, n)
    providers = (
        Provider("evalp_fast", lambda _: categorical),
        Provider("evalp_fast resample", lambda _: lambda log_weights: resample(log_weights, 1)),
        Provider("torch eager race", lambda _: race),
        *by_inductor(race, "torch.compile race"),
        Provider("torch softmax and multinomial", lambda _: lambda log_weights: multinomial(log_weights, 1)),
    )
    return Problem(
        "resampling",
        f"one draw a row, {name}",
        parameters,
        rows,
        drawing(rows, n, 1),
        providers,
        Work(bytes=4.0 * rows * n),
        unit="draws",
        clock="device",
    )


def problems(scale: Scale) -> list[Problem]:
    """One long row, and many rows of 100."""
    if scale == "sweep":
        return [resample_problem(1, n, "systematic") for n in SWEEP]
    long = pick(scale, 1 << 20, 1 << 20, 1 << 26)
    rows = pick(scale, 1 << 17, 1_000_000, 1_000_000)
    return [
        resample_problem(1, long, "systematic"),
        resample_problem(1, long, "multinomial"),
        categorical_problem(rows, 100),
        resample_problem(pick(scale, 1 << 13, 1 << 16, 1_000_000), 100, "systematic"),
        summarize_problem(1, long),
        summarize_problem(rows, 100),
    ]


def test_resampling(case: Any, timed: Any) -> None:
    timed(case)
