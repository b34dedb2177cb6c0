"""Statistics of log-weights: against float64, piece by piece, and their gradients."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from evalp_fast.kernels import categorical, importance
from evalp_fast.kernels.importance import (
    WeightSummary,
    finish,
    merge,
    summarize,
    summary_backward_reference,
    weight_statistics,
)
from evalp_fast.kernels.launch import HAS_TRITON, INTERPRETED, backend, force_int64_offsets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED), reason="needs Triton, on a GPU or interpreted"
)
on_each_backend = pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=needs_kernel)])
INF, NAN = float("inf"), float("nan")
# exp of a float32 difference of size d has relative error (d + 2)·2^-24, a sum of n positive terms
# adds log2(n)·2^-24 in a tree, and 16 per thread; the weights that matter have d < 20.
RELATIVE = (20 + 2 + 11 + 16) * 2.0**-24


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN, so that an element which no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[4096, 16], ids=["whole rows", "blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows that a program takes whole, and rows in blocks of 16 that are merged four at a time."""
    monkeypatch.setattr(categorical, "_BLOCK", request.param)
    monkeypatch.setattr(importance, "_CACHED", request.param * 16)
    monkeypatch.setattr(importance, "_MERGED", 4)
    return request.param


def log_weights(*shape: int, spread: float = 4.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(spread).to(DEVICE)


def summarize_by(name: str, log_weights: Tensor, dim: int = -1) -> WeightSummary:
    with backend(name):
        return summarize(log_weights, dim)


def assert_is_summary(got: WeightSummary, log_weights: Tensor) -> None:
    """Of rows that are finite or -inf, each with a weight: by torch's own logsumexp, in float64."""
    x = log_weights.double()
    p = x.softmax(-1)
    n = x.shape[-1]
    log_mean, ess = x.logsumexp(-1) - math.log(n), 1 / p.square().sum(-1)
    assert torch.equal(got.log_max.double(), x.amax(-1))
    # log_mean is a sum of two float32 numbers, each rounded.
    bound = RELATIVE + 2.0**-23 * (got.log_max.double().abs() + log_mean.abs() + math.log(n))
    assert ((got.log_mean - log_mean).abs() <= bound).all()
    assert ((got.ess - ess).abs() <= 4 * RELATIVE * ess).all()
    assert (got.non_finite == 0).all()
    assert got.non_finite.dtype == torch.int64


@on_each_backend
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (3, 2), (7, 20), (18, 100), (2, 333)])
def test_summary_is_that_of_float64(name: str, blocks: int, shape: tuple[int, int]) -> None:
    for offset in (0.0, -2e4):
        x = log_weights(*shape) + offset
        x[0, 1 : shape[1] // 2] = -INF
        got = summarize_by(name, x)
        assert all(field.dtype == torch.float32 for field in got[:3])
        assert_is_summary(got, x)


@on_each_backend
def test_any_dimension_and_layout(name: str, blocks: int) -> None:
    x = log_weights(3, 4, 40)
    for dim in (-1, 0, 1, -2):
        got = summarize_by(name, x, dim)
        moved = x.movedim(dim, -1)
        assert got.ess.shape == moved.shape[:-1]
        assert_is_summary(got, moved)
        assert_is_summary(summarize_by(name, moved.contiguous().movedim(-1, dim), dim), moved)
    one = summarize_by(name, x[0, 0])
    assert one.log_mean.shape == ()
    assert_is_summary(summarize_by(name, x[:, :, 1:-1]), x[:, :, 1:-1])
    assert summarize_by(name, x[:0]).log_mean.shape == (0, 4)


@needs_kernel
def test_int64_offsets_change_nothing(blocks: int) -> None:
    x = log_weights(5, 40)
    want = summarize_by("triton", x)
    with force_int64_offsets():
        got = summarize_by("triton", x)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@on_each_backend
def test_values_that_are_no_log_weights(name: str, blocks: int) -> None:
    """-inf is weight 0; NaN and +inf are weight 0 and counted; a row without a weight is -inf and 0."""
    good = [1.0, 2.0, 0.5] * 7
    rows = [
        [*good, -INF, -INF],
        [*good, NAN, -INF],
        [NAN, *good, INF],
        [-INF] * 23,
        [NAN] * 23,
        [INF] + [-INF] * 22,
    ]
    log_mean, ess, log_max, non_finite = summarize_by(name, torch.tensor(rows, device=DEVICE))
    assert non_finite.tolist() == [0, 1, 2, 0, 23, 1]
    assert log_max.tolist() == [2.0] * 3 + [-INF] * 3
    assert log_mean[3:].tolist() == [-INF] * 3
    assert ess[3:].tolist() == [0.0] * 3
    expected = torch.tensor(good).double()
    want = expected.logsumexp(0) - math.log(23)
    assert ((log_mean[:3].cpu() - want).abs() < 1e-6).all()
    assert ((ess[:3].cpu() * expected.softmax(0).square().sum() - 1).abs() < 1e-5).all()


@on_each_backend
def test_a_row_alone_is_the_row_in_a_batch(name: str, blocks: int) -> None:
    """Bit for bit: launches and sums are chosen by the length of a row alone."""
    for n in (9, 70):
        x = log_weights(19, n)
        want = summarize_by(name, x)
        for row in (0, 7, 18):
            for got, field in zip(summarize_by(name, x[row : row + 1]), want, strict=True):
                assert torch.equal(got[0], field[row])


def test_pieces_merge_to_the_whole() -> None:
    x = log_weights(6, 50)
    x[1, :20] = -INF
    x[2] = -INF
    x[3, 7] = NAN
    x[4, 20:] += 100
    pieces = [weight_statistics(piece) for piece in x.split([20, 1, 29], dim=1)]
    whole = weight_statistics(x)
    for merged in (
        merge(*pieces),
        merge(merge(pieces[0], pieces[1]), pieces[2]),
        merge(pieces[2], merge(pieces[1], pieces[0])),
    ):
        assert merged.count == whole.count == 50
        torch.testing.assert_close(merged[:3], whole[:3], rtol=1e-6, atol=0)
        assert torch.equal(merged.non_finite, whole.non_finite)
        torch.testing.assert_close(finish(merged), summarize(x), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="at least one"):
        merge()
    with pytest.raises(ValueError, match="parts must be statistics of the same rows"):
        merge(whole, weight_statistics(x[:2]))
    with pytest.raises(ValueError, match="parts must be on one device"):
        merge(whole, weight_statistics(x.to("meta")))


@on_each_backend
def test_statistics_are_sums(name: str, blocks: int) -> None:
    x = log_weights(3, 4, 40)
    with backend(name):
        log_max, total, total_squares, count, non_finite = weight_statistics(x.requires_grad_(), dim=1)
    weights = (x.detach().double() - x.detach().double().amax(1, keepdim=True)).exp()
    assert not total.requires_grad
    assert count == 4
    assert torch.equal(log_max, x.detach().amax(1))
    torch.testing.assert_close(total.double(), weights.sum(1), rtol=RELATIVE, atol=0)
    torch.testing.assert_close(total_squares.double(), weights.square().sum(1), rtol=2 * RELATIVE, atol=0)
    assert not non_finite.any()


def test_merging_many_pieces_loses_nothing() -> None:
    """Guards against running sums in float32: 2^24 and 3 more pieces of one would stay at 2^24."""
    part = weight_statistics(torch.full((1,), -50.0))
    most = part._replace(total=part.total * 2**24, total_squares=part.total_squares * 2**24, count=2**24)
    merged = merge(most, part, part, part, part)
    assert merged.count == merged.total == 2**24 + 4


def loss(summary: WeightSummary) -> Tensor:
    return (summary.log_mean * 1.5).sum() + summary.ess.square().sum() * 0.1


@on_each_backend
def test_gradients_are_those_of_float64(name: str, blocks: int) -> None:
    x = log_weights(5, 40, spread=2.0)
    x[0, 3:9] = -INF
    leaf, double = x.requires_grad_(), x.detach().double().requires_grad_()
    with backend(name):
        (got,) = torch.autograd.grad(loss(summarize(leaf)), leaf)
    p = double.softmax(-1)
    expected = double.logsumexp(-1).sum() * 1.5 + (1 / p.square().sum(-1)).square().sum() * 0.1
    (want,) = torch.autograd.grad(expected, double)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@on_each_backend
def test_gradients_without_a_weight_are_zero(name: str, blocks: int) -> None:
    x = log_weights(4, 20)
    x[1] = -INF
    x[2] = NAN
    x[3, 5], x[3, 6] = NAN, INF
    leaf = x.requires_grad_()
    with backend(name):
        (got,) = torch.autograd.grad(loss(summarize(leaf)), leaf)
    assert (got[1:3] == 0).all()
    assert (got[3, 5:7] == 0).all()
    assert got.isfinite().all()
    assert (got[0] != 0).any()
    # Gradients that arrive as an expanded scalar, and of one output only.
    with backend(name):
        (got,) = torch.autograd.grad(summarize(leaf).log_mean.sum(), leaf)
    torch.testing.assert_close(got[0], leaf[0].softmax(-1))


def test_the_reference_passes_gradcheck() -> None:
    x = log_weights(2, 5).double().cpu().requires_grad_()

    def differentiable(x: Tensor) -> tuple[Tensor, Tensor]:
        return summarize(x)[:2]

    assert torch.autograd.gradcheck(differentiable, x)
    assert torch.autograd.gradgradcheck(differentiable, x)
    log_max, total, _, _, _ = weight_statistics(x)
    ess = summarize(x.detach()).ess
    grads = torch.ones(2, dtype=torch.float64), torch.full((2,), 0.3, dtype=torch.float64)
    (want,) = torch.autograd.grad(differentiable(x), x, grads)
    torch.testing.assert_close(summary_backward_reference(x.detach(), log_max, total, ess, *grads), want)


@on_each_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        log_mean, ess, _, non_finite = summarize(x.sin(), dim=0)
        return log_mean + ess, non_finite

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with backend(name):
        for shape in ((4, 9), (7, 12)):
            leaf = log_weights(*shape).requires_grad_()
            got, want = compiled(leaf), function(leaf)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(*(torch.autograd.grad(r[0].cos().sum(), leaf) for r in (got, want)))


@needs_kernel
def test_the_ops_obey_their_schemas() -> None:
    rows = [log_weights(3) for _ in range(5)]
    ops = torch.ops.evalp_fast
    for name in ("reference", "triton"):
        with backend(name):
            torch.library.opcheck(ops.weight_summary.default, (log_weights(3, 9),))
            torch.library.opcheck(ops.weight_summary_backward.default, (log_weights(3, 9), *rows))


@on_each_backend
def test_vmap(name: str) -> None:
    x = log_weights(4, 5, 9)
    with backend(name):
        want, got = summarize(x), torch.func.vmap(summarize)(x)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.func.vmap(summarize, in_dims=1, out_dims=1)(x), want)
        torch.testing.assert_close(torch.func.vmap(summarize)(x[0]).ess, want.ess[0])
        gradient = torch.func.vmap(torch.func.grad(lambda row: summarize(row).log_mean))(x[0])
        torch.testing.assert_close(gradient, x[0].softmax(-1))


