"""Drawing in tiles and batches: which sample is which, whatever the batch size, and to the last bit."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from evalp_fast.samplers import base
from evalp_fast.samplers.base import (
    Draws,
    check_count,
    concatenate,
    default_tile,
    draw,
    on_host,
    rebatch,
    stream,
    tiles,
)


def numbered(seed: int, index: Tensor) -> Draws:
    """Sample i is (i, seed): what came out says where it came from."""
    samples = torch.stack((index, torch.full_like(index, seed)), dim=1)
    return Draws(samples, {"square": index.square()})


class Recorder:
    """A sampler that remembers the tiles it was asked for."""

    def __init__(self) -> None:
        self.tiles: list[Tensor] = []

    def __call__(self, seed: int, index: Tensor) -> Draws:
        self.tiles.append(index)
        return numbered(seed, index)


@pytest.mark.parametrize("start", [0, 1, 7, 8, 29])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("batch_size", [None, 1, 3, 8, 20, 100])
def test_every_sample_once_and_in_order(n: int, start: int, batch_size: int | None) -> None:
    batches = list(stream(numbered, n, seed=5, start=start, batch_size=batch_size, tile=8))
    sizes = [batch.samples.shape[0] for batch in batches]
    expected = 8 if batch_size is None else batch_size
    assert sizes[:-1] == [expected] * (len(sizes) - 1)
    assert 1 <= sizes[-1] <= expected
    merged = concatenate(batches)
    assert torch.equal(merged.samples[:, 0], torch.arange(start, start + n))
    assert (merged.samples[:, 1] == 5).all()
    assert torch.equal(merged.diagnostics["square"], torch.arange(start, start + n).square())


@pytest.mark.parametrize(("n", "start", "batch_size"), [(1, 0, None), (20, 13, 3), (3, 6, 100)])
def test_tiles_are_aligned_and_whole(n: int, start: int, batch_size: int | None) -> None:
    """Guards against a last tile that is cut short: its products would round differently."""
    recorder = Recorder()
    list(stream(recorder, n, start=start, batch_size=batch_size, tile=8))
    for tile in recorder.tiles:
        assert tile.shape == (8,)
        assert tile.dtype == torch.int64
        assert int(tile[0]) % 8 == 0
    first, last = start // 8, (start + n - 1) // 8
    assert [int(tile[0]) for tile in recorder.tiles] == list(range(8 * first, 8 * last + 1, 8))


def test_stream_is_lazy() -> None:
    """A batch is handed out as soon as it is there: memory holds one batch, whatever n is."""
    recorder = Recorder()
    batches = stream(recorder, 10**12, batch_size=4, tile=8)
    next(batches)
    next(batches)
    assert len(recorder.tiles) == 1
    next(batches)
    assert len(recorder.tiles) == 2


def test_no_samples() -> None:
    draws = draw(numbered, 0)
    assert draws.samples.shape == (0, 2)
    assert draws.samples.dtype == torch.int64
    assert draws.diagnostics["square"].shape == (0,)
    assert list(stream(numbered, 0)) == []


def test_draw_is_the_stream() -> None:
    draws = draw(numbered, 10, start=3, batch_size=4, seed=2)
    assert torch.equal(draws.samples[:, 0], torch.arange(3, 13))
    assert torch.equal(draws.samples, concatenate(list(stream(numbered, 10, start=3, seed=2))).samples)


def test_gradients_are_not_recorded() -> None:
    weight = torch.ones((), requires_grad=True)
    draws = draw(lambda seed, index: Draws(weight * index[:, None], {}), 3)
    assert not draws.samples.requires_grad
    # Nor does a suspended generator switch them off for whoever consumes it.
    batches = stream(numbered, 20, tile=8)
    next(batches)
    assert torch.is_grad_enabled()


def test_large_numbers() -> None:
    start = (1 << 56) - 3
    assert int(draw(numbered, 3, start=start).samples[-1, 0]) == (1 << 56) - 1
    with pytest.raises(ValueError, match=r"start \+ n must be at most 2\^56"):
        draw(numbered, 4, start=start)


def test_tf32_is_set_for_the_sampler_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    seen = []

    def spy(seed: int, index: Tensor) -> Draws:
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return numbered(seed, index)

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    draw(spy, 1, precision="tf32")
    draw(spy, 1, precision="ieee")
    draw(spy, 1)
    assert seen == [(True, True), (False, False), (False, False)]
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1,), ValueError, "n must be at least 0, got -1"),
        ((1, -1), ValueError, "start must be at least 0"),
        ((1, 0, 0), ValueError, "batch_size must be at least 1, got 0"),
        ((1.0,), TypeError, "n must be an int, got float"),
        ((True,), TypeError, "n must be an int, got bool"),
        ((1, "2"), TypeError, "start must be an int"),
        ((1, 0, 2.5), TypeError, "batch_size must be an int"),
    ],
)
def test_bad_counts_are_named(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_count(*arguments)


def test_tiles_of_devices() -> None:
    assert default_tile(torch.device("cpu")) < default_tile(torch.device("cuda"))


@pytest.mark.parametrize(("n", "start"), [(1, 0), (8, 8), (30, 5), (3, 6), (2, (1 << 40) + 7)])
def test_tiles_say_which_samples_they_hold(n: int, start: int) -> None:
    """Guards against a decoder that is told the tile's beginning where the samples begin later."""
    held = []
    for first, draws in tiles(numbered, n, start=start, device=torch.device("cpu"), tile=8):
        count = len(draws.samples)
        assert 1 <= count <= 8
        assert first // 8 == (first + count - 1) // 8
        assert torch.equal(draws.samples[:, 0], torch.arange(first, first + count))
        held += range(first, first + count)
    assert held == list(range(start, start + n))


