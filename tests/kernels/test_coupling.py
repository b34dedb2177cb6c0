"""Affine coupling: kernels against the float64 reference, the reference against automatic differentiation."""

import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from evalp_fast.kernels import coupling
from evalp_fast.kernels.coupling import affine_coupling
from evalp_fast.kernels.coupling_reference import (
    affine_coupling_backward_reference,
    affine_coupling_reference,
)
from evalp_fast.kernels.launch import HAS_TRITON, INTERPRETED, backend, force_int64_offsets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED), reason="needs Triton, on a GPU or interpreted"
)

# Rounding of the output: half a unit in the last place; a whole one in bfloat16, which is truncated by the
# interpreter.
OUTPUT_ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
# Arithmetic is float32 whatever the input: a product, a sum and an exponential of |s| <= 4 (argument
# reduction multiplies its rounding by |s|), with a hyperbolic tangent of relative error 2^-20 before it.
ARITHMETIC = 32 * 2.0**-24
SUBNORMAL = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-24}

on_each_backend = pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=needs_kernel)])
each_map = pytest.mark.parametrize(
    ("inverse", "clamp"), [(False, None), (True, None), (False, 1.5), (True, 1.5)]
)
with_and_without_mask = pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True])])
IMAGE_MASKS = {
    "checkerboard": (torch.arange(5)[:, None] + torch.arange(7)[None, :]).remainder(2).bool()[None],
    "channels": torch.tensor([True, False, True])[:, None, None],
    "rows": torch.tensor([True, False, True, True, False])[None, :, None],
    "every_sample": torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.5,
}


def by_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN, so that an element which no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernel() -> Iterator[None]:
    with backend("triton"):
        yield


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randn(shape, generator=generator).clamp(-4, 4).to(DEVICE, dtype) for _ in range(3))
    x, log_scale, shift = draws
    return x, log_scale, shift


class Results(NamedTuple):
    y: Tensor
    log_det: Tensor
    grad_x: Tensor
    grad_log_scale: Tensor
    grad_shift: Tensor


def run(
    x: Tensor, log_scale: Tensor, shift: Tensor, grad_y: Tensor, grad_log_det: Tensor, **options: Any
) -> Results:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, log_scale, shift)]
    y, log_det = affine_coupling(*leaves, **options)
    gradients = torch.autograd.grad((y, log_det), leaves, (grad_y, grad_log_det))
    return Results(y.detach(), log_det.detach(), *gradients)


def cotangents(x: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    grad_y = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
    return grad_y, torch.randn(x.shape[0], generator=generator).to(x.device)


def assert_close_to_float64(
    actual: Results, x: Tensor, log_scale: Tensor, shift: Tensor, *grads: Tensor, **options: Any
) -> None:
    """Against the float64 reference: each error is below the roundings of the terms that the value sums."""
    with backend("reference"):
        want = run(*(tensor.double() for tensor in (x, log_scale, shift, *grads)), **options)
    inverse = bool(options.get("inverse"))
    grad_y, grad_sum = grads[0].double().abs(), grads[1].double().abs().reshape(-1, *[1] * (x.ndim - 1))
    one = torch.ones_like(log_scale, dtype=torch.float64)
    scale = affine_coupling_reference(
        one, log_scale.double(), 0 * one, options.get("mask"), options.get("clamp"), inverse
    )[0]
    a, b = x.double().abs(), shift.double().abs()
    magnitudes = Results(
        y=torch.maximum((a + b) * scale if inverse else a * scale + b, a),
        log_det=scale.log().abs().flatten(1).sum(1),
        grad_x=grad_y * scale,
        grad_log_scale=(want.y.abs() * grad_y if inverse else a * scale * grad_y) + grad_sum,
        grad_shift=grad_y * scale if inverse else grad_y,
    )
    for name, got, true, magnitude in zip(Results._fields, actual, want, magnitudes, strict=True):
        rounding = 2.0**-24 if name == "log_det" else OUTPUT_ROUNDING[x.dtype]
        if name == "grad_log_scale" and inverse:
            rounding *= 2  # it is computed from y as it was rounded
        # The 8 + log2(1024) additions of a log-determinant, one after another.
        arithmetic = ARITHMETIC + (18 * 2.0**-24 if name == "log_det" else 0.0)
        excess = (got.double() - true).abs() - (arithmetic + rounding) * magnitude - SUBNORMAL[x.dtype]
        assert torch.isfinite(got).all(), name
        assert (excess <= 0).all(), f"{name}: {excess.max():.3e} over its bound"


@each_map
@with_and_without_mask
def test_reference_log_det_is_that_of_the_jacobian(
    inverse: bool, clamp: float | None, mask: Tensor | None
) -> None:
    x, log_scale, shift = (tensor.cpu().double() for tensor in inputs(1, 3))

    def map_one(row: Tensor) -> Tensor:
        return affine_coupling_reference(row[None], log_scale, shift, mask, clamp, inverse)[0][0]

    jacobian = torch.autograd.functional.jacobian(map_one, x[0])
    log_det = affine_coupling_reference(x, log_scale, shift, mask, clamp, inverse)[1]
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian)[1])