def test_arguments_are_checked() -> None:
    x = log_weights(4, 5)
    for function in (summarize, weight_statistics):
        with pytest.raises(TypeError, match="log_weights must be a float32 or float64 tensor"):
            function(x.half())
        with pytest.raises(ValueError, match="dim must be a dimension"):
            function(x, 2)
        with pytest.raises(ValueError, match="dim must be a dimension"):
            function(x[0, 0])
        with pytest.raises(TypeError, match="dim must be an int, got float"):
            function(x, 1.0)
        assert function(x.to("meta"))[0].shape == (4,)  # shapes without values
        with pytest.raises(ValueError, match="must not be empty along dim 0"):
            function(x[:0], 0)
    with pytest.raises(RuntimeError, match="float64"):
        summarize_by("triton", x.double())
    assert summarize(x.double()).ess.dtype == torch.float64


@pytest.mark.gpu
def test_long_rows_and_many_rows_on_the_device() -> None:
    for shape in ((1, 1 << 26), (1 << 18, 100), (3, 100_003)):
        x = log_weights(*shape, spread=2.0)
        found = summarize_by("triton", x)
        assert_is_summary(found, x)
        for row in (0, shape[0] // 2, shape[0] - 1):  # alone, bit for bit
            for one, all_ in zip(summarize_by("triton", x[row : row + 1].clone()), found, strict=True):
                assert torch.equal(one[0], all_[row])
        if shape[0] * shape[1] < 1 << 26:
            leaf, double = x.requires_grad_(), x.detach().double().requires_grad_()
            (got,) = torch.autograd.grad(loss(summarize_by("triton", leaf)), leaf)
            (want,) = torch.autograd.grad(loss(summarize_by("reference", double)), double)
            torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
def test_a_captured_graph_reads_anew() -> None:
    x = log_weights(64, 5000)
    summarize(x)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = summarize(x)
    x.mul_(0.5)
    graph.replay()
    for found, expected in zip(out, summarize(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_more_than_2_to_the_31_log_weights() -> None:
    """Guards against 32-bit offsets: the rows behind 2^31 elements would be read from elsewhere."""
    if torch.cuda.mem_get_info()[0] < 11 * 10**9:
        pytest.skip("needs 11 GB of free GPU memory")
    x = torch.zeros((1 << 25) + 3, 64, device="cuda")
    x[-2:, 5] = 4.0
    found, expected = summarize(x), summarize(x[-2:].clone())
    assert torch.equal(found.ess[-2:], expected.ess)
    assert torch.equal(found.log_max[-3:].cpu(), torch.tensor([0.0, 4.0, 4.0]))


@pytest.mark.gpu
def test_a_row_of_more_than_2_to_the_31_log_weights() -> None:
    """Guards against columns in 32 bits: the few weights are behind 2^31."""
    n = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 11 * 10**9:
        pytest.skip("needs 11 GB of free GPU memory")
    x = torch.full((1, n), -INF, device="cuda")
    x[0, -8:], x[0, -9] = 2.0, NAN
    log_mean, ess, log_max, non_finite = summarize(x)
    assert (float(log_max), float(ess), int(non_finite)) == (2.0, 8.0, 1)
    assert abs(float(log_mean) - (2.0 + math.log(8 / n))) < 1e-5