def test_a_sampler_of_larger_tiles() -> None:
    """`tiles` multiplies the device's tile, and a tile that is given by name is left as it is."""
    recorder = Recorder()
    size = default_tile(torch.device("cpu"))

    class Wide:
        tiles = 3

        def __call__(self, seed: int, index: Tensor) -> Draws:
            return recorder(seed, index)

    found = draw(Wide(), 5, start=3 * size - 2)
    assert torch.equal(found.samples[:, 0], torch.arange(3 * size - 2, 3 * size + 3))
    assert [(int(tile[0]), len(tile)) for tile in recorder.tiles] == [(0, 3 * size), (3 * size, 3 * size)]
    recorder.tiles.clear()
    assert len(next(stream(Wide(), 10_000)).samples) == size  # a batch is still one default tile
    recorder.tiles.clear()
    draw(Wide(), 5, tile=16)
    assert [len(tile) for tile in recorder.tiles] == [16]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 100])
@pytest.mark.parametrize("sizes", [[], [1], [5, 5, 5], [1, 1, 1, 9, 2], [20], [3, 30, 1]])
def test_rebatch_moves_the_cuts_alone(sizes: list[int], batch_size: int) -> None:
    """Guards against samples that are lost or repeated at a cut, and diagnostics or info that are."""
    total = sum(sizes)
    whole = numbered(4, torch.arange(total))._replace(info={"path": "composed"})
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    parts = [base._slice(whole, end - size, end) for end, size in zip(ends, sizes, strict=True)]
    batches = list(rebatch(iter(parts), batch_size))
    assert [len(batch.samples) for batch in batches] == [
        min(batch_size, total - begin) for begin in range(0, total, batch_size)
    ]
    for k, batch in enumerate(batches):
        begin = k * batch_size
        assert torch.equal(batch.samples, whole.samples[begin : begin + batch_size])
        assert torch.equal(
            batch.diagnostics["square"], whole.diagnostics["square"][begin : begin + batch_size]
        )
        assert batch.info == {"path": "composed"}


def test_info_comes_through() -> None:
    """From the sampler to every batch, and to an empty one."""

    def told(seed: int, index: Tensor) -> Draws:
        return numbered(seed, index)._replace(info={"path": "composed", "reason": "a test"})

    assert draw(numbered, 3).info == {}
    for found in (*stream(told, 20, batch_size=3, tile=8), draw(told, 20), draw(told, 0)):
        assert found.info == {"path": "composed", "reason": "a test"}


def test_on_host_hands_on_what_is_there() -> None:
    """On the CPU each batch is the very same, and comes before the next one is computed."""
    made: list[Draws] = []

    def batches() -> Iterator[Draws]:
        for k in range(3):
            made.append(numbered(k, torch.arange(4)))
            yield made[-1]

    for k, found in enumerate(on_host(batches())):
        assert len(made) == k + 1
        assert found is made[k]
    assert len(made) == 3
    assert list(on_host([])) == []


def test_on_host_begins_a_copy_before_it_waits_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against copies that are waited for one by one (no overlap), and against a last one forgotten."""
    events: list[tuple[str, int]] = []

    def begin(draws: Draws) -> tuple[Draws, Any]:
        events.append(("begin", draws.samples.number))  # type: ignore[attr-defined]
        return draws, None

    def finish(draws: Draws, copied: Any) -> Draws:
        events.append(("finish", draws.samples.number))  # type: ignore[attr-defined]
        return draws

    monkeypatch.setattr(base, "_begin_copy", begin)
    monkeypatch.setattr(base, "_finish_copy", finish)
    source = [Draws(SimpleNamespace(is_cuda=True, number=k), {}) for k in range(3)]  # type: ignore[arg-type]
    assert list(on_host(iter(source))) == source
    order = [("begin", 0), ("begin", 1), ("finish", 0), ("begin", 2), ("finish", 1), ("finish", 2)]
    assert events == order


@pytest.mark.gpu
def test_on_host_copies_while_the_next_batch_is_made() -> None:
    """Guards against a copy that begins before its samples are there, or whose memory the next batch gets
    while it is being read: the GPU is kept busy before, and memory is given back after each batch."""
    rows, columns, count = 1 << 14, 1 << 10, 6

    def batches() -> Iterator[Draws]:
        for k in range(count):
            busy = torch.ones(2048, 2048, device="cuda")
            for _ in range(20):
                busy = busy @ busy * 0.0 + 1.0
            samples = torch.full((rows, columns), float(k), device="cuda") * busy[0, 0]
            diagnostics = {"number": torch.full((rows,), k, device="cuda")}
            yield Draws(samples, diagnostics, {"path": "one launch"})
            del samples
            torch.empty(rows, columns, device="cuda").fill_(-1.0)

    found = list(on_host(batches()))
    assert len(found) == count
    for k, draws in enumerate(found):
        assert draws.samples.device.type == "cpu"
        assert draws.samples.is_pinned()
        assert (draws.samples == float(k)).all()
        assert (draws.diagnostics["number"] == k).all()
        assert draws.info == {"path": "one launch"}
    images = torch.arange(48, dtype=torch.uint8, device="cuda").view(4, 3, 2, 2)
    (one,) = on_host([Draws(images, {})])
    assert torch.equal(one.samples, images.cpu())
