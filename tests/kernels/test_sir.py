"""SIR in one launch: the kernel against the composed reference, the reference against the sampler that is
made of modules, the law of the draws, memory, and errors.

Which bugs the statistical tests see is tested beside them, on broken races and weights.
"""

import math
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from evalp_fast.kernels import philox, sir_reference
from evalp_fast.kernels import sir as sir_module
from evalp_fast.kernels.energy import EnergyParameters, mlp_energy
from evalp_fast.kernels.flow import FlowParameters, coupling_flow
from evalp_fast.kernels.launch import HAS_TRITON, INTERPRETED, backend, force_int64_offsets
from evalp_fast.kernels.sir import SIRResult, group_of, log_weight_of, sir, sir_fits, weighting
from evalp_fast.priors import EnergyConfig, EnergyPrior, FlowConfig, PriorConfig, SamplingOptions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.usefixtures("unrounded_tf32"),
]
needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED), reason="needs Triton, on a GPU or interpreted"
)
# Such a flow has its hidden layers in memory in "ieee", and in registers in "tf32", which is float32 here in
# the interpreter alone.
each_form = pytest.mark.parametrize("precision", ["ieee", *["tf32"] * INTERPRETED])


@pytest.fixture(autouse=True)
def poison():
    """Uninitialised memory is filled, so that an element which no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def networks(
    dim: int,
    depth: int = 2,
    *,
    couplings: int = 2,
    hidden: int = 12,
    flow_depth: int = 2,
    normalised: bool = False,
    scale: float = 1.3,
    dtype: torch.dtype = torch.float32,
) -> tuple[FlowParameters, EnergyParameters]:
    """A flow and an energy with weights of a size that makes log-determinants and weights vary."""
    changed, passed = dim // 2, (dim + 1) // 2

    def stack(seed: int, *shape: int) -> Tensor:
        fan = shape[-1] if len(shape) > 2 else 1
        return (normals(seed, *shape) * scale / math.sqrt(fan)).to(DEVICE, dtype)

    flow = FlowParameters(
        stack(1, couplings, hidden, passed),
        stack(2, couplings, hidden),
        stack(3, couplings, flow_depth - 1, hidden, hidden),
        stack(4, couplings, flow_depth - 1, hidden),
        stack(5, couplings, 2 * changed, hidden),
        stack(6, couplings, 2 * changed),
        stack(7, couplings, dim) * 0.3 if normalised else None,
        stack(8, couplings, dim) if normalised else None,
    )
    widths = [dim, *[10] * depth, 1]
    weights = [
        (normals(10 + i, widths[i + 1], widths[i]) * 1.5 / math.sqrt(widths[i])).to(DEVICE, dtype)
        for i in range(depth + 1)
    ]
    biases = [(normals(20 + i, widths[i + 1]) * 0.3).to(DEVICE, dtype) for i in range(depth + 1)]
    return flow, EnergyParameters(tuple(weights), tuple(biases))


def on_both(*arguments: Any, **options: Any) -> tuple[SIRResult, SIRResult]:
    with backend("reference"):
        expected = sir(*arguments, **options)
    with backend("triton"):
        return expected, sir(*arguments, **options)


def compare(actual: SIRResult, expected: SIRResult, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual.z, expected.z, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual.log_weight, expected.log_weight, rtol=tolerance, atol=tolerance)
    assert torch.equal(actual.diagnostics.non_finite, expected.diagnostics.non_finite)
    for name in ("ess", "log_mean_weight", "log_max"):
        pair = (getattr(result.diagnostics, name) for result in (actual, expected))
        torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)


# --- the kernel ---------------------------------------------------------------------------------------------

CASES = {
    "gaussian base": (6, 2, 7, 5, {}),
    "flow base": (5, 1, 7, 5, {"base": "flow"}),
    "flow base, tempered": (5, 3, 3, 5, {"base": "flow", "temperature": 1.4, "energy_activation": "silu"}),
    "gaussian base, tempered": (3, 2, 7, 5, {"temperature": 0.7, "energy_scale": 3.0}),
    "energy alone": (7, 3, 7, 5, {"weights": "energy", "temperature": 1.3}),
    "one proposal": (4, 1, 7, 1, {}),
    "swap, no clamp": (9, 1, 2, 4, {"mixing": "swap", "clamp": None, "flow_activation": "silu"}),
    "a hundred": (5, 1, 3, 100, {"base": "flow", "temperature": 1.2}),
    "one sample": (8, 1, 1, 3, {}),
}


@needs_kernel
@each_form
@pytest.mark.parametrize("name", sorted(CASES))
def test_the_kernel_draws_what_the_reference_draws(name: str, precision: str) -> None:
    """The winner too: a wrong one is another sample, far beyond the tolerance."""
    dim, depth, n, proposals, options = CASES[name]
    options = {"precision": precision, **options}
    expected, actual = on_both(3, 11, n, proposals, *networks(dim, depth, couplings=1 + (n > 3)), **options)
    assert actual.z.shape == (n, dim)
    compare(actual, expected)


@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=needs_kernel)])
def test_a_low_temperature_costs_no_accuracy(name: str) -> None:
    """All weights share D/2·((1 - 1/T)·log 2π + log T), -1.2 million here, of which float32 keeps the nearest
    eighth. Guards against a race, and sums, of weights that it was added to."""
    flow, energy = networks(128, 1, couplings=1, scale=2e-3)
    stacks: Any = (None if stack is None else stack.double() for stack in flow)
    groups: Any = (tuple(tensor.double() for tensor in group) for group in energy)
    exact = FlowParameters(*stacks), EnergyParameters(*groups)
    arguments: Any = (2, 0, 4, 9)
    options: dict[str, Any] = {"temperature": 1e-4, "energy_scale": 3e-3}
    expected = sir(*arguments, *exact, **options)
    with backend(name):
        actual = sir(*arguments, flow, energy, **options)
    torch.testing.assert_close(actual.z.double(), expected.z, rtol=0, atol=1e-5)
    ess = expected.diagnostics.ess
    assert float(ess.min()) > 1.5  # else nothing is shown
    torch.testing.assert_close(actual.diagnostics.ess.double(), ess, rtol=2e-3, atol=0)
    assert float(expected.log_weight.abs().min()) > 1e6
    torch.testing.assert_close(actual.log_weight.double(), expected.log_weight, rtol=1e-6, atol=0)
    for field in ("log_mean_weight", "log_max"):
        pair = getattr(actual.diagnostics, field).double(), getattr(expected.diagnostics, field)
        torch.testing.assert_close(*pair, rtol=1e-6, atol=0)


@needs_kernel
@each_form
def test_normalised_flows_of_every_depth(precision: str) -> None:
    for flow_depth in (1, 3):
        flow, energy = networks(6, 1, couplings=1, flow_depth=flow_depth, normalised=True)
        expected, actual = on_both(5, 0, 3, 4, flow, energy, precision=precision)
        compare(actual, expected)


@needs_kernel
@pytest.mark.parametrize("group", [2, 4, 16])
def test_rows_that_share_a_sample_choose_as_one_row_does(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposals that do not fill the last turn, and a sample whose group straddles nothing."""
    flow, energy = networks(4, 1, couplings=1)
    monkeypatch.setattr(sir_module, "group_of", lambda *_: group)
    expected, actual = on_both(9, 1 << 33, 9, 6, flow, energy)
    compare(actual, expected)


