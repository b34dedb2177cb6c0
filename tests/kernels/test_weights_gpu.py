"""The bfloat16 copies that a GPU keeps: the bits of a conversion, after any change, and no more written."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from evalp_fast.kernels.launch import INTERPRETED, backend, force_int64_offsets
from evalp_fast.kernels.weights_gpu import Kept, bfloat16_copies, operands

DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="runs kernels in Triton's interpreter")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
on_each = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """On the CPU in the interpreter, and nothing is recorded."""
    with backend("triton"), torch.no_grad():
        yield


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16)


def normals(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def stack(device: str) -> tuple[Tensor, ...]:
    """Of odd sizes, one of no number, one of a single number, and one of several blocks."""
    return tuple(
        normals(*shape, device=device) for shape in ((3, 5, 7), (3, 0, 5, 5), (1, 1), (2, 50, 41), (2048,))
    )


@on_each
@pytest.mark.parametrize("wide", [False, True])
def test_they_are_a_conversion(device: str, wide: bool) -> None:
    """At first and after a change, in every matrix. Guards against offsets of a matrix behind another, and
    against cutting off, or halves that are rounded up: some of them are exact halves."""
    halves = 1.0 + torch.arange(256, device=device) / 256
    weights, kept = (*stack(device), halves), {}
    for change in (0.0, 1.0, -3.0):
        for weight in weights:
            weight.add_(change)
        if wide:
            with force_int64_offsets():
                copies = bfloat16_copies(weights, kept)
        else:
            copies = bfloat16_copies(weights, kept)
        for weight, copy in zip(weights, copies, strict=True):
            assert copy.shape == weight.shape
            assert torch.equal(bits(copy), bits(weight.bfloat16()))


@on_each
def test_every_number_is_followed_alone(device: str) -> None:
    """The first, the last and one at the end of a block, by one bit of its rounding."""
    weight, kept = torch.ones(5000, device=device), {}
    for place in (0, 2047, 2048, 4095, 4999):
        weight[place] = 1.0 + 2.0**-7
        (copy,) = bfloat16_copies((weight,), kept)
        assert torch.equal(bits(copy), bits(weight.bfloat16()))


@on_each
def test_numbers_that_compare_equal_and_are_not(device: str) -> None:
    """Guards against a comparison of values: 0 is -0 to it, and a NaN is never what it was."""
    weight = torch.tensor([0.0, 1.0, torch.inf, torch.nan, 1e-40, 3.4e38], device=device)
    kept: Kept = {}
    for _ in range(2):
        (copy,) = bfloat16_copies((weight,), kept)
        assert torch.equal(copy.isnan(), weight.isnan())
        assert torch.equal(bits(copy.nan_to_num()), bits(weight.bfloat16().nan_to_num()))
        weight.neg_()


@on_each
def test_operands(device: str) -> None:
    """For a launcher: those in bfloat16 or for "ieee" are what they were, others rounded to new tensors."""
    weights = stack(device)
    assert all(a is b for a, b in zip(operands(weights, "ieee"), weights, strict=True))
    transposed = operands([weights[0].transpose(1, 2)], "ieee")[0]
    assert transposed.is_contiguous()
    assert torch.equal(transposed, weights[0].transpose(1, 2))
    ready = weights[1].bfloat16()
    mixed = (weights[0], ready, weights[3].transpose(1, 2), *weights[3:])
    for _ in range(2):
        rounded = operands(mixed, "bf16")
        assert rounded[1] is ready
        for weight, found in zip(mixed, rounded, strict=True):
            assert torch.equal(bits(found), bits(weight.bfloat16()))
        weights[3].add_(1.0)
    for weight, found in zip(weights, operands(weights, "tf32"), strict=True):
        assert found.dtype == torch.float32
        assert not (found.view(torch.int32) & 0x1FFF).any()
        assert ((found - weight).abs() <= weight.abs() * 2.0**-11).all()


@on_each
def test_tf32_rounds_to_the_nearest(device: str) -> None:
    """As `cvt.rna.tf32.f32` does. Guards against numbers that are cut off, halves towards zero, and against a
    NaN, of which all bits may be set, that becomes a zero."""
    step = 2.0**-10
    cases = {
        1.0: 1.0,
        1.0 + 0.49 * step: 1.0,
        1.0 + 0.5 * step: 1.0 + step,
        -1.0 - 0.5 * step: -1.0 - step,
        1.0 + 0.51 * step: 1.0 + step,
        2.0 - 0.25 * step: 2.0,
        -0.0: -0.0,
        3.4e38: 2046 * 2.0**117,
        3.4028234e38: torch.inf,
        -torch.inf: -torch.inf,
        1e-40: 9 * 2.0**-136,
    }
    weight = torch.tensor(list(cases), device=device)
    (found,) = operands([weight], "tf32")
    assert found.tolist() == list(cases.values())
    nans = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32, device=device)
    assert operands([nans.view(torch.float32)], "tf32")[0].isnan().all()


@on_each
def test_they_are_kept(device: str) -> None:
    """Guards against copies that are made anew, which is what they are kept to save."""
    weights, kept = stack(device), {}
    first = bfloat16_copies(weights, kept)
    weights[0].add_(1.0)
    again = bfloat16_copies(weights, kept)
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert len(kept) == 1
    assert not any(one is other for one, other in zip(first, bfloat16_copies(weights, {}), strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter writes")
def test_what_has_not_changed_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else samplers on two streams would write what the other reads."""
    interpreter: Any = pytest.importorskip("triton.runtime.interpreter")
    store, stored = interpreter.InterpreterBuilder.create_masked_store, []

    def noted(self: Any, pointers: Any, values: Any, mask: Any, *rest: Any) -> Any:
        stored.append(int(mask.data.sum()))
        return store(self, pointers, values, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", noted)
    weight, kept = torch.tensor([0.1, torch.nan, -0.0] * 2000), {}
    bfloat16_copies((weight,), kept)
    assert sum(stored) == 6000
    stored.clear()
    bfloat16_copies((weight,), kept)
    weight[0] += 1e-5  # which bfloat16 does not see
    bfloat16_copies((weight,), kept)
    assert stored == []
    weight[2100] = 1.0
    bfloat16_copies((weight,), kept)
    assert stored == [2048]


@on_each
def test_weights_of_another_shape_have_other_copies(device: str) -> None:
    weight, kept = normals(4, 6, device=device), {}
    (before,) = bfloat16_copies((weight,), kept)
    then = before.clone()
    weight.data = normals(7, 3, device=device)
    (after,) = bfloat16_copies((weight,), kept)
    assert torch.equal(after, weight.bfloat16())
    assert torch.equal(before, then)


@on_each
def test_those_of_inference_mode(device: str) -> None:
    """Guards against copies that can be written to in that mode alone."""
    weight, kept = normals(4, 6, device=device), {}
    with torch.inference_mode():
        bfloat16_copies((weight,), kept)
    weight.mul_(2.0)
    (copy,) = bfloat16_copies((weight,), kept)
    assert torch.equal(copy, weight.bfloat16())
    assert not copy.is_inference()


@on_each
def test_what_autograd_may_save_is_new(device: str) -> None:
    """Guards against gradients of the weights after the next call, and against an error where two calls are
    differentiated together."""
    weight, x, kept = normals(4, 6, device=device), normals(5, 6, device=device), {}
    bfloat16_copies((weight,), kept)
    expected = 2.0 * weight.bfloat16().float().sum(0)
    x.requires_grad_()
    with torch.enable_grad():
        both = [(x.bfloat16() @ bfloat16_copies((weight,), kept)[0].T).float().sum() for _ in range(2)]
        total = both[0] + both[1]
    weight.mul_(3.0)
    bfloat16_copies((weight,), kept)
    total.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected.expand(5, 6), rtol=2e-2, atol=2e-2)


