"""The noise: known answers, the three drivers against each other, the sample contract, and its statistics.

Statistical tests draw a fixed 2^20 numbers, so they pass or fail for ever; their bounds sit at p = 1e-4.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from evalp_fast.kernels import launch, philox, philox_cpu
from evalp_fast.kernels.launch import (
    HAS_TRITON,
    INTERPRETED,
    LaunchConfig,
    backend,
    force_int64_offsets,
    tl,
    triton,
)
from evalp_fast.kernels.philox import Stream, exponential, normal, philox4x32, uniform, words

MASK = 0xFFFFFFFF
# counter, key, words: kat_vectors of Random123 (philox4x32, 10 rounds): zeros, ones, digits of pi.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
KINDS = {words: 0, uniform: 1, normal: 2, exponential: 3}
interpreter = pytest.mark.skipif(not INTERPRETED, reason="kernels on CPU tensors need Triton's interpreter")


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """Algorithm of section 3.3 of the paper, in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def words_in_python(seed: int, index: list[int], step: int, stream: int, width: int) -> Tensor:
    """The noise contract, word by word."""
    key = [seed & MASK, seed >> 32 & MASK]
    rows = []
    for number in index:
        counters = ([j, number & MASK, step, stream | number >> 32 << 8] for j in range(-(-width // 4)))
        rows.append([word for counter in counters for word in philox_in_python(counter, key)][:width])
    return torch.tensor(rows, dtype=torch.int64).reshape(len(index), width)


def reference(function, seed, index, step, stream, width, dtype=torch.float32) -> Tensor:
    """The traceable reference, called directly."""
    if function is words:
        dtype = torch.int64
    seed_tensor, seed = (seed, 0) if isinstance(seed, Tensor) else (None, seed)
    step_tensor, step = (step, 0) if isinstance(step, Tensor) else (None, step)
    arguments = (seed_tensor, seed, step_tensor, step, KINDS[function], stream, width, dtype)
    return philox.draw_reference(index, None, *arguments)


# --- the words ---


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers_of_the_reference(counter, key, expected):
    keys = [((key[0] + r * 0x9E3779B9) & MASK, (key[1] + r * 0xBB67AE85) & MASK) for r in range(10)]
    for convert in (lambda word: torch.tensor([[word]]), lambda word: np.array([[word]])):
        out = philox.philox_rounds(*(convert(word) for word in counter), keys)
        assert [int(word.item()) for word in out] == expected
    assert philox_in_python(counter, key) == expected


@triton.jit
def _philox_kernel(out_ptr, in_ptr):
    lane = tl.arange(0, 1)
    seed_lo, seed_hi = tl.load(in_ptr + lane + 4).to(tl.uint32), tl.load(in_ptr + lane + 5).to(tl.uint32)
    c0, c1 = tl.load(in_ptr + lane).to(tl.uint32), tl.load(in_ptr + lane + 1).to(tl.uint32)
    c2, c3 = tl.load(in_ptr + lane + 2).to(tl.uint32), tl.load(in_ptr + lane + 3).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(seed_lo, seed_hi, c0, c1, c2, c3)
    tl.store(out_ptr + lane, w0.to(tl.int64))
    tl.store(out_ptr + lane + 1, w1.to(tl.int64))
    tl.store(out_ptr + lane + 2, w2.to(tl.int64))
    tl.store(out_ptr + lane + 3, w3.to(tl.int64))


@interpreter
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers_of_the_kernel(counter, key, expected):
    out = torch.zeros(4, dtype=torch.int64)
    _philox_kernel[(1,)](out, torch.tensor(counter + key))
    assert out.tolist() == expected


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 0x0123456789ABCDEF])
def test_words_follow_the_contract(seed):
    # The upper half of the seed, of the index and the stream each have their own place in key and counter.
    index = [0, 1, MASK, MASK + 1, 2**56 - 1, 0x00ABCDEF01234567]
    for step, stream, width in ((0, 0, 4), (MASK, 255, 9), (7, Stream.SELECTION, 6)):
        drawn = words(seed, torch.tensor(index), step, stream, width)
        assert torch.equal(drawn, words_in_python(seed, index, step, stream, width))


INDEX = torch.tensor([0, 1, 5, (1 << 40) + 7, (1 << 56) - 1, 123456789012, MASK])
CALLS = [
    (3, 0, 4),
    (-5, 9, 7),
    ((1 << 62) + 9, MASK, 33),
    (torch.tensor(77), torch.tensor(5), 64),
    (torch.tensor([2**63 - 1]), torch.arange(7) + (1 << 31), 1),
    (11, torch.tensor([12]), 2100),
]


@pytest.mark.parametrize("function", list(KINDS), ids=lambda function: function.__name__)
@pytest.mark.parametrize(("seed", "step", "width"), CALLS)
def test_the_loop_on_the_cpu_has_the_bits_of_the_reference(function, seed, step, width):
    expected = reference(function, seed, INDEX, step, Stream.LANGEVIN, width)
    drawn = function(seed, INDEX, step, Stream.LANGEVIN, width)
    assert drawn.is_contiguous()
    assert drawn.dtype == expected.dtype
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("function", list(KINDS), ids=lambda function: function.__name__)
def test_the_compiled_loop_has_the_bits_of_the_uncompiled_one(function, monkeypatch):
    # A run compiles its noise when it has drawn much: its samples must not change then. Guards against
    # library functions, which round otherwise in vectors and in tails, and against contracted products.
    cases = [(1000, 27), (600, 64), (1, 100_000), (3, 9)]
    expected = [function(9, torch.arange(rows) * 7919 + (1 << 31), 3, 1, width) for rows, width in cases]
    monkeypatch.setattr(launch, "_COMPILE_AFTER", 0.0)
    monkeypatch.setattr(philox_cpu, "_LOOP_BLOCKS", 5000)
    for (rows, width), numbers in zip(cases, expected, strict=True):
        assert torch.equal(function(9, torch.arange(rows) * 7919 + (1 << 31), 3, 1, width), numbers)


@pytest.mark.parametrize("function", list(KINDS), ids=lambda function: function.__name__)
def test_past_the_compilers_limit_the_bits_are_the_same(function, monkeypatch):
    # Guards against what torch.compile does where it has compiled a loop too often, for shapes or modes: it
    # runs the lines as they are, with a square root that a library rounds otherwise.
    cases = [(1, 4), (1, 9), (5, 4), (20_000, 13)]
    expected = [function(4, torch.arange(rows), 0, 1, width) for rows, width in cases]
    monkeypatch.setattr(launch, "_COMPILE_AFTER", 0.0)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        for (rows, width), numbers in zip(cases, expected, strict=True):
            assert torch.equal(function(4, torch.arange(rows), 0, 1, width), numbers)
    torch._dynamo.reset()
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(function(4, torch.arange(20_000), 0, 1, 13), expected[-1])


@pytest.mark.parametrize(
    "setting",
    [{"cpp.enable_floating_point_contract_flag": "fast"}, {"cpp.enable_unsafe_math_opt_flag": True}],
)
def test_the_callers_settings_of_inductor_change_no_bit(setting, monkeypatch):
    import torch._inductor.config as inductor

    expected = normal(4, torch.arange(2_000), 0, 1, 64)
    monkeypatch.setattr(launch, "_COMPILE_AFTER", 0.0)
    torch._dynamo.reset()
    with inductor.patch(setting):
        assert torch.equal(normal(4, torch.arange(2_000), 0, 1, 64), expected)
    torch._dynamo.reset()


def test_the_callers_modes_compile_the_loop_no_second_time(monkeypatch):
    # Guards against the same limit: each mode would take one of the eight variants, and its seconds.
    monkeypatch.setattr(launch, "_COMPILE_AFTER", 0.0)
    monkeypatch.setattr(philox_cpu, "_LOOP_BLOCKS", 64)
    expected = normal(4, torch.arange(50), 0, 1, 13)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for mode in (
            torch.no_grad(),
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16),
            torch.enable_grad(),
        ):
            with mode:
                assert torch.equal(normal(4, torch.arange(50), 0, 1, 13), expected)
                out = torch.zeros(50, 13)
                assert torch.equal(normal(4, torch.arange(50), 0, 1, 13, out=out), expected)
        with torch.inference_mode():
            index = torch.arange(50)
        assert torch.equal(normal(4, index, 0, 1, 13), expected)