@needs_kernel
def test_seeds_and_indices_may_be_in_memory_and_offsets_long() -> None:
    flow, energy = networks(4, 1, couplings=1)
    index = torch.tensor([7, (1 << 40) + 3, 8, 7], device=DEVICE)
    seed = torch.tensor([-5], device=DEVICE)
    expected = sir(-5, 0, 4, 3, flow, energy, index=index)
    with backend("triton"), force_int64_offsets():
        actual = sir(seed, 0, 4, 3, flow, energy, index=index)
        alone = sir(seed, 7, 2, 3, flow, energy)
    compare(actual, expected)
    assert torch.equal(actual.z[0], actual.z[3])
    # In another batch, at another place of its tile, a sample has the same bits.
    assert torch.equal(alone.z, actual.z[[0, 2]])
    for name in ("ess", "log_mean_weight"):
        pair = getattr(alone.diagnostics, name), getattr(actual.diagnostics, name)[[0, 2]]
        assert torch.equal(*pair)


@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=needs_kernel)])
def test_useless_weights_are_zero_and_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An energy that is NaN for about half of all z, and one that is for all; rows that share a sample."""
    monkeypatch.setattr(sir_module, "group_of", lambda *_: 4)
    flow, _ = networks(2, couplings=1, scale=0.0)
    # A ReLU of a finite z is infinite where z₀ > 0, and 0·inf is NaN.
    energy = EnergyParameters(
        (torch.tensor([[3e38, 0.0], [0.0, 1.0]], device=DEVICE), torch.tensor([[1e38, 1.0]], device=DEVICE)),
        (torch.zeros(2, device=DEVICE), torch.zeros(1, device=DEVICE)),
    )
    options: dict[str, Any] = {"base": "flow", "energy_activation": "relu", "energy_scale": -1.0}
    with backend("reference"):
        expected = sir(1, 0, 6, 9, flow, energy, **options)
    with backend(name):
        result = sir(1, 0, 6, 9, flow, energy, **options)
        assert torch.equal(result.diagnostics.non_finite, expected.diagnostics.non_finite)
        assert (result.z[:, 0] < 1e3).all()
        assert result.log_weight.isfinite().all()
        assert (result.diagnostics.non_finite > 0).all()
        assert (result.diagnostics.non_finite < 9).all()
        assert (result.diagnostics.ess <= 9 - result.diagnostics.non_finite + 1e-4).all()
        useless = energy._replace(biases=(energy.biases[0], energy.biases[1] + math.nan))
        with pytest.raises(ValueError, match="sample 40: none of its 3 proposals"):
            sir(1, 40, 2, 3, flow, useless, **options)


@needs_kernel
def test_an_empty_batch_and_a_network_that_does_not_fit() -> None:
    flow, energy = networks(4, 1)
    for result in on_both(0, 5, 0, 10, flow, energy):
        assert result.z.shape == (0, 4)
        assert result.diagnostics.non_finite.shape == (0,)
    double = networks(4, 1, dtype=torch.float64)
    assert sir_fits(flow, energy) is None
    assert "float64" in str(sir_fits(*double))
    wide = networks(4, 1, hidden=600)[0]
    assert "the flow: " in str(sir_fits(wide, energy))
    assert "the energy: " in str(sir_fits(flow, networks(4, 4)[1]))
    with backend("triton"), pytest.raises(RuntimeError, match="float64"):
        sir(0, 0, 3, 4, *double)


def test_groups_depend_on_proposals_and_waste_little() -> None:
    for proposals in (1, 2, 5, 7, 64, 100, 1000, 10_000):
        group = group_of(proposals, 64)
        assert 1 <= group <= 16
        turns = -(-proposals // group) + 1
        assert turns * group <= 1.05 * (proposals + 1)
    assert (group_of(1, 64), group_of(100, 64), group_of(1000, 64), group_of(1000, 8)) == (1, 4, 16, 8)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("ieee", 1e-4), ("tf32", 2e-2), ("bf16", 1e-1)])
def test_on_a_gpu(precision: Any, tolerance: float) -> None:
    """ieee: winner and all. Else most winners are the same, and those have z and weight within rounding."""
    flow, energy = networks(16, 2, couplings=4, hidden=64)
    with backend("reference"):
        expected = sir(3, 0, 4096, 100, flow, energy)
    actual = sir(3, 0, 4096, 100, flow, energy, precision=precision)
    same = (actual.z - expected.z).abs().amax(1) < tolerance
    assert same.double().mean() > (0.999 if precision == "ieee" else 0.8)
    difference = (actual.log_weight - expected.log_weight)[same].abs()
    assert difference.quantile(0.99) < 5 * tolerance
    assert torch.equal(actual.z, sir(3, 0, 4096, 100, flow, energy, precision=precision).z)
    part = sir(3, 1000, 37, 100, flow, energy, precision=precision)
    assert torch.equal(part.z, actual.z[1000:1037])
    assert torch.equal(part.diagnostics.ess, actual.diagnostics.ess[1000:1037])


# --- the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["gaussian", "flow"])
@pytest.mark.parametrize("weights", ["exact", "energy"])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_it_is_the_sampler_of_the_modules(base: Any, weights: Any, temperature: float) -> None:
    """Of `EnergyPrior`, whose weights and race are written separately."""
    kl_weight = 0.25 if base == "gaussian" else 1.0
    config = PriorConfig(FlowConfig(5, 3, 12), EnergyConfig(5, 10), base, kl_weight)
    prior = EnergyPrior(config)
    with torch.no_grad():
        for i, parameter in enumerate(prior.parameters()):
            parameter.copy_(normals(i, *parameter.shape) * 0.4)
    names = ("weight_in", "bias_in", "weight_hidden", "bias_hidden", "weight_out", "bias_out")
    stacks: Any = (getattr(prior.flow, name).detach() for name in names)
    flow = FlowParameters(*stacks, None, None)
    layers: Any = list(prior.energy_net.layers)
    energy = EnergyParameters(
        tuple(layer.weight.detach() for layer in layers), tuple(layer.bias.detach() for layer in layers)
    )
    options = SamplingOptions(temperature=temperature, proposals=37, weights=weights)
    expected = prior.sampler("sir", options=options)(3, torch.arange(11, 31))
    with backend("reference"):
        actual = sir(
            3,
            11,
            20,
            37,
            flow,
            energy,
            base=base,
            weights=weights,
            temperature=temperature,
            energy_scale=1.0 / kl_weight,
        )
    torch.testing.assert_close(actual.z, expected.samples, rtol=1e-5, atol=1e-5)
    for name, value in expected.diagnostics.items():
        torch.testing.assert_close(getattr(actual.diagnostics, name), value, rtol=2e-5, atol=2e-5)


def test_blocks_do_not_change_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, energy = networks(4, dtype=torch.float64)
    whole = sir(3, 0, 11, 50, flow, energy)
    monkeypatch.setattr(sir_reference, "_AT_ONCE", 16)
    compare(sir(3, 0, 11, 50, flow, energy), whole, 1e-12)
    compare(sir(3, 4, 1, 50, flow, energy), sir(3, 0, 1, 50, flow, energy, index=torch.tensor([4])), 1e-12)


def test_memory_does_not_grow_with_proposals() -> None:
    """Of the reference: no tensor has room for all proposals, or all weights, of the samples."""
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            out = function(*arguments, **(keywords or {}))
            leaves = torch.utils._pytree.tree_leaves(out)
            largest = max([largest, *(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))])
            return out

    flow, energy = networks(4, 1, couplings=1)
    sizes = []
    for proposals in (40, 160, 640):
        largest = 0
        with backend("reference"), Largest():
            sir(0, 0, 256, proposals, flow, energy)
        sizes.append(largest)
    assert sizes[0] == sizes[1] == sizes[2]


# --- the law ------------------------------------------------------------------------------------------------

PROPOSALS, SAMPLES = 7, 8000


def all_proposals(n: int, proposals: int) -> tuple[Tensor, Tensor, Tensor, Any]:
    """z `[n, proposals, D]`, their log-weights and log-determinants, by the ops alone; and the networks."""
    flow, energy = networks(4, 1, scale=1.3, dtype=torch.float64)
    z, log_weights, log_dets = [], [], []
    for k in range(proposals):
        u = philox.normal(5, range(n), k, philox.Stream.PROPOSAL, 4, dtype=torch.float64, device=DEVICE)
        x, log_det = coupling_flow(u, flow)
        f = mlp_energy(x, energy)
        z.append(x)
        log_dets.append(log_det)
        log_weights.append(
            -f
            + torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
            - (torch.distributions.Normal(0.0, 1.0).log_prob(u).sum(1) - log_det)
        )
    return torch.stack(z, 1), torch.stack(log_weights, 1), torch.stack(log_dets, 1), (flow, energy)


def p_value(winner: Tensor, log_weights: Tensor, *keys: Tensor) -> float:
    """The lowest of chi-square tests, one a key, that winners are draws in proportion to their weights.

    Proposals are sorted by the key, and with P the mass before the winner and p its own, P + V·p is uniform
    for V uniform, whatever the weights are. Sorting puts the power where favour for large keys shows.
    """
    values = []
    for key in keys:
        order = key.argsort(dim=1, descending=True)
        mass = log_weights.softmax(1).gather(1, order)
        place = (order == winner[:, None]).double().argmax(1, keepdim=True)
        before = (mass.cumsum(1) - mass).gather(1, place)
        v = torch.rand(place.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        transform = (before + v.to(mass.device) * mass.gather(1, place)).flatten()
        counts = torch.histc(transform, 20, 0.0, 1.0).cpu()
        values.append(float(scipy.stats.chisquare(counts.numpy()).pvalue))
    return min(values)


def test_the_winner_is_a_categorical_draw() -> None:
    """8,000 winners among 7 proposals each. Guards against clocks that proposals or samples share, against
    weights that lack a term, and against a best kept by weight; all of which the next test shows it sees."""
    z, log_weights, log_dets, parameters = all_proposals(SAMPLES, PROPOSALS)
    result = sir(5, 0, SAMPLES, PROPOSALS, *parameters)
    distance = (z - result.z[:, None]).abs().amax(2)
    assert distance.amin(1).max() < 1e-9
    winner = distance.argmin(1)
    torch.testing.assert_close(result.log_weight, log_weights.gather(1, winner[:, None]).squeeze(1))
    assert p_value(winner, log_weights, log_weights, log_dets) > 1e-3


def test_the_test_sees_a_wrong_race() -> None:
    _, log_weights, log_dets, _ = all_proposals(SAMPLES, PROPOSALS)
    log_weights, log_dets = log_weights.cpu(), log_dets.cpu()
    index, keys = torch.arange(SAMPLES), (log_weights, log_dets)
    clocks = torch.cat(
        [philox.exponential(5, index, k, philox.Stream.SELECTION, 4, dtype=torch.float64) for k in range(2)],
        1,
    )
    clocks = clocks[:, :PROPOSALS].log()
    assert p_value((log_weights - clocks).argmax(1), log_weights, *keys) > 1e-3
    broken = {
        "one clock for all proposals": log_weights - clocks[:, :1],
        "one clock for four proposals": log_weights - clocks[:, torch.arange(PROPOSALS) // 4 * 4],
        "four clocks, over and over": log_weights - clocks[:, torch.arange(PROPOSALS) % 4],
        "the same clocks for all samples": log_weights - clocks[:1],
        "no log-determinant": log_weights - log_dets - clocks,
        "kept by weight": log_weights,
        "unweighted": -clocks,
    }
    values = {bug: p_value(arrival.argmax(1), log_weights, *keys) for bug, arrival in broken.items()}
    assert max(values.values()) < 1e-6, values


def mixture_networks(centre: float = 0.8, share: float = 0.6) -> tuple[FlowParameters, EnergyParameters]:
    """A flow, and the energy of a mixture of N(±(centre, 0), I) on the Gaussian: p = N·exp(-f), log Z = 0.

    f(z) = centre²/2 - log(share·e^t + (1 - share)·e^-t), t = centre·z₀, as one hidden layer of ReLUs, which
    interpolates it between knots 1/8 apart: within 1/512 of it, as |f''| is at most 1. The flow is wider than
    the mixture, so that weights hardly vary.
    """
    flow, _ = networks(2, couplings=3, hidden=16, scale=0.25)
    flow.bias_out[:, 0] = torch.tensor([0.2, 0.3, 0.1])
    flow.bias_out[:, 1] *= 0.2

    def f(t: Tensor) -> Tensor:
        return centre**2 / 2 - torch.logaddexp(math.log(share) + t, math.log(1.0 - share) - t)

    knots = torch.arange(-5.0, 5.0, 0.125, dtype=torch.float64)
    slopes = (f(knots + 0.125) - f(knots)) / 0.125
    bends = torch.cat((slopes[:1], slopes.diff()))
    weight = torch.stack((torch.full_like(knots, centre), torch.zeros_like(knots)), 1)
    energy = EnergyParameters(
        (weight.float().to(DEVICE), bends[None].float().to(DEVICE)),
        ((-knots).float().to(DEVICE), f(knots[:1]).float().to(DEVICE)),
    )
    return flow, energy


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_the_law_is_the_mixture_in_bf16_too(precision: Any, gaussian_mixture) -> None:
    """A chi-square test of 4,000 samples against exact cells. Guards against weights that lack a term.

    SIR with K proposals is off by a noncentrality of about N·Var_p(w)/K², here below 1.
    """
    mixture = gaussian_mixture((0.6, 0.4), ((0.8, 0.0), (-0.8, 0.0)), ((1.0, 1.0), (1.0, 1.0)))
    flow, energy = mixture_networks()
    options: dict[str, Any] = {"energy_activation": "relu", "precision": precision}
    result = sir(2, 0, 4000, 64, flow, energy, **options)
    assert mixture.p_value(result.z.cpu()) > 1e-3
    # Each sample's mean weight estimates Z = 1 without bias; the energy is known to 1/512.
    means = result.diagnostics.log_mean_weight.double().exp()
    error = float(means.std()) / math.sqrt(len(means))
    assert error < 3e-3
    assert abs(float(means.mean()) - 1.0) < 4 * error + 2e-3
    # It can fail: the published weights sample another law.
    wrong = sir(2, 0, 4000, 16, flow, energy, weights="energy", **options)
    assert mixture.p_value(wrong.z.cpu()) < 1e-9


def test_a_flow_in_bf16_is_a_flow_with_its_own_density() -> None:
    """What keeps bf16 weights exact: the rounded map is undone to float32's accuracy, with the same
    log-determinant, though it is another map than float32's."""
    flow, _ = networks(6, couplings=3)
    u = normals(1, 200, 6).float().to(DEVICE)
    z, log_det = coupling_flow(u, flow, precision="bf16")
    back, back_log_det = coupling_flow(z, flow, precision="bf16", inverse=True)
    exact, exact_log_det = coupling_flow(u, flow)
    undone = (back - u).abs().amax(1) < 1e-4
    # Where a rounding of the way back falls on the other side of a tie, the way back is another.
    assert undone.double().mean() > 0.9
    assert (back_log_det + log_det)[undone].abs().max() < 1e-4
    assert (z - exact).abs().max() > 1e-3
    assert (log_det - exact_log_det).abs().max() > 1e-3


