"""Drawing in tiles and batches: which sample is which, whatever the batch size, and to the last bit."""

import pytest
import torch
from torch import Tensor

from evalp_fast.samplers.base import Draws, check_count, concatenate, default_tile, draw, stream


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


def test_tf32_is_set_for_the_sampler_alone() -> None:
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