def assert_near(function, drawn: Tensor, expected: Tensor) -> None:
    """Words and uniforms bit for bit, normals within 1e-6, exponentials within 4 units of the last place."""
    if function in (words, uniform):
        assert torch.equal(drawn, expected)
    elif function is normal:
        assert (drawn - expected).abs().max() <= 1e-6
    else:
        assert ((drawn - expected).abs() / expected).max() <= 4 * 2.0**-23


@interpreter
@pytest.mark.parametrize("function", list(KINDS), ids=lambda function: function.__name__)
@pytest.mark.parametrize(("seed", "step", "width"), CALLS)
@pytest.mark.parametrize("int64", [False, True])
def test_the_kernel_has_the_numbers_of_the_reference(function, seed, step, width, int64):
    expected = reference(function, seed, INDEX, step, Stream.LANGEVIN, width)
    out = torch.full_like(expected, -1 if function is words else math.nan)
    with backend("triton"):
        if int64:
            with force_int64_offsets():
                function(seed, INDEX, step, Stream.LANGEVIN, width, out=out)
        else:
            function(seed, INDEX, step, Stream.LANGEVIN, width, out=out)
    assert_near(function, out, expected)


@interpreter
@pytest.mark.parametrize("function", [normal, exponential])
def test_the_kernel_is_near_the_reference_for_a_million_numbers(function, monkeypatch):
    # Few programs, because the interpreter pays for each. A quarter turn or an exponent that is reduced
    # wrongly shows in one number in a few thousand, not in a handful.
    monkeypatch.setattr(philox, "fill_config", lambda rows, width: LaunchConfig(1024, 64))
    index = range(1 << 33, (1 << 33) + 1024)
    with backend("triton"):
        drawn = function(5, index, 1, Stream.PROPOSAL, 1024)
    assert_near(function, drawn, function(5, index, 1, Stream.PROPOSAL, 1024))


