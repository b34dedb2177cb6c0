"""log Z from importance weights."""

import math

import pytest
import torch

from evalp_fast.partition import bootstrap_means, log_partition_of


def test_bootstrap_means() -> None:
    values = torch.arange(1000, dtype=torch.float64)
    means = bootstrap_means(values, 300, seed=0)
    assert means.shape == (300,)
    spread = float(values.std()) / math.sqrt(1000)
    assert float(means.std()) == pytest.approx(spread, rel=0.2)
    assert float(means.mean()) == pytest.approx(float(values.mean()), abs=4 * spread / math.sqrt(300))
    assert torch.equal(means, bootstrap_means(values, 300, seed=0))
    assert not torch.equal(means, bootstrap_means(values, 300, seed=1))


def test_the_estimate_of_known_weights() -> None:
    """Weights 0, 2 and 6, far from 1: guards against a lost shift, and against zeros that are left out."""
    log_weights = torch.tensor([-math.inf, math.log(2.0), math.log(6.0)]) + 300.0
    found = log_partition_of(log_weights, replicates=50)
    assert found.value == pytest.approx(300.0 + math.log(8.0 / 3.0), abs=1e-4)
    assert found.upper_bound == pytest.approx(300.0 + 0.25 * math.log(2.0) + 0.75 * math.log(6.0), abs=1e-4)
    assert found.lower_bound == -math.inf
    assert found.ess == pytest.approx(64.0 / 40.0, rel=1e-4)
    assert (found.n, found.non_finite) == (3, 0)
    assert found.low <= found.value <= found.high


def test_weights_that_are_not_finite_count_as_zero_and_are_counted() -> None:
    found = log_partition_of(torch.tensor([0.0, math.nan, math.inf, -math.inf]), replicates=10)
    assert found.value == pytest.approx(math.log(0.25))
    assert (found.n, found.non_finite) == (4, 2)


def test_no_weight_at_all_raises() -> None:
    with pytest.raises(ValueError, match="none of the 2 importance weights"):
        log_partition_of(torch.tensor([-math.inf, math.nan]))