def test_a_flow_and_an_energy_that_do_nothing_have_log_z_0() -> None:
    flow, energy = networks(5, dtype=torch.float64)
    stacks: Any = (None if stack is None else torch.zeros_like(stack) for stack in flow)
    still = FlowParameters(*stacks)
    result = sir(2, 0, 4, 9, still, energy, energy_scale=0.0)
    assert result.diagnostics.log_mean_weight.abs().max() < 1e-12
    torch.testing.assert_close(result.diagnostics.ess, torch.full_like(result.log_weight, 9.0))


def test_weights_are_the_formula() -> None:
    """Against the densities themselves, at T != 1, in both bases."""
    u, z, f, log_det = normals(1, 6, 3) * 1.2, normals(2, 6, 3), normals(3, 6), normals(4, 6)
    temperature = 1.44
    one = torch.ones((), dtype=torch.float64)
    tempered = torch.distributions.Normal(0.0 * one, 1.2 * one).log_prob(u).sum(1) - log_det
    standard = torch.distributions.Normal(0.0 * one, one)
    bases = {"gaussian": standard.log_prob(z).sum(1), "flow": standard.log_prob(u).sum(1) - log_det}
    for base, log_base in bases.items():
        rule = weighting(base, "exact", 2.0, temperature, 3)
        weight = log_weight_of(rule, z, u, log_det, f) + rule.offset
        torch.testing.assert_close(weight, (log_base - 2.0 * f) / temperature - tempered)
        weight = log_weight_of(weighting(base, "energy", 2.0, temperature, 3), z, u, log_det, f)
        torch.testing.assert_close(weight, -2.0 * f / temperature)


