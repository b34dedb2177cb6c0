"""What every sampler is, and how n samples are drawn with one.

A sample is a function of `(seed, index)`. To keep that true to the last bit, samples are computed in *tiles*:
index-aligned groups of a fixed size, always computed whole, so that every matrix product has the same
shape and the same rows whatever `n`, `start` and `batch_size` are. A matrix library may round the same row
differently in a batch of another size; in a tile it never sees one.
"""

from collections.abc import Iterator
from numbers import Integral
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from evalp_fast.models.precision import Precision, matmul_precision


class Draws(NamedTuple):
    """Samples and what is known about them.

    Attributes:
        samples: `[N, ...]`, sample dimension first.
        diagnostics: name to a tensor `[N]`, one value a sample (SIR: `ess`, `log_mean_weight`,
            `non_finite`; Langevin: `acceptance`).
    """

    samples: Tensor
    diagnostics: dict[str, Tensor]


class Sampler(Protocol):
    """Draws the samples of given numbers."""

    def __call__(self, seed: int, index: Tensor) -> Draws:
        """The samples number `index` (int64 `[N]`) of the series `seed`."""
        ...


def check_count(n: int, start: int = 0, batch_size: int | None = None) -> None:
    """Raise `ValueError` or `TypeError` for a number of samples that cannot be drawn."""
    for name, value, least in (("n", n, 0), ("start", start, 0), ("batch_size", batch_size, 1)):
        if value is None and name == "batch_size":
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if start + n > 1 << 56:
        raise ValueError(f"start + n must be at most 2^56, got {start + n}")


def default_tile(device: torch.device) -> int:
    """Samples that are computed together: small enough for a CPU's cache, large enough to fill a GPU."""
    return 256 if device.type == "cpu" else 8192


def concatenate(draws: list[Draws]) -> Draws:
    """One `Draws` after another."""
    return Draws(
        torch.cat([d.samples for d in draws]),
        {name: torch.cat([d.diagnostics[name] for d in draws]) for name in draws[0].diagnostics},
    )


def _slice(draws: Draws, begin: int, end: int) -> Draws:
    return Draws(draws.samples[begin:end], {k: v[begin:end] for k, v in draws.diagnostics.items()})


def stream(
    sampler: Sampler,
    n: int,
    *,
    seed: int = 0,
    start: int = 0,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    tile: int | None = None,
    precision: Precision | None = None,
    progress: bool = False,
) -> Iterator[Draws]:
    """Samples `start .. start+n-1` in batches of `batch_size` (the last may be smaller), in order.

    Args:
        sampler: what draws them; its modules must live on `device`.
        n, seed, start: which samples.
        batch_size: samples per batch handed out (default: one tile). It changes no sample.
        tile: samples computed together. It is part of what fixes the last bit of a sample, so it is left
            alone unless the device's memory demands it.
        precision: of float32 matrix products on CUDA (`"tf32"`); a sampler's own networks take theirs.
        progress: show a progress bar.

    Returns:
        An iterator over `Draws`, at most `batch_size` samples each; peak memory is one batch and one tile.

    Raises:
        ValueError, TypeError: naming the argument, before the first batch.
    """
    check_count(n, start, batch_size)
    n, start, seed = int(n), int(start), int(seed)
    device = torch.device(device)
    tile = default_tile(device) if tile is None else tile
    batch_size = tile if batch_size is None else batch_size
    return _batches(sampler, n, seed, start, batch_size, device, tile, precision, progress)


def _batches(
    sampler: Sampler,
    n: int,
    seed: int,
    start: int,
    batch_size: int,
    device: torch.device,
    tile: int,
    precision: Precision | None,
    progress: bool,
) -> Iterator[Draws]:
    pending: list[Draws] = []
    held = 0
    with tqdm(total=n, unit=" samples", disable=not progress, leave=False, delay=1.0) as bar:
        for first in range(start - start % tile, start + n, tile):
            index = torch.arange(first, first + tile, device=device)
            with torch.no_grad(), matmul_precision(precision):
                draws = sampler(seed, index)
            draws = _slice(draws, max(start - first, 0), min(start + n - first, tile))
            bar.update(draws.samples.shape[0])
            pending.append(draws)
            held += draws.samples.shape[0]
            if held >= batch_size:
                merged = concatenate(pending)
                whole = held - held % batch_size
                for begin in range(0, whole, batch_size):
                    yield _slice(merged, begin, begin + batch_size)
                pending = [_slice(merged, whole, held)] if held > whole else []
                held -= whole
    if held:
        yield concatenate(pending)


def draw(sampler: Sampler, n: int, *, device: torch.device | str = "cpu", **options) -> Draws:
    """All of `stream` at once. `n = 0` gives an empty tensor of the right shape."""
    check_count(n)
    batches = list(stream(sampler, max(n, 1), device=device, **options))
    return _slice(concatenate(batches), 0, n)