# --- the sample contract ---


@pytest.mark.parametrize("function", list(KINDS), ids=lambda function: function.__name__)
def test_a_sample_does_not_depend_on_its_batch(function, monkeypatch):
    # Guards against vector tails that round otherwise, and against state carried from tile to tile.
    index = torch.arange(500) * 7919 + (1 << 31)
    steps = torch.arange(500) % 3
    whole = function(9, index, steps, Stream.PROPOSAL, 13)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(function(9, index[order], steps[order], Stream.PROPOSAL, 13), whole[order])
    for row in (0, 1, 255, 499):
        alone = function(9, index[row : row + 1], int(steps[row]), Stream.PROPOSAL, 13)
        assert torch.equal(alone, whole[row : row + 1])
    for blocks in (1, 3, 37, 1000):
        monkeypatch.setattr(philox_cpu, "_NUMPY_BLOCKS", blocks)
        monkeypatch.setattr(philox_cpu, "_LOOP_BLOCKS", 7 * blocks)
        assert torch.equal(function(9, index, steps, Stream.PROPOSAL, 13), whole)


@pytest.mark.parametrize("function", list(KINDS), ids=lambda function: function.__name__)
def test_a_narrower_sample_is_the_beginning_of_a_wider_one(function):
    index = torch.arange(10)
    wide = function(1, index, 0, Stream.INITIAL, 16)
    for width in range(16):
        narrow = function(1, index, 0, Stream.INITIAL, width)
        assert narrow.shape == (10, width)
        assert torch.equal(narrow, wide[:, :width])


@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=interpreter)])
def test_a_range_draws_what_its_numbers_draw(name):
    start = (1 << 32) - 3
    with backend(name):
        drawn = normal(4, range(start, start + 6), 2, Stream.PROPOSAL, 5)
        assert torch.equal(drawn, normal(4, torch.arange(start, start + 6), 2, Stream.PROPOSAL, 5))


