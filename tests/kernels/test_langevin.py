"""The Langevin step: the formula, kernel against reference, the noise contract, and the law it samples."""

import math

import numpy as np
import pytest
import torch
from chain_states import SEED, STEP, STEP_SHAPES, assert_same, numbers, state, tensors_of
from torch import Tensor

from evalp_fast.kernels import langevin
from evalp_fast.kernels.langevin import langevin_step, langevin_step_reference, mala_propose
from evalp_fast.kernels.launch import INTERPRETED, backend, force_int64_offsets
from evalp_fast.kernels.philox import Stream, normal

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs kernels in Triton's interpreter")

# --- the formula -----------------------------------------------------------------------------------------


def by_hand(x, grad, eta, heat, noise, clip=None, precision=0.0, bounds=None) -> list[np.ndarray]:
    """The update written once more, sample by sample in float64, from numpy arrays of shape [N, ...]."""
    moved = [np.empty(t.shape) for t in x]
    for i in range(x[0].shape[0]):
        norm = math.sqrt(sum(float((t[i].astype(np.float64) ** 2).sum()) for t in grad))
        shorten = 1.0 if clip is None or norm <= clip else clip / norm
        for k in range(len(x)):
            position = x[k][i].astype(np.float64)
            drift = grad[k][i].astype(np.float64) * shorten + precision * position
            new = position - eta[i] / 2 * drift + math.sqrt(eta[i] * heat[i]) * noise[k][i].astype(np.float64)
            moved[k][i] = new if bounds is None else np.clip(new, *bounds)
    return moved


OPTIONS = [
    {},
    {"grad_clip": 0.7},
    {"prior_precision": 1.3},
    {"clamp": (-0.3, 0.4)},
    {"grad_clip": 0.7, "prior_precision": 1.3, "clamp": (-0.3, 0.4)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_is_the_formula(options: dict, dtype: torch.dtype) -> None:
    shapes = [(3, 2), (5,)]
    x, grad, noise = (state(shapes, dtype=dtype, seed=s) for s in range(3))
    eta, heat = torch.rand(5, dtype=dtype) + 0.1, torch.rand(5, dtype=dtype) + 0.1
    actual = langevin_step_reference(x, grad, eta, temperature=heat, noise=noise, **options)
    arrays = [[t.numpy() for t in s] for s in (x, grad, noise)]
    expected = by_hand(
        arrays[0],
        arrays[1],
        eta.tolist(),
        heat.tolist(),
        arrays[2],
        options.get("grad_clip"),
        options.get("prior_precision", 0.0),
        options.get("clamp"),
    )
    # A handful of float32 roundings of numbers below 10.
    tolerance = 1e-14 if dtype == torch.float64 else 4e-6
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.numpy(), b, atol=tolerance, rtol=0)


@pytest.mark.parametrize("run", ["reference", "triton"])
def test_noise_is_the_contract(run: str) -> None:
    """At rest the step is the noise itself: column c of sample i is philox.normal's, streams and all."""
    if run == "triton" and not INTERPRETED:
        pytest.skip("runs kernels in Triton's interpreter")
    index = numbers(6)
    zero = torch.zeros(6, 3, 5)
    with backend(run):
        moved = langevin_step(zero, zero, 1.0, seed=SEED, index=index, step=STEP)
        other = langevin_step(zero, zero, 1.0, seed=SEED, index=index, step=STEP, stream=Stream.INITIAL)
        proposed = mala_propose(zero, zero, 1.0, seed=SEED, index=index, step=STEP)
    torch.testing.assert_close(
        moved.flatten(1), normal(SEED, index, STEP, Stream.LANGEVIN, 15), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        other.flatten(1), normal(SEED, index, STEP, Stream.INITIAL, 15), atol=1e-6, rtol=0
    )
    assert_same(proposed, moved)


# --- the kernel ------------------------------------------------------------------------------------------


def both(x, grad, eta, **options):
    """The reference's and the kernel's result; the kernel's is written over NaN."""
    arguments = {"seed": SEED, "index": numbers(tensors_of(x)[0].shape[0]), "step": STEP, "temperature": 0.7}
    arguments |= options
    expected = langevin_step(x, grad, eta, **arguments)
    out = [torch.full_like(t, math.nan) for t in tensors_of(x)]
    with backend("triton"):
        actual = langevin_step(x, grad, eta, out=out[0] if isinstance(x, Tensor) else out, **arguments)
    return tensors_of(actual), tensors_of(expected)


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        # The normals agree to 1e-6, the rest to a few float32 roundings of numbers below 10; a 16-bit result
        # to one unit in the last place (the interpreter truncates what the hardware rounds).
        size = {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}[b.dtype]
        torch.testing.assert_close(a.float(), b.float(), atol=4e-6, rtol=size)


@needs_interpreter
@pytest.mark.parametrize("shapes", STEP_SHAPES, ids=str)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=["plain", "all options"])
def test_kernel_equals_reference(shapes: list[tuple[int, ...]], options: dict) -> None:
    assert_close(*both(state(shapes), state(shapes, seed=1), 0.3, **options))


