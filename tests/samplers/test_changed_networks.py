"""What a user changes in a prior's networks, by hooks or by assignment, is part of the law of its samples."""

from typing import Any

import pytest
import torch
from small_prior import LANGEVIN, METHODS, new_prior
from torch import Tensor
from torch.nn.utils import parametrizations

from evalp_fast.models.energy import MLPEnergy
from evalp_fast.priors import EnergyPrior, SamplingOptions


class Steeper(MLPEnergy):
    def forward(self, z: Tensor, *, precision: Any = None) -> Tensor:
        return 30.0 * super().forward(z, precision=precision)


def steepen_by_hook(energy: MLPEnergy) -> None:
    energy.register_forward_hook(lambda module, inputs, output: 30.0 * output)


def steepen_by_a_layers_hook(energy: MLPEnergy) -> None:
    energy.layers[-1].register_forward_hook(lambda module, inputs, output: 30.0 * output)


@pytest.mark.parametrize("steepen", [steepen_by_hook, steepen_by_a_layers_hook])
@pytest.mark.parametrize("base", ["gaussian", "flow"])
@pytest.mark.parametrize("name", ["sir", "latent", "noise"])
def test_hooks_are_part_of_every_methods_law(steepen: Any, base: str, name: str) -> None:
    """Guards against methods that see a user's changes beside methods that do not."""
    hooked, own = new_prior(base, 1.0), new_prior(base, 1.0)
    steepen(hooked.energy_net)
    own.energy_net = Steeper(own.config.energy).requires_grad_(False)
    own.energy_net.load_state_dict(hooked.energy_net.state_dict())
    found = hooked.draw(20, **METHODS[name])
    assert found.info["path"] == "composed"
    if name != "noise":
        assert "hooks" in found.info["reason"] or base == "flow"
    torch.testing.assert_close(found.samples, own.sample(20, **METHODS[name]), rtol=0, atol=1e-5)
    assert not torch.allclose(
        found.samples, new_prior(base, 1.0).sample(20, **METHODS[name]), rtol=0, atol=1e-4
    )


def test_hooks_of_a_flow_are_part_of_its_law() -> None:
    hooked = new_prior()
    hooked.flow.register_forward_hook(lambda module, inputs, output: (output[0] + 1.0, output[1]))
    for name in ("flow", "sir"):
        found = hooked.draw(20, **METHODS[name])
        assert "flow has hooks" in found.info["reason"]
    torch.testing.assert_close(
        hooked.sample(20, method="flow"), new_prior().sample(20, method="flow") + 1.0, rtol=0, atol=1e-5
    )


def change_in_place(prior: EnergyPrior) -> None:
    prior.energy_net.layers[-1].weight.mul_(3.0)  # type: ignore[union-attr, operator]


def change_by_assignment(prior: EnergyPrior) -> None:
    state = {name: 1.5 * tensor for name, tensor in prior.state_dict().items()}
    prior.load_state_dict(state, assign=True)


def change_the_data(prior: EnergyPrior) -> None:
    for parameter in prior.parameters():
        parameter.data = 1.5 * parameter.data


def change_the_network(prior: EnergyPrior) -> None:
    prior.flow = new_prior().flow
    prior.flow.weight_out.normal_(std=0.3)


def change_by_parametrization(prior: EnergyPrior) -> None:
    parametrizations.spectral_norm(prior.energy_net.layers[0])  # type: ignore[arg-type]


CHANGES = (
    change_in_place,
    change_by_assignment,
    change_the_data,
    change_the_network,
    change_by_parametrization,
)


@pytest.mark.parametrize("base", ["gaussian", "flow"])
@pytest.mark.parametrize("space", ["latent", "noise"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_chain_sees_the_weights_of_the_moment(base: str, space: str, change: Any) -> None:
    """Guards against a sampler that keeps networks, parameters or numbers of the time when it was made."""
    options: Any = {"space": space, **LANGEVIN}
    prior, index = new_prior(base, 1.0).eval(), torch.arange(8)
    sampler = prior.sampler("langevin", options=SamplingOptions(**options))
    before = sampler(0, index).samples
    change(prior)
    after = sampler(0, index).samples
    assert not torch.equal(before, after)
    assert torch.equal(after, prior.sampler("langevin", options=SamplingOptions(**options))(0, index).samples)