@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=interpreter)])
def test_an_empty_draw_has_its_shape(name):
    with backend(name):
        for function in KINDS:
            assert function(0, torch.arange(0), 0, 0, 5).shape == (0, 5)
            assert function(0, range(3), 0, 0, 0).shape == (3, 0)


# --- distributions ---

N, WIDTH = 1 << 14, 64


def million(function, **changes) -> Tensor:
    arguments = {"seed": 10, "index": torch.arange(N), "step": 4, "stream": Stream.LANGEVIN, "width": WIDTH}
    return function(**(arguments | changes)).double().flatten()


@pytest.mark.parametrize(
    ("function", "law"), [(uniform, stats.uniform), (normal, stats.norm), (exponential, stats.expon)]
)
def test_the_distribution(function, law):
    # Guards against a biased radius or angle, which moments alone may not show.
    drawn = million(function)
    assert stats.kstest(drawn.numpy(), law.cdf).pvalue > 1e-4
    for column in range(4):  # each of a block's four words makes its own kind of number
        assert stats.kstest(drawn[column::4].numpy(), law.cdf).pvalue > 1e-4


@pytest.mark.parametrize("threshold", [3.0, 4.0, 4.5])
def test_the_tails_of_the_normals(threshold):
    # Guards against a generator that stops early: uniforms of 24 bits lose the tail beyond 5.7, of 16 bits
    # that beyond 4.7.
    drawn = million(normal)
    for tail in (drawn, -drawn):
        expected = len(drawn) * stats.norm.sf(threshold)
        count = int((tail > threshold).sum())
        assert stats.poisson.cdf(count, expected) > 1e-4
        assert stats.poisson.sf(count - 1, expected) > 1e-4


def test_the_largest_normal_and_exponential():
    word = torch.tensor([0, MASK, 0, MASK])
    z, _, _, _ = philox_cpu.numbers(KINDS[normal], tuple(word[:, None].unbind(0)))
    assert (
        abs(z.item() - math.sqrt(66 * math.log(2))) < 1e-6
    )  # 6.764: u = 2^-33, and the angle is a whole turn
    large = philox_cpu.numbers(KINDS[exponential], (word,) * 4)[0][1]
    assert abs(large.item() - 33 * math.log(2)) < 3e-6


INDEPENDENT = {
    "step": {"step": 5},
    "stream": {"stream": Stream.ACCEPTANCE},
    "seed": {"seed": 11},
    "seed's upper word": {"seed": 10 + (1 << 32)},
    "neighbour": {"index": torch.arange(N) + 1},
    "far index": {"index": torch.arange(N) + (1 << 32)},
    "seed + 1 at step - 1": {"seed": 11, "step": 3},
    "index 2^32 and the next stream": {"index": torch.arange(N) + (1 << 32), "stream": Stream.PROPOSAL},
}


def joint_p_value(a: Tensor, b: Tensor) -> float:
    """Chi-square of the pairs (a, b) of uniforms on a grid of 32 x 32 cells."""
    counts = torch.bincount(
        (a * 32).long().clamp(max=31) * 32 + (b * 32).long().clamp(max=31), minlength=1024
    )
    return stats.chisquare(counts.numpy()).pvalue


@pytest.mark.parametrize("change", list(INDEPENDENT.values()), ids=list(INDEPENDENT))
def test_streams_are_independent(change):
    # Guards against keys that overlap: with seed + step as the key, seed 11 at step t is seed 10 at t + 1.
    assert joint_p_value(million(uniform), million(uniform, **change)) > 1e-4
    a, b = million(normal), million(normal, **change)
    for power in (1, 2):
        assert abs(stats.pearsonr(a**power, b**power).statistic) < 4 / math.sqrt(len(a))


