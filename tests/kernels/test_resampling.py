"""Resampling: the reference against the definitions, the kernels against the reference, the draws' laws."""

import math
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from evalp_fast.kernels import resampling, resampling_long
from evalp_fast.kernels.launch import HAS_TRITON, INTERPRETED, backend, force_int64_offsets
from evalp_fast.kernels.resampling import SCHEMES, resample, resample_reference, slot_uniforms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED), reason="needs Triton, on a GPU or interpreted"
)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
on_each_backend = pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=needs_kernel)])
INF = float("inf")


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Uninitialised memory is filled, so that a slot that no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 64 particles are long, in blocks of 64 that fill at most 96 slots at a time."""
    monkeypatch.setattr(resampling, "_SHORT", 64)
    monkeypatch.setattr(resampling_long, "_BLOCK", 64)
    monkeypatch.setattr(resampling_long, "_CHUNK", 96)


def log_weights(*shape: int, spread: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(spread).to(DEVICE)


def drawn_by(name: str, *args: object, **options: object) -> Tensor:
    with backend(name):
        return resample(*args, **options)  # type: ignore[arg-type]


def definition(weights: np.ndarray, num: int, scheme: str, uniforms: np.ndarray) -> np.ndarray:
    """One row by a loop over its slots, in float64."""

    def at(weights: np.ndarray, position: float) -> int:
        return next(i for i, end in enumerate(np.cumsum(weights)) if position < end)

    total = weights.sum()
    if scheme == "multinomial":
        return np.array([at(weights, uniforms[j] * total) for j in range(num)])
    if scheme == "stratified":
        return np.array([at(weights, (j + uniforms[j]) / num * total) for j in range(num)])
    if scheme == "systematic":
        return np.array([at(weights, (j + uniforms[0]) / num * total) for j in range(num)])
    share = num * weights / total
    copies = np.repeat(np.arange(len(weights)), np.floor(share).astype(int))
    rest = share - np.floor(share)
    drawn = [at(rest, uniforms[j] * rest.sum()) for j in range(len(copies), num)]
    return np.concatenate([copies, np.array(drawn, dtype=np.int64)])


@each_scheme
@pytest.mark.parametrize(("n", "num"), [(1, 3), (2, 1), (7, 7), (7, 40), (40, 7), (100, 100)])
def test_the_reference_is_the_definition(scheme: str, n: int, num: int) -> None:
    rows = log_weights(5, n).double().cpu()
    uniforms = slot_uniforms(3, torch.arange(5), num)
    drawn, log_max = resample_reference(
        rows, num, scheme, uniforms[:, :1] if scheme == "systematic" else uniforms
    )
    assert torch.equal(log_max, rows.amax(1))
    for row, weights in enumerate(torch.exp(rows).numpy()):
        expected = definition(weights, num, scheme, uniforms[row].numpy())
        assert drawn[row].tolist() == expected.tolist()


def test_uniforms_use_52_bits_of_the_words_that_are_named() -> None:
    """A 32-bit uniform could not draw a particle of relative weight below 2^-32."""
    from evalp_fast.kernels.philox import Stream, words

    index = torch.tensor([5, 1 << 40])
    w = words(9, index, 0, Stream.SELECTION, 6).to(torch.int64)
    pairs = w.unflatten(1, (3, 2)).tolist()
    expected = [[(high * 2**20 + low // 2**12 + 0.5) / 2**52 for high, low in row] for row in pairs]
    assert slot_uniforms(9, index, 3).tolist() == expected


@needs_kernel
@each_scheme
@pytest.mark.parametrize("num", [1, 2, 7, 33, 130])
def test_short_rows_draw_what_the_reference_draws(scheme: str, num: int) -> None:
    for rows, n in ((37, 20), (3, 1), (5, 2), (3, 64)):
        x = log_weights(rows, n, seed=n)
        x[0] += 500.0
        if n > 2:
            x[1, 0] = float("nan")
            x[2, : n // 2] = -INF
        want, got = (drawn_by(name, x, num, scheme=scheme, seed=4) for name in ("reference", "triton"))
        assert torch.equal(want, got)


def with_value(value: float, *columns: slice) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        for part in columns:
            x[:, part] = value
        return x

    return change


LONG_ROWS = {
    "spread": with_value(0.0),
    "equal": with_value(0.0, slice(0, 250)),
    "one takes all": with_value(200.0, slice(150, 151)),
    "dead blocks": with_value(-INF, slice(0, 10), slice(60, 200)),
    "the last is dead": with_value(-INF, slice(30, 250)),
    "missing": with_value(float("nan"), slice(0, 250, 64)),
}


@needs_kernel
@each_scheme
@pytest.mark.parametrize("kind", LONG_ROWS)
def test_long_rows_draw_what_the_reference_draws(short_blocks: None, scheme: str, kind: str) -> None:
    x = LONG_ROWS[kind](log_weights(2, 250, seed=8))
    for num in (5, 333):
        want, got = (drawn_by(name, x, num, scheme=scheme, seed=6) for name in ("reference", "triton"))
        assert torch.equal(want, got)
        assert (x.gather(1, got) > -INF).all()


@needs_kernel
@each_scheme
def test_int64_offsets_change_nothing(short_blocks: None, scheme: str) -> None:
    for n in (20, 90):
        x = log_weights(3, n)
        want = drawn_by("triton", x, 70, scheme=scheme)
        with force_int64_offsets():
            assert torch.equal(drawn_by("triton", x, 70, scheme=scheme), want)


@on_each_backend
@each_scheme
def test_any_layout(short_blocks: None, name: str, scheme: str) -> None:
    wide = log_weights(4, 3, 50)
    want = drawn_by(name, wide, 9, scheme=scheme)
    assert want.shape == (4, 3, 9)
    assert torch.equal(drawn_by(name, wide.mT.contiguous().mT, 9, scheme=scheme), want)
    padded = torch.cat([wide, wide], dim=-1)[..., :50]
    assert torch.equal(drawn_by(name, padded, 9, scheme=scheme), want)
    assert torch.equal(drawn_by(name, wide.reshape(12, 50), 9, scheme=scheme).reshape(4, 3, 9), want)
    assert torch.equal(drawn_by(name, wide[0, 0], 9, scheme=scheme), want[0, 0])


@on_each_backend
@each_scheme
@pytest.mark.parametrize("n", [30, 150])
def test_a_row_alone_is_the_row_in_a_batch(short_blocks: None, name: str, scheme: str, n: int) -> None:
    x = log_weights(19, n)
    index = torch.arange(19, device=DEVICE) * 1000 + (1 << 33)
    want = drawn_by(name, x, 12, scheme=scheme, seed=2, index=index)
    for row in (0, 7, 18):
        alone = drawn_by(name, x[row : row + 1], 12, scheme=scheme, seed=2, index=index[row : row + 1])
        assert torch.equal(alone[0], want[row])


def test_the_rows_of_a_large_batch_do_not_depend_on_the_blocks_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = log_weights(50, 40).cpu()
    want = resample(x, 8, scheme="residual")
    monkeypatch.setattr(resampling, "_CACHED", 100)
    monkeypatch.setattr(resampling, "_NOISE", 130)
    assert torch.equal(resample(x, 8, scheme="residual"), want)


def test_sorted_look_ups_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = log_weights(2, 300).cpu()
    for scheme in ("multinomial", "residual"):
        want = resample(x, 500, scheme=scheme)
        monkeypatch.setattr(resampling, "_SORT_FROM", 1)
        assert torch.equal(resample(x, 500, scheme=scheme), want)
        monkeypatch.undo()


def test_multinomial_draws_do_not_depend_on_their_number() -> None:
    x = log_weights(3, 50)
    assert torch.equal(resample(x, 90, scheme="multinomial")[:, :20], resample(x, 20, scheme="multinomial"))


@each_scheme
def test_one_slot_is_one_draw_by_any_scheme(scheme: str) -> None:
    x = log_weights(40, 9)
    assert torch.equal(resample(x, 1, scheme=scheme), resample(x, 1, scheme="multinomial"))


def test_a_seed_may_be_a_tensor() -> None:
    x = log_weights(3, 50)
    seed = torch.tensor(-7, device=DEVICE)
    assert torch.equal(resample(x, 5, seed=seed), resample(x, 5, seed=-7))


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Chi-square test; cells that expect fewer than 20 are counted as one."""
    expected = probabilities * counts.sum()
    many = expected >= 20
    observed = torch.cat([counts[many].double(), counts[~many].sum()[None].double()])
    expected = torch.cat([expected[many], expected[~many].sum()[None]])
    statistic = ((observed - expected).square() / expected.clamp(min=1e-300))[expected > 0].sum()
    return float(scipy.stats.chi2.sf(statistic, int((expected > 0).sum()) - 1))