@needs_interpreter
def test_norm_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(langevin, "_CHUNK", 64)
    shapes = [(150,), (3,), (64,)]
    assert_close(*both(state(shapes), state(shapes, seed=1), 0.3, grad_clip=0.7))


@needs_interpreter
@pytest.mark.parametrize("shapes", [[(16,)], [(12,)], [(8,), (16,)], [(8,), (6,)]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_of_16_bit_positions(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    assert_close(*both(state(shapes, dtype=dtype), state(shapes, dtype=dtype, seed=1), 0.3, grad_clip=1.0))


@needs_interpreter
def test_kernel_of_mixed_dtypes() -> None:
    assert_close(*both(state([(8,)]), state([(8,)], dtype=torch.bfloat16, seed=1), 0.3, prior_precision=0.5))


@needs_interpreter
@pytest.mark.parametrize(
    "numbers_per_chain",
    [
        {"eta": torch.linspace(0.1, 0.9, 5)},
        {"eta": torch.tensor(0.4)},
        {"eta": torch.tensor([0.4], dtype=torch.float64)},
        {"temperature": torch.linspace(0.0, 2.0, 5)},
        {"temperature": 0.0},
        {"seed": torch.tensor(-9)},
        {"seed": -(2**63)},
        {"step": torch.tensor(7)},
        {"step": torch.arange(5) + 2**31},
        {"step": 2**32 - 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_kernel_reads_numbers_and_tensors(numbers_per_chain: dict) -> None:
    shapes = [(8,), (3,)]
    options = dict(numbers_per_chain)
    assert_close(*both(state(shapes), state(shapes, seed=1), options.pop("eta", 0.3), **options))


@needs_interpreter
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=["plain", "all options"])
def test_kernel_with_int64_offsets(options: dict) -> None:
    with force_int64_offsets():
        assert_close(*both(state([(8,), (5,)]), state([(8,), (5,)], seed=1), 0.3, **options))


@pytest.mark.parametrize("run", ["reference", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("shapes", [[(8,), (4, 4)], [(3,), (5,), (2, 3)]], ids=str)
def test_list_equals_concatenation(run: str, shapes: list[tuple[int, ...]]) -> None:
    x, grad = state(shapes), state(shapes, seed=1)
    options = {"seed": SEED, "index": numbers(5), "step": STEP, "prior_precision": 0.2}
    with backend(run):
        moved = langevin_step(x, grad, 0.3, **options)
        whole = langevin_step(
            torch.cat([t.flatten(1) for t in x], 1),
            torch.cat([t.flatten(1) for t in grad], 1),
            0.3,
            **options,
        )
    assert isinstance(moved, list)
    assert [t.shape for t in moved] == [t.shape for t in x]
    assert_same(torch.cat([t.flatten(1) for t in moved], 1), whole)


@pytest.mark.parametrize("run", ["reference", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("columns", [6, 1100])
def test_row_alone_equals_row_in_batch(run: str, columns: int) -> None:
    x, grad, index = state([(columns,)], 4), state([(columns,)], 4, seed=1), numbers(4)
    options = {"seed": SEED, "step": STEP, "grad_clip": 0.9, "prior_precision": 0.4}
    with backend(run):
        batch = langevin_step(x, grad, 0.3, index=index, **options)
        alone = [
            langevin_step(x[i : i + 1], grad[i : i + 1], 0.3, index=index[i : i + 1], **options)
            for i in range(4)
        ]
    assert_same(torch.cat(alone), batch)


@pytest.mark.parametrize("run", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_in_place_and_strided(run: str) -> None:
    options = {"seed": SEED, "index": numbers(4), "step": STEP, "grad_clip": 0.8}
    x, grad = state([(3, 8)], 4), state([(3, 8)], 4, seed=1)
    expected = langevin_step(x, grad, 0.3, **options)
    with backend(run):
        # Strided along the samples, inside the samples, and repeated without memory.
        transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
        torch.testing.assert_close(
            langevin_step(transposed, grad, 0.3, **options), expected, atol=4e-6, rtol=0
        )
        wide = torch.zeros(8, 3, 8)
        wide[::2] = x
        repeated = langevin_step(x, grad[:1].expand(4, 3, 8), 0.3, **options)
        first = langevin_step(x, grad[:1].repeat(4, 1, 1), 0.3, **options)
        assert_same(repeated, first)
        view = wide[::2]
        assert langevin_step(view, grad, 0.3, out=view, **options) is view
        torch.testing.assert_close(wide[::2], expected, atol=4e-6, rtol=0)
        assert torch.all(wide[1::2] == 0)
        moved = x.clone()
        assert langevin_step(moved, grad, 0.3, out=moved, **options) is moved
        torch.testing.assert_close(moved, expected, atol=4e-6, rtol=0)
        pair = [x[:, :1].clone(), x[:, 1:].clone()]
        returned = langevin_step(pair, [grad[:, :1], grad[:, 1:]], 0.3, out=pair, **options)
        assert all(a is b for a, b in zip(returned, pair, strict=True))
        torch.testing.assert_close(torch.cat(pair, 1), expected, atol=4e-6, rtol=0)


@pytest.mark.parametrize("run", ["reference", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty(run: str, shape: tuple[int, int]) -> None:
    with backend(run):
        moved = langevin_step(
            torch.empty(shape),
            torch.empty(shape),
            0.3,
            seed=0,
            index=torch.arange(shape[0]),
            step=0,
            grad_clip=1.0,
        )
    assert moved.shape == shape


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("run", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_what_is_not_finite_stays_visible(run: str) -> None:
    """A NaN that a clamp or a clip turns into a number hides a chain that has diverged."""
    grad = torch.ones(5, 6)
    grad[0, 2], grad[1, 3], grad[2, 1], grad[4, 0] = math.nan, math.inf, -math.inf, 1e25
    options = {"seed": 1, "index": torch.arange(5), "step": 0, "temperature": 0.0}
    with backend(run):
        clamped = langevin_step(torch.zeros(5, 6), grad, 0.2, clamp=(-1.0, 1.0), **options)
        clipped = langevin_step(torch.zeros(5, 6), grad, 0.2, grad_clip=1.0, **options)
    assert torch.isnan(clamped).nonzero().tolist() == [[0, 2]]
    assert clamped[1, 3] == -1.0
    assert clamped[2, 1] == 1.0
    assert torch.isnan(clipped[:3]).all()  # the norm is not a number: so is what it divides
    torch.testing.assert_close(clipped[3], torch.full((6,), -0.1 / math.sqrt(6)))
    # A gradient whose square overflows is clipped like any other.
    torch.testing.assert_close(clipped[4], torch.tensor([-0.1, 0, 0, 0, 0, 0]), atol=1e-6, rtol=0)


# --- autograd, torch.compile, opcheck, vmap --------------------------------------------------------------


def test_differentiable() -> None:
    x, grad = state([(3,)], 2, torch.float64), state([(3,)], 2, torch.float64, seed=1)
    eta = torch.tensor([0.3, 0.5], dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, grad, eta)]
    index = numbers(2)

    def step(x: Tensor, grad: Tensor, eta: Tensor) -> Tensor:
        moved = langevin_step(x, grad, eta, seed=1, index=index, step=2, grad_clip=1.0, prior_precision=0.5)
        assert isinstance(moved, Tensor)
        return moved

    assert torch.autograd.gradcheck(step, inputs)
    with pytest.raises(ValueError, match="out must be None where a gradient is needed"):
        langevin_step(x, grad, eta, seed=1, index=index, step=2, out=torch.empty_like(x))
    with torch.no_grad():
        langevin_step(x, grad, eta, seed=1, index=index, step=2, out=x)


def test_gradient_of_a_chain_at_rest_is_finite() -> None:
    """The derivative of a norm at 0 must not become 0·inf."""
    grad = torch.zeros(2, 3, requires_grad=True)
    langevin_step(
        torch.ones(2, 3), grad, 0.5, seed=1, index=numbers(2), step=2, grad_clip=1.0
    ).sum().backward()
    torch.testing.assert_close(grad.grad, torch.full((2, 3), -0.25))


@pytest.mark.parametrize("run", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_backward_sees_what_was_overwritten(run: str) -> None:
    x = torch.ones(2, 4, requires_grad=True)
    square = (x**2).sum()
    with torch.no_grad(), backend(run):
        langevin_step(x, x, 0.1, seed=0, index=numbers(2), step=0, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@needs_interpreter
def test_forced_kernel_without_gradient_says_so() -> None:
    x = torch.ones(2, 4, requires_grad=True)
    with backend("triton"), pytest.raises(RuntimeError, match="no gradient"):
        langevin_step(x, x, 0.1, seed=0, index=numbers(2), step=0)
    with backend("triton"), pytest.raises(RuntimeError, match="float64"):
        langevin_step(x.detach().double(), x.detach().double(), 0.1, seed=0, index=numbers(2), step=0)
    with backend("triton"), pytest.raises(RuntimeError, match="at most 64 tensors"):
        langevin_step([x.detach()] * 65, [x.detach()] * 65, 0.1, seed=0, index=numbers(2), step=0)


# The op's writes are what AOTAutograd must understand; of the reference Dynamo's part is enough, and faster.
COMPILER = {"reference": "eager", "triton": "aot_eager"}


def two_steps(x: Tensor, index: Tensor, seed: Tensor, first: Tensor) -> Tensor:
    """A step to a new tensor, and one of a list in place."""
    x = langevin_step(x, x.sin(), 0.3, seed=seed, index=index, step=first, prior_precision=0.4, grad_clip=1.0)
    pair = [x.clone(), x.clone()]
    langevin_step(pair, pair, 0.2, seed=seed, index=index, step=first + 1, out=pair)
    return pair[0] + pair[1]


@pytest.mark.parametrize("run", ["reference", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(run: str, dynamic: bool) -> None:
    compiled = torch.compile(two_steps, fullgraph=True, dynamic=dynamic, backend=COMPILER[run])
    with backend(run):
        for count in (3, 5) if dynamic else (3,):
            arguments = (state([(8,)], count), numbers(count), torch.tensor(SEED), torch.tensor(STEP))
            torch.testing.assert_close(compiled(*arguments), two_steps(*arguments), atol=4e-6, rtol=0)


@pytest.mark.parametrize("run", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_int_step_does_not_recompile_without_end(run: str) -> None:
    compiles = 0

    def count(module: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        nonlocal compiles
        compiles += 1
        return module

    def move(x: Tensor, index: Tensor, step: int) -> Tensor:
        return langevin_step(x, x, 0.1, seed=1, index=index, step=step)

    compiled = torch.compile(move, fullgraph=True, backend=count)
    x, index = state([(4,)], 3), numbers(3)
    with backend(run):
        for step in range(2, 7):
            assert_same(compiled(x, index, step), move(x, index, step))
    assert compiles <= 2


ARGUMENTS = (None, 0.3, None, 1.0, None, SEED, None, STEP, int(Stream.LANGEVIN), [-1.0, 1.0], 0.5, 0.2)


@pytest.mark.parametrize("run", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_opcheck(run: str) -> None:
    x, grad = state([(8,), (3,)], 3), state([(8,), (3,)], 3, seed=1)
    out = [torch.empty_like(t) for t in x]
    with backend(run):
        torch.library.opcheck(
            torch.ops.evalp_fast.langevin_step.default,
            (out, x, grad, numbers(3), *ARGUMENTS),
            rtol=1e-5,
            atol=4e-6,
        )


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    "mapped",
    [
        {"x": torch.linspace(-1, 1, 24).reshape(3, 2, 4)},
        {"grad": torch.linspace(-1, 1, 24).reshape(3, 2, 4)},
        {"step_size": torch.tensor([0.1, 0.2, 0.3])},
        {"temperature": torch.tensor([0.1, 0.2, 0.3])},
        {"seed": torch.arange(3)},
        {"index": torch.arange(6).reshape(3, 2)},
        {"step": torch.arange(3)},
    ],
    ids=lambda mapped: next(iter(mapped)),
)
def test_vmap_over_each_argument(mapped: dict[str, Tensor]) -> None:
    """On the CPU what is mapped may be any of them: none may meet the path that writes in place."""
    name, values = next(iter(mapped.items()))
    fixed = {"x": state([(4,)], 2), "grad": state([(4,)], 2, seed=1), "step_size": 0.3}
    fixed |= {"seed": 1, "index": numbers(2), "step": 2}

    def move(value: Tensor) -> Tensor:
        moved = langevin_step(**(fixed | {name: value}))
        assert isinstance(moved, Tensor)
        return moved

    alone = torch.stack([move(value) for value in values])
    torch.testing.assert_close(torch.vmap(move)(values), alone, atol=1e-6, rtol=0)
    if INTERPRETED:
        with backend("triton"), pytest.raises(RuntimeError, match="no rules for vmap"):
            torch.vmap(move)(values)


def test_vmap() -> None:
    """The reference maps; the op does not, and says which it is."""
    x, grad, index = state([(2, 8)], 3), state([(2, 8)], 3, seed=1), numbers(2)

    def move(x: Tensor, grad: Tensor) -> Tensor:
        moved = langevin_step(x, grad, 0.3, seed=1, index=index, step=2, grad_clip=1.0)
        assert isinstance(moved, Tensor)
        return moved

    mapped = torch.vmap(move)(x, grad)
    assert_same(mapped, torch.stack([move(a, b) for a, b in zip(x, grad, strict=True)]))

    def op(x: Tensor, grad: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.ops.evalp_fast.langevin_step([out], [x], [grad], index, *ARGUMENTS)
        return out

    with pytest.raises(RuntimeError, match="langevin_step"):
        torch.vmap(op)(x, grad)


# --- user errors -----------------------------------------------------------------------------------------

GOOD = {"x": torch.zeros(3, 4), "grad": torch.zeros(3, 4), "step_size": 0.1, "index": torch.arange(3)}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"x": 3.0}, TypeError, "x must be a tensor or a list"),
        ({"x": [], "grad": []}, ValueError, "x must hold at least one tensor"),
        ({"x": [torch.zeros(3), 1.0]}, TypeError, r"x\[1\] must be a tensor"),
        ({"x": [torch.zeros(3), torch.zeros(2)]}, ValueError, r"x\[1\] must have shape \[3, ...\]"),
        ({"x": torch.zeros(())}, ValueError, "x must have shape"),
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "x must be of a floating dtype"),
        ({"x": [torch.zeros(3), torch.zeros(3).half()]}, ValueError, r"x\[1\] must be torch.float32"),
        ({"grad": [torch.zeros(3, 4)]}, TypeError, "grad must be a tensor as x is"),
        ({"grad": torch.zeros(3, 5)}, ValueError, "grad must have the shape of x"),
        ({"grad": torch.zeros(3, 4, device="meta")}, ValueError, "grad must be on cpu"),
        ({"grad": torch.zeros(3, 4, dtype=torch.float64)}, TypeError, "grad must not be float64"),
        ({"step_size": 0.0}, ValueError, "step_size must be finite and positive"),
        ({"step_size": math.nan}, ValueError, "step_size"),
        ({"step_size": "0.1"}, TypeError, "step_size must be a number or a floating tensor, got str"),
        ({"step_size": [0.1] * 3}, TypeError, "step_size must be a number or a floating tensor, got list"),
        ({"temperature": None}, TypeError, "temperature must be a number or a floating tensor"),
        ({"step_size": torch.ones(2)}, ValueError, r"step_size must be a number or have shape \[3\]"),
        ({"step_size": torch.ones(3, dtype=torch.int64)}, TypeError, "step_size"),
        ({"step_size": torch.ones(3, device="meta")}, ValueError, "step_size must be on cpu"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and not negative"),
        ({"index": [0, 1, 2]}, TypeError, "index must be an int64 tensor"),
        ({"index": torch.arange(3).int()}, TypeError, "index must be an int64 tensor"),
        ({"index": torch.arange(2)}, ValueError, "index must have shape"),
        ({"index": torch.arange(3, device="meta")}, ValueError, "index must be on cpu"),
        ({"seed": 2**63}, ValueError, "seed must fit in 64 bits"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, TypeError, "seed"),
        ({"step": -1}, ValueError, "step must be in"),
        ({"step": torch.zeros(2, dtype=torch.int64)}, TypeError, "step"),
        ({"stream": 256}, ValueError, "stream must be in"),
        ({"stream": 1.5}, TypeError, "stream must be an int, got float"),
        ({"clamp": 1.0}, TypeError, "clamp must be None or a pair of numbers"),
        ({"clamp": (None, 1.0)}, TypeError, "clamp must be None or a pair of numbers"),
        ({"clamp": (1.0, -1.0)}, ValueError, "clamp must be None or a pair"),
        ({"clamp": (1.0,)}, ValueError, "clamp must be None or a pair"),
        ({"grad_clip": 0.0}, ValueError, "grad_clip"),
        ({"prior_precision": -1.0}, ValueError, "prior_precision"),
        ({"grad_clip": "1"}, TypeError, "grad_clip must be None or a number, got str"),
        ({"prior_precision": torch.ones(3)}, TypeError, "prior_precision must be None or a number"),
        ({"out": torch.zeros(1, 4).expand(3, 4)}, ValueError, "out must not be an expanded tensor"),
        ({"out": torch.zeros(3, 5)}, ValueError, "out must have the shape of x"),
        ({"out": torch.zeros(3, 4).half()}, TypeError, "out must be torch.float32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("run", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_errors_name_the_argument(run: str, bad: dict, error: type[Exception], message: str) -> None:
    with backend(run), pytest.raises(error, match=message):
        langevin_step(**({"seed": 0, "step": 0} | GOOD | bad))


def test_module_exports() -> None:
    assert set(langevin.__all__) >= {
        "langevin_step",
        "langevin_step_reference",
        "mala_propose",
        "mala_accept",
    }
