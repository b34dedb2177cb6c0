"""The scales: how large the problems are, and how long a suite may take."""

from typing import Literal, TypeVar

from bench.machine import ON_CUDA

Scale = Literal["small", "medium", "large", "sweep"]
SCALES: tuple[Scale, ...] = ("small", "medium", "large", "sweep")
DEFAULT: Scale = "large" if ON_CUDA else "small"

# Seconds of a simple suite. Its problems share them alike; what one leaves over is for all that come later.
BUDGETS: dict[Scale, float] = {"small": 12.0, "medium": 120.0, "large": 12.0, "sweep": 60.0}
# How many times as long the others may take: they compile more, or a call of theirs is seconds.
_WEIGHTS = {
    "flow": 4.0,
    "chain": 3.0,
    "sir": 2.0,
    "resampling": 2.5,
    "train": 2.0,
    "generate": 3.0,
    "energy": 1.5,
}

SWEEP = tuple(1 << power for power in range(10, 25, 2))

# Seconds of all suites together, however slow the machine; on a GPU the tests need the rest of ten minutes.
TOTALS: dict[Scale, float] = {"small": 270.0, "medium": 3600.0, "large": 270.0, "sweep": 3600.0}

T = TypeVar("T")


def budget(suite: str, scale: Scale, base: float | None = None) -> float:
    """Seconds for a suite; `base` replaces those of a simple one."""
    return (BUDGETS[scale] if base is None else base) * _WEIGHTS.get(suite, 1.0)


def pick(scale: Scale, small: T, medium: T, large: T, sweep: T | None = None) -> T:
    """The value for a scale; the sweep takes `large`'s where it has none of its own."""
    values: dict[Scale, T] = {"small": small, "medium": medium, "large": large}
    values["sweep"] = large if sweep is None else sweep
    return values[scale]