# --- the interface ------------------------------------------------------------------------------------------


def arguments_of_op(n: int = 3, **options: Any) -> tuple[Any, ...]:
    flow, energy = networks(4, 1, couplings=1, **options)
    rule = weighting("gaussian", "exact", 1.0, 1.2, 4)
    index = torch.arange(n, device=DEVICE)
    settings = ("ieee", "relu", "leaky_relu", 2.0, "shuffle")
    networks_ = (*flow, list(energy.weights), list(energy.biases))
    return (index, None, 3, 0, n, 4, *networks_, *rule, 1.2, *settings)


def test_opcheck() -> None:
    operator: Any = torch.ops.evalp_fast.sir.default
    torch.library.opcheck(operator, (None, torch.tensor([3], device=DEVICE), *arguments_of_op()[2:]))


@pytest.mark.parametrize("dynamic", [None, True])
def test_it_compiles_as_one_graph(dynamic: bool | None) -> None:
    """One graph where shapes are dynamic, two where the first call's are taken for constants. Guards against
    a number that Python must know, which would compile anew for each, or not at all."""
    flow, energy = networks(4, 1)

    def draw(seed: int, start: int, n: int) -> Tensor:
        result = sir(seed, start, n, 5, flow, energy)
        return result.z * result.diagnostics.ess[:, None]

    def draw_these(index: Tensor) -> Tensor:
        return sir(3, 0, index.shape[0], 5, flow, energy, index=index).z

    cases: list[tuple[Any, list[tuple[Any, ...]]]] = [
        (draw, [(3, 2, 6), (3, 2, 7), (3, 2, 9)]),
        (draw, [(3, 2, 6), (4, 2, 6), (5, 2, 6)]),
        (draw, [(3, 2, 6), (3, 4, 6), (3, 5, 6)]),
        (draw_these, [(torch.arange(3, n, device=DEVICE),) for n in (6, 8, 12)]),
    ]
    for function, calls in cases:
        torch.compiler.reset()
        graphs = CompileCounterWithBackend("eager")
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=graphs)
        for arguments in calls:
            torch.testing.assert_close(compiled(*arguments), function(*arguments))
        assert graphs.frame_count == (1 if dynamic else 2)


