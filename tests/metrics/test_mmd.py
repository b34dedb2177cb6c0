"""MMD² against brute force and the closed form between Gaussians; bias, coverage and power."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evalp_fast.metrics.mmd import median_bandwidths, mmd2

BANDWIDTHS = (0.5, 1.0, 3.0)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kernel(a: Tensor, b: Tensor) -> Tensor:
    squares = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    return sum(torch.exp(-squares / (2 * s * s)) for s in BANDWIDTHS) / len(BANDWIDTHS)


def brute_force(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The U-statistic and its first-order standard error, from whole float64 kernel matrices."""
    xx, yy, xy = kernel(x, x).fill_diagonal_(0), kernel(y, y).fill_diagonal_(0), kernel(x, y)
    n, m = xy.shape
    value = xx.sum() / (n * (n - 1)) + yy.sum() / (m * (m - 1)) - 2 * xy.mean()
    a = xx.sum(1) / (n - 1) - xy.mean(1)
    b = yy.sum(1) / (m - 1) - xy.mean(0)
    return float(value), math.sqrt(4 * float(a.var()) / n + 4 * float(b.var()) / m)


def expected_kernel(shift: float, variance: float, dim: int) -> float:
    """E k(a, b) where a - b ~ N(shift·1, variance·I): a Gaussian integral per bandwidth."""
    terms = []
    for s in BANDWIDTHS:
        total = s * s + variance
        terms.append((s * s / total) ** (dim / 2) * math.exp(-dim * shift**2 / (2 * total)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize(
    ("n", "m", "block"), [(50, 50, 512), (70, 33, 16), (2, 3, 1), (129, 64, 64), (40, 90, 41)]
)
def test_against_brute_force(n: int, m: int, block: int) -> None:
    """Sizes that blocks do not divide guard against rows or block pairs counted twice or left out."""
    x, y = draw(0, n, 4), 1.3 * draw(1, m, 4) + 0.2
    value, standard_error = brute_force(x, y)
    result = mmd2(x, y, bandwidths=BANDWIDTHS, block=block)
    # Each float32 kernel value is right to about 1e-6, and the estimate is a sum of three means of them.
    assert result.value == pytest.approx(value, abs=3e-6)
    assert result.standard_error == pytest.approx(standard_error, rel=1e-3, abs=3e-6)
    assert result.low == pytest.approx(result.value - 1.959964 * result.standard_error, abs=1e-7)
    assert result.high == pytest.approx(result.value + 1.959964 * result.standard_error, abs=1e-7)


def test_confidence() -> None:
    x, y = draw(0, 50, 2), draw(1, 60, 2)
    wide, narrow = mmd2(x, y, confidence=0.99), mmd2(x, y, confidence=0.5)
    assert wide.value == narrow.value
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(2.575829 / 0.674490, rel=1e-5)


def test_samples_far_from_zero() -> None:
    """Uncentred float32 norms lose all digits here: 1e8·2^-24 is 6."""
    x, y = draw(0, 80, 3), draw(1, 80, 3) + 0.5
    near = mmd2(x, y, bandwidths=BANDWIDTHS)
    far = mmd2(x.double() + 1e4, y.double() + 1e4, bandwidths=BANDWIDTHS)
    assert far.value == pytest.approx(near.value, abs=1e-6)


def test_unbiased_at_equality() -> None:
    """Guards against the diagonal in the sums (a bias of 2/n) and n where n - 1 belongs."""
    values = torch.tensor(
        [mmd2(draw(2 * i, 40, 3), draw(2 * i + 1, 30, 3), bandwidths=BANDWIDTHS).value for i in range(500)]
    )
    standard_error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean())) < 3 * standard_error
    assert standard_error < 1e-3


