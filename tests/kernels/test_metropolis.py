"""The Metropolis-adjusted step: the ratio, the kernel against the reference, and the exactness of the law."""

import math
from collections.abc import Callable

import pytest
import scipy.stats
import torch
from chain_states import ACCEPTANCE_SHAPES, SEED, STEP, numbers, problem, tensors_of
from torch import Tensor

from evalp_fast.kernels.langevin import MalaStep, mala_accept, mala_accept_reference, mala_propose
from evalp_fast.kernels.launch import INTERPRETED, backend, force_int64_offsets
from evalp_fast.kernels.philox import Stream, normal, uniform

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs kernels in Triton's interpreter")
either = pytest.mark.parametrize("run", ["reference", pytest.param("triton", marks=needs_interpreter)])

OPTIONS = [
    {},
    {"grad_clip": 0.7},
    {"prior_precision": 1.3},
    {"grad_clip": 0.7, "prior_precision": 1.3},
]

# --- the ratio -------------------------------------------------------------------------------------------


def ratio_by_hand(
    x, energy, grad, proposal, proposal_energy, proposal_grad, eta, heat, clip=None, precision=0.0
):
    """-ΔU/T + log q(x|x') - log q(x'|x), from the densities themselves, of flat float64 states."""

    def mean(position: Tensor, gradient: Tensor) -> Tensor:
        if clip is not None:
            gradient = gradient * (clip / gradient.norm(dim=1, keepdim=True)).clamp(max=1.0)
        return position - eta[:, None] / 2 * (gradient + precision * position)

    def log_q(to: Tensor, start: Tensor, gradient: Tensor) -> Tensor:
        law = torch.distributions.Normal(mean(start, gradient), torch.sqrt(eta * heat)[:, None])
        return law.log_prob(to).sum(1)

    def total(position: Tensor, value: Tensor) -> Tensor:
        return value + precision / 2 * (position**2).sum(1)

    change = total(proposal, proposal_energy) - total(x, energy)
    return -change / heat + log_q(x, proposal, proposal_grad) - log_q(proposal, x, grad)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ratio_is_that_of_the_densities(options: dict) -> None:
    x, energy, grad, proposal, proposal_energy, proposal_grad = problem([(3, 2)], dtype=torch.float64)
    eta, heat = torch.rand(7, dtype=torch.float64) + 0.1, torch.rand(7, dtype=torch.float64) + 0.3
    step = mala_accept(
        *(x, energy, grad, proposal, proposal_energy, proposal_grad, eta),
        **{"temperature": heat, "seed": 0, "index": numbers(7), "step": 0} | options,
    )
    flat = [
        t.flatten(1) if t.ndim > 1 else t for t in (x, energy, grad, proposal, proposal_energy, proposal_grad)
    ]
    expected = ratio_by_hand(*flat, eta, heat, options.get("grad_clip"), options.get("prior_precision", 0.0))
    torch.testing.assert_close(step.log_ratio, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_there_and_back_cancel(options: dict) -> None:
    a = problem([(4,), (2,)], dtype=torch.float64)
    arguments = {"seed": 0, "index": numbers(7), "step": 0, "temperature": 0.6} | options
    there = mala_accept(*a, 0.4, **arguments)
    back = mala_accept(*a[3:], *a[:3], 0.4, **arguments)
    torch.testing.assert_close(there.log_ratio, -back.log_ratio, atol=1e-12, rtol=0)
    assert there.log_ratio.abs().min() > 1e-3


@either
def test_decision_is_the_contract(run: str) -> None:
    """Accepted where the uniform of the acceptance stream lies below the ratio."""
    a = problem([(4,)], 200)
    index = numbers(200)
    with backend(run):
        step = mala_accept(*a, 0.4, seed=SEED, index=index, step=STEP)
        other = mala_accept(*a, 0.4, seed=SEED, index=index, step=STEP, stream=Stream.SELECTION)
    u = uniform(SEED, index, STEP, Stream.ACCEPTANCE, 1)[:, 0]
    assert torch.equal(step.accepted, u <= torch.exp(step.log_ratio))
    assert 40 < int(step.accepted.sum()) < 160
    u = uniform(SEED, index, STEP, Stream.SELECTION, 1)[:, 0]
    assert torch.equal(other.accepted, u <= torch.exp(other.log_ratio))
    assert torch.equal(step.x, torch.where(step.accepted[:, None], a[3], a[0]))
    assert torch.equal(step.energy, torch.where(step.accepted, a[4], a[1]))
    assert torch.equal(step.grad, torch.where(step.accepted[:, None], a[5], a[2]))


# --- the kernel ------------------------------------------------------------------------------------------


def assert_same_step(actual: MalaStep, expected: MalaStep) -> None:
    """Equal decisions and states; the ratios differ by the order of their sums."""
    torch.testing.assert_close(actual.log_ratio, expected.log_ratio, atol=2e-5, rtol=1e-5, equal_nan=True)
    assert torch.equal(actual.accepted, expected.accepted)
    for a, b in zip(actual[:3], expected[:3], strict=True):
        for left, right in zip(tensors_of(a), tensors_of(b), strict=True):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)


