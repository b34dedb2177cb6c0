"""Memorisation: do generated images lie closer to the training images than other real images do?"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from evalp_fast.kernels.philox import Stream, normal

_FIT_IMAGES = 10_000
_FIT_ITERATIONS = 4
_OVERSAMPLING = 8
_IMAGES_AT_A_TIME = 2_000


class PrincipalComponents(NamedTuple):
    """An affine map to the directions of largest variance: `(x - mean) @ directions`, pixels in [0, 1]."""

    mean: Tensor
    """float32 `[D]`, D pixels."""
    directions: Tensor
    """float32 `[D, K]`, orthonormal columns, largest variance first."""


class Memorisation(NamedTuple):
    """How close generated images are to training images, measured against held-out real images."""

    median_ratio: float
    """Median nearest-neighbour distance of the generated images over that of the held-out images."""
    fraction_close: float
    """Share of generated images closer to training images than 99 % of the held-out ones are; par is 0.01."""
    threshold: float
    """The distance that this refers to: the 1st percentile of the held-out distances."""
    generated_index: Tensor
    """int64 `[P]`: the generated images of the closest pairs, closest first."""
    training_index: Tensor
    """int64 `[P]`: their nearest training images."""
    pair_distance: Tensor
    """float32 `[P]`: their distances."""


def _check_images(images: Tensor, name: str, shape: torch.Size | None = None) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"{name} images must be uint8 [N, C, H, W] with N > 0, got {images.dtype} {list(images.shape)}"
        )
    if shape is not None and images.shape[1:] != shape:
        raise ValueError(f"{name} images must be [N, {', '.join(map(str, shape))}], got {list(images.shape)}")


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1).to(torch.float32) / 255


def fit_principal_components(images: Tensor, components: int = 64, *, seed: int = 0) -> PrincipalComponents:
    """The leading principal components of uint8 images `[N, C, H, W]`, by randomised subspace iteration.

    Halko, Martinsson and Tropp (2011, algorithm 4.4) with 4 iterations and 8 columns to spare; no D×D
    covariance is formed. Of more than 10,000 images, at most 10,000 at even spacing are used. The starting
    subspace is a function of `seed`.

    Raises:
        ValueError: images of another dtype or shape, or components outside 1..min(N, D).
    """
    _check_images(images, "training")
    chosen = images[torch.arange(0, len(images), math.ceil(len(images) / _FIT_IMAGES), device=images.device)]
    pixels = chosen[0].numel()
    largest = min(len(chosen), pixels)
    if not 1 <= components <= largest:
        raise ValueError(f"components must be in 1..{largest} for these images, got {components}")
    mean = torch.stack([_pixels(part).sum(0) for part in chosen.split(_IMAGES_AT_A_TIME)]).sum(0) / len(
        chosen
    )
    width = min(components + _OVERSAMPLING, largest)
    index = torch.arange(pixels, device=images.device)
    basis = torch.linalg.qr(normal(seed, index, 0, Stream.INITIAL, width)).Q
    singular_vectors = basis
    for _ in range(_FIT_ITERATIONS):
        product = torch.zeros_like(basis)
        for part in chosen.split(_IMAGES_AT_A_TIME):
            centred = _pixels(part) - mean
            product += centred.T @ (centred @ basis)
        # product = C·basis with the covariance C: its left singular vectors tend to the leading eigenvectors.
        singular_vectors, _, _ = torch.linalg.svd(product, full_matrices=False)
        basis = singular_vectors
    return PrincipalComponents(mean, singular_vectors[:, :components].contiguous())


def project(images: Tensor, components: PrincipalComponents) -> Tensor:
    """Coordinates of uint8 images `[N, C, H, W]` in PCA space, float32 `[N, K]`."""
    parts = images.split(_IMAGES_AT_A_TIME)
    return torch.cat([(_pixels(part) - components.mean) @ components.directions for part in parts])


def nearest_neighbours(queries: Tensor, points: Tensor, *, block: int = 2048) -> tuple[Tensor, Tensor]:
    """The nearest of `points` `[M, K]` to each of `queries` `[N, K]`, both float32.

    Blocks of `block`×`block` distances are held at a time.

    Returns:
        (distance float32 `[N]`, index int64 `[N]`); the lower index where two are equally near.

    Raises:
        ValueError: other shapes, no points, or block below 1.
    """
    if queries.ndim != 2 or points.ndim != 2 or queries.shape[1] != points.shape[1] or len(points) == 0:
        shapes = f"{list(queries.shape)} and {list(points.shape)}"
        raise ValueError(f"queries and points must be [N, K] and [M, K] with M > 0, got {shapes}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    # |q - p|² = |q|² + |p|² - 2qp, and |q|² does not change which p is nearest. Centring limits cancellation.
    centre = points.mean(0)
    centred = points - centre
    norms = centred.square().sum(1)
    indices = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(queries), block):
        part = queries[start : start + block] - centre
        best = torch.full((len(part),), math.inf, device=part.device)
        best_index = torch.zeros(len(part), dtype=torch.int64, device=part.device)
        for offset in range(0, len(points), block):
            columns = slice(offset, offset + block)
            value, position = torch.addmm(norms[columns], part, centred[columns].T, alpha=-2).min(1)
            closer = value < best
            best = torch.where(closer, value, best)
            best_index = torch.where(closer, position + offset, best_index)
        indices[start : start + block] = best_index
    # The distance itself from the difference: exactly 0 for a copy.
    return (queries - points[indices]).norm(dim=1), indices


def memorisation(
    generated: Tensor,
    training: Tensor,
    held_out: Tensor,
    *,
    components: int = 64,
    closest: int = 16,
    seed: int = 0,
    block: int = 2048,
) -> Memorisation:
    """Compares generated with held-out images by their distances to the nearest training image, in PCA space.

    A model that has memorised has a `fraction_close` well above 0.01. A `median_ratio` below 1 alone does not
    say so: images that are smoother than real ones lie nearer to everything.

    Args:
        generated, training, held_out: uint8 `[N, C, H, W]` of one C, H, W, on one device. Held-out images are
            real ones that the model was not trained on.
        components: of the PCA, fitted to the training images.
        closest: how many of the closest pairs to return (fewer if there are fewer generated images).
        seed: of the PCA's starting subspace.
        block: see `nearest_neighbours`.

    Returns:
        A `Memorisation`.

    Raises:
        ValueError: naming the argument.
    """
    _check_images(training, "training")
    _check_images(generated, "generated", training.shape[1:])
    _check_images(held_out, "held_out", training.shape[1:])
    if closest < 0:
        raise ValueError(f"closest must not be negative, got {closest}")
    principal = fit_principal_components(training, components, seed=seed)
    points = project(training, principal)
    distance, index = nearest_neighbours(project(generated, principal), points, block=block)
    held_out_distance, _ = nearest_neighbours(project(held_out, principal), points, block=block)
    # Held-out copies of training images can make the percentile 0: then only copies count as close.
    threshold = held_out_distance.quantile(0.01)
    held_out_median = float(held_out_distance.median())
    pair_distance, pairs = distance.sort(stable=True)
    return Memorisation(
        median_ratio=float(distance.median()) / held_out_median if held_out_median > 0 else math.nan,
        fraction_close=float((distance <= threshold).to(torch.float32).mean()),
        threshold=float(threshold),
        generated_index=pairs[:closest],
        training_index=index[pairs[:closest]],
        pair_distance=pair_distance[:closest],
    )


__all__ = [
    "Memorisation",
    "PrincipalComponents",
    "fit_principal_components",
    "memorisation",
    "nearest_neighbours",
    "project",
]
