"""The latent energy: its value, its gradient, and the second derivative that the gradient penalty needs."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune

from evalp_fast.models.energy import EnergyConfig, MLPEnergy


def new_energy(**shape) -> MLPEnergy:
    torch.manual_seed(0)
    return MLPEnergy(EnergyConfig(**({"dim": 3, "hidden": 8} | shape))).double()


def test_value_is_the_mlp() -> None:
    energy = new_energy(depth=2)
    z = torch.randn(5, 3, dtype=torch.float64)
    first, second, last = energy.layers
    h = F.leaky_relu(z @ first.weight.T + first.bias, 0.01)
    h = F.leaky_relu(h @ second.weight.T + second.bias, 0.01)
    torch.testing.assert_close(energy(z), (h @ last.weight.T + last.bias)[:, 0])
    assert energy(z).shape == (5,)
    assert energy(z[:0]).shape == (0,)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
def test_gradient_is_a_finite_difference(activation: str) -> None:
    energy = new_energy(activation=activation)
    z = torch.randn(6, 3, dtype=torch.float64)
    value, gradient = energy.gradient(z)
    torch.testing.assert_close(value, energy(z))
    step = 1e-6
    for column in range(3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[column] = step
        slope = (energy(z + shift) - energy(z - shift)) / (2 * step)
        torch.testing.assert_close(gradient[:, column], slope, rtol=0, atol=1e-7)


def test_gradient_leaves_no_trace() -> None:
    """Under no_grad, of a tensor that the caller keeps: neither it nor the parameters change."""
    energy = new_energy()
    z = torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        _, gradient = energy.gradient(z)
    assert not z.requires_grad
    assert not gradient.requires_grad
    assert all(parameter.grad is None for parameter in energy.parameters())


def test_gradient_penalty_can_be_differentiated() -> None:
    """Guards against a penalty that is computed but moves nothing (a gradient without a graph)."""
    energy = new_energy(activation="silu")
    z = torch.randn(5, 3, dtype=torch.float64)
    names = [name for name, _ in energy.named_parameters()]

    def penalty(z: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        values = dict(zip(names, parameters, strict=True))
        with torch.nn.utils.stateless._reparametrize_module(energy, values):
            _, gradient = energy.gradient(z)
        return (gradient.norm(dim=1) - 1.0).square().mean()

    arguments = (z.requires_grad_(), *(p.detach().clone().requires_grad_() for p in energy.parameters()))
    assert torch.autograd.gradcheck(penalty, arguments)
    penalty(*arguments).backward()
    for name, argument in zip(names, arguments[1:], strict=True):
        if name != "layers.2.bias":  # the energy's constant has no slope
            assert argument.grad is not None
            assert argument.grad.abs().sum() > 0, name


def test_zero_init_is_the_base() -> None:
    energy = new_energy(zero_init=True)
    assert torch.equal(energy(torch.randn(4, 3, dtype=torch.float64)), torch.zeros(4, dtype=torch.float64))


def test_bf16_is_close() -> None:
    energy = new_energy(hidden=64).float()
    z = torch.randn(100, 3)
    difference = energy(z, precision="bf16") - energy(z)
    assert energy(z, precision="bf16").dtype == torch.float32
    assert 0 < difference.abs().max() < 0.02


@pytest.mark.parametrize(
    ("field", "value"), [("dim", 0), ("hidden", 0), ("depth", 0), ("activation", "gelu")]
)
def test_bad_configuration_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        EnergyConfig(**({"dim": 3} | {field: value}))


def test_bad_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"z must have shape \[N, 3\], got \(2, 4\)"):
        new_energy()(torch.zeros(2, 4, dtype=torch.float64))


class Adapter(torch.nn.Module):
    """A low-rank addition to a layer (LoRA)."""

    def __init__(self, layer: torch.nn.Linear):
        super().__init__()
        self.layer = layer
        self.down = torch.nn.Linear(layer.in_features, 1, bias=False, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.down(x)


class Doubled(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


def adapt(energy: MLPEnergy) -> None:
    energy.layers[1] = Adapter(energy.layers[1])  # type: ignore[arg-type]


def subclass(energy: MLPEnergy) -> None:
    energy.layers[1].__class__ = Doubled


def hook(energy: MLPEnergy) -> None:
    energy.layers[1].register_forward_hook(lambda module, inputs, output: output + 1.0)


class Called(torch.nn.Linear):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().__call__(x)


def call(energy: MLPEnergy) -> None:
    energy.layers[1].__class__ = Called


def drop_bias(energy: MLPEnergy) -> None:
    energy.layers[1] = torch.nn.Linear(8, 8, bias=False, dtype=torch.float64)


def instance(energy: MLPEnergy) -> None:
    layer = energy.layers[1]
    layer.forward = lambda x: torch.relu(F.linear(x, layer.weight))  # type: ignore[method-assign, arg-type]


def prune_some(energy: MLPEnergy) -> None:
    prune.l1_unstructured(energy.layers[1], "weight", amount=0.5)
    with torch.no_grad():
        energy.layers[1].weight_orig.mul_(1.5)  # type: ignore[union-attr, operator]


def normalise(energy: MLPEnergy) -> None:
    torch.nn.utils.parametrizations.weight_norm(energy.layers[1])
    with torch.no_grad():
        energy.layers[1].parametrizations.weight.original0.mul_(1.5)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("change", [adapt, subclass, call, hook, drop_bias, instance, prune_some, normalise])
def test_changed_layers_are_part_of_the_energy(change) -> None:
    """Guards against an energy of the weights alone: of a layer that is left out, or as it was before."""
    energy = new_energy()
    z = torch.randn(5, 3, dtype=torch.float64)
    before = energy(z)
    change(energy)
    first, second, last = energy.layers
    expected = last(F.leaky_relu(second(F.leaky_relu(first(z), 0.01)), 0.01))[:, 0]
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(energy(z), expected)
    value, gradient = energy.gradient(z)
    torch.testing.assert_close(value, expected)
    x = z.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(energy(x).sum(), x)[0])
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = energy.gradient(z.clone())
            assert not any(tensor.requires_grad for tensor in found)
            torch.testing.assert_close(found[1], gradient)
    rows = torch.func.vmap(lambda row: energy.gradient(row[None])[1][0])(z)
    torch.testing.assert_close(rows, gradient)
    if change is not normalise:
        assert gradient.requires_grad, "for a penalty"
        with pytest.raises(TypeError, match=r"layers\[1\] (is a|has)"):
            energy.parameters_in_order()