def compare(a, eta=0.3, **options) -> None:
    count = a[1].shape[0]
    arguments = {"seed": SEED, "index": numbers(count), "step": STEP, "temperature": 0.7} | options
    expected_counts, counts = (torch.full((count, 2), 5, dtype=torch.int64) for _ in range(2))
    expected = mala_accept(*a, eta, counts=expected_counts, **arguments)
    poisoned = [
        torch.full_like(s, math.nan) if isinstance(s, Tensor) else [torch.full_like(t, math.nan) for t in s]
        for s in a[:3]
    ]
    with backend("triton"):
        actual = mala_accept(*a, eta, counts=counts, out=poisoned, **arguments)
    assert_same_step(actual, expected)
    assert torch.equal(counts, expected_counts)
    assert torch.equal(counts[:, 0] - 5, expected.accepted.long())


@needs_interpreter
@pytest.mark.parametrize("shapes", ACCEPTANCE_SHAPES, ids=str)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=["plain", "all options"])
def test_kernel_equals_reference(shapes: list[tuple[int, ...]], options: dict) -> None:
    compare(problem(shapes), **options)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_of_16_bit_positions(dtype: torch.dtype) -> None:
    compare(problem([(8,), (3,)], dtype=dtype), grad_clip=1.0)


@needs_interpreter
@pytest.mark.parametrize(
    "numbers_per_chain",
    [
        {"eta": torch.linspace(0.1, 0.9, 7)},
        {"eta": torch.tensor(0.4)},
        {"temperature": torch.linspace(0.5, 2.0, 7)},
        {"seed": torch.tensor(-9)},
        {"step": torch.tensor(7)},
        {"step": torch.arange(7) + 2**31},
    ],
    ids=lambda options: next(iter(options)),
)
def test_kernel_reads_numbers_and_tensors(numbers_per_chain: dict) -> None:
    compare(problem([(8,), (3,)]), **numbers_per_chain)


@needs_interpreter
def test_kernel_with_int64_offsets() -> None:
    with force_int64_offsets():
        compare(problem([(8,), (5,)]), **OPTIONS[-1])


@either
@pytest.mark.parametrize("columns", [6, 1100])
def test_row_alone_equals_row_in_batch(run: str, columns: int) -> None:
    a, index = problem([(columns,)], 4), numbers(4)
    options = {"seed": SEED, "step": STEP, "grad_clip": 0.9, "prior_precision": 0.4}
    with backend(run):
        batch = mala_accept(*a, 0.3, index=index, **options)
        alone = [
            mala_accept(*(t[i : i + 1] for t in a), 0.3, index=index[i : i + 1], **options) for i in range(9)
        ]
    for k in range(5):
        assert torch.equal(torch.cat([step[k] for step in alone]), batch[k])


@either
def test_in_place_and_strided(run: str) -> None:
    a = problem([(3, 8)], 30)
    options = {"seed": SEED, "index": numbers(30), "step": STEP}
    expected = mala_accept(*a, 0.3, **options)
    assert 3 < int(expected.accepted.sum()) < 27
    with backend(run):
        transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) if t.ndim == 3 else t for t in a]
        assert_same_step(mala_accept(*transposed, 0.3, **options), expected)
        x, energy, grad = (t.clone() for t in a[:3])
        step = mala_accept(x, energy, grad, *a[3:], 0.3, out=(x, energy, grad), **options)
        assert_same_step(step, expected)
        assert step.x is x
        assert step.energy is energy
        assert step.grad is grad
        wide = torch.zeros(60, 3, 8)
        wide[::2] = a[0]
        x, energy, grad = wide[::2], a[1].clone(), a[2].clone()
        assert_same_step(
            mala_accept(x, energy, grad, *a[3:], 0.3, out=(x, energy, grad), **options), expected
        )
        assert torch.equal(wide[::2], expected.x)
        assert torch.all(wide[1::2] == 0)
        pair = [[t[:, :1].clone(), t[:, 1:].clone()] for t in (a[0], a[2], a[3], a[5])]
        energy = a[1].clone()
        out = (pair[0], energy, pair[1])
        step = mala_accept(pair[0], energy, pair[1], pair[2], a[4], pair[3], 0.3, out=out, **options)
        assert torch.equal(torch.cat(pair[0], 1), expected.x)
        assert torch.equal(torch.cat(pair[1], 1), expected.grad)
        assert torch.equal(energy, expected.energy)


