"""The Fréchet distance against SciPy, closed forms and torch-fidelity; its statistics; its interval."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evalp_fast.metrics.frechet import FeatureStatistics, frechet_distance, frechet_interval


def draw(seed: int, number: int, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(number, dim, generator=generator, dtype=torch.float64) @ mixing + mixing[0]


def statistics_of(features: Tensor) -> FeatureStatistics:
    result = FeatureStatistics(features.shape[1])
    result.update(features)
    return result


def scipy_distance(a: Tensor, b: Tensor) -> float:
    """The textbook form: a matrix square root of the product."""
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    cross = np.trace(np.real(scipy.linalg.sqrtm(cov_a @ cov_b)))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum()) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross


def nuclear_norm_distance(a: Tensor, b: Tensor) -> float:
    """tr (A^½ B A^½)^½ is the sum of the singular values of XYᵀ/√((n-1)(m-1)) for centred samples X, Y."""
    x, y = a - a.mean(0), b - b.mean(0)
    x, y = x / math.sqrt(len(x) - 1), y / math.sqrt(len(y) - 1)
    cross = torch.linalg.svdvals(x @ y.T).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * cross)


def test_against_scipy() -> None:
    a, b = draw(0, 300, 12), draw(1, 500, 12)
    assert frechet_distance(statistics_of(a), statistics_of(b)) == pytest.approx(
        scipy_distance(a, b), rel=1e-9
    )


def test_closed_form_of_diagonal_gaussians() -> None:
    """Guards against a wrong sign, factor or root: Σ (μ1-μ2)² + (σ1-σ2)²."""
    a, b = FeatureStatistics(3), FeatureStatistics(3)
    a.count = b.count = 11
    a.mean, b.mean = torch.tensor([0.0, 1, 2]).double(), torch.tensor([1.0, 1, 0]).double()
    a.scatter = 10 * torch.tensor([1.0, 4, 9]).double().diag()
    b.scatter = 10 * torch.tensor([4.0, 4, 0]).double().diag()
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 0 + 9, rel=1e-12)


@pytest.mark.parametrize(("number_a", "number_b"), [(20, 500), (500, 20), (10, 12)])
def test_singular_covariances(number_a: int, number_b: int) -> None:
    """Fewer features than dimensions: textbook code adds an offset, or returns NaN or a complex number."""
    a, b = draw(0, number_a, 64), draw(1, number_b, 64)
    expected = nuclear_norm_distance(a, b)
    assert frechet_distance(statistics_of(a), statistics_of(b)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("number", [10, 500])
def test_zero_for_equal_statistics_and_symmetric(number: int) -> None:
    a, b = statistics_of(draw(0, number, 32)), statistics_of(draw(1, 100, 32))
    assert 0 <= frechet_distance(a, a) <= 1e-6 * float(a.covariance.trace())
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-7)


def test_against_torch_fidelity() -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = draw(2, 400, 16), draw(3, 400, 16)
    theirs = fid.fid_statistics_to_metric(
        fid.fid_features_to_statistics(a), fid.fid_features_to_statistics(b), False
    )
    value = frechet_distance(statistics_of(a), statistics_of(b))
    assert value == pytest.approx(next(iter(theirs.values())), rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("sizes", [[1000], [1, 999], [300, 0, 1, 699]])
def test_batches_give_the_statistics_of_the_whole(sizes: list[int], offset: float) -> None:
    """The offset guards against sums of raw outer products, which cancel: 1e12·2^-53 is 1e-4."""
    features = draw(4, 1000, 5) + offset
    result = FeatureStatistics(5)
    for part in features.split(sizes):
        result.update(part)
    assert result.count == 1000
    np.testing.assert_allclose(result.mean.numpy(), features.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        result.covariance.numpy(), np.cov(features.numpy(), rowvar=False), rtol=1e-7, atol=1e-8
    )


def test_merge() -> None:
    features = draw(5, 1000, 5)
    parts = [statistics_of(part) for part in features.split([100, 650, 250])]
    result = FeatureStatistics(5)
    result.merge(FeatureStatistics(5))
    for part in parts:
        count, scatter = part.count, part.scatter.clone()
        result.merge(part)
        assert part.count == count
        assert torch.equal(part.scatter, scatter)
    whole = statistics_of(features)
    assert result.count == 1000
    torch.testing.assert_close(result.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.scatter, whole.scatter, rtol=1e-11, atol=1e-9)


def test_merging_into_empty_statistics_does_not_share_memory() -> None:
    first, second = statistics_of(draw(0, 10, 3)), FeatureStatistics(3)
    before = first.scatter.clone()
    second.merge(first)
    second.update(draw(1, 10, 3))
    assert torch.equal(first.scatter, before)


def test_float32_features_accumulate_in_float64() -> None:
    """A float32 sum of a million ones and a tail loses the tail."""
    result = FeatureStatistics(1)
    for _ in range(3):
        result.update(torch.full((1000, 1), 1e8, dtype=torch.float32))
        result.update(torch.full((1000, 1), 1.0, dtype=torch.float32))
    assert result.mean.item() == pytest.approx((1e8 + 1) / 2, rel=1e-14)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    before = statistics_of(draw(6, 50, 7))
    save_file(before.to_dict(), tmp_path / "statistics.safetensors")
    after = FeatureStatistics.from_dict(load_file(tmp_path / "statistics.safetensors"))
    assert (after.dim, after.count) == (7, 50)
    assert torch.equal(after.mean, before.mean)
    assert torch.equal(after.scatter, before.scatter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": None}, "missing: mean"),
        ({"count": torch.tensor([1.5])}, "count must be one int64"),
        ({"count": torch.tensor([-1])}, "count must be one int64"),
        ({"mean": torch.zeros(4, dtype=torch.float64)}, r"\[4\] and \[3, 3\]"),
        ({"scatter": torch.zeros(3, 3)}, "must be float64"),
    ],
)
def test_bad_dictionaries(change: dict[str, Tensor | None], message: str) -> None:
    tensors = statistics_of(draw(0, 10, 3)).to_dict() | change
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.from_dict({name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_bad_features_leave_the_statistics_unchanged() -> None:
    result = statistics_of(draw(0, 10, 3))
    before = result.scatter.clone()
    poisoned = torch.zeros(5, 3)
    poisoned[2, 1] = math.nan
    poisoned[4, 0] = math.inf
    for features, message in (
        (torch.zeros(5, 4), r"\[N, 3\]"),
        (torch.zeros(3), r"\[N, 3\]"),
        (torch.zeros(5, 3, dtype=torch.uint8), "floating point"),
        (poisoned, "2 of 5 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            result.update(features)
    assert result.count == 10
    assert torch.equal(result.scatter, before)


def test_bad_arguments() -> None:
    three, four, one = (
        statistics_of(draw(0, 10, 3)),
        statistics_of(draw(0, 10, 4)),
        statistics_of(draw(0, 1, 3)),
    )
    with pytest.raises(ValueError, match="same dim, got 3 and 4"):
        frechet_distance(three, four)
    with pytest.raises(ValueError, match="at least 2 features"):
        frechet_distance(three, one)
    with pytest.raises(ValueError, match="dim 3, got 4"):
        three.merge(four)
    with pytest.raises(ValueError, match="dim must be at least 1"):
        FeatureStatistics(0)
    with pytest.raises(ValueError, match="n_bootstrap"):
        frechet_interval(draw(0, 10, 3), three, n_bootstrap=1, seed=0)
    with pytest.raises(ValueError, match="confidence"):
        frechet_interval(draw(0, 10, 3), three, n_bootstrap=10, seed=0, confidence=1.0)
    with pytest.raises(ValueError, match="at least 2"):
        frechet_interval(draw(0, 1, 3), three, n_bootstrap=10, seed=0)


def test_interval_is_a_function_of_its_seed() -> None:
    features, reference = draw(0, 200, 4), statistics_of(draw(1, 200, 4))
    first = frechet_interval(features, reference, n_bootstrap=20, seed=1)
    torch.randn(5)
    assert frechet_interval(features, reference, n_bootstrap=20, seed=1) == first
    assert frechet_interval(features, reference, n_bootstrap=20, seed=2) != first


def test_interval_surrounds_the_distance_in_spite_of_the_bias_of_the_bootstrap() -> None:
    """Quantiles of the replicates lie wholly above the distance here: the bias is many deviations."""
    features, reference = draw(0, 100, 32), statistics_of(draw(0, 20_000, 32))
    interval = frechet_interval(features, reference, n_bootstrap=50, seed=0)
    low, high = interval
    distance = frechet_distance(statistics_of(features), reference)
    assert low < distance < high
    assert (low + high) / 2 == pytest.approx(distance, rel=1e-9)


def test_interval_covers_the_expected_distance() -> None:
    """Guards against a spread that is wrong by a factor of √2 or more.

    Of 100 draws 95 ± 2.2 % are expected to be covered; 87 % is three sigma below, and leaves room for
    the spread of 40 replicates, itself uncertain by 11 %.
    """
    dim, number, trials = 6, 150, 100
    reference = FeatureStatistics(dim)
    reference.count, reference.scatter = 2, torch.eye(dim, dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    scale = torch.linspace(0.5, 1.5, dim, dtype=torch.float64)
    samples = torch.randn(trials, number, dim, generator=generator, dtype=torch.float64) * scale + 0.5
    distances = torch.tensor([frechet_distance(statistics_of(sample), reference) for sample in samples])
    expected = float(distances.mean())
    intervals = [frechet_interval(s, reference, n_bootstrap=40, seed=i) for i, s in enumerate(samples)]
    coverage = sum(low <= expected <= high for low, high in intervals) / trials
    assert coverage >= 0.87
    spread = torch.tensor([(high - low) / (2 * 1.96) for low, high in intervals]).mean()
    assert float(spread) == pytest.approx(float(distances.std()), rel=0.2)


def test_singular_reference_and_zero_distance() -> None:
    features = draw(0, 10, 32)
    low, high = frechet_interval(features, statistics_of(features), n_bootstrap=10, seed=0)
    assert low == 0
    assert math.isfinite(high)