def test_neighbouring_columns_are_independent():
    # Guards against a word that is used twice, in a block or in the next.
    u = million(uniform).reshape(N, WIDTH)
    for lag in (1, 2, 3, 4, 5, 8):
        assert joint_p_value(u[:, lag:].flatten(), u[:, :-lag].flatten()) > 1e-4
    z = million(normal).reshape(N, WIDTH // 4, 4)
    for i in range(4):
        for j in range(i):
            squares = stats.pearsonr(z[..., i].flatten() ** 2, z[..., j].flatten() ** 2).statistic
            assert abs(squares) < 4 / math.sqrt(N * WIDTH / 4)


@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=interpreter)])
def test_exponentials_are_accurate_relative_to_their_size(name, monkeypatch):
    # Guards against -log(u) with u rounded to 1, which makes exponentials below 3e-8 zero and those near 1e-6
    # wrong in the second digit: the winners of a race among many.
    monkeypatch.setattr(philox, "fill_config", lambda rows, width: LaunchConfig(1024, 64))
    index = torch.arange(1024)
    with backend(name):
        drawn = exponential(3, index, 0, Stream.SELECTION, 1024).double()
    exact = -torch.log1p(-(words(3, index, 0, Stream.SELECTION, 1024).double() + 0.5) * 2.0**-32)
    assert drawn.min() < 2e-6
    assert ((drawn - exact).abs() / exact).max() < 4 * 2.0**-23
    edges = torch.tensor([0, 1, 2, 100, (1 << 30) - 1, 1 << 30, (1 << 31) - 1, MASK - 1, MASK])[:, None]
    near = philox_cpu.numbers(KINDS[exponential], (edges,) * 4)[0].double()
    exact = -torch.log1p(-(edges.double() + 0.5) * 2.0**-32)
    assert ((near - exact).abs() / exact).max() < 4 * 2.0**-23


def test_the_race_draws_in_proportion_to_the_weights():
    # Weights over twelve orders of magnitude; guards against exponentials that are coarse where they win.
    weight = torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-12, 0.5, 2.0], dtype=torch.float64)
    index = torch.arange(1 << 18)
    winner = (exponential(8, index, 0, Stream.SELECTION, 8).double() / weight).argmin(dim=1)
    counts = torch.bincount(winner, minlength=8)
    assert counts[5] == 0
    kept = torch.tensor([0, 1, 2, 3, 4, 6, 7])
    expected = weight[kept] / weight[kept].sum() * len(index)
    assert stats.chisquare(counts[kept].numpy(), expected.numpy()).pvalue > 1e-4


# --- dtypes, out, errors ---