@each_map
def test_reference_formula(inverse: bool, clamp: float | None) -> None:
    """The formula of the docstring, written once more with other functions."""
    x, log_scale, shift = (tensor.cpu().double() for tensor in inputs(4, 6))
    s = log_scale if clamp is None else clamp * torch.sinh(log_scale / clamp) / torch.cosh(log_scale / clamp)
    y, log_det = affine_coupling(x, log_scale, shift, inverse=inverse, clamp=clamp)
    torch.testing.assert_close(y, (x - shift) / s.exp() if inverse else x * s.exp() + shift)
    torch.testing.assert_close(log_det, s.sum(1) * (-1 if inverse else 1))
    assert log_det.dtype == torch.float64


@each_map
@with_and_without_mask
def test_gradcheck_in_float64(inverse: bool, clamp: float | None, mask: Tensor | None) -> None:
    leaves = [tensor.cpu().double().requires_grad_() for tensor in inputs(2, 3)]

    def function(*args: Tensor) -> tuple[Tensor, Tensor]:
        return affine_coupling(*args, inverse=inverse, clamp=clamp, mask=mask)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@each_map
@with_and_without_mask
def test_backward_reference_is_the_derivative(
    inverse: bool, clamp: float | None, mask: Tensor | None
) -> None:
    leaves = [tensor.cpu().double().requires_grad_() for tensor in inputs(4, 3)]
    y, log_det = affine_coupling_reference(*leaves, mask, clamp, inverse)
    grads = (torch.cos(y.detach()), torch.sin(log_det.detach()))
    want = torch.autograd.grad((y, log_det), leaves, grads)
    point = (y if inverse else leaves[0]).detach()
    got = affine_coupling_backward_reference(*grads, point, leaves[1].detach(), mask, clamp, inverse)
    torch.testing.assert_close(got, want)


@needs_kernel
@pytest.mark.parametrize("dtype", list(OUTPUT_ROUNDING), ids=str)
@each_map
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (5, 7), (200, 6), (3, 2048), (2, 1300), (2, 3, 5, 7), (3, 4, 8, 8)],
    ids=by_shape,
)
def test_kernel_against_float64(
    kernel: None, shape: tuple[int, ...], inverse: bool, clamp: float | None, dtype: torch.dtype
) -> None:
    """Rows shorter and longer than a block, and equal to it; several rows a program, several programs."""
    tensors = inputs(*shape, dtype=dtype)
    grads = cotangents(tensors[0])
    actual = run(*tensors, *grads, inverse=inverse, clamp=clamp)
    assert (actual.y.dtype, actual.log_det.dtype, actual.y.shape) == (dtype, torch.float32, shape)
    assert all(gradient.dtype == dtype for gradient in actual[2:])
    assert_close_to_float64(actual, *tensors, *grads, inverse=inverse, clamp=clamp)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_map