def test_interval_covers_the_truth_where_the_distributions_differ() -> None:
    """Guards against a variance wrong by a factor of 2 either way (coverage 0.82 or 0.99, errors off by 1.4).

    The truth is known. So close to 0 (three standard errors) the 95 % interval covers 93.4 ± 0.5 % of 3,000
    draws; the bounds are three sigma of 400 draws around that.
    """
    shift, dim, trials = 0.6, 2, 400
    truth = 2 * expected_kernel(0, 2, dim) - 2 * expected_kernel(shift, 2, dim)
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(trials):
        x, y = torch.randn(150, dim, generator=generator), torch.randn(100, dim, generator=generator)
        results.append(mmd2(x, y + shift, bandwidths=BANDWIDTHS))
    coverage = sum(r.low <= truth <= r.high for r in results) / trials
    assert 0.897 <= coverage <= 0.971
    values = torch.tensor([r.value for r in results])
    spread = float(values.std())
    assert float(values.mean()) == pytest.approx(truth, abs=3 * spread / math.sqrt(trials))
    errors = torch.tensor([r.standard_error for r in results])
    assert float(errors.mean()) == pytest.approx(spread, rel=0.15)


def test_interval_is_cautious_at_equality() -> None:
    """There the variance is of second order, and the interval may be too wide by √2 but not too narrow."""
    results = [mmd2(draw(2 * i, 100, 3), draw(2 * i + 1, 100, 3), bandwidths=BANDWIDTHS) for i in range(300)]
    assert sum(r.low <= 0 <= r.high for r in results) >= 0.95 * len(results)
    spread = float(torch.tensor([r.value for r in results]).std())
    errors = float(torch.tensor([r.standard_error for r in results]).mean())
    assert spread < errors < 1.6 * spread


def test_power_on_a_mean_shift_and_on_a_variance_shift() -> None:
    """A statistic of the mean alone would miss the second. Equal distributions are not told apart."""
    reference = draw(0, 2000, 8)
    bandwidths = median_bandwidths(reference)
    assert mmd2(draw(1, 2000, 8) + 0.15, reference, bandwidths=bandwidths).low > 0
    assert mmd2(draw(2, 2000, 8) * 1.15, reference, bandwidths=bandwidths).low > 0
    assert mmd2(draw(3, 2000, 8), reference, bandwidths=bandwidths).low < 0


def test_median_bandwidths() -> None:
    y = torch.tensor([[0.0], [1.0], [3.0]])  # distances 1, 2, 3
    assert median_bandwidths(y) == pytest.approx((0.5, 1.0, 2.0, 4.0, 8.0))
    assert median_bandwidths(y, (3.0,)) == pytest.approx((6.0,))
    x = draw(0, 30, 3)
    y = draw(1, 40, 3)
    assert mmd2(x, y) == mmd2(x, y, bandwidths=median_bandwidths(y))


def test_median_of_a_long_sorted_sample() -> None:
    """Guards against taking the first rows: of sorted ones they are all alike."""
    y = torch.linspace(0, 1, 10_001)[:, None]
    # |u - v| of uniforms has the median 1 - 1/√2.
    assert median_bandwidths(y, (1.0,))[0] == pytest.approx(1 - math.sqrt(0.5), rel=0.01)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_memory_does_not_grow_with_the_square() -> None:
    x, y = draw(0, 600, 2), draw(1, 500, 2)
    with LargestTensor() as mode:
        mmd2(x, y, bandwidths=BANDWIDTHS, block=50)
    assert 2500 <= mode.largest <= 3000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(1, 3)}, "x must be floating point"),
        ({"x": torch.zeros(5)}, "x must be floating point"),
        ({"y": torch.zeros(5, 3, dtype=torch.int64)}, "y must be floating point"),
        ({"y": torch.full((5, 3), math.nan)}, "y must be finite, 5 of 5"),
        ({"y": torch.zeros(5, 2)}, "same dim, got 3 and 2"),
        ({"block": 0}, "block"),
        ({"bandwidths": ()}, "bandwidths"),
        ({"bandwidths": (1.0, 0.0)}, "bandwidths"),
        ({"bandwidths": (math.nan,)}, "bandwidths"),
        ({"confidence": 0.0}, "confidence"),
        ({"y": torch.zeros(5, 3)}, "must spread"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"x": draw(0, 5, 3), "y": draw(1, 5, 3)}
    with pytest.raises(ValueError, match=message):
        mmd2(**(good | arguments))  # type: ignore[arg-type]


def test_bad_multiples() -> None:
    with pytest.raises(ValueError, match="multiples"):
        median_bandwidths(draw(0, 5, 3), (1.0, -1.0))
