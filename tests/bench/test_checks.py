"""The checks refuse what is wrong, and the textbook that they compare with is right."""

import pytest
import torch

from bench import checks, textbook
from bench.flow_peers import FLOW_PEERS
from bench.harness import absent
from bench.machine import DEVICE
from evalp_fast.models.energy import EnergyConfig, MLPEnergy
from evalp_fast.models.flow import CouplingFlow, FlowConfig

DIM = 6


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# --- checks of draws ----------------------------------------------------------------------------------------


def test_normals() -> None:
    good = torch.randn(20_000, 8)
    checks.standard_normal_rows(good)
    for bad in (
        1.03 * good,
        good + 0.03,
        (torch.rand(20_000, 8) - 0.5) * 12**0.5,
        torch.where(good > 3.5, torch.nan, good),
    ):
        with pytest.raises(AssertionError):
            checks.standard_normal_rows(bad)


def test_normals_with_a_column_twice_or_left_out() -> None:
    good = torch.randn(20_000, 8)
    for bad in (good[:, [0, 0, 2, 3, 4, 5, 6, 7]], torch.cat((good[:, :7], torch.zeros(20_000, 1)), dim=1)):
        with pytest.raises(AssertionError):
            checks.standard_normal_rows(bad)


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 100)])
def test_draws(shape: tuple[int, int]) -> None:
    log_weights = torch.randn(*shape)
    num = shape[1] if shape[0] == 1 else 5
    check = checks.Draws(log_weights, num)
    weights = torch.softmax(log_weights.double(), dim=1)
    check(torch.multinomial(weights, num, replacement=True))
    with pytest.raises(AssertionError, match="chi-square"):  # as if all weights were equal
        check(torch.randint(0, shape[1], (shape[0], num)))
    with pytest.raises(AssertionError, match="chi-square"):  # a temperature that is off by a fifth
        check(torch.multinomial(torch.softmax(1.2 * log_weights.double(), dim=1), num, replacement=True))
    with pytest.raises(AssertionError, match="out of range"):
        check(torch.full((shape[0], num), shape[1]))


def test_relative_error() -> None:
    exact = torch.randn(100, dtype=torch.float64)
    checks.relative_error(exact.float(), exact, 1e-6, "x")
    with pytest.raises(AssertionError, match=r"x is off by 0\.01"):
        checks.relative_error(1.01 * exact, exact, 9e-3, "x")
    with pytest.raises(AssertionError, match="not finite"):
        checks.relative_error(exact / 0, exact, 1.0, "x")


def test_relative_error_from_a_centre() -> None:
    """What all rows have in common hides no error."""
    exact = 100 + torch.randn(100, 3, dtype=torch.float64)
    checks.relative_error(1.001 * exact, exact, 2e-3, "x")
    with pytest.raises(AssertionError, match="x is off"):
        checks.relative_error(1.001 * exact, exact, 2e-3, "x", exact.mean(dim=0))


def test_absolute_error() -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    noise = torch.randn(1000, dtype=torch.float64)
    checks.absolute_error(exact + 0.09 * noise, exact, 0.1, "x")
    with pytest.raises(AssertionError, match=r"x is off by 0\.1"):
        checks.absolute_error(exact + 0.12 * noise, exact, 0.1, "x")
    with pytest.raises(AssertionError, match=r"x is off on average by 0\.05"):
        checks.absolute_error(exact + 0.05, exact, 0.1, "x")
    with pytest.raises(AssertionError, match="not finite"):
        checks.absolute_error(exact / 0, exact, 0.1, "x")


def test_rows_agree() -> None:
    exact = torch.randn(100, 5, dtype=torch.float64)
    other = exact.clone()
    other[:10] += 1
    checks.rows_agree(other, exact, 1e-6, 0.9, "x")
    with pytest.raises(AssertionError, match=r"90.0% of the rows of x are right, not 91%"):
        checks.rows_agree(other, exact, 1e-6, 0.91, "x")


def test_some_rows() -> None:
    assert checks.some(5, 8).tolist() == [0, 1, 2, 3, 4]
    for count in (8, 9, 100, 10**7 + 1):
        rows = checks.some(count, 8)
        assert len(set(rows.tolist())) == 8
        assert rows.tolist() == sorted(rows.tolist())
        assert rows[:2].tolist() == [0, 1]
        assert rows[-2:].tolist() == [count - 2, count - 1]
    assert checks.some(1000, 8).diff().max() < 300


