"""The memorisation check: PCA against a full decomposition, neighbours against brute force, copies found."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evalp_fast.data import load_dataset
from evalp_fast.metrics.neighbours import (
    fit_principal_components,
    memorisation,
    nearest_neighbours,
    project,
)

EXCERPT = Path(__file__).parents[1] / "data" / "mnist_excerpt.npz"


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """1,500 training digits, uint8 [1500, 1, 32, 32]."""
    return load_dataset("mnist", split="train+validation", root=EXCERPT).images


@pytest.fixture(scope="module")
def other_digits() -> Tensor:
    """500 digits of the test set."""
    return load_dataset("mnist", split="test", root=EXCERPT).images


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_principal_components_against_a_full_decomposition(digits: Tensor) -> None:
    """Guards against too few iterations, a wrong mean and directions in the wrong order."""
    pixels = digits.flatten(1).double() / 255
    components = fit_principal_components(digits, 32)
    torch.testing.assert_close(components.mean.double(), pixels.mean(0), rtol=0, atol=1e-5)
    directions = components.directions.double()
    torch.testing.assert_close(directions.T @ directions, torch.eye(32).double(), rtol=0, atol=1e-5)
    covariance = torch.cov(pixels.T)
    variances = directions.T @ covariance @ directions
    largest = torch.linalg.eigvalsh(covariance).flip(0)[:32]
    assert float(variances.trace() / largest.sum()) > 0.995
    # The first few directions have converged one by one.
    torch.testing.assert_close(variances.diagonal()[:8], largest[:8], rtol=1e-3, atol=0)
    coordinates = project(digits, components)
    torch.testing.assert_close(
        coordinates.double(), (pixels - pixels.mean(0)) @ directions, rtol=0, atol=1e-4
    )


def test_principal_components_are_a_function_of_images_and_seed(digits: Tensor) -> None:
    first = fit_principal_components(digits[:200], 8, seed=3)
    torch.randn(7)
    assert torch.equal(first.directions, fit_principal_components(digits[:200], 8, seed=3).directions)


def test_as_many_components_as_there_are(digits: Tensor) -> None:
    small = digits[:, :, 12:16, 12:16]
    components = fit_principal_components(small, 16)
    recovered = project(small, components) @ components.directions.T + components.mean
    torch.testing.assert_close(recovered, small.flatten(1).float() / 255, rtol=0, atol=1e-4)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_neighbours_against_brute_force(block: int) -> None:
    """Guards against an index without its block's offset; the offset of 100 against cancellation."""
    queries, points = draw(0, 40, 5) + 100, draw(1, 65, 5) + 100
    distances = torch.cdist(queries.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected, expected_index = distances.min(1)
    distance, index = nearest_neighbours(queries, points, block=block)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(distance.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [1, 3, 64])
def test_copies_are_at_distance_zero_and_ties_go_to_the_first(block: int) -> None:
    points = draw(0, 10, 4).repeat(2, 1)
    distance, index = nearest_neighbours(points[10:], points, block=block)
    assert torch.equal(distance, torch.zeros(10))
    assert torch.equal(index, torch.arange(10))


def test_no_queries() -> None:
    distance, index = nearest_neighbours(torch.empty(0, 3), torch.zeros(2, 3))
    assert distance.shape == index.shape == (0,)


def test_other_real_digits_are_on_par(digits: Tensor, other_digits: Tensor) -> None:
    """Three sigma of a 1 % share among 250 is 1.9 %, and the percentile of 250 is as uncertain again."""
    report = memorisation(other_digits[:250], digits, other_digits[250:])
    assert 0.85 < report.median_ratio < 1.18
    assert report.fraction_close <= 0.04


def test_copies_are_found(digits: Tensor, other_digits: Tensor) -> None:
    """A tenth of the images are copies of known training images, scattered among new ones."""
    generated = other_digits[:250].clone()
    places, sources = torch.arange(5, 250, 10), torch.arange(1400, 1375, -1)
    generated[places] = digits[sources]
    report = memorisation(generated, digits, other_digits[250:], closest=25)
    assert report.fraction_close >= 0.1
    assert torch.equal(report.pair_distance, torch.zeros(25))
    assert dict(zip(report.generated_index.tolist(), report.training_index.tolist(), strict=True)) == dict(
        zip(places.tolist(), sources.tolist(), strict=True)
    )


def test_closest_pairs_come_in_order(digits: Tensor, other_digits: Tensor) -> None:
    report = memorisation(other_digits[:50], digits, other_digits[250:], closest=60)
    assert len(report.generated_index) == len(report.training_index) == 50
    assert torch.equal(report.pair_distance, report.pair_distance.sort().values)
    components = fit_principal_components(digits)
    difference = project(other_digits[report.generated_index], components) - project(
        digits[report.training_index], components
    )
    torch.testing.assert_close(difference.norm(dim=1), report.pair_distance, rtol=1e-4, atol=1e-4)


def test_held_out_copies_of_training_images(digits: Tensor, other_digits: Tensor) -> None:
    """All reference distances are 0: no ratio, and only copies count as close."""
    report = memorisation(other_digits[:20], digits, digits[:50])
    assert math.isnan(report.median_ratio)
    assert report.fraction_close == 0


def test_bad_arguments(digits: Tensor, other_digits: Tensor) -> None:
    with pytest.raises(ValueError, match="training images must be uint8"):
        memorisation(digits[:5], digits.float(), other_digits)
    with pytest.raises(ValueError, match=r"generated images must be \[N, 1, 32, 32\]"):
        memorisation(digits[:5, :, :28, :28], digits, other_digits)
    with pytest.raises(ValueError, match="held_out images must be uint8"):
        memorisation(digits[:5], digits, other_digits[:0])
    with pytest.raises(ValueError, match=r"components must be in 1\.\.20"):
        memorisation(digits[:5], digits[:20], other_digits, components=21)
    with pytest.raises(ValueError, match="closest"):
        memorisation(digits[:5], digits, other_digits, closest=-1)
    with pytest.raises(ValueError, match="block"):
        memorisation(digits[:5], digits, other_digits, block=0)
    with pytest.raises(ValueError, match="queries and points"):
        nearest_neighbours(torch.zeros(2, 3), torch.zeros(2, 4))
