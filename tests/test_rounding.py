"""What bfloat16 products may do to samples before nobody should be given them without asking."""

import math

import pytest
import torch

from evalp_fast import EVaLP
from evalp_fast.models.energy import EnergyConfig, MLPEnergy
from evalp_fast.models.flow import CouplingFlow, FlowConfig
from evalp_fast.priors import EnergyPrior, PriorConfig, SamplingOptions
from evalp_fast.rounding import flow_draws_as_well, weights_are_as_good

CLAMP = 8.0


def ridge(width: float) -> CouplingFlow:
    """One coupling, z = (u0, 3·u0 + width·u1) but for the mixing: all of it in its last layer."""
    flow = CouplingFlow(FlowConfig(2, couplings=1, hidden=4, depth=1, clamp=CLAMP, mixing="swap"))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.zero_()
        flow.weight_in[0, :2, 0] = torch.tensor([1.0, -1.0])  # u0 = relu(u0) - relu(-u0)
        flow.weight_out[0, 1, :2] = torch.tensor([3.0, -3.0])
        flow.bias_out[0, 0] = CLAMP * math.atanh(math.log(width) / CLAMP)
    return flow


def width_of(flow: CouplingFlow, precision: str) -> float:
    u = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z, _ = flow(u, precision=precision)  # type: ignore[arg-type]
    return float((z[:, 0] - 3.0 * z[:, 1]).std())


def slope(steepness: float) -> MLPEnergy:
    """f(z) = steepness·z0, through rounded layers."""
    energy = MLPEnergy(EnergyConfig(2, hidden=4, depth=2, activation="relu"))
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.zero_()
        first, second, last = (layer for layer in energy.layers if isinstance(layer, torch.nn.Linear))
        first.weight[:2, 0] = torch.tensor([1.0, -1.0])
        second.weight[:2, :2] = torch.eye(2)
        last.weight[0, :2] = steepness * torch.tensor([1.0, -1.0])
    return energy


@pytest.mark.parametrize(("width", "good"), [(1.0, True), (0.3, True), (0.03, False), (0.003, False)])
def test_narrow_ridges_stay_in_float32(width: float, good: bool) -> None:
    """What is called good hardly shows in a hundred thousand draws, and the narrowest gets twice as wide."""
    flow = ridge(width)
    assert width_of(flow, "ieee") == pytest.approx(width, rel=0.01)
    assert flow_draws_as_well(flow, 1.0) is good
    widened = width_of(flow, "bf16") / width_of(flow, "ieee")
    if good:
        assert widened == pytest.approx(1.0, abs=0.005)
    if width == 0.003:
        assert widened > 2.0


@pytest.mark.parametrize(
    ("steepness", "scale", "good"),
    [(1.0, 1.0, True), (100.0, 1.0, False), (1.0, 100.0, False), (100.0, 0.01, True)],
)
def test_steep_energies_stay_in_float32(steepness: float, scale: float, good: bool) -> None:
    """Where they are called good, the weights of bfloat16 are as equal as 0.03 nats let them be."""
    energy = slope(steepness)
    assert weights_are_as_good(ridge(1.0), energy, scale, 1.0) is good
    z = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = (energy(z, precision="bf16") - energy(z)) * scale
    ess = float(apart.softmax(dim=0).square().sum().reciprocal()) / len(z)
    assert ess > 0.999 if good else ess < 0.98


def test_numbers_that_are_none_stay_in_float32() -> None:
    flow, energy = ridge(1.0), slope(1.0)
    with torch.no_grad():
        flow.bias_out[0, 0] = math.nan
        energy.layers[0].bias[0] = math.nan  # type: ignore[index, union-attr]
    assert not flow_draws_as_well(flow, 1.0)
    assert not weights_are_as_good(ridge(1.0), energy, 1.0, 1.0)


def test_draws_leave_no_gradient_and_no_generator_behind() -> None:
    flow, state = ridge(1.0), torch.get_rng_state()
    assert flow_draws_as_well(flow, 1.0)
    assert all(parameter.grad is None for parameter in flow.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def prior_of(flow: CouplingFlow, energy: MLPEnergy, kl_weight: float = 1.0) -> EnergyPrior:
    prior = EnergyPrior(PriorConfig(flow.config, energy.config, kl_weight=kl_weight))
    prior.flow, prior.energy_net = flow, energy
    return prior


def test_the_default_is_what_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of flow and SIR: the energy counts where there are weights, as it is divided by w and T."""
    monkeypatch.setattr("evalp_fast.kernels.processor.BFLOAT16_PAYS", True)
    cold = SamplingOptions(temperature=0.01)

    def chosen(prior: EnergyPrior, options: SamplingOptions | None = None) -> list[str]:
        return [prior.default_precision(method, options) for method in ("prior", "flow", "sir")]  # type: ignore[arg-type]

    assert chosen(prior_of(ridge(0.3), slope(1.0))) == ["bf16", "bf16", "bf16"]
    assert chosen(prior_of(ridge(0.3), slope(100.0))) == ["bf16", "bf16", "ieee"]
    assert chosen(prior_of(ridge(0.3), slope(1.0), kl_weight=0.01)) == ["bf16", "bf16", "ieee"]
    assert chosen(prior_of(ridge(0.3), slope(1.0)), cold) == ["bf16", "bf16", "ieee"]
    assert chosen(prior_of(ridge(0.003), slope(1.0))) == ["bf16", "ieee", "ieee"]
    monkeypatch.setattr("evalp_fast.kernels.processor.BFLOAT16_PAYS", False)
    assert chosen(prior_of(ridge(0.3), slope(1.0))) == ["ieee", "ieee", "ieee"]


def test_the_shipped_model_is_drawn_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evalp_fast.kernels.processor.BFLOAT16_PAYS", True)
    model = EVaLP.from_pretrained("mnist")
    for method in ("prior", "flow", "sir"):
        assert model.sample_with_diagnostics(1, method=method).info["precision"] == "bf16"
