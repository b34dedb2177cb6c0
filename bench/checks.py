"""Checks of results: closeness to float64, and statistics of draws. Each raises AssertionError."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.machine import DEVICE


def close(values: Sequence[Tensor], exact: Sequence[Tensor], *, rounding: float = 256) -> None:
    """Within one rounding to a 16-bit type, or what a float32 sum of a row may lose (`rounding` epsilons)."""
    for value, wanted in zip(values, exact, strict=True):
        tolerance = (rounding if value.dtype == torch.float32 else 1) * torch.finfo(value.dtype).eps
        torch.testing.assert_close(value.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def ends(rows: Tensor, number: int = 1 << 16) -> Tensor:
    """The first and the last `number` rows: enough to check by, and rows far into memory are among them."""
    return rows if len(rows) <= 2 * number else torch.cat((rows[:number], rows[-number:]))


def some(count: int, number: int) -> Tensor:
    """Which of `count` rows to check by: a quarter of `number` at either end, the rest evenly between."""
    if count <= number:
        return torch.arange(count, device=DEVICE)
    quarter = number // 4
    first, between = torch.arange(quarter), torch.arange(number - 2 * quarter)
    between = quarter + between * (count - 2 * quarter) // len(between)
    return torch.cat((first, between, first + count - quarter)).to(DEVICE)


def finite(values: Tensor, name: str) -> None:
    """All of them, also those that nobody compares."""
    assert bool(values.isfinite().all()), f"{name} has values that are not finite"


def relative_error(
    value: Tensor, exact: Tensor, limit: float, name: str, centre: Tensor | float = 0.0
) -> None:
    """Root mean square of the error, relative to that of the exact values' distance from `centre`."""
    finite(value, name)
    exact = exact.double()
    error = (value.double() - exact).square().mean().sqrt() / (exact - centre).square().mean().sqrt()
    assert float(error) <= limit, f"{name} is off by {float(error):.3g}, relative; the limit is {limit:.3g}"


def absolute_error(value: Tensor, exact: Tensor, limit: float, name: str) -> None:
    """Root mean square of the error, and a third of that for its mean, which rounding hardly moves."""
    finite(value, name)
    error = value.double() - exact.double()
    for size, bound, kind in (
        (float(error.square().mean().sqrt()), limit, "off"),
        (abs(float(error.mean())), limit / 3, "off on average"),
    ):
        assert size <= bound, f"{name} is {kind} by {size:.3g}; the limit is {bound:.3g}"


def rows_agree(value: Tensor, exact: Tensor, limit: float, share: float, name: str) -> None:
    """At least this share of the rows is within `limit` of the exact ones, relative to the size of these.

    For results with a choice in them (a proposal accepted, a winner), which rounding may turn in a few rows.
    """
    finite(value, name)
    exact = exact.double()
    errors = (value.double() - exact).square().mean(dim=1).sqrt() / exact.square().mean().sqrt()
    agreeing = float((errors <= limit).double().mean())
    assert agreeing >= share, f"{agreeing:.1%} of the rows of {name} are right, not {share:.0%}"


def standard_normal(numbers: Tensor) -> None:
    """The first four moments of independent standard normals, within six standard errors.

    Of more than 2^25 numbers those at both ends are taken.
    """
    numbers = ends(numbers.flatten(), 1 << 24).double()
    deviations = {1: 1.0, 2: 2.0**0.5, 3: 15.0**0.5, 4: 96.0**0.5}
    for power, deviation in deviations.items():
        error = float(numbers.pow(power).mean()) - (0.0, 1.0, 0.0, 3.0)[power - 1]
        assert abs(error) < 6 * deviation / numbers.numel() ** 0.5, f"moment {power} is off by {error:.3g}"


def standard_normal_rows(rows: Tensor) -> None:
    """`standard_normal`, and the first two moments of every column and the product of neighbouring columns.

    Columns that were put in the wrong place, used twice or left out show in these.
    """
    standard_normal(rows)
    rows, bound = rows.double(), 6.5 / rows.shape[0] ** 0.5
    worst = {
        "the mean of a column": rows.mean(0).abs().max(),
        "the variance of a column": (rows.square().mean(0) - 1).abs().max() / 2**0.5,
        "the covariance of neighbours": (rows * rows.roll(1, 1)).mean(0).abs().max(),
    }
    for name, value in worst.items():
        assert float(value) < bound, f"{name} is off by {float(value):.3g}"


class Draws:
    """Checks draws of columns, int64 `[rows, num]` (or `[rows]` of one each), from log-weights `[rows, n]`.

    A chi-square of `groups` groups by rank of the log-weight, over the first and the last `_CHECKED` numbers'
    worth of rows. Schemes with less variance than independent draws stay below the bound too.
    """

    _CHECKED = 1 << 20

    def __init__(self, log_weights: Tensor, num: int, groups: int = 50):
        self.n, self.groups = log_weights.shape[1], groups
        rows, each = log_weights.shape[0], max(1, self._CHECKED // self.n)
        self.shapes = ((rows, num), (rows,)) if num == 1 else ((rows, num),)
        chosen = range(rows) if rows <= 2 * each else [*range(each), *range(rows - each, rows)]
        self.rows = torch.tensor(chosen, device=log_weights.device)
        log_weights = log_weights[self.rows]
        order = log_weights.argsort(dim=1, descending=True)
        group = torch.arange(self.n, device=order.device) * groups // self.n
        self.group_of_column = torch.empty_like(order).scatter_(1, order, group.expand(len(order), self.n))
        share = torch.softmax(log_weights.double(), dim=1).gather(1, order).sum(dim=0) / len(order)
        self.share = torch.zeros(groups, dtype=torch.float64, device=order.device).index_add_(0, group, share)

    def __call__(self, drawn: Tensor) -> None:
        assert drawn.shape in self.shapes, f"draws have shape {tuple(drawn.shape)}, not {self.shapes[0]}"
        assert drawn.dtype == torch.int64, f"draws are {drawn.dtype}, not int64"
        assert int(drawn.min()) >= 0, "a drawn index is negative"
        assert int(drawn.max()) < self.n, "a drawn index is out of range"
        drawn = drawn.reshape(drawn.shape[0], -1)[self.rows]
        observed = torch.bincount(
            self.group_of_column.gather(1, drawn).flatten(), minlength=self.groups
        ).double()
        expected = self.share * drawn.numel()
        rare = expected < 20  # counted as one
        observed, expected = (torch.cat((t[~rare], t[rare].sum().view(1))) for t in (observed, expected))
        excess = float(((observed - expected).square() / expected.clamp_min(1.0)).sum())
        limit = self.groups - 1 + 6 * (2.0 * (self.groups - 1)) ** 0.5
        assert excess < limit, f"chi-square of the draws is {excess:.0f}, above {limit:.0f}"
