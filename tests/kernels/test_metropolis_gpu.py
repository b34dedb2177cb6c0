"""The Metropolis-adjusted step on a GPU: against float64, row by row, in captured graphs, beyond 2^31."""

import math

import pytest
import torch
from chain_states import ACCEPTANCE_SHAPES, SEED, STEP, numbers, problem, tensors_of
from torch import Tensor

from evalp_fast.kernels.langevin import mala_accept, mala_accept_reference, mala_propose
from evalp_fast.kernels.philox import Stream, normal, uniform

pytestmark = pytest.mark.gpu

OPTIONS = [{}, {"grad_clip": 0.7, "prior_precision": 1.3}]


def quadratic(x: Tensor) -> tuple[Tensor, Tensor]:
    return (x**2).sum(1) / 2, x


@pytest.mark.parametrize(
    "shapes", [*ACCEPTANCE_SHAPES, [(3, 64, 64)], [(1024,)] * 63 + [(3, 32, 32)]], ids=str
)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all options"])
def test_gpu_against_float64(shapes: list[tuple[int, ...]], options: dict) -> None:
    a, index = problem(shapes, 33), numbers(33)
    arguments = {"seed": SEED, "step": STEP, "temperature": 0.7} | options
    cuda = [s.cuda() if isinstance(s, Tensor) else [t.cuda() for t in s] for s in a]
    actual = mala_accept(*cuda, 0.3, index=index.cuda(), **arguments)
    exact = [s.double() if isinstance(s, Tensor) else [t.double() for t in s] for s in a]
    expected = mala_accept_reference(*exact, 0.3, index=index, **arguments)
    columns = sum(math.prod(shape) for shape in shapes)
    torch.testing.assert_close(
        actual.log_ratio.cpu().double(),
        expected.log_ratio,
        atol=2e-6 * max(math.sqrt(columns), 4.0),
        rtol=2e-6,
    )
    clear = (
        torch.log(uniform(SEED, index, STEP, Stream.ACCEPTANCE, 1)[:, 0]) - expected.log_ratio
    ).abs() > 1e-3
    assert torch.equal(actual.accepted.cpu()[clear], expected.accepted[clear])
    for selected, kept, proposed in zip(
        tensors_of(actual.x), tensors_of(a[0]), tensors_of(a[3]), strict=True
    ):
        mask = actual.accepted.cpu().reshape(-1, *[1] * (kept.ndim - 1))
        assert torch.equal(selected.cpu(), torch.where(mask, proposed, kept))


def test_gpu_row_alone_equals_row_in_batch() -> None:
    a, index = [t.cuda() for t in problem([(3, 40, 40)], 130)], numbers(130).cuda()
    options = {"seed": SEED, "step": STEP, "grad_clip": 2.0}
    batch = mala_accept(*a, 0.3, index=index, **options)
    for i in (0, 7, 129):
        rows = slice(i, i + 1)
        for one, all_ in zip(
            mala_accept(*(t[rows] for t in a), 0.3, index=index[rows], **options), batch, strict=True
        ):
            assert torch.equal(one, all_[rows])


def test_gpu_graph_draws_fresh_noise_at_each_replay() -> None:
    count, eta = 256, 1.5
    index = torch.arange(count, device="cuda")
    x = normal(3, index, 0, Stream.INITIAL, 8)
    energy, grad = (x**2).sum(1) / 2, x.clone()
    start = x.cpu()
    seed, step = torch.tensor(SEED, device="cuda"), torch.tensor(0, device="cuda")
    counts = torch.zeros(count, 2, dtype=torch.int64, device="cuda")

    def move() -> None:
        noise = {"seed": seed, "index": index, "step": step}
        proposal = mala_propose(x, grad, eta, **noise)
        value = (proposal**2).sum(1) / 2
        mala_accept(
            x, energy, grad, proposal, value, proposal, eta, counts=counts, out=(x, energy, grad), **noise
        )
        step.add_(1)

    move()  # compiles the kernels
    x.copy_(start)
    grad.copy_(start)
    energy.copy_((x**2).sum(1) / 2)
    step.zero_()
    counts.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        move()
    for _ in range(5):
        graph.replay()
    expected, accepted = start, 0
    value, g = quadratic(expected)
    for k in range(5):
        noise = {"seed": SEED, "index": torch.arange(count), "step": k}
        proposal = mala_propose(expected, g, eta, **noise)
        step_k = mala_accept(expected, value, g, proposal, *quadratic(proposal), eta, **noise)
        expected, value, g = step_k.x, step_k.energy, step_k.grad
        accepted += int(step_k.accepted.sum())
    # A decision may turn over by rounding, in a chain or two.
    assert (x.cpu() - expected).abs().amax(1).gt(1e-4).sum() <= 2
    assert abs(int(counts[:, 0].sum()) - accepted) <= 4


def test_gpu_more_than_2_to_the_31_elements() -> None:
    """Guards against 32-bit offsets, in the ratio and in the selection: the last rows would be others'.

    The rows at both ends and in the middle are those that are judged alone; both decisions are among them.
    """
    rows, columns = 2**19 + 3, 4096
    if torch.cuda.mem_get_info()[0] < 6 * rows * columns * 2:
        pytest.skip("needs 26 GB of free GPU memory")
    ends = torch.cat([torch.arange(8), rows // 2 + torch.arange(8), rows - 1 - torch.arange(16)]).cuda()
    parts = [t.cuda() for t in problem([(columns,)], len(ends), torch.bfloat16)]
    whole = [torch.zeros(rows, *t.shape[1:], dtype=t.dtype, device="cuda") for t in parts]
    for tensor, part in zip(whole, parts, strict=True):
        tensor[ends] = part
    index = torch.arange(rows, device="cuda") + (3 << 33)
    options = {"seed": SEED, "step": STEP, "grad_clip": 0.7}
    alone = mala_accept(*parts, 0.3, index=index[ends], **options)
    assert 0 < int(alone.accepted.sum()) < len(ends)
    together = mala_accept(*whole, 0.3, index=index, out=tuple(whole[:3]), **options)
    for one, all_ in zip(alone, together, strict=True):
        assert torch.equal(one, all_[ends])
