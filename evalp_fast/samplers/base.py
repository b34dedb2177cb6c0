"""What every sampler is, and how n samples are drawn with one.

A sample is a function of `(seed, index)`. To keep that true to the last bit, samples are computed in *tiles*:
index-aligned groups of a fixed size, always computed whole, so that every matrix product has the same
shape and the same rows whatever `n`, `start` and `batch_size` are. A matrix library may round the same row
differently in a batch of another size; in a tile it never sees one.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from evalp_fast.kernels.checks import check_seed
from evalp_fast.kernels.matmul_precision import matmul_precision
from evalp_fast.models.precision import Precision


class Draws(NamedTuple):
    """Samples and what is known about them.

    Attributes:
        samples: `[N, ...]`, sample dimension first.
        diagnostics: name to a tensor `[N]`, one value a sample (SIR: `ess`, `log_mean_weight`,
            `non_finite`; Langevin: `acceptance`).
        info: how they were drawn: `path` is "one launch" or "composed", `reason` why it is composed, and
            `precision` that of the products, which on a CPU may be "ieee" where another was asked for; of a
            user's own network nothing is known.
    """

    samples: Tensor
    diagnostics: dict[str, Tensor]
    info: Mapping[str, str] = MappingProxyType({})


class Sampler(Protocol):
    """Draws the samples of given numbers. One with little to do for a sample says so by an int attribute
    `tiles`: how many default tiles' samples are computed together."""

    def __call__(self, seed: int, index: Tensor) -> Draws:
        """The samples number `index` (int64 `[N]`) of the series `seed`."""
        ...


def check_count(n: int, start: int = 0, batch_size: int | None = None, seed: int = 0) -> None:
    """Raise `ValueError` or `TypeError` for a number of samples, or a seed, that cannot be drawn."""
    whole = isinstance(seed, Integral) and not isinstance(seed, bool)
    check_seed("seed", int(seed) if whole else seed)
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
        draws[0].info,
    )


def _slice(draws: Draws, begin: int, end: int) -> Draws:
    diagnostics = {name: values[begin:end] for name, values in draws.diagnostics.items()}
    return Draws(draws.samples[begin:end], diagnostics, draws.info)


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
        batch_size: samples per batch handed out (default: `default_tile`). It changes no sample.
        tile: samples computed together (default: `default_tile`, times the sampler's own `tiles`). It is part
            of what fixes the last bit of a sample, so it is left alone unless the device's memory demands it.
        precision: of float32 matrix products on CUDA (`"tf32"`); a sampler's own networks take theirs.
        progress: show a progress bar.

    Returns:
        An iterator over `Draws`, at most `batch_size` samples each; peak memory is one batch and one tile.

    Raises:
        ValueError, TypeError: naming the argument, before the first batch.
    """
    check_count(n, start, batch_size, seed)
    device = torch.device(device)
    parts = tiles(
        sampler, n, seed=seed, start=start, device=device, tile=tile, precision=precision, progress=progress
    )
    usual = default_tile(device) if tile is None else tile
    return rebatch((draws for _, draws in parts), usual if batch_size is None else batch_size)


def tiles(
    sampler: Sampler,
    n: int,
    *,
    seed: int = 0,
    start: int = 0,
    device: torch.device,
    tile: int | None = None,
    precision: Precision | None = None,
    progress: bool = False,
) -> Iterator[tuple[int, Draws]]:
    """Samples `start .. start+n-1` as they are computed: the number of the first one, and a tile's `Draws`
    without those that were not asked for. Arguments as for `stream`, already checked."""
    n, start, seed = int(n), int(start), int(seed)
    size = default_tile(device) * getattr(sampler, "tiles", 1) if tile is None else tile
    with tqdm(total=n, unit=" samples", disable=not progress, leave=False, delay=1.0) as bar:
        for first in range(start - start % size, start + n, size):
            index = torch.arange(first, first + size, device=device)
            with torch.no_grad(), matmul_precision(precision):
                draws = sampler(seed, index)
            begin, end = max(start - first, 0), min(start + n - first, size)
            bar.update(end - begin)
            yield first + begin, _slice(draws, begin, end)


def rebatch(parts: Iterable[Draws], batch_size: int) -> Iterator[Draws]:
    """The same samples in batches of `batch_size`, the last of which may be smaller."""
    pending: list[Draws] = []
    held = 0
    for draws in parts:
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


def on_host(batches: Iterable[Draws]) -> Iterator[Draws]:
    """Each batch on the CPU; from a GPU it is copied while the next one is computed, which takes the memory
    of one batch more."""
    copying: tuple[Draws, Any] | None = None
    for draws in batches:
        if not draws.samples.is_cuda:
            yield draws
            continue
        begun = _begin_copy(draws)
        if copying is not None:
            yield _finish_copy(*copying)
        copying = begun
    if copying is not None:
        yield _finish_copy(*copying)


def _begin_copy(draws: Draws) -> tuple[Draws, Any]:
    device = draws.samples.device
    beside = _copy_stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))

    def copy(values: Tensor) -> Tensor:
        host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        host.copy_(values, non_blocking=True)
        values.record_stream(beside)  # its memory is not reused before the copy has been made
        return host

    with torch.cuda.stream(beside):
        samples = copy(draws.samples)
        diagnostics = {name: copy(values) for name, values in draws.diagnostics.items()}
        return Draws(samples, diagnostics, draws.info), beside.record_event()


def _finish_copy(draws: Draws, copied: Any) -> Draws:
    copied.synchronize()
    return draws


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def draw(sampler: Sampler, n: int, *, device: torch.device | str = "cpu", **options) -> Draws:
    """All of `stream` at once. `n = 0` gives an empty tensor of the right shape."""
    check_count(n)
    batches = list(stream(sampler, max(n, 1), device=device, **options))
    return _slice(concatenate(batches), 0, n)