@pytest.mark.parametrize("name", list(IMAGE_MASKS))
def test_masked_kernel_against_float64(
    kernel: None, name: str, inverse: bool, clamp: float | None, dtype: torch.dtype
) -> None:
    tensors = inputs(2, 3, 5, 7, dtype=dtype)
    grads = cotangents(tensors[0])
    options: dict[str, Any] = {"inverse": inverse, "clamp": clamp, "mask": IMAGE_MASKS[name].to(DEVICE)}
    actual = run(*tensors, *grads, **options)
    assert_close_to_float64(actual, *tensors, *grads, **options)
    passed = ~options["mask"].expand(2, 3, 5, 7)
    assert torch.equal(actual.y[passed], tensors[0][passed])
    assert torch.equal(actual.grad_x[passed], grads[0][passed])
    assert (actual.grad_log_scale[passed] == 0).all()
    assert (actual.grad_shift[passed] == 0).all()


@on_each_backend
@each_map
def test_what_is_masked_out_does_not_matter(name: str, inverse: bool, clamp: float | None) -> None:
    """Not even where it is infinite: exp(inf)·0 must reach neither the sum nor a gradient."""
    mask = torch.tensor([True, False, True, False, True], device=DEVICE)
    tensors = inputs(3, 5)
    grads = cotangents(tensors[0])
    x, log_scale, shift = tensors
    wild = (x, log_scale.where(mask, float("inf")), shift.where(mask, float("nan")))
    with backend(name):
        want = run(*tensors, *grads, inverse=inverse, clamp=clamp, mask=mask)
        got = run(*wild, *grads, inverse=inverse, clamp=clamp, mask=mask)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@on_each_backend
def test_a_clamp_bounds_the_scale(name: str) -> None:
    x, shift = torch.ones(2, 8, device=DEVICE), torch.zeros(2, 8, device=DEVICE)
    log_scale = torch.tensor([1e4, -1e4], device=DEVICE)[:, None].expand(2, 8)
    with backend(name):
        y, log_det = affine_coupling(x, log_scale, shift, clamp=2.0)
    torch.testing.assert_close(log_det, torch.tensor([16.0, -16.0], device=DEVICE))
    torch.testing.assert_close(y, torch.tensor([2.0, -2.0], device=DEVICE).exp()[:, None].expand(2, 8))


@needs_kernel
def test_clamped_small_scales_keep_their_digits(kernel: None) -> None:
    """2·sigmoid(2v) - 1 alone keeps one digit of v = 1e-6, and a flow starts with scales like that."""
    log_scale = torch.logspace(-8, 0, 200, device=DEVICE)[:, None]
    zero = torch.zeros_like(log_scale)
    log_det = affine_coupling(zero, log_scale, zero, clamp=3.0)[1]
    want = 3.0 * torch.tanh(log_scale.double()[:, 0] / 3.0)
    assert ((log_det - want) / want).abs().max() < 1e-6


@needs_kernel
@pytest.mark.parametrize("clamp", [None, 2.0])
def test_the_inverse_undoes_the_forward_map(kernel: None, clamp: float | None) -> None:
    x, log_scale, shift = inputs(6, 33)
    y, log_det = affine_coupling(x, log_scale, shift, clamp=clamp)
    back, log_det_back = affine_coupling(y, log_scale, shift, clamp=clamp, inverse=True)
    bound = ARITHMETIC * (x.abs() + shift.abs() * torch.exp(-log_scale.clamp(max=0)))
    assert ((back - x).abs() <= bound).all()
    assert torch.equal(log_det, -log_det_back)