def test_float64_evaluates_the_same_words_in_double_precision():
    index = torch.arange(100)
    w = words(1, index, 0, Stream.PROPOSAL, 4).double()
    u = (w + 0.5) * 2.0**-32
    drawn = normal(1, index, 0, Stream.PROPOSAL, 4, dtype=torch.float64)
    radius = torch.sqrt(-2 * torch.log(u[:, 0::2]))
    torch.testing.assert_close(
        drawn[:, 0::2], radius * torch.cos(2 * math.pi * u[:, 1::2]), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(
        drawn[:, 1::2], radius * torch.sin(2 * math.pi * u[:, 1::2]), rtol=0, atol=1e-14
    )


def test_float32_is_near_double_precision():
    # Guards against a word that loses bits on its way. What remains is the rounding of uniforms to 24 bits,
    # which a small radius, that of a uniform near 1, magnifies.
    single, double = million(normal), million(normal, dtype=torch.float64)
    assert (single - double).abs().max() < 2.5e-4
    assert (single - double)[double.abs() > 0.1].abs().max() < 5e-6


@pytest.mark.parametrize("function", [uniform, normal, exponential])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_the_float32_number(function, dtype):
    drawn = function(1, torch.arange(50), 0, Stream.PROPOSAL, 7, dtype=dtype)
    assert drawn.dtype == dtype
    assert torch.equal(drawn, function(1, torch.arange(50), 0, Stream.PROPOSAL, 7).to(dtype))


@interpreter
def test_the_kernel_writes_sixteen_bits():
    with backend("triton"):
        drawn = normal(1, torch.arange(5), 0, Stream.PROPOSAL, 7, dtype=torch.float16)
    expected = normal(1, torch.arange(5), 0, Stream.PROPOSAL, 7)
    torch.testing.assert_close(drawn.float(), expected, rtol=2.0**-10, atol=2.0**-14)


@pytest.mark.parametrize("function", list(KINDS), ids=lambda function: function.__name__)
def test_out_is_written_and_returned(function):
    expected = function(1, torch.arange(50), 0, Stream.PROPOSAL, 7)
    out = torch.full_like(expected, -1 if function is words else math.nan)
    assert function(1, torch.arange(50), 0, Stream.PROPOSAL, 7, out=out) is out
    assert torch.equal(out, expected)


GOOD = {"seed": 0, "index": torch.arange(3), "step": 0, "stream": 0, "width": 4}
BAD = [
    ({"seed": 1 << 63}, ValueError, "seed"),
    ({"seed": 1.5}, TypeError, "seed"),
    ({"seed": torch.tensor(1.0)}, TypeError, "seed"),
    ({"seed": torch.arange(2)}, TypeError, "seed"),
    ({"seed": torch.empty(1, dtype=torch.int64, device="meta")}, ValueError, "seed"),
    ({"index": torch.arange(3.0)}, TypeError, "index"),
    ({"index": torch.arange(4).reshape(2, 2)}, TypeError, "index"),
    ({"index": [1, 2]}, TypeError, "index"),
    ({"index": range(0, 10, 2)}, ValueError, "index"),
    ({"index": range(-1, 2)}, ValueError, "index"),
    ({"index": range((1 << 56) - 1, (1 << 56) + 1)}, ValueError, "index"),
    ({"step": -1}, ValueError, "step"),
    ({"step": 1 << 32}, ValueError, "step"),
    ({"step": torch.arange(2)}, TypeError, "step"),
    ({"step": "1"}, TypeError, "step"),
    ({"stream": 256}, ValueError, "stream"),
    ({"stream": 1.5}, TypeError, "stream"),
    ({"width": -1}, ValueError, "width"),
    ({"width": 4.0}, TypeError, "width"),
    ({"dtype": torch.int32}, TypeError, "dtype"),
    ({"dtype": "float32"}, TypeError, "dtype"),
    ({"out": 3}, TypeError, "out"),
    ({"out": torch.zeros(3, 5)}, ValueError, "out"),
    ({"out": torch.zeros(4, 3).T}, ValueError, "out"),
    ({"out": torch.zeros(3, 4), "dtype": torch.float64}, ValueError, "out"),
    ({"device": "cuda"}, ValueError, "device"),
]


@pytest.mark.parametrize(("change", "error", "argument"), BAD, ids=lambda value: str(value)[:40])
def test_errors_name_the_argument(change, error, argument):
    with pytest.raises(error, match=rf"^{argument} must"):
        normal(**(GOOD | change))


def test_float64_has_no_kernel():
    with (
        backend("triton"),
        pytest.raises(RuntimeError, match="float64 has no kernel" if HAS_TRITON else "Triton"),
    ):
        normal(0, torch.arange(3), 0, 0, 4, dtype=torch.float64)


# --- torch.compile, vmap, opcheck, graphs ---


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=interpreter)])
def test_vmap(name):
    index = torch.arange(6).reshape(2, 3) + (1 << 35)
    with backend(name):
        mapped = torch.vmap(lambda row: normal(4, row, 1, Stream.PROPOSAL, 5))(index)
        assert torch.equal(mapped.flatten(0, 1), normal(4, index.flatten(), 1, Stream.PROPOSAL, 5))
        mapped = torch.vmap(lambda seed: words(seed, index[0], 1, Stream.PROPOSAL, 5))(torch.arange(3))
        for seed in range(3):
            assert torch.equal(mapped[seed], words(seed, index[0], 1, Stream.PROPOSAL, 5))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    def draw(seed: Tensor, index: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        return (
            words(seed, index, step, Stream.LANGEVIN, 6),
            normal(seed, index, step, Stream.LANGEVIN, 6),
            exponential(seed, index, step, Stream.LANGEVIN, 6, dtype=torch.float64),
        )

    compiled = torch.compile(draw, fullgraph=True, dynamic=dynamic)
    for count in (40, 9) if dynamic else (40,):
        arguments = (torch.tensor(3), torch.arange(count) + (1 << 35), torch.tensor([7]))
        for drawn, expected in zip(compiled(*arguments), draw(*arguments), strict=True):
            if drawn.dtype == torch.float64:
                torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-13)
            else:
                assert torch.equal(drawn, expected)