@on_each
@pytest.mark.parametrize("kind", ["float64", "bfloat16", "transposed", "every other", "vmap", "subclass"])
def test_other_weights_are_converted(device: str, kind: str) -> None:
    weight, kept = normals(4, 6, device=device), {}
    if kind == "vmap":
        converted = torch.vmap(lambda one: bfloat16_copies((one,), kept)[0])(weight)
        assert torch.equal(converted, weight.bfloat16())
    elif kind == "subclass":
        weight = weight.as_subclass(type("Own", (torch.Tensor,), {}))  # pyright: ignore[reportAttributeAccessIssue]
    elif kind == "transposed":
        weight = weight.T
    elif kind == "every other":
        weight = weight[:, ::2]
    else:
        weight = weight.to(getattr(torch, kind))
    if kind != "vmap":
        (copy,) = bfloat16_copies((weight,), kept)
        assert copy.dtype == torch.bfloat16
        assert torch.equal(bits(copy), bits(weight.bfloat16()))
    assert not kept


@on_each
def test_nothing_of_a_transform_or_a_mode_is_kept(device: str) -> None:
    """The weights are plain tensors, and other things are transformed. Guards against copies that are wrapped
    or have no numbers, in every later call."""
    weight, x, kept = normals(4, 6, device=device), normals(6, device=device), {}

    def call(x: Tensor) -> Tensor:
        return bfloat16_copies((weight,), kept)[0].float() @ x

    torch.func.jvp(call, (x,), (x,))
    torch.func.functionalize(call)(x)
    torch.vmap(call)(x[None])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        call(mode.from_tensor(x))
    assert not kept
    (copy,) = bfloat16_copies((weight,), kept)
    assert torch.equal(copy, weight.bfloat16())
    traced = make_fx(call)(x)  # copies that are known are no constants of what it traces
    weight.add_(1.0)
    assert torch.equal(traced(x), weight.bfloat16().float() @ x)


