"""The Langevin step on a GPU: against float64, row by row, in captured graphs, beyond 2^31 elements."""

import pytest
import torch
from chain_states import SEED, STEP, STEP_SHAPES, assert_same, numbers, state, tensors_of
from torch import Tensor

from evalp_fast.kernels.langevin import langevin_step, langevin_step_reference

pytestmark = pytest.mark.gpu

OPTIONS = {"grad_clip": 0.7, "prior_precision": 1.3, "clamp": (-0.3, 0.4)}


def two_steps(x: Tensor, index: Tensor, seed: Tensor, first: Tensor) -> Tensor:
    """A step to a new tensor, and one of a list in place."""
    x = langevin_step(x, x.sin(), 0.3, seed=seed, index=index, step=first, prior_precision=0.4, grad_clip=1.0)
    pair = [x.clone(), x.clone()]
    langevin_step(pair, pair, 0.2, seed=seed, index=index, step=first + 1, out=pair)
    return pair[0] + pair[1]


@pytest.mark.parametrize("shapes", [*STEP_SHAPES, [(3, 64, 64)], [(1024,)] * 63 + [(3, 32, 32)]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_against_float64(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    x, grad = state(shapes, 33, dtype), state(shapes, 33, dtype, seed=1)
    index, options = numbers(33), {"seed": SEED, "step": STEP, **OPTIONS}
    exact = [[t.double() for t in tensors_of(s)] for s in (x, grad)]
    expected = langevin_step_reference(exact[0], exact[1], 0.3, index=index, **options)
    devices = [[t.cuda() for t in tensors_of(s)] for s in (x, grad)]
    actual = langevin_step(devices[0], devices[1], 0.3, index=index.cuda(), **options)
    size = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    for a, b in zip(tensors_of(actual), tensors_of(expected), strict=True):
        torch.testing.assert_close(a.cpu().double(), b, atol=4e-6, rtol=size)


def test_gpu_row_alone_equals_row_in_batch() -> None:
    x, grad = (state([(3, 40, 40)], 130, seed=s).cuda() for s in range(2))
    index, options = numbers(130).cuda(), {"seed": SEED, "step": STEP, "grad_clip": 2.0}
    batch = langevin_step(x, grad, 0.3, index=index, **options)
    for i in (0, 7, 129):
        rows = slice(i, i + 1)
        assert_same(langevin_step(x[rows], grad[rows], 0.3, index=index[rows], **options), batch[rows])


def test_gpu_graph_draws_fresh_noise_at_each_replay() -> None:
    x, index = torch.zeros(64, 48, device="cuda"), torch.arange(64, device="cuda")
    seed, step = (torch.tensor(v, device="cuda") for v in (SEED, 0))

    def move() -> None:
        langevin_step(x, x, 0.3, seed=seed, index=index, step=step, out=x)
        step.add_(1)

    move()  # compiles the kernel
    x.zero_()
    step.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        move()
    for _ in range(5):
        graph.replay()
    expected = torch.zeros(64, 48)
    for k in range(5):
        expected = langevin_step(expected, expected, 0.3, seed=SEED, index=torch.arange(64), step=k)
    torch.testing.assert_close(x.cpu(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_gpu_compiled(dynamic: bool) -> None:
    compiled = torch.compile(two_steps, fullgraph=True, dynamic=dynamic)
    for count in (3, 5):
        arguments = [
            t.cuda() for t in (state([(8,)], count), numbers(count), torch.tensor(SEED), torch.tensor(STEP))
        ]
        torch.testing.assert_close(compiled(*arguments), two_steps(*arguments), atol=4e-6, rtol=0)


def test_gpu_more_than_2_to_the_31_elements() -> None:
    """Guards against 32-bit offsets, in the step and in the norm: rows behind 2^31 would come from elsewhere.

    The rows at both ends and in the middle are those that are moved alone.
    """
    rows, columns = 2**19 + 3, 4096
    if torch.cuda.mem_get_info()[0] < 5 * rows * columns * 2:
        pytest.skip("needs 22 GB of free GPU memory")
    ends = torch.tensor([0, 1, rows // 2, rows - 3, rows - 2, rows - 1], device="cuda")
    x, grad = (torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for part, tensor in enumerate((x, grad)):
        tensor[ends] = state([(columns,)], len(ends), torch.bfloat16, part).cuda()
    index = torch.arange(rows, device="cuda") + (3 << 33)
    options = {"seed": SEED, "step": STEP, **OPTIONS}
    alone = langevin_step(x[ends], grad[ends], 0.3, index=index[ends], **options)
    langevin_step(x, grad, 0.3, index=index, out=x, **options)
    assert_same(x[ends], alone)