@either
def test_empty(run: str) -> None:
    with backend(run):
        step = mala_accept(*problem([(3,)], 0), 0.3, seed=0, index=torch.arange(0), step=0)
    assert step.x.shape == (0, 3)
    assert step.accepted.shape == step.log_ratio.shape == (0,)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@either
@pytest.mark.parametrize(
    "options", [{}, {"grad_clip": 1.0, "prior_precision": 0.5}], ids=["plain", "all options"]
)
@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_not_finite_is_rejected_and_counted(run: str, options: dict, in_place: bool) -> None:
    x, energy, grad, proposal, proposal_energy, proposal_grad = (
        [t.clone() for t in s] if isinstance(s, list) else s.clone() for s in problem([(5,), (2,)], 10)
    )
    proposal_energy -= 100.0  # every proposal would be accepted
    proposal_energy[0], proposal_energy[1], proposal_energy[2] = math.nan, math.inf, -math.inf
    proposal_grad[0][3, 1], proposal_grad[1][4, 0] = math.nan, -math.inf
    proposal[1][5, 1] = math.inf
    proposal[0][6, 4] = math.nan
    energy[7] = math.inf  # a chain that starts outside the support may enter it
    energy[8] = math.nan  # one that has no energy at all can only stay, and is seen
    before = [[t.clone() for t in s] for s in (x, grad)]
    counts = torch.zeros(10, 2, dtype=torch.int64)
    state = (x, energy, grad)
    with backend(run):
        step = mala_accept(
            *(*state, proposal, proposal_energy, proposal_grad, 0.3),
            **{"seed": 1, "index": torch.arange(10), "step": 0, "counts": counts} | options,
            out=state if in_place else None,
        )
    assert step.accepted.tolist() == [False] * 7 + [True, False, True]
    assert torch.isnan(step.log_ratio).tolist() == [True] * 7 + [False, True, False]
    assert counts.tolist() == [[0, 1]] * 7 + [[1, 0], [0, 1], [1, 0]]
    for selected, kept in zip((step.x, step.grad), before, strict=True):
        for a, b in zip(selected, kept, strict=True):
            assert torch.isfinite(a).all()
            assert torch.equal(a[:7], b[:7])


# --- autograd, torch.compile, opcheck --------------------------------------------------------------------


def test_differentiable() -> None:
    a = [t.requires_grad_() for t in problem([(3,)], 4, torch.float64)]
    index = numbers(4)

    def step(*a: Tensor) -> tuple[Tensor, ...]:
        made = mala_accept(*a, 0.3, seed=1, index=index, step=2, grad_clip=1.0, prior_precision=0.5)
        return made.x, made.energy, made.grad, made.log_ratio

    assert torch.autograd.gradcheck(step, a)
    with pytest.raises(ValueError, match="out must be None where a gradient is needed"):
        mala_accept(*a, 0.3, seed=1, index=index, step=2, out=a[:3])


# The op's writes are what AOTAutograd must understand; of the reference Dynamo's part is enough, and faster.
COMPILER = {"reference": "eager", "triton": "aot_eager"}