@on_each
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_trace_contains_the_conversion(device: str) -> None:
    """Guards against copies that are constants of a trace, or memory in it that nothing writes."""
    weight, x, kept = normals(4, 6, device=device), normals(6, device=device), {}
    for known in (False, True):
        if known:
            bfloat16_copies((weight,), kept)
        traced = torch.jit.trace(lambda w, x: bfloat16_copies((w,), kept)[0].float() @ x, (weight, x))
        weight.add_(1.0)
        assert torch.equal(traced(weight, x), weight.bfloat16().float() @ x)


@on_each
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(device: str, dynamic: bool) -> None:
    """In one graph, which converts. Guards against copies that are frozen into it."""
    call = torch.compile(bfloat16_copies, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    weights = stack(device)
    for _ in range(2):
        for weight, copy in zip(weights, call(weights, {}), strict=True):
            assert torch.equal(copy, weight.bfloat16())
        for weight in weights:
            weight.add_(1.0)


@pytest.mark.parametrize("run", ["reference", *(["triton"] if INTERPRETED else [])])
def test_opcheck(run: str) -> None:
    weights = [normals(3, 5), normals(4)]
    with backend(run):
        copies = [torch.zeros_like(weight, dtype=torch.bfloat16) for weight in weights]
        torch.library.opcheck(torch.ops.evalp_fast.refresh_copies.default, (weights, copies))


@pytest.mark.gpu
@pytest.mark.parametrize("known", [False, True])
def test_in_a_captured_graph(known: bool) -> None:
    """Its copies are those of the weights at each replay, whether there were some before it or not."""
    weights, kept = stack("cuda"), {}
    if known:
        bfloat16_copies(weights, kept)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copies = bfloat16_copies(weights, kept)
    for _ in range(2):
        for weight in weights:
            weight.data.add_(1.0)
        graph.replay()
        for weight, copy in zip(weights, copies, strict=True):
            assert torch.equal(copy, weight.bfloat16())
    assert len(kept) == known


@pytest.mark.gpu
def test_each_stream_has_its_own() -> None:
    """Guards against a stream that rewrites what another still reads, or memory that another still writes."""
    weights, kept = stack("cuda"), {}
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams * 2:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            copies = bfloat16_copies(weights, kept)
            assert all(
                torch.equal(copy, weight.bfloat16()) for copy, weight in zip(copies, weights, strict=True)
            )
    assert len(kept) == 2