def test_compiled_with_python_numbers_that_change():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def draw(seed: int, step: int) -> Tensor:
        return words(seed, range(10, 14), step, Stream.LANGEVIN, 6)

    for seed, step in ((1, 0), (2, 1), (-3, MASK), (1 << 60, 2)):
        assert torch.equal(draw(seed, step), words(seed, torch.arange(10, 14), step, Stream.LANGEVIN, 6))


@pytest.mark.parametrize("name", [None, pytest.param("triton", marks=interpreter)])
def test_opcheck(name):
    index, seed = torch.arange(5), torch.tensor(3)
    calls = [
        (index, None, None, 1, None, 2, 2, 3, 6, torch.float32),
        (index[:1], 4, seed, 0, index[:1], 0, 0, 3, 6, torch.int64),
    ]
    with backend(name):
        for arguments in calls:
            torch.library.opcheck(torch.ops.evalp_fast.philox.default, arguments)
            out = torch.empty(4 if arguments[1] else 5, 6, dtype=arguments[-1])
            torch.library.opcheck(torch.ops.evalp_fast.philox_fill.default, (out, *arguments[:-2]))


@pytest.mark.gpu
@pytest.mark.parametrize("function", list(KINDS), ids=lambda function: function.__name__)
@pytest.mark.parametrize(("seed", "step", "width"), CALLS)
def test_on_a_gpu(function, seed, step, width):
    def moved(value):
        return value.cuda() if isinstance(value, Tensor) else value

    drawn = function(moved(seed), INDEX.cuda(), moved(step), Stream.LANGEVIN, width)
    assert_near(function, drawn.cpu(), function(seed, INDEX, step, Stream.LANGEVIN, width))


@pytest.mark.gpu
@pytest.mark.parametrize("function", [normal, exponential])
def test_a_million_on_a_gpu(function):
    drawn = function(5, range(1 << 33, (1 << 33) + 1024), 1, Stream.PROPOSAL, 1024, device="cuda")
    assert_near(
        function, drawn.cpu(), function(5, range(1 << 33, (1 << 33) + 1024), 1, Stream.PROPOSAL, 1024)
    )
    for row in (0, 511, 1023):  # alone, bit for bit
        alone = function(5, torch.tensor([(1 << 33) + row], device="cuda"), 1, Stream.PROPOSAL, 1024)
        assert torch.equal(alone, drawn[row : row + 1])


@pytest.mark.gpu
def test_offsets_beyond_2_31_on_a_gpu():
    # 2^31 + 2^13 numbers in bfloat16, 4 GiB: an int32 offset would wrap and leave the end unwritten.
    if torch.cuda.mem_get_info()[0] < 5 * 10**9:
        pytest.skip("needs 5 GB of free GPU memory")
    rows = (1 << 18) + 1
    out = torch.full((rows, 8192), math.nan, dtype=torch.bfloat16, device="cuda")
    normal(1, range(rows), 0, Stream.PROPOSAL, 8192, out=out)
    expected = normal(1, range(rows - 1, rows), 0, Stream.PROPOSAL, 8192)
    torch.testing.assert_close(out[-1:].float().cpu(), expected, rtol=2.0**-8, atol=1e-5)


@pytest.mark.gpu
def test_a_captured_graph_draws_fresh_noise():
    index = torch.arange(100, device="cuda")
    seed, step = torch.tensor([5], device="cuda"), torch.tensor([0], device="cuda")
    out = torch.empty(100, 8, device="cuda")
    normal(seed, index, step, Stream.LANGEVIN, 8, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        normal(seed, index, step, Stream.LANGEVIN, 8, out=out)
        step.add_(1)
    step.zero_()
    for replay in range(3):
        graph.replay()
        expected = normal(5, torch.arange(100), replay, Stream.LANGEVIN, 8)
        assert (out.cpu() - expected).abs().max() <= 1e-6
    seed.fill_(6)
    graph.replay()
    assert (out.cpu() - normal(6, torch.arange(100), 3, Stream.LANGEVIN, 8)).abs().max() <= 1e-6