def halves(shape: tuple[int, ...], dim: int, memory_format: torch.memory_format) -> tuple[Tensor, ...]:
    """x, log_scale and shift as halves of wider tensors."""
    wide = [*shape]
    wide[dim] *= 2
    x, parameters, _ = inputs(*wide)
    x, parameters = (tensor.contiguous(memory_format=memory_format) for tensor in (x, parameters))
    return x.chunk(2, dim)[1], *parameters.chunk(2, dim)


def layouts() -> dict[str, tuple[Tensor, ...]]:
    x, log_scale, shift = inputs(6, 4, 3, 8)
    every = (x, log_scale, shift)
    return {
        "vector halves": halves((6, 10), 1, torch.contiguous_format),
        "channel halves": halves((6, 4, 3, 8), 1, torch.contiguous_format),
        "channels last": tuple(tensor.to(memory_format=torch.channels_last) for tensor in every),
        "channels last halves": halves((6, 4, 3, 8), 1, torch.channels_last),
        "every second column": tuple(tensor.flatten(1)[:, ::2] for tensor in every),
        "transposed": tuple(tensor.flatten(1).t() for tensor in every),
        "one row for all": (x, log_scale[:1].expand_as(x), shift),
        "one value a channel": (x, log_scale[0, :, :1, :1].expand_as(x), shift),
    }


def copied_layouts() -> dict[str, tuple[Tensor, ...]]:
    x, log_scale, shift = inputs(4, 4, 6, 8)
    last = log_scale.to(memory_format=torch.channels_last)
    turned = shift.transpose(2, 3).contiguous().transpose(2, 3)
    return {
        "mixed formats": (x, last, turned),
        "a window": tuple(tensor[:, ::2, 1:4, ::2] for tensor in (x, log_scale, shift)),
    }


@needs_kernel
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", [*layouts(), *copied_layouts()])
def test_any_strides(kernel: None, name: str, inverse: bool) -> None:
    tensors = {**layouts(), **copied_layouts()}[name]
    grads = cotangents(tensors[0])
    strided = run(*tensors, *grads, inverse=inverse, clamp=2.0)
    assert_close_to_float64(strided, *tensors, *grads, inverse=inverse, clamp=2.0)
    dense = run(*(tensor.contiguous() for tensor in tensors), *grads, inverse=inverse, clamp=2.0)
    assert torch.equal(strided.y, dense.y)
    torch.testing.assert_close(strided.log_det, dense.log_det)


@needs_kernel
def test_gradients_of_any_strides(kernel: None) -> None:
    """A sum's gradient is one number with stride 0, a slice's has gaps: neither may be read as dense."""
    tensors = inputs(5, 6)
    wide = torch.arange(60.0, device=DEVICE).reshape(5, 12).cos()
    number = torch.ones((), device=DEVICE)
    for grads in (
        (number.expand(5, 6), number.expand(5)),
        (wide[:, 1::2], wide[:, 3]),
        (wide[:, :6], wide.flatten()[::12]),
    ):
        assert_close_to_float64(run(*tensors, *grads), *tensors, *grads)


@pytest.mark.parametrize("name", list(layouts()))
@pytest.mark.parametrize(
    "mask_shape", [None, (4, 1, 1), (1, 3, 8)], ids=["whole", "channels", "checkerboard"]
)
def test_halves_and_formats_are_read_in_place(name: str, mask_shape: tuple[int, ...] | None) -> None:
    """The speed rests on it: these layouts, and masks over them, must not be copied first."""
    x, *parameters = layouts()[name]
    tensors = [x, *parameters]
    if mask_shape is not None and x.ndim == 4:
        tensors.append(coupling._bytes(torch.ones(mask_shape, dtype=torch.bool, device=DEVICE), x))
    used, runs = coupling._in_runs(tensors, torch.empty_like(x))
    assert all(one is other for one, other in zip(used, tensors, strict=True))
    # Neighbouring threads write neighbouring elements: the runs are those of memory, not of the dimensions.
    assert runs.strides[-1] == 1 or name == "transposed"