def test_errors_name_the_argument() -> None:
    flow, energy = networks(4, 1)
    good: dict[str, Any] = {
        "seed": 0, "start": 0, "n": 3, "proposals": 4, "flow": flow, "energy": energy
    }  # fmt: skip
    bad: list[tuple[str, Any, type[Exception]]] = [
        ("seed", 1.0, TypeError),
        ("seed", 1 << 63, ValueError),
        ("seed", torch.tensor([1.0]), TypeError),
        ("start", -1, ValueError),
        ("start", 1 << 56, ValueError),
        ("n", -1, ValueError),
        ("n", 2.0, TypeError),
        ("proposals", 0, ValueError),
        ("proposals", True, TypeError),
        ("base", "uniform", ValueError),
        ("weights", "none", ValueError),
        ("energy_scale", math.inf, ValueError),
        ("temperature", 0.0, ValueError),
        ("precision", "fp8", ValueError),
        ("mixing", "none", ValueError),
        ("clamp", -1.0, ValueError),
        ("index", [0, 1, 2], TypeError),
        ("index", torch.zeros(2, dtype=torch.int64, device=DEVICE), ValueError),
        ("device", "meta", ValueError),
        ("energy", networks(6, 1)[1], ValueError),
        ("energy", networks(4, 1, dtype=torch.float64)[1], TypeError),
        ("flow", None, TypeError),
        ("energy", None, TypeError),
    ]
    for name, value, error in bad:
        changed: Any = good | {name: value}
        with pytest.raises(error) as raised:
            sir(**changed)
        assert name in str(raised.value) or "parameters" in str(raised.value), (name, str(raised.value))
    for name in ("flow_activation", "energy_activation"):
        with pytest.raises(ValueError, match="activation must be one of"):
            sir(**(good | {name: "tanh"}))
