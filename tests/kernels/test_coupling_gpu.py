"""Affine coupling on a GPU: against float64, row by row, in captured graphs, beyond 2^31 elements."""

from typing import Any

import pytest
import torch
from torch import Tensor

from evalp_fast.kernels.coupling import affine_coupling
from evalp_fast.kernels.coupling_reference import affine_coupling_reference

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
CLAMP = 2.0
# Half a unit in the last place of the result, and some 32 float32 roundings of numbers below 64.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ARITHMETIC = 32 * 2.0**-24 * 64


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randn(shape, generator=generator).clamp(-4, 4).to(DEVICE, dtype) for _ in range(3))
    x, log_scale, shift = draws
    return x, log_scale, shift


def masks(shape: tuple[int, ...]) -> list[Tensor | None]:
    """None, every second column, and for images a checkerboard and every second channel."""
    found: list[Tensor | None] = [None, torch.arange(shape[-1], device=DEVICE) % 2 == 0]
    if len(shape) == 4:
        row, column = (torch.arange(n, device=DEVICE) for n in shape[2:])
        found += [
            (row[:, None] + column) % 2 == 0,
            (torch.arange(shape[1], device=DEVICE) % 2 == 0)[:, None, None],
        ]
    return found


def with_gradients(tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    """y, log_det, and the gradients of x, log_scale and shift."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    results = affine_coupling(*leaves, clamp=CLAMP, **options)
    return [part.detach() for part in (*results, *torch.autograd.grad(results, leaves, grads))]


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    "shape", [(5, 7), (1000, 64), (3, 2048), (2, 1300), (7, 6, 5, 7), (5, 4, 8, 8)], ids=str
)
def test_against_float64(shape: tuple[int, ...], inverse: bool, dtype: torch.dtype) -> None:
    tensors = inputs(*shape, dtype=dtype)
    grads = (inputs(*shape, dtype=dtype, seed=1)[0], torch.linspace(-1, 1, shape[0], device=DEVICE))
    for mask in masks(shape):
        actual = with_gradients(tensors, grads, inverse=inverse, mask=mask)
        exact = with_gradients(
            tuple(t.double() for t in tensors), tuple(t.double() for t in grads), inverse=inverse, mask=mask
        )
        scales = (CLAMP * torch.tanh(tensors[1].double() / CLAMP)).abs().flatten(1).sum(1)
        assert ((actual[1] - exact[1]).abs() <= 50 * 2.0**-24 * scales).all()
        for place in (0, 2, 3, 4):
            # The inverse computes the gradient of log_scale from y as it was rounded.
            rounded = inverse * (place == 3) * float((grads[0].double() * exact[0]).abs().max())
            torch.testing.assert_close(
                actual[place].double(),
                exact[place],
                rtol=ROUNDING[dtype] * 1.01,
                atol=ARITHMETIC + ROUNDING[dtype] * rounded,
            )


@pytest.mark.parametrize("shape", [(1030, 24), (70, 1300), (90, 6, 8, 8)], ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_a_row_alone_equals_the_row_in_a_batch(shape: tuple[int, ...], inverse: bool) -> None:
    """Bit for bit: a sample may not depend on what it was drawn with."""
    tensors, grads = inputs(*shape), (inputs(*shape, seed=1)[0], torch.ones(shape[0], device=DEVICE))
    together = with_gradients(tensors, grads, inverse=inverse)
    for row in (0, shape[0] // 2, shape[0] - 1):
        rows = slice(row, row + 1)
        alone = with_gradients(
            tuple(t[rows].clone() for t in tensors), tuple(t[rows] for t in grads), inverse=inverse
        )
        for one, all_ in zip(alone, together, strict=True):
            assert torch.equal(one, all_[rows])


def test_graph_replays_with_new_inputs() -> None:
    tensors = inputs(64, 128)
    for _ in range(3):
        affine_coupling(*tensors, clamp=2.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, log_det = affine_coupling(*tensors, clamp=2.0)
    for tensor, fresh in zip(tensors, inputs(64, 128, seed=9), strict=True):
        tensor.copy_(fresh)
    graph.replay()
    want_y, want_log_det = affine_coupling(*inputs(64, 128, seed=9), clamp=2.0)
    assert torch.equal(y, want_y)
    assert torch.equal(log_det, want_log_det)


def test_more_than_two_to_the_31_elements() -> None:
    rows, columns = 2**31 // 4096 + 1, 4096
    if torch.cuda.mem_get_info()[0] < 5 * rows * columns * 2:
        pytest.skip("needs 22 GB of GPU memory")
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.arange(columns, device="cuda").remainder(7)
    log_scale, shift = torch.zeros_like(x), torch.zeros_like(x)
    log_scale[-1], shift[-1] = 1.0, 2.0
    y, log_det = affine_coupling(x, log_scale, shift)
    want = affine_coupling_reference(x[-1:], log_scale[-1:], shift[-1:])
    torch.testing.assert_close(y[-1:], want[0])
    torch.testing.assert_close(log_det[-1:], want[1])
    assert (y[:-1] == 0).all()