@needs_kernel
@pytest.mark.parametrize("name", list(copied_layouts()))
@pytest.mark.parametrize("of_batch", [False, True])
def test_masks_over_layouts_that_are_copied(kernel: None, name: str, of_batch: bool) -> None:
    tensors = copied_layouts()[name]
    mask = (torch.arange(tensors[0].shape[2], device=DEVICE) % 2 == 0)[:, None]
    if of_batch:
        mask = mask ^ (torch.arange(4, device=DEVICE) % 2 == 0)[:, None, None, None]
    grads = cotangents(tensors[0])
    assert_close_to_float64(run(*tensors, *grads, mask=mask), *tensors, *grads, mask=mask)


@needs_kernel
@pytest.mark.parametrize("shape", [(40, 7), (3, 1280), (5, 2, 4, 4)], ids=by_shape)
def test_int64_offsets_change_nothing(kernel: None, shape: tuple[int, ...]) -> None:
    tensors = inputs(*shape)
    grads = cotangents(tensors[0])
    mask = torch.arange(shape[-1], device=DEVICE) % 3 > 0
    want = run(*tensors, *grads, mask=mask, clamp=1.0)
    with force_int64_offsets():
        got = run(*tensors, *grads, mask=mask, clamp=1.0)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_far_rows_take_int64_offsets() -> None:
    """By strides, not by the number of elements: two rows 2^30 elements apart do not need it, three do."""
    for rows, wide in ((2, False), (3, True)):
        runs = coupling._runs((rows, 4), ((2**30, 1), (4, 1)))
        assert runs is not None
        assert coupling._constants(runs, None, None, torch.empty(0))["INT64"] == wide


def test_masks_are_vectors_only_where_their_bytes_are_adjacent() -> None:
    """The interpreter does not read vectors: what the compiler is told about them must be true by itself."""

    def vector(mask: Tensor, *shape: int) -> int:
        x = torch.zeros(shape)
        runs = coupling._in_runs([x, x, x, coupling._bytes(mask, x)], x)[1]
        return coupling._constants(runs, None, mask, x)["VECTOR"]

    assert vector(torch.ones(1, 4, 4, dtype=torch.bool), 2, 3, 4, 4) == 4
    assert vector(torch.ones(48, dtype=torch.bool), 2, 48) == 4
    assert vector(torch.ones(1, 3, 5, dtype=torch.bool), 2, 4, 3, 5) == 1  # runs of 15
    assert vector(torch.ones(3, 1, 1, dtype=torch.bool), 2, 3, 4, 4) == 1  # one byte for a run
    assert vector(torch.ones(96, dtype=torch.bool)[::2], 2, 48) == 1
    assert vector(torch.ones(2, dtype=torch.bool), 2, 2) == 1  # a block of two columns


@needs_kernel
@pytest.mark.parametrize("shape", [(130, 24), (7, 1300), (9, 3, 4, 4)], ids=by_shape)
def test_a_row_alone_equals_the_row_in_a_batch(kernel: None, shape: tuple[int, ...]) -> None:
    """Bit for bit: a sample may not depend on what it was drawn with."""
    tensors = inputs(*shape)
    grads = cotangents(tensors[0])
    together = run(*tensors, *grads, clamp=2.0, inverse=True)
    for row in (0, shape[0] // 2, shape[0] - 1):
        rows = slice(row, row + 1)
        alone = run(*(tensor[rows].clone() for tensor in (*tensors, *grads)), clamp=2.0, inverse=True)
        torch.testing.assert_close(alone, Results(*(part[rows] for part in together)), rtol=0, atol=0)


@on_each_backend
def test_not_a_number_stays_in_its_row(name: str) -> None:
    x, log_scale, shift = inputs(6, 40)
    x[2, 3], log_scale[4, 5] = float("nan"), float("nan")
    with backend(name):
        y, log_det = affine_coupling(x, log_scale, shift, clamp=2.0)
    assert y.isnan().nonzero().tolist() == [[2, 3], [4, 5]]
    assert log_det.isnan().nonzero().tolist() == [[4]]


@on_each_backend
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 3, 4, 4)], ids=by_shape)
def test_empty(name: str, shape: tuple[int, ...]) -> None:
    tensors = inputs(*shape)
    with backend(name):
        results = run(*tensors, *cotangents(tensors[0]), inverse=True, clamp=1.0)
    assert results.y.shape == results.grad_shift.shape == shape
    assert torch.equal(results.log_det, torch.zeros(shape[0], device=DEVICE))