# --- the textbook -------------------------------------------------------------------------------------------


def test_the_flow_is_invertible_and_its_log_determinant_that_of_its_jacobian() -> None:
    weights, order = textbook.flow_weights(DIM, 4, 16, 2).double(), textbook.shuffle(DIM)
    u = torch.randn(5, DIM, dtype=torch.float64, device=DEVICE)
    z, log_det = textbook.flow_forward(weights, order, u)
    back, minus = textbook.flow_inverse(weights, order, z)
    torch.testing.assert_close(back, u)
    torch.testing.assert_close(minus, -log_det)
    for row in range(5):
        jacobian = torch.autograd.functional.jacobian(
            lambda v: textbook.flow_forward(weights, order, v[None])[0][0], u[row]
        )
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_det[row])


def test_the_flow_is_the_package_s() -> None:
    for dim in (6, 7):
        weights, order = textbook.flow_weights(dim, 4, 16, 2), textbook.shuffle(dim)
        flow = CouplingFlow(FlowConfig(dim, 4, 16)).to(DEVICE)
        with torch.no_grad():
            for name, value in vars(weights).items():
                getattr(flow, name).copy_(value)
            u = torch.randn(50, dim, device=DEVICE)
            torch.testing.assert_close(flow(u), textbook.flow_forward(weights, order, u))
            z = flow(u)[0]
            torch.testing.assert_close(
                flow.log_prob(z), textbook.flow_log_prob(weights, order, z), rtol=1e-5, atol=1e-4
            )


def test_the_energy_is_the_package_s_and_its_gradient_right() -> None:
    weights = textbook.energy_weights(DIM, 16, 2)
    energy = MLPEnergy(EnergyConfig(DIM, 16, 2, "silu")).to(DEVICE)
    with torch.no_grad():
        for layer, weight, bias in zip(energy.layers, weights.weights, weights.biases, strict=True):
            layer.weight.copy_(weight)  # type: ignore[union-attr,operator]
            layer.bias.copy_(bias)  # type: ignore[union-attr,operator]
    z = torch.randn(50, DIM, device=DEVICE)
    torch.testing.assert_close(energy.gradient(z), textbook.energy_and_gradient(weights, z))


def test_counts_of_operations() -> None:
    # 3 -> 16 -> 16 -> 2·3, four times; 6 -> 16 -> 16 -> 1.
    assert textbook.flow_weights(DIM, 4, 16, 2).flops() == 4 * 2 * (3 * 16 + 16 * 16 + 16 * 6)
    assert textbook.energy_weights(DIM, 16, 2).flops() == 2 * (6 * 16 + 16 * 16 + 16)


@pytest.mark.parametrize("name", FLOW_PEERS)
@pytest.mark.parametrize("dim", [6, 7])
def test_the_peers_compute_the_same_flow(name: str, dim: int) -> None:
    needed, make = FLOW_PEERS[name]
    missing = absent(needed)()
    if missing is not None:
        pytest.skip(missing)
    weights, order = textbook.flow_weights(dim, 4, 16, 2), textbook.shuffle(dim)
    peer = make(weights)
    with torch.no_grad():
        z = textbook.flow_forward(weights, order, torch.randn(100, dim, device=DEVICE))[0]
        exact = textbook.flow_log_prob(weights.double(), order, z.double())
        torch.testing.assert_close(peer.log_prob(z).double(), exact, rtol=1e-5, atol=1e-4)
        torch.manual_seed(1)
        drawn = peer.sample(20_000)
        drawn = drawn[0] if isinstance(drawn, tuple) else drawn
        torch.manual_seed(1)
        noise = peer.base(20_000)
        checks.standard_normal_rows(noise)
        exact = textbook.flow_forward(weights.double(), order, noise.double())[0]
        torch.testing.assert_close(drawn.double(), exact, rtol=1e-5, atol=1e-4)
        calls = []
        for module in peer.network.modules():
            if isinstance(module, torch.nn.Linear) and module.in_features == (dim + 1) // 2:
                module.register_forward_hook(lambda *_: calls.append(1))
        peer.log_prob(z)
        assert len(calls) == 4, "a conditioner runs more than once"