SHUFFLE = torch.randperm(37, generator=torch.Generator().manual_seed(1))
TWELVE_ORDERS = torch.linspace(-12.0, 0.0, 37).mul(math.log(10.0))[SHUFFLE]


@each_scheme
@pytest.mark.parametrize("num", [1, 5])
def test_marginals_over_a_million_draws(scheme: str, num: int) -> None:
    """Guards against any bias. Rows are independent, and with them the draws that are looked at: one slot of
    each row, chosen at random, so that its law is the weights'. They span twelve orders of magnitude.
    """
    rows = 1_000_000
    drawn = resample(TWELVE_ORDERS.expand(rows, -1), num, scheme=scheme, seed=11)
    slot = torch.randint(num, (rows, 1), generator=torch.Generator().manual_seed(3))
    counts = torch.bincount(drawn.gather(1, slot).flatten(), minlength=37)
    assert p_value(counts, TWELVE_ORDERS.double().softmax(0)) > 1e-3


@pytest.mark.parametrize("scheme", ["multinomial", "stratified", "residual"])
def test_a_million_draws_from_one_long_row(scheme: str) -> None:
    """Guards the sorted look-up, and slots that share a uniform: then counts scatter more than they may."""
    n = 1 << 17
    x = TWELVE_ORDERS.repeat(-(-n // 37))[:n]
    counts = torch.bincount(resample(x, 1_000_000, scheme=scheme, seed=5), minlength=n)
    kinds = torch.zeros(37, dtype=torch.int64).index_add(0, torch.arange(n) % 37, counts)
    law = torch.zeros(37, dtype=torch.float64).index_add(0, torch.arange(n) % 37, x.double().softmax(0))
    p = p_value(kinds, law)
    assert p > 1e-3
    if scheme == "multinomial":
        # Independent draws scatter as much as they must, within a kind too.
        top = counts[int(TWELVE_ORDERS.argmax()) :: 37]
        dispersion = float(top.double().var() / top.double().mean())
        assert abs(dispersion - 1) < 5 * (2 / len(top)) ** 0.5
        assert p < 1 - 1e-3


@pytest.mark.parametrize("scheme", ["stratified", "systematic", "residual"])
def test_counts_stay_within_their_bounds(scheme: str) -> None:
    """Systematic within one of what is expected, stratified within two, residual at least its whole part."""
    for n, num, seed in ((40, 1000, 0), (200, 700, 1), (200, 50, 2)):
        x = log_weights(3, n, spread=2.0, seed=seed)
        drawn = resample(x, num, scheme=scheme, seed=seed).cpu()
        expected = x.double().softmax(1).cpu() * num
        counts = torch.zeros(3, n, dtype=torch.float64).scatter_add(
            1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
        )
        slack = 1e-4  # the rounding of float32 weights, in slots
        if scheme == "residual":
            assert (counts >= (expected - slack).floor()).all()
        else:
            limit = 1 if scheme == "systematic" else 2
            assert ((counts - expected).abs() < limit + slack).all()
            assert (drawn.diff(dim=1) >= 0).all()


def test_no_particle_is_dead_at_2_24() -> None:
    """In float32 the cumulative sum stops moving and one particle in six cannot be drawn.

    The middle of each particle's interval, found by an exact sum of integers, must draw that particle.
    """
    n = 1 << 24
    weights = torch.randint(1 << 10, 1 << 20, (n,), generator=torch.Generator().manual_seed(0))
    ends = weights.cumsum(0)
    middles = (ends.double() - weights.double() / 2) / ends[-1]
    drawn, _ = resample_reference(weights.double().log()[None], n, "multinomial", middles[None])
    assert torch.equal(drawn[0], torch.arange(n))


def test_every_particle_that_is_owed_a_copy_gets_it_at_2_24() -> None:
    """The same in float32 and through the public function: half of the particles are owed one or more."""
    n = 1 << 24
    x = torch.rand(n, generator=torch.Generator().manual_seed(0)).add(0.5).log()
    counts = torch.bincount(resample(x, n, scheme="systematic", seed=1), minlength=n)
    expected = (x - x.amax()).exp().double()
    expected *= n / expected.sum()
    assert bool(((counts - expected).abs() < 1 + 1e-5).all())


@pytest.mark.gpu
@each_scheme
def test_no_particle_is_dead_in_the_kernels(scheme: str) -> None:
    n = 1 << 24
    x = torch.rand(n, generator=torch.Generator().manual_seed(0)).add(0.5).log().cuda()
    counts = torch.bincount(resample(x, n, scheme=scheme, seed=1), minlength=n)
    expected = (x - x.amax()).exp().double()
    expected *= n / expected.sum()
    if scheme == "multinomial":
        parts, law = (x.view(4096, -1).sum(1).cpu() for x in (counts, expected / n))
        assert p_value(parts, law) > 1e-3
    elif scheme == "residual":
        assert bool((counts >= (expected - 1e-5).floor()).all())
    else:
        assert bool(((counts - expected).abs() < (1 if scheme == "systematic" else 2) + 1e-5).all())


@pytest.mark.gpu
@each_scheme
@pytest.mark.parametrize(
    ("rows", "n", "num"), [(5000, 100, 100), (20_000, 100, 1), (50, 1500, 700), (3, 40_011, 9999)]
)
def test_draws_on_the_device_are_those_of_float64(scheme: str, rows: int, n: int, num: int) -> None:
    """And those of the same row alone. Weights in the kernels are float32: one draw in 1000 may differ."""
    x = log_weights(rows, n)
    drawn = drawn_by("triton", x, num, scheme=scheme, seed=4)
    exact = drawn_by("reference", x.double(), num, scheme=scheme, seed=4)
    assert (drawn == exact).double().mean() > 0.999
    index = torch.arange(rows, device=DEVICE)
    for row in (0, rows // 2, rows - 1):
        part = slice(row, row + 1)
        alone = drawn_by("triton", x[part].clone(), num, scheme=scheme, seed=4, index=index[part])
        assert torch.equal(alone, drawn[part])


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["systematic", "multinomial"])
def test_a_row_of_more_than_2_to_the_31_particles(scheme: str) -> None:
    """Guards against columns in 32 bits: all weight is behind 2^31, and nothing before may be drawn."""
    n = 2**31 + 4096
    needed = 4 * n + (8 * n if scheme == "multinomial" else 0) + (1 << 31)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory")
    x = torch.full((1, n), -INF, device="cuda")
    x[0, -4000:] = 0.0
    drawn = resample(x, 4000, scheme=scheme, seed=1)  # type: ignore[arg-type]
    if scheme == "systematic":
        assert torch.equal(drawn[0], torch.arange(n - 4000, n, device="cuda"))
    counts = torch.bincount(drawn[0] - (n - 4000), minlength=4000)  # raises where one is below
    assert counts.sum() == 4000
    assert p_value(counts.view(40, 100).sum(1).cpu(), torch.full((40,), 1 / 40, dtype=torch.float64)) > 1e-4


@pytest.mark.gpu
def test_short_rows_of_more_than_2_to_the_31_log_weights() -> None:
    """Guards against 32-bit offsets of rows."""
    rows, n = 2**25 + 3, 64
    if torch.cuda.mem_get_info()[0] < 4 * rows * n + 64 * rows:
        pytest.skip("needs 11 GB of free GPU memory")
    x = torch.full((rows, n), -INF, device="cuda")
    x[:, 3] = 0.0
    x[-2:, 5] = 50.0
    drawn = resample(x, 1)
    assert torch.equal(drawn[-3:, 0].cpu(), torch.tensor([3, 5, 5]))
    assert (drawn[:-2] == 3).all()


@needs_kernel
def test_the_kernels_resolve_small_weights() -> None:
    """Guards against float32 within a block: beside 1, weights of 2^-25 come four to a rounding."""
    x = torch.full((1, 2048), -25.0 * math.log(2.0), device=DEVICE)
    x[0, 0] = 0.0
    num = 1 << 16
    want, got = (drawn_by(name, x, num, scheme="stratified", seed=1) for name in ("reference", "triton"))
    assert torch.equal(want, got)
    assert 2 <= (got > 0).sum() <= 6  # 4 are owed


@each_scheme
def test_rows_and_seeds_are_independent(scheme: str) -> None:
    """Guards against noise that rows or seeds share: pairs of a fair draw are uniform on 16 cells."""
    n = 100_000
    x = torch.zeros(n, 4)
    one, other = (resample(x, 1, scheme=scheme, seed=seed)[:, 0] for seed in (1, 2))
    uniform = torch.full((16,), 1 / 16, dtype=torch.float64)
    for name, a, b in (("neighbours", one[::2], one[1::2]), ("seeds", one, other)):
        assert p_value(torch.bincount(a * 4 + b, minlength=16), uniform) > 1e-3, name


@pytest.mark.parametrize("scheme", ["multinomial", "stratified", "residual"])
def test_slots_are_independent(scheme: str) -> None:
    """Guards against slots that share a uniform. With two slots and weights (3, 2, 2, 1)/8 the halves of a
    stratified row are (3, 1)/4 and (1, 2, 1)/4, and two residual slots are multinomial."""
    x = torch.tensor([3.0, 2.0, 2.0, 1.0]).log().expand(100_000, -1)
    a, b = resample(x, 2, scheme=scheme, seed=3).unbind(1)
    first = second = torch.tensor([3.0, 2.0, 2.0, 1.0], dtype=torch.float64) / 8
    if scheme == "stratified":
        first, second = (torch.tensor(law, dtype=torch.float64) / 4 for law in ([3, 1, 0, 0], [0, 1, 2, 1]))
    assert p_value(torch.bincount(a * 4 + b, minlength=16), torch.outer(first, second).flatten()) > 1e-3


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter's NumPy
@on_each_backend
@each_scheme
@pytest.mark.parametrize("value", [-INF, float("nan"), INF])
def test_a_row_without_a_weight_raises_and_is_named(
    short_blocks: None, name: str, scheme: str, value: float
) -> None:
    for n in (10, 70):
        x = log_weights(6, n)
        x[3] = value
        x[5] = -INF
        message = "row 3: .inf is not" if value == INF else "row 3: no weight is finite"
        with pytest.raises(ValueError, match=message):
            drawn_by(name, x, 4, scheme=scheme)


def test_arguments_are_checked() -> None:
    x = log_weights(4, 5)
    with pytest.raises(TypeError, match="log_weights must be a float32 or float64 tensor"):
        resample(torch.zeros(3, dtype=torch.int64), 2)
    with pytest.raises(TypeError, match="log_weights must be"):
        resample([1.0], 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n >= 1"):
        resample(x[:, :0], 2)
    with pytest.raises(ValueError, match="n >= 1"):
        resample(x[0, 0], 2)
    with pytest.raises(ValueError, match=r"scheme must be one of multinomial, .* got 'best'"):
        resample(x, 2, scheme="best")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="num must be an int, got float"):
        resample(x, 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num must be at least 0, got -1"):
        resample(x, -1)
    with pytest.raises(TypeError, match="index must be an int64 tensor"):
        resample(x, 2, index=x[:, 0])
    with pytest.raises(ValueError, match=r"index must have shape \(4,\)"):
        resample(x, 2, index=torch.arange(3, device=DEVICE))
    with pytest.raises(ValueError, match="seed must fit in 64 bits"):
        resample(x, 2, seed=1 << 64)
    with pytest.raises(TypeError, match="seed must be an int"):
        resample(x, 2, seed=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed must be an int"):
        resample(x, 2, seed=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="log_weights must not be batched by vmap"):
        torch.func.vmap(lambda row: resample(row, 2))(x)
    with pytest.raises(ValueError, match="index must not be batched by vmap"):
        torch.func.vmap(lambda index: resample(x, 2, index=index))(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="seed must not be batched by vmap"):
        torch.func.vmap(lambda seed: resample(x, 2, seed=seed))(torch.arange(3))
    if DEVICE == "cuda":
        with pytest.raises(ValueError, match="index must be on the device"):
            resample(x, 2, index=torch.arange(4))


@each_scheme
def test_shapes_without_values(scheme: str) -> None:
    """On the meta device there are no weights to miss."""
    assert drawn_by("reference", torch.empty(3, 5, device="meta"), 4, scheme=scheme).shape == (3, 4)


@on_each_backend
@each_scheme
def test_nothing_to_draw(name: str, scheme: str) -> None:
    assert drawn_by(name, log_weights(3, 5), 0, scheme=scheme).shape == (3, 0)
    assert drawn_by(name, log_weights(2, 0, 5), 4, scheme=scheme).shape == (2, 0, 4)


@on_each_backend
@each_scheme
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(name: str, scheme: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def function(x: Tensor) -> Tensor:
        return resample(x * 2, 6, scheme=scheme, seed=3) + 1  # type: ignore[arg-type]

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with backend(name):
        for shape in ((4, 9), (7, 12)):
            x = log_weights(*shape)
            assert torch.equal(compiled(x), function(x))
        with pytest.raises(RuntimeError, match="no finite weight"):
            compiled(x - INF)


@needs_kernel
@each_scheme
def test_the_op_obeys_its_schema(scheme: str) -> None:
    args = (
        log_weights(3, 9),
        torch.arange(3, device=DEVICE),
        torch.tensor(1, device=DEVICE),
        5,
        SCHEMES.index(scheme),
    )
    torch.library.opcheck(torch.ops.evalp_fast.resample.default, args)
    with backend("triton"):
        torch.library.opcheck(torch.ops.evalp_fast.resample.default, args)


def test_float64_stays_on_the_reference_path() -> None:
    x = log_weights(3, 9).double()
    assert resample(x, 4).dtype == torch.int64
    with pytest.raises(RuntimeError, match="float64"):
        drawn_by("triton", x, 4)


@pytest.mark.gpu
@each_scheme
def test_a_captured_graph_draws_anew(scheme: str) -> None:
    x = log_weights(8, 5000)
    seed = torch.tensor(1, device="cuda")
    resample(x, 16, scheme=scheme, seed=seed)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = resample(x, 16, scheme=scheme, seed=seed)
    seen: list[Tensor] = []
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        seen.append(out.clone())
        assert torch.equal(out, resample(x, 16, scheme=scheme, seed=value))
    assert not torch.equal(*seen)


def test_without_triton_the_draws_are_the_same() -> None:
    """Guards against constants of the kernels, which mean nothing without Triton, on the reference path."""
    code = """
        import sys
        if sys.argv[1] == "hidden":
            sys.modules["triton"] = sys.modules["triton.language"] = None
        import torch
        from evalp_fast.kernels.importance import categorical, resample
        from evalp_fast.kernels.resampling import SCHEMES
        x = torch.linspace(-2, 2, 20).reshape(4, 5)
        print([resample(x, 6, scheme=scheme).tolist() for scheme in SCHEMES], categorical(x).tolist())
    """
    outputs = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), how], capture_output=True, text=True, check=True
        ).stdout
        for how in ("hidden", "there")
    ]
    assert outputs[0] == outputs[1] != ""