ONES = torch.ones(2, 4)
WRONG = [
    ({"x": 1.0}, TypeError, "x must be a tensor"),
    ({"shift": None}, TypeError, "shift must be a tensor"),
    ({"x": ONES[0]}, ValueError, r"x must have a batch dimension.*\(4,\)"),
    ({"x": ONES.long()}, TypeError, "x must be float32.*int64"),
    ({"log_scale": ONES[:, :3]}, ValueError, r"log_scale must have the shape of x, \(2, 4\)"),
    ({"shift": ONES[0]}, ValueError, r"shift must have the shape of x, \(2, 4\)"),
    ({"log_scale": ONES.bfloat16()}, TypeError, "log_scale must have the dtype of x"),
    ({"shift": ONES.double()}, TypeError, "shift must have the dtype of x"),
    ({"shift": ONES.to("meta")}, ValueError, "shift must be on the device of x"),
    ({"clamp": 0.0}, ValueError, "clamp must be None or positive"),
    ({"clamp": float("nan")}, ValueError, "clamp must be None or positive"),
    ({"inverse": "yes"}, TypeError, "inverse must be a bool, got str"),
    ({"clamp": "2"}, TypeError, "clamp must be None or a number"),
    ({"mask": ONES[0]}, TypeError, "mask must be None or a bool tensor"),
    ({"mask": ONES[0, :3].bool()}, ValueError, r"mask must broadcast to the shape of x, \(2, 4\)"),
    ({"mask": ONES[None, :1].bool()}, ValueError, "mask must broadcast"),
    ({"mask": ONES[0].bool().to("meta")}, ValueError, "mask must be on the device of x"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": ONES, "log_scale": ONES, "shift": ONES, **change}
    with pytest.raises(error, match=message):
        affine_coupling(**arguments)


@needs_kernel
def test_float64_has_no_kernel(kernel: None) -> None:
    tensors = [tensor.double() for tensor in inputs(2, 3)]
    with pytest.raises(RuntimeError, match="float64"):
        affine_coupling(*tensors)
    with backend(None):
        y, log_det = affine_coupling(*tensors)
    assert y.dtype == log_det.dtype == torch.float64


@on_each_backend
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(name: str, inverse: bool, masked: bool) -> None:
    x, log_scale, shift = inputs(4, 6, 2, 2)
    mask = torch.arange(2, device=DEVICE) > 0 if masked else None
    last = x.to(memory_format=torch.channels_last)
    with backend(name):
        for point in (x, last, last[:, :6]):
            torch.library.opcheck(coupling._forward, (point, log_scale, shift, mask, 2.0, inverse))
            grads = (shift, shift[:, 0, 0, 0])
            torch.library.opcheck(coupling._backward, (*grads, point, log_scale, mask, None, inverse))


@on_each_backend
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_to_one_graph(name: str, dynamic: bool, masked: bool) -> None:
    torch._dynamo.reset()
    mask = torch.tensor([True, False, True, True, False], device=DEVICE) if masked else None

    def function(x: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        y, first = affine_coupling(x, log_scale, shift, clamp=2.0, mask=mask)
        back, second = affine_coupling(y.sin(), log_scale, shift, inverse=True, mask=mask)
        return back, first + second

    # Inductor's code for the CPU has nothing to do with the kernels; its graphs on a GPU have.
    inner = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=inner)
    with backend(name):
        for rows in (4, 4, 7):
            leaves = [tensor.requires_grad_() for tensor in inputs(rows, 5, seed=rows)]
            want, got = function(*leaves), compiled(*leaves)
            torch.testing.assert_close(got, want)
            losses = (pair[0].cos().sum() + pair[1].sum() for pair in (got, want))
            torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in losses))


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_the_reference_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    leaves = inputs(4, 6)
    compiled = torch.compile(affine_coupling_reference, fullgraph=True)
    got = compiled(*leaves, None, 2.0, True)
    torch.testing.assert_close(got, affine_coupling_reference(*leaves, None, 2.0, True))


