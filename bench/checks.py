"""Checks of results: closeness to float64, and statistics of draws. Each raises AssertionError."""

from collections.abc import Sequence

import torch
from torch import Tensor


def close(values: Sequence[Tensor], exact: Sequence[Tensor], *, rounding: float = 256) -> None:
    """Within one rounding to a 16-bit type, or what a float32 sum of a row may lose (`rounding` epsilons)."""
    for value, wanted in zip(values, exact, strict=True):
        tolerance = (rounding if value.dtype == torch.float32 else 1) * torch.finfo(value.dtype).eps
        torch.testing.assert_close(value.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def ends(rows: Tensor, number: int = 1 << 16) -> Tensor:
    """The first and the last `number` rows: enough to check by, and rows far into memory are among them."""
    return rows if len(rows) <= 2 * number else torch.cat((rows[:number], rows[-number:]))


def relative_error(value: Tensor, exact: Tensor, limit: float, name: str) -> None:
    """Root mean square of the error, relative to that of the exact values; and all values are finite."""
    assert bool(value.isfinite().all()), f"{name} has values that are not finite"
    error = (value.double() - exact.double()).square().mean().sqrt() / exact.double().square().mean().sqrt()
    assert float(error) <= limit, f"{name} is off by {float(error):.3g}, relative; the limit is {limit:.3g}"


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
    """Checks draws of columns, `[rows, num]`, from log-weights `[rows, n]`.

    A chi-square of `groups` groups by rank of the log-weight, over the first and the last `_CHECKED` numbers'
    worth of rows. Schemes with less variance than independent draws stay below the bound too.
    """

    _CHECKED = 1 << 20

    def __init__(self, log_weights: Tensor, groups: int = 50):
        self.n, self.groups = log_weights.shape[1], groups
        rows, each = log_weights.shape[0], max(1, self._CHECKED // self.n)
        chosen = range(rows) if rows <= 2 * each else [*range(each), *range(rows - each, rows)]
        self.rows = torch.tensor(chosen, device=log_weights.device)
        log_weights = log_weights[self.rows]
        order = log_weights.argsort(dim=1, descending=True)
        group = torch.arange(self.n, device=order.device) * groups // self.n
        self.group_of_column = torch.empty_like(order).scatter_(1, order, group.expand(len(order), self.n))
        share = torch.softmax(log_weights.double(), dim=1).gather(1, order).sum(dim=0) / len(order)
        self.share = torch.zeros(groups, dtype=torch.float64, device=order.device).index_add_(0, group, share)

    def __call__(self, drawn: Tensor) -> None:
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


def mean_close(value: Tensor, other: Tensor, name: str, standard_errors: float = 6.0) -> None:
    """Two independent sets of draws `[N]` and `[M]` have one mean, within that many standard errors."""
    a, b = value.double(), other.double()
    assert bool(a.isfinite().all()), f"{name} has values that are not finite"
    error = float(a.mean() - b.mean())
    deviation = float((a.var() / a.numel() + b.var() / b.numel()).sqrt())
    assert abs(error) <= standard_errors * deviation, (
        f"the mean of {name} is off by {error:.3g}, {abs(error) / max(deviation, 1e-300):.1f} standard errors"
    )
