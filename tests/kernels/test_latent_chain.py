"""The latent chain in one launch: against the composed steps, and against laws that are known."""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from evalp_fast.kernels.chain_reference import (
    ChainOptions,
    ChainResult,
    chain_start_reference,
    chain_step_reference,
)
from evalp_fast.kernels.energy import EnergyParameters, mlp_energy, mlp_energy_and_gradient
from evalp_fast.kernels.langevin import langevin_step
from evalp_fast.kernels.latent_chain import langevin_chain
from evalp_fast.kernels.launch import (
    HAS_TRITON,
    INTERPRETED,
    backend,
    force_int64_offsets,
    recorded_launches,
)
from evalp_fast.kernels.metropolis import mala_accept

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED), reason="needs Triton, on a GPU or interpreted"
)
on_each_backend = pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=needs_kernel)])
OPTIONS: dict[str, Any] = {
    "step_size": 0.3,
    "temperature": 0.8,
    "prior_precision": 0.7,
    "energy_scale": 1.7,
    "seed": 3,
    "first_step": 5,
}
# A few steps of maps whose slope is near 1 multiply the rounding of sums of at most 100 terms.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
ops: Any = torch.ops.evalp_fast


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN, so that an element which no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(dim: int, hidden: int, depth: int, seed: int = 0) -> EnergyParameters:
    generator = torch.Generator().manual_seed(seed)
    sizes = [dim, *[hidden] * depth, 1]

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(DEVICE)

    return EnergyParameters(
        tuple(draw(sizes[i + 1], sizes[i], scale=1.2 / sizes[i] ** 0.5) for i in range(depth + 1)),
        tuple(draw(size, scale=0.3) for size in sizes[1:]),
    )