VMAP_MASKS = {
    "none": (None, None),
    "shared": (torch.tensor([True, False, True, True, False, True]), None),
    "shared, of a batch": (torch.rand(4, 6, generator=torch.Generator().manual_seed(5)) > 0.5, None),
    "one each": (torch.rand(3, 6, generator=torch.Generator().manual_seed(6)) > 0.5, 0),
    "a batch each": (torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(7)) > 0.5, 2),
}


@on_each_backend
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("masks", list(VMAP_MASKS))
def test_vmap_and_grad(name: str, inverse: bool, masks: str) -> None:
    mask, mask_dim = VMAP_MASKS[masks]
    mask = None if mask is None else mask.to(DEVICE)
    many = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(8)).to(DEVICE)
    _, log_scale, shift = inputs(4, 6)

    def value(x: Tensor, log_scale: Tensor, mask: Tensor | None) -> Tensor:
        y, log_det = affine_coupling(x, log_scale, shift, clamp=2.0, mask=mask, inverse=inverse)
        return y.square().sum() + (log_det * torch.arange(4, device=DEVICE)).sum()

    function = torch.func.grad_and_value(value, argnums=(0, 1))
    with backend(name):
        (grad_x, grad_log_scale), values = torch.vmap(function, (1, None, mask_dim))(many, log_scale, mask)
        for i in range(3):
            one_mask = mask if mask is None or mask_dim is None else mask.select(mask_dim, i)
            want, want_value = function(many[:, i], log_scale, one_mask)
            torch.testing.assert_close((values[i], grad_x[i], grad_log_scale[i]), (want_value, *want))


@needs_kernel
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_second_derivatives(inverse: bool, masked: bool) -> None:
    """A gradient penalty needs them; a kernel without them would drop the term and say nothing."""
    mask = torch.tensor([True, False, True], device=DEVICE) if masked else None

    def function(x: Tensor, log_scale: Tensor, shift: Tensor) -> Tensor:
        y, log_det = affine_coupling(x, log_scale, shift, clamp=2.0, mask=mask, inverse=inverse)
        return (y**3).sum() + (log_det**2).sum()

    results = []
    for name in ("reference", "triton"):
        with backend(name):
            leaves = [tensor.requires_grad_() for tensor in inputs(4, 3)]
            gradients = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
            twice = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), leaves)
            jacobian = torch.func.jacrev(torch.func.grad(function, argnums=1), argnums=1)(*inputs(4, 3))
            results.append((*twice, jacobian))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@needs_kernel
@pytest.mark.parametrize("inverse", [False, True])
def test_the_backward_pass_keeps_two_tensors(kernel: None, inverse: bool) -> None:
    """x or y, and log_scale: keeping shift too would be a quarter more memory for every layer of a flow."""
    kept: list[Tensor] = []
    leaves = [tensor.requires_grad_() for tensor in inputs(4, 6)]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        affine_coupling(*leaves, inverse=inverse)
    assert sum(tensor.numel() for tensor in kept) == 2 * 24