def two_steps(x: Tensor, index: Tensor, seed: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A step to new tensors, and one in place."""
    counts = torch.zeros(x.shape[0], 2, dtype=torch.int64, device=x.device)
    energy, grad = (x**2).sum(1) / 2, x
    noise = {"seed": seed, "index": index, "step": first}
    proposal = mala_propose(x, grad, 1.5, **noise)
    step = mala_accept(
        x, energy, grad, proposal, (proposal**2).sum(1) / 2, proposal, 1.5, counts=counts, **noise
    )
    x, energy, grad = step.x.clone(), step.energy.clone(), step.grad.clone()
    step = mala_accept(x, energy, grad, -x, energy, -grad, 1.5, out=(x, energy, grad), **noise)
    return step.x, counts, x + step.accepted[:, None]


@either
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(run: str, dynamic: bool) -> None:
    compiled = torch.compile(two_steps, fullgraph=True, dynamic=dynamic, backend=COMPILER[run])
    with backend(run):
        for count in (3, 6) if dynamic else (3,):
            x = normal(2, torch.arange(count), 0, Stream.INITIAL, 8)
            arguments = (x, numbers(count), torch.tensor(SEED), torch.tensor(STEP))
            for actual, expected in zip(compiled(*arguments), two_steps(*arguments), strict=True):
                torch.testing.assert_close(actual, expected, atol=4e-6, rtol=0)


@either
def test_opcheck(run: str) -> None:
    a = problem([(8,), (3,)], 5)
    out = [[torch.empty_like(t) for t in a[0]], torch.empty_like(a[1]), [torch.empty_like(t) for t in a[2]]]
    counts = torch.zeros(5, 2, dtype=torch.int64)
    rest = (numbers(5), None, 0.3, None, 0.7, None, SEED, None, STEP, int(Stream.ACCEPTANCE), 0.5, 0.2)
    with backend(run):
        torch.library.opcheck(
            torch.ops.evalp_fast.mala_accept.default, (*out, counts, *a, *rest), rtol=1e-5, atol=2e-5
        )


def test_reference_maps() -> None:
    a, index = problem([(2, 4)], 3), numbers(2)
    energies = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(1))

    def accept(x: Tensor, energy: Tensor, grad: Tensor, proposal: Tensor, proposal_energy: Tensor, h: Tensor):
        return tuple(
            mala_accept(x, energy, grad, proposal, proposal_energy, h, 0.3, seed=1, index=index, step=2)
        )

    mapped = (a[0], energies[0], a[2], a[3], energies[1], a[5])
    together = torch.vmap(accept)(*mapped)
    for i in range(3):
        for one, all_ in zip(accept(*(t[i] for t in mapped)), together, strict=True):
            assert torch.equal(one, all_[i])


@pytest.mark.parametrize("name", ["step_size", "temperature", "seed", "step", "energy", "counts"])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_over_one_argument(name: str) -> None:
    x, energy, grad, proposal, proposal_energy, proposal_grad = problem([(4,)], 2)
    fixed = {"x": x, "energy": energy, "grad": grad, "proposal": proposal, "step_size": 0.3}
    fixed |= {"proposal_energy": proposal_energy, "proposal_grad": proposal_grad, "index": numbers(2)}
    fixed |= {"seed": 1, "step": 2}
    values = torch.arange(1, 4)
    if name in ("step_size", "temperature"):
        values = values / 10
    elif name == "energy":
        values = values[:, None] * torch.ones(2)
    elif name == "counts":
        values = torch.zeros(3, 2, 2, dtype=torch.int64)

    def accept(value: Tensor) -> tuple:
        return tuple(mala_accept(**(fixed | {name: value})))

    together = torch.vmap(accept)(values)
    for i, value in enumerate(values):
        for one, all_ in zip(accept(value.clone()), together, strict=True):
            torch.testing.assert_close(one, all_[i])
    if name == "counts":
        assert torch.equal(values[:, :, 0], together[3].long())


# --- user errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"proposal": torch.zeros(3, 5)}, ValueError, "proposal must have the shape of x"),
        ({"proposal": torch.zeros(3, 4).half()}, TypeError, "proposal must be torch.float32"),
        ({"proposal_grad": torch.zeros(3, 4).half()}, TypeError, "proposal_grad must be torch.float32"),
        ({"grad": [torch.zeros(3, 4)]}, TypeError, "grad must be a tensor as x is"),
        ({"energy": torch.zeros(3, 1)}, ValueError, r"energy must be torch.float32 of shape \[3\]"),
        ({"energy": 1.0}, TypeError, "energy must be a floating tensor"),
        ({"energy": torch.zeros(3, dtype=torch.int64)}, TypeError, "energy must be a floating tensor"),
        ({"proposal_energy": torch.zeros(3).double()}, ValueError, "proposal_energy must be torch.float32"),
        ({"proposal_energy": torch.zeros(3, device="meta")}, ValueError, "proposal_energy"),
        ({"step_size": -1.0}, ValueError, "step_size must be finite and positive"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and positive"),
        ({"index": torch.arange(4)}, ValueError, "index must have shape"),
        ({"seed": 2**63}, ValueError, "seed must fit in 64 bits"),
        ({"step": -1}, ValueError, "step must be in"),
        ({"stream": -1}, ValueError, "stream must be in"),
        ({"grad_clip": -1.0}, ValueError, "grad_clip"),
        ({"prior_precision": math.inf}, ValueError, "prior_precision"),
        ({"step_size": None}, TypeError, "step_size must be a number or a floating tensor"),
        ({"counts": [[0, 0]] * 3}, TypeError, "counts must be None or an int64 tensor, got list"),
        (
            {"counts": torch.zeros(1, 2, dtype=torch.int64).expand(3, 2)},
            ValueError,
            "counts must not be an exp",
        ),
        ({"out": 3}, TypeError, "out must be the triple"),
        (
            {"out": (torch.zeros(3, 4), torch.zeros(1).expand(3), torch.zeros(3, 4))},
            ValueError,
            r"out\[1\] must not be an expanded tensor",
        ),
        ({"counts": torch.zeros(3, 2)}, ValueError, r"counts must be int64 \[3, 2\]"),
        ({"counts": torch.zeros(3, dtype=torch.int64)}, ValueError, r"counts must be int64 \[3, 2\]"),
        ({"out": (torch.zeros(3, 4), torch.zeros(3))}, ValueError, "out must be the triple"),
        (
            {"out": (torch.zeros(3, 4), torch.zeros(3), torch.zeros(3))},
            ValueError,
            r"out\[2\] must have the shape",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@either
def test_errors_name_the_argument(run: str, bad: dict, error: type[Exception], message: str) -> None:
    zeros = torch.zeros(3, 4)
    good = {
        "x": zeros,
        "grad": zeros,
        "proposal": zeros,
        "proposal_grad": zeros,
        "step_size": 0.1,
        "seed": 0,
        "step": 0,
    }
    good |= {"energy": torch.zeros(3), "proposal_energy": torch.zeros(3), "index": torch.arange(3)}
    with backend(run), pytest.raises(error, match=message):
        mala_accept(**(good | bad))


# --- the law ---------------------------------------------------------------------------------------------

Law = Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> energy, gradient


def chain(x: Tensor, law: Law, steps: int, eta: float, accept=mala_accept, **options) -> tuple[Tensor, float]:
    """`steps` adjusted steps, and the share of proposals that was accepted."""
    index = torch.arange(x.shape[0])
    energy, grad = law(x)
    accepted = 0.0
    for k in range(steps):
        noise = {"seed": 4, "index": index, "step": k} | options
        proposal = mala_propose(x, grad, eta, **noise)
        step = accept(x, energy, grad, proposal, *law(proposal), eta, **noise)
        x, energy, grad = step.x, step.energy, step.grad
        accepted += float(step.accepted.float().mean())
    return x, accepted / steps


def unadjusted(x, energy, grad, proposal, proposal_energy, proposal_grad, eta, **options) -> MalaStep:
    everything = torch.ones(x.shape[0], dtype=torch.bool)
    return MalaStep(proposal, proposal_energy, proposal_grad, everything, torch.zeros(x.shape[0]))


def without_proposal_density(
    x, energy, grad, proposal, proposal_energy, proposal_grad, eta, **options
) -> MalaStep:
    """Metropolis's ratio in place of Hastings's: what one gets by forgetting q."""
    still = torch.zeros_like(x)
    options.pop("grad_clip", None)
    step = mala_accept_reference(x, energy, still, proposal, proposal_energy, still, eta, **options)
    chosen = step.accepted[:, None]
    return step._replace(grad=torch.where(chosen, proposal_grad, grad))


def quadratic(x: Tensor) -> tuple[Tensor, Tensor]:
    return (x**2).sum(1) / 2, x


def gaussian_p_value(eta: float, temperature: float = 1.0, accept=mala_accept, **options) -> float:
    """Does N(0, temperature) stay what it is? What `prior_precision` adds, the energy leaves out."""
    share = options.get("prior_precision", 0.0)
    deviation = math.sqrt(temperature)
    x = deviation * normal(3, torch.arange(30_000), 0, Stream.INITIAL, 2)
    law: Law = lambda x: tuple((1.0 - share) * part for part in quadratic(x))  # noqa: E731
    x, accepted = chain(x, law, 12, eta, accept, temperature=temperature, **options)
    assert 0.2 < accepted <= 1.0
    # KS of each coordinate, and of the radius, which sees what is wrong with the pair.
    tests = [scipy.stats.kstest(x[:, k].numpy() / deviation, "norm").pvalue for k in range(2)]
    tests.append(scipy.stats.kstest(((x**2).sum(1) / temperature).numpy(), scipy.stats.chi2(2).cdf).pvalue)
    return 3.0 * min(tests)


@pytest.mark.parametrize(
    ("eta", "options"),
    [
        (1.0, {}),
        (2.0, {}),
        (1.0, {"temperature": 0.3}),
        (1.5, {"temperature": 2.0, "prior_precision": 0.5}),
        (1.5, {"grad_clip": 0.5}),
        (1.5, {"grad_clip": 0.5, "prior_precision": 0.5, "temperature": 0.7}),
    ],
    ids=str,
)
def test_gaussian_is_invariant(eta: float, options: dict) -> None:
    assert gaussian_p_value(eta, **options) > 3e-3


@pytest.mark.parametrize("broken", [unadjusted, without_proposal_density])
def test_a_broken_ratio_is_told_apart(broken: Callable[..., MalaStep]) -> None:
    assert gaussian_p_value(1.0, accept=broken) < 1e-6


MEANS = torch.tensor([[-1.5, 0.0], [1.5, 0.5], [0.0, 2.0]])
SHARES = torch.tensor([0.5, 0.3, 0.2])
WIDTH = 0.8


def mixture(x: Tensor) -> tuple[Tensor, Tensor]:
    """Energy and gradient of a mixture of three round Gaussians in the plane."""
    offsets = x[:, None, :] - MEANS
    logs = torch.log(SHARES) - (offsets**2).sum(2) / (2 * WIDTH**2)
    gradient = (torch.softmax(logs, dim=1)[:, :, None] * offsets).sum(1) / WIDTH**2
    return -torch.logsumexp(logs, dim=1), gradient


def mixture_draws(count: int) -> Tensor:
    index = torch.arange(count)
    which = torch.searchsorted(torch.cumsum(SHARES, 0), uniform(8, index, 0, Stream.SELECTION, 1)[:, 0])
    return MEANS[which.clamp(max=2)] + WIDTH * normal(8, index, 0, Stream.INITIAL, 2)


def mixture_p_value(x: Tensor) -> float:
    """Chi-square test over a grid of cells, whose probabilities the normal distribution function gives."""
    edges = torch.tensor([-math.inf, -2.5, -1.5, -0.75, 0.0, 0.75, 1.5, 2.5, math.inf], dtype=torch.float64)
    cumulative = torch.special.ndtr((edges[:, None, None] - MEANS.double()) / WIDTH)  # edge, component, axis
    cells = cumulative.diff(dim=0)
    expected = torch.einsum("k,ik,jk->ij", SHARES.double(), cells[:, :, 0], cells[:, :, 1]).flatten()
    place = torch.bucketize(x.double().contiguous(), edges[1:-1])
    observed = torch.bincount(8 * place[:, 0] + place[:, 1], minlength=64).double()
    large = expected * len(x) >= 10
    observed = torch.cat([observed[large], observed[~large].sum()[None]])
    expected = torch.cat([expected[large], expected[~large].sum()[None]]) * len(x)
    return scipy.stats.chisquare(
        observed.numpy(), (expected * observed.sum() / expected.sum()).numpy()
    ).pvalue


def test_mixture_is_invariant() -> None:
    """10^5 exact draws stay exact draws, and the test sees what an unadjusted chain does to them."""
    start = mixture_draws(100_000)
    x, accepted = chain(start, mixture, 15, 0.8)
    assert 0.4 < accepted < 0.95
    assert mixture_p_value(x) > 1e-3
    assert float((x - start).norm(dim=1).median()) > 0.5  # it has moved
    for broken in (unadjusted, without_proposal_density):
        assert mixture_p_value(chain(start, mixture, 15, 0.8, broken)[0]) < 1e-6


def test_mixture_is_reached() -> None:
    """From a point in one mode to the whole law."""
    x, _ = chain(MEANS[:1].repeat(20_000, 1), mixture, 150, 0.8)
    assert mixture_p_value(x) > 1e-3