def points(n: int, dim: int, seed: int = 1) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def composed(
    z: Tensor,
    parameters: EnergyParameters,
    n_steps: int,
    index: Tensor,
    *,
    step_size: float,
    temperature: float,
    prior_precision: float,
    energy_scale: float,
    seed: int,
    first_step: int,
    activation: Any,
    adjusted: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same chain by public functions of single steps: samples, acceptance and all states."""

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = mlp_energy_and_gradient(x, parameters, activation=activation)
        return energy_scale * value, energy_scale * slope

    x, states = z, []
    accepted = torch.zeros(len(z), device=z.device)
    value, slope = evaluate(x)
    for step in range(first_step, first_step + n_steps):
        noise: dict[str, Any] = {"seed": seed, "index": index, "step": step, "temperature": temperature}
        moved = cast(Tensor, langevin_step(x, slope, step_size, prior_precision=prior_precision, **noise))
        new_value, new_slope = evaluate(moved)
        if adjusted:
            outcome = mala_accept(
                x,
                value,
                slope,
                moved,
                new_value,
                new_slope,
                step_size,
                prior_precision=prior_precision,
                **noise,
            )
            x, value, slope = cast(Tensor, outcome.x), outcome.energy, cast(Tensor, outcome.grad)
            accepted += outcome.accepted
        else:
            x, value, slope = moved, new_value, new_slope
        states.append(x)
    return x, accepted / n_steps if adjusted else torch.ones_like(accepted), states


@on_each_backend
@pytest.mark.parametrize("adjusted", [False, True])
@pytest.mark.parametrize(
    ("depth", "dim", "hidden", "rows", "activation"),
    [
        (1, 5, 40, 7, "relu"),
        (2, 33, 50, 70, "leaky_relu"),
        (3, 2, 24, 33, "silu"),
        (2, 70, 20, 3, "silu"),
        (1, 1, 9, 1, "silu"),
    ],
)
def test_the_chain_is_the_composed_one(
    name: str, depth: int, dim: int, hidden: int, rows: int, activation: Any, adjusted: bool
) -> None:
    parameters, z = make(dim, hidden, depth), points(rows, dim)
    before = z.clone()
    index = torch.randperm(1 << 12, generator=torch.Generator().manual_seed(0))[:rows].to(DEVICE) << 30
    options = {**OPTIONS, "activation": activation, "adjusted": adjusted}
    wanted, acceptance, states = composed(z, parameters, 7, index, **options)
    with backend(name):
        got = langevin_chain(z, parameters, n_steps=7, index=index, thin=3, return_trajectory=True, **options)
    torch.testing.assert_close(got.samples, wanted, **CLOSE)
    torch.testing.assert_close(got.acceptance, acceptance)
    torch.testing.assert_close(got.energy, mlp_energy(wanted, parameters, activation=activation), **CLOSE)
    assert got.trajectory is not None
    torch.testing.assert_close(got.trajectory, torch.stack([states[2], states[5]]), **CLOSE)
    assert torch.equal(z, before)
    if adjusted and rows > 30:
        assert 0.3 < float(acceptance.mean()) < 1.0  # both decisions are there


@on_each_backend
@pytest.mark.parametrize("adjusted", [False, True])
def test_two_halves_continue_one_chain(name: str, adjusted: bool) -> None:
    parameters, z = make(6, 20, 2), points(9, 6)
    options = {**OPTIONS, "adjusted": adjusted}
    with backend(name):
        whole = langevin_chain(z, parameters, n_steps=6, **options)
        first = langevin_chain(z, parameters, n_steps=3, **options)
        second = langevin_chain(first.samples, parameters, n_steps=3, **{**options, "first_step": 8})
    assert torch.equal(second.samples, whole.samples)
    assert torch.equal(second.energy, whole.energy)
    torch.testing.assert_close((first.acceptance + second.acceptance) / 2, whole.acceptance)


@on_each_backend
@pytest.mark.parametrize("adjusted", [False, True])
def test_a_row_does_not_depend_on_its_batch(name: str, adjusted: bool) -> None:
    if name == "reference" and DEVICE == "cpu":
        pytest.skip("products of the CPU's library depend on the batch")
    parameters, z = make(6, 20, 2), points(70, 6)
    index = torch.arange(100, 170, device=DEVICE)
    options = {**OPTIONS, "adjusted": adjusted, "n_steps": 4}
    with backend(name):
        whole = langevin_chain(z, parameters, index=index, **options)
        for rows in (slice(0, 1), slice(31, 66)):
            part = langevin_chain(z[rows], parameters, index=index[rows], **options)
            for got, wanted in zip(part[:3], whole[:3], strict=True):
                assert torch.equal(got, wanted[rows])


@needs_kernel
@pytest.mark.parametrize("adjusted", [False, True])
def test_int64_offsets_strides_and_numbers_on_the_device(adjusted: bool) -> None:
    parameters, wide = make(6, 20, 2), points(20, 12)
    options = {**OPTIONS, "adjusted": adjusted, "n_steps": 4, "return_trajectory": True}
    on_device = {
        "seed": torch.tensor([3], device=DEVICE),
        "first_step": torch.tensor(5, device=DEVICE),
    }
    for z in (wide[:, ::2], wide[::2, 3:9]):
        with backend("triton"):
            wanted = langevin_chain(z.contiguous(), parameters, **options)
            with force_int64_offsets():
                got = langevin_chain(z, parameters, **{**options, **on_device})
        assert all(torch.equal(cast(Tensor, a), cast(Tensor, b)) for a, b in zip(got, wanted, strict=True))
        with backend("reference"):
            torch.testing.assert_close(
                langevin_chain(z, parameters, **{**options, **on_device}).samples, got.samples, **CLOSE
            )


@pytest.mark.parametrize(
    ("rows", "n_steps", "wide"), [(1 << 10, 4, False), (1 << 25, 4, True), (1 << 10, 1 << 15, True)]
)
def test_offsets_are_64_bits_where_states_or_records_are_long(rows: int, n_steps: int, wide: bool) -> None:
    parameters = EnergyParameters(*(tuple(t.to("meta") for t in group) for group in make(128, 20, 2)))
    with recorded_launches() as launches:
        langevin_chain(
            torch.empty(rows, 128, device="meta"),
            parameters,
            n_steps=n_steps,
            step_size=0.1,
            return_trajectory=True,
        )
    assert [launch.constants["INT64"] for launch in launches] == [wide]


@on_each_backend
def test_no_rows_no_steps_and_no_record(name: str) -> None:
    parameters, z = make(3, 10, 2), points(5, 3)
    with backend(name):
        empty = langevin_chain(z[:0], parameters, n_steps=3, step_size=0.1, return_trajectory=True)
        still = langevin_chain(z, parameters, n_steps=0, step_size=0.1, return_trajectory=True)
        short = langevin_chain(z, parameters, n_steps=3, step_size=0.1, thin=4, return_trajectory=True)
    assert empty.samples.shape == (0, 3)
    assert cast(Tensor, empty.trajectory).shape == (3, 0, 3)
    assert torch.equal(still.samples, z)
    assert torch.equal(still.acceptance, torch.ones_like(still.acceptance))
    torch.testing.assert_close(still.energy, mlp_energy(z, parameters))
    for result in (still, short):
        assert cast(Tensor, result.trajectory).shape == (0, 5, 3)


@on_each_backend
def test_proposals_of_non_finite_energy_are_rejected(name: str) -> None:
    """f overflows where z is positive and large: no chain may go there, and the others are not touched."""
    weights = (torch.tensor([[1e30], [-1.0]]), torch.tensor([[1e30, 0.3]]))
    parameters = EnergyParameters(
        tuple(w.to(DEVICE) for w in weights), (torch.zeros(2, device=DEVICE), torch.zeros(1, device=DEVICE))
    )
    z = torch.full((300, 1), -0.05, device=DEVICE)
    with backend(name):
        ended = langevin_chain(z, parameters, n_steps=8, step_size=1.0, adjusted=True, activation="relu")
    assert torch.isfinite(ended.samples).all()
    assert (ended.samples <= 0).all()
    assert torch.isfinite(ended.energy).all()
    assert 0.2 < float(ended.acceptance.mean()) < 0.9


@on_each_backend
def test_a_chain_that_starts_at_nan_stays_and_says_so(name: str) -> None:
    parameters, z = make(3, 10, 2), points(4, 3)
    z[1, 0] = float("nan")
    with backend(name):
        ended = langevin_chain(z, parameters, n_steps=5, step_size=0.1, adjusted=True)
    assert ended.energy.isnan().tolist() == [False, True, False, False]
    assert ended.acceptance[1] == 0.0
    assert torch.isfinite(ended.samples[[0, 2, 3]]).all()


def one_dimension() -> tuple[EnergyParameters, Any]:
    """f(z) = 2·relu(z - 0.5) + relu(-z - 1): a law of one number, and its cumulative distribution.

    p ∝ exp(-(1.5·f(z) + 0.8·z²/2)/0.9) by quadrature.
    """
    parameters = EnergyParameters(
        (torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0, 1.0]])),
        (torch.tensor([-0.5, -1.0]), torch.zeros(1)),
    )
    z = np.linspace(-9.0, 9.0, 200_001)
    f = 2.0 * np.maximum(z - 0.5, 0.0) + np.maximum(-z - 1.0, 0.0)
    density = np.exp(-(1.5 * f + 0.4 * z * z) / 0.9)
    cumulative = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    on_device = EnergyParameters(*(tuple(t.to(DEVICE) for t in group) for group in parameters))
    return on_device, lambda x: np.interp(x, z, cumulative / cumulative[-1])


FEW = 640
LAW: dict[str, Any] = {
    "step_size": 1.0,
    "temperature": 0.9,
    "prior_precision": 0.8,
    "energy_scale": 1.5,
    "activation": "relu",
}


def ends(name: str, **changes: Any) -> tuple[np.ndarray, Any, ChainResult]:
    """The ends of chains that start at points of a broad law, and the law of one dimension."""
    parameters, cumulative = one_dimension()
    # The interpreter's time goes with the programs and steps. The chain forgets its start in a few.
    count, n_steps = (4000, 40) if name == "reference" else (FEW, 12)
    with backend(name):
        result = langevin_chain(
            points(count, 1, seed=5),
            parameters,
            n_steps=n_steps,
            seed=11,
            **{**LAW, "adjusted": True, **changes},
        )
    return result.samples[:, 0].double().cpu().numpy(), cumulative, result


@on_each_backend
def test_mala_has_the_exact_law(name: str) -> None:
    """Kolmogorov-Smirnov against the law by quadrature. Chains are independent, and at this step they mix in
    a few steps. What it would reject, at the same number of chains, are the next two tests.
    """
    samples, cumulative, result = ends(name)
    assert scipy.stats.kstest(samples, cumulative).pvalue > 1e-3
    # A step that accepts nearly everything would not tell adjusted chains from unadjusted ones.
    assert 0.3 < float(result.acceptance.mean()) < 0.95


@pytest.mark.parametrize(
    ("changes", "chains"),
    [
        ({"adjusted": False}, FEW),
        ({"prior_precision": 0.0}, FEW),
        ({"energy_scale": 0.75}, 4000),
        ({"temperature": 1.8}, 4000),
    ],
)
def test_the_test_of_the_law_has_power(changes: dict[str, float], chains: int) -> None:
    """The errors that the test above is for, which it rejects at 1e-6: the chain without acceptance or
    without the prior's term, also at the number of chains that the interpreter runs; half the scale, twice
    the temperature.
    """
    samples, cumulative, _ = ends("reference", **changes)
    assert scipy.stats.kstest(samples[:chains], cumulative).pvalue < 1e-6


@pytest.mark.parametrize(
    ("name", "step_size"),
    [("reference", 0.1), ("reference", 1.0), pytest.param("triton", 1.0, marks=needs_kernel)],
)
def test_unadjusted_variance_on_a_quadratic(name: str, step_size: float) -> None:
    """With f = 0 the chain is an autoregression, x' = (1 - ηλ/2)·x + sqrt(ηT)·ξ, of stationary variance
    T/(λ·(1 - ηλ/4)): at η = 1, λ = 1.6 that is 1.67 of that of the law it aims at, T/λ.
    """
    precision, temperature = 1.6, 0.7
    zero = make(4, 8, 1)
    parameters = EnergyParameters((zero.weights[0], zero.weights[1] * 0.0), (zero.biases[0], zero.biases[1]))
    count, n_steps = (600, 60) if step_size < 0.5 else (600, 6)
    variance = temperature / (precision * (1.0 - step_size * precision / 4.0))
    with backend(name):
        result = langevin_chain(
            points(count, 4) * variance**0.5,
            parameters,
            n_steps=n_steps,
            step_size=step_size,
            temperature=temperature,
            prior_precision=precision,
            seed=2,
        )
    samples = result.samples.double()
    # 2400 independent numbers: a chi-square of that many degrees of freedom, two-sided at 1e-3.
    statistic = float(samples.square().sum()) / variance
    assert 1e-3 < scipy.stats.chi2.cdf(statistic, samples.numel()) < 1.0 - 1e-3
    for wrong in (temperature / precision, variance * 1.15, variance / 1.15):
        if abs(wrong / variance - 1.0) > 0.14:
            share = scipy.stats.chi2.cdf(float(samples.square().sum()) / wrong, samples.numel())
            assert not 1e-3 < share < 1.0 - 1e-3
    torch.testing.assert_close(result.energy, zero.biases[1].expand(count))


@on_each_backend
def test_acceptance_falls_with_the_step(name: str) -> None:
    parameters, z = make(8, 16, 2), points(64, 8)
    rates = []
    with backend(name):
        for step_size in (0.01, 0.8, 6.0):
            result = langevin_chain(
                z, parameters, n_steps=6, step_size=step_size, adjusted=True, activation="silu"
            )
            torch.testing.assert_close((result.acceptance * 6).round() / 6, result.acceptance)
            rates.append(float(result.acceptance.mean()))
    assert rates[0] > 0.98
    assert 0.98 > rates[1] > rates[2] + 0.2


def test_one_step_of_the_reference_compiles_in_one_graph() -> None:
    torch.compiler.reset()
    parameters, z = make(4, 10, 2), points(6, 4)
    index = torch.arange(6, device=DEVICE)
    step = torch.zeros((), dtype=torch.int64, device=DEVICE)

    options = ChainOptions(3, 0.3, 1.0, True, 1.0, 1.0, "ieee", "leaky_relu", 3, 0, 1, False)

    def advance(state: Any, step: Tensor) -> Any:
        return chain_step_reference(state, parameters, index, step, options)

    compiled = torch.compile(advance, fullgraph=True, backend="aot_eager")
    state = other = chain_start_reference(z, parameters, options)
    for t in range(3):
        state, other = advance(state, step + t), compiled(other, step + t)
    for got, wanted in zip(other, state, strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic: bool) -> None:
    torch.compiler.reset()
    parameters = make(4, 10, 1)

    def function(z: Tensor) -> Tensor:
        return langevin_chain(z, parameters, n_steps=2, step_size=0.2, adjusted=True).samples

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 7):
        z = points(rows, 4)
        torch.testing.assert_close(compiled(z), function(z), **CLOSE)


@pytest.mark.parametrize("recorded", [False, True])
def test_opcheck(recorded: bool) -> None:
    parameters = make(4, 12, 2)
    args = (
        points(5, 4),
        list(parameters.weights),
        list(parameters.biases),
        torch.arange(5, device=DEVICE),
        *(None, 3, None, 0, 4, 0.1, 1.0, True, 1.0, 1.0, 0, 1, 2, recorded),
    )
    torch.library.opcheck(ops.langevin_chain.default, args)


def test_nothing_is_recorded_for_autograd() -> None:
    parameters, z = make(4, 6, 1), points(3, 4).requires_grad_()
    assert not langevin_chain(z, parameters, n_steps=2, step_size=0.1).samples.requires_grad


def test_errors_name_the_argument() -> None:
    parameters, z = make(4, 6, 1), points(3, 4)
    good: dict[str, Any] = {"n_steps": 2, "step_size": 0.1}
    index = torch.arange(3, device=DEVICE)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "n_steps must be at least 0", {"n_steps": -1}),
        (TypeError, "n_steps must be an int", {"n_steps": 2.0}),
        (ValueError, "thin must be at least 1", {"thin": 0}),
        (ValueError, "step_size must be positive", {"step_size": 0.0}),
        (ValueError, "temperature must be positive", {"temperature": float("inf")}),
        (ValueError, "prior_precision must be", {"prior_precision": -1.0}),
        (ValueError, "energy_scale must be finite", {"energy_scale": float("nan")}),
        (TypeError, "index must be an int64", {"index": index.int()}),
        (ValueError, r"index must have shape \[3\]", {"index": index[:2]}),
        (ValueError, "seed must fit", {"seed": 1 << 63}),
        (ValueError, "first_step must be in", {"first_step": (1 << 32) - 1}),
        (ValueError, "first_step must be in", {"first_step": -1}),
        (TypeError, "first_step must be", {"first_step": index}),
        (ValueError, "precision must be", {"precision": "half"}),
        (ValueError, "activation must be", {"activation": "gelu"}),
    ]
    for kind, message, change in cases:
        with pytest.raises(kind, match=message):
            langevin_chain(z, parameters, **{**good, **change})
    with pytest.raises(ValueError, match=r"weights\[0\] must have shape"):
        langevin_chain(z[:, :3], parameters, **good)


def test_wide_states_take_the_composed_chain() -> None:
    parameters = make(600, 4, 1)
    with backend("triton"), pytest.raises(RuntimeError, match="600 columns"):
        langevin_chain(points(2, 600), parameters, n_steps=1, step_size=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "bound"), [("ieee", 1e-4), ("tf32", 1e-2), ("bf16", 5e-2)])
@pytest.mark.parametrize("adjusted", [False, True])
@pytest.mark.parametrize(
    ("dim", "hidden", "depth"), [(16, 192, 2), (128, 200, 2), (64, 256, 1), (33, 100, 3)]
)
def test_precisions_on_a_gpu(
    dim: int, hidden: int, depth: int, adjusted: bool, precision: Any, bound: float
) -> None:
    """20 steps against float64 with the same noise: all rows unadjusted. Adjusted, rows whose decisions were
    all the same, which are nearly all: a decision turns where the rounding crosses it.
    """
    parameters, z = make(dim, hidden, depth), points(5000, dim)
    exact = EnergyParameters(*(tuple(t.double() for t in group) for group in parameters))
    options: dict[str, Any] = {"n_steps": 20, "step_size": 0.05, "adjusted": adjusted, "activation": "silu"}
    wanted = langevin_chain(z.double(), exact, **options)
    got = langevin_chain(z, parameters, precision=precision, **options)
    distance = (got.samples.double() - wanted.samples).square().mean(dim=1).sqrt()
    near = distance <= bound * wanted.samples.square().mean().sqrt()
    assert float(near.double().mean()) >= (0.9 if adjusted else 1.0)
