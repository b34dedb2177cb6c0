"""The Gumbel-max race: against an exact race, the kernel against the reference, and the law of the draws."""

import math
from collections.abc import Iterator

import pytest
import scipy.stats
import torch
from torch import Tensor

from evalp_fast.kernels import categorical as categorical_module
from evalp_fast.kernels.categorical import categorical
from evalp_fast.kernels.launch import HAS_TRITON, INTERPRETED, backend, force_int64_offsets
from evalp_fast.kernels.philox import Stream, exponential, words
from evalp_fast.kernels.resampling import resample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED), reason="needs Triton, on a GPU or interpreted"
)
on_each_backend = pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=needs_kernel)])
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Uninitialised memory is filled, so that an element which no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[4096, 16], ids=["whole rows", "blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows that a program takes whole, and rows in blocks of 16 whose winners race again."""
    monkeypatch.setattr(categorical_module, "_BLOCK", request.param)
    monkeypatch.setattr(categorical_module, "_CACHED", request.param * 16)
    return request.param


def log_weights(*shape: int, spread: float = 4.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(spread).to(DEVICE)


@needs_kernel
@pytest.mark.parametrize("shape", [(1, 1), (9, 3), (18, 20), (7, 150)])
def test_the_kernel_s_winners_are_the_reference_s(blocks: int, shape: tuple[int, int]) -> None:
    x = log_weights(*shape, spread=1.0)
    x[0, 1:] = -INF
    x[-1, : shape[1] // 2] = NAN
    winners = []
    for name in ("reference", "triton"):
        with backend(name):
            winners.append(categorical(x, seed=3, index=torch.arange(shape[0], device=DEVICE) + (1 << 35)))
    assert torch.equal(*winners)
    assert winners[0][0] == 0


def test_the_winner_is_that_of_an_exact_race() -> None:
    """Guards against exponentials that are exact only absolutely: among 2^22 the winner's is near 2^-22.

    In row 17 the first two ring within 2^-24 of each other.
    """
    n, index = 1 << 22, torch.tensor([17])
    v = (words(1, index, 1, Stream.SELECTION, n).double() + 0.5) * 2.0**-32
    exact = torch.log1p(-v).neg().argmin(1)
    assert torch.equal(categorical(torch.zeros(1, n), seed=1, index=index), exact)


def test_a_million_races_have_the_law_of_the_weights() -> None:
    """Chi-square over weights that span twelve orders of magnitude; the rarest cells are one."""
    n = 29
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    x = torch.linspace(-12.0, 0.0, n).mul(math.log(10.0))[order]
    counts = torch.bincount(categorical(x.expand(1_000_000, n), seed=11), minlength=n).double()
    expected = x.double().softmax(0) * counts.sum()
    many = expected >= 20
    pairs = [torch.cat([cells[many], cells[~many].sum()[None]]) for cells in (counts, expected)]
    statistic = ((pairs[0] - pairs[1]).square() / pairs[1]).sum()
    assert scipy.stats.chi2.sf(statistic, int(many.sum())) > 1e-3


def test_races_of_rows_and_seeds_are_independent() -> None:
    """Guards against noise that rows, seeds or `resample` share."""
    x = torch.zeros(100_000, 4)
    one, other = (categorical(x, seed=seed) for seed in (1, 2))
    drawn = resample(x, 1, seed=1)[:, 0]
    for a, b in ((one[::2], one[1::2]), (one, other), (one, drawn)):
        counts = torch.bincount(a * 4 + b, minlength=16)
        assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_the_race_uses_the_named_column() -> None:
    """Column i of the row's noise at step 1 is the clock of particle i."""
    x = log_weights(20, 11).cpu()
    index = torch.arange(20) * 3 + 1
    race = exponential(5, index, 1, Stream.SELECTION, 11)
    assert torch.equal(categorical(x, seed=5, index=index), (race / x.exp()).argmin(1))


def test_float64_log_weights_race_in_float64() -> None:
    """In float32 numbers near 1e10 are 1024 apart: the first of two would win, whatever their weights."""
    x = torch.tensor([1e10 - 50.0, 1e10], dtype=torch.float64).expand(20, 2)
    assert (categorical(x) == 1).all()


@on_each_backend
@pytest.mark.parametrize("value", [-INF, NAN, INF])
def test_a_race_without_a_weight_raises_and_names_the_row(name: str, blocks: int, value: float) -> None:
    x = log_weights(6, 40)
    x[3] = value
    x[5] = -INF
    with backend(name), pytest.raises(ValueError, match="row 3: "):
        categorical(x)
    assert categorical(x[:0]).shape == (0,)


@on_each_backend
def test_a_row_alone_is_the_row_in_a_batch(name: str, blocks: int) -> None:
    x = log_weights(19, 70)
    index = torch.arange(19, device=DEVICE)
    with backend(name):
        winners = categorical(x, seed=1)
        for row in (0, 7, 18):
            assert torch.equal(categorical(x[row], seed=1, index=index[row]), winners[row])


@needs_kernel
def test_layout_and_int64_offsets_change_nothing(blocks: int) -> None:
    x = log_weights(2, 3, 40)
    with backend("triton"):
        want = categorical(x)
        assert want.shape == (2, 3)
        assert torch.equal(categorical(x.mT.contiguous().mT), want)
        assert torch.equal(categorical(torch.cat([x, x], dim=-1)[..., :40]), want)
        assert torch.equal(categorical(x, seed=torch.tensor(0, device=DEVICE)), want)
        with force_int64_offsets():
            assert torch.equal(categorical(x), want)


@on_each_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def function(x: Tensor) -> Tensor:
        return categorical(x * 2, seed=5) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with backend(name):
        for shape in ((4, 9), (7, 12)):
            x = log_weights(*shape)
            assert torch.equal(compiled(x), function(x))
        with pytest.raises(RuntimeError, match="no finite weight"):
            compiled(x - INF)


@needs_kernel
def test_the_op_obeys_its_schema() -> None:
    args = (log_weights(3, 9), torch.arange(3, device=DEVICE), torch.tensor(1, device=DEVICE))
    for name in ("reference", "triton"):
        with backend(name):
            torch.library.opcheck(torch.ops.evalp_fast.categorical.default, args)


def test_vmap_is_refused() -> None:
    x = log_weights(3, 4)
    with pytest.raises(ValueError, match="log_weights must not be batched by vmap"):
        torch.func.vmap(categorical)(x)
    with pytest.raises(ValueError, match="seed must not be batched by vmap"):
        torch.func.vmap(lambda seed: categorical(x, seed=seed))(torch.arange(2))


def test_shapes_without_values() -> None:
    with backend("reference"):
        assert categorical(torch.empty(3, 5, device="meta")).shape == (3,)


@pytest.mark.gpu
def test_winners_on_the_device() -> None:
    for shape in ((1000, 5000), (100_000, 100)):
        x = log_weights(*shape)
        winners = categorical(x, seed=2)
        assert (winners.cpu() == categorical(x.cpu().double(), seed=2)).float().mean() > 0.999
        index = torch.arange(len(x), device=DEVICE)
        for row in (0, len(x) // 2, len(x) - 1):  # alone, bit for bit
            part = slice(row, row + 1)
            assert torch.equal(categorical(x[part].clone(), seed=2, index=index[part]), winners[part])


@pytest.mark.gpu
def test_more_than_2_to_the_31_log_weights() -> None:
    """Guards against 32-bit offsets, of rows and within a row: the only weight is at the end."""
    for shape in ((2**25 + 3, 64), (1, 2**31 + 4096)):
        if torch.cuda.mem_get_info()[0] < 4 * math.prod(shape) + (1 << 31):
            pytest.skip("needs 11 GB of free GPU memory")
        x = torch.full(shape, -INF, device="cuda")
        x[:, 3] = 0.0
        x[-1, 3], x[-1, -1] = -INF, 0.0
        assert categorical(x)[-1] == shape[1] - 1
        del x


@pytest.mark.gpu
def test_a_captured_graph_draws_anew() -> None:
    x = log_weights(1000, 100)
    seed = torch.tensor(1, device="cuda")
    categorical(x, seed=seed)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = categorical(x, seed=seed)
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(out, categorical(x, seed=value))
