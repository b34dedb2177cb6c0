"""Weights that the CPU's products keep: made once, and never those of before."""

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn

from evalp_fast.kernels import weights_cpu
from evalp_fast.kernels.energy import EnergyParameters, mlp_energy, mlp_energy_and_gradient
from evalp_fast.kernels.latent_chain import langevin_chain
from evalp_fast.kernels.weights_cpu import kept_matrices
from evalp_fast.models.energy import EnergyConfig, MLPEnergy
from evalp_fast.models.flow import CouplingFlow, FlowConfig


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The type of every stack of matrices that was made."""
    seen = []
    original = weights_cpu._matrices

    def counting(weight: torch.Tensor, dtype: torch.dtype, transposed: bool) -> weights_cpu.Matrices:
        seen.append(dtype)
        return original(weight, dtype, transposed)

    monkeypatch.setattr(weights_cpu, "_matrices", counting)
    return seen


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@torch.no_grad()
def test_gradients_and_chains_follow_the_weights(precision: Any) -> None:
    """As values and samples do (`test_precision.py`), after a write that no version counter sees."""
    energy, z = MLPEnergy(EnergyConfig(dim=7, hidden=16)), torch.randn(9, 7)

    def run(energy: MLPEnergy) -> list[torch.Tensor]:
        parameters = energy.parameters_in_order(precision)
        chain = langevin_chain(z, parameters, n_steps=2, step_size=0.1, seed=0, precision=precision)
        return [mlp_energy_and_gradient(z, parameters, precision=precision)[1], chain.samples]

    before = run(energy)
    for weight in energy.parameters_in_order().weights[:-1]:
        weight.data.mul_(1.5)
    after, fresh = run(energy), run(copy.deepcopy(energy))
    for old, new, expected in zip(before, after, fresh, strict=True):
        assert torch.equal(new, expected)
        assert not torch.equal(new, old)


@torch.no_grad()
def test_matrices_are_made_once(made: list[torch.dtype]) -> None:
    flow = CouplingFlow(FlowConfig(dim=6, couplings=2, hidden=16))
    for _ in range(3):
        flow(torch.randn(5, 6))
    assert made == 3 * [torch.float32]
    for _ in range(3):
        flow(torch.randn(5, 6), precision="bf16")
    assert made == 3 * [torch.float32] + 3 * [torch.bfloat16]


def test_they_go_with_their_tensor() -> None:
    """Guards against memory that grows with every model."""
    gc.collect()
    count = len(weights_cpu._kept)
    weights = torch.randn(16, 6), torch.randn(1, 16)
    parameters = EnergyParameters(weights, (torch.zeros(16), torch.zeros(1)))
    mlp_energy(torch.randn(3, 6), parameters)
    assert len(weights_cpu._kept) == count + 2
    del weights, parameters
    gc.collect()
    assert len(weights_cpu._kept) == count


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(9, 7), (3, 9, 7), (3, 2, 9, 7), (3, 0, 9, 7), (1, 1)])
def test_norm_bounds_the_products(shape: tuple[int, ...], transposed: bool) -> None:
    weight = torch.randn(shape)
    found = kept_matrices(weight, "ieee", transposed=transposed)
    plain = weight.transpose(-1, -2) if transposed else weight
    assert len(found.each) == weight.shape[:-2].numel()
    largest = plain.double().abs().sum(-1).max() if weight.numel() else torch.tensor(0.0)
    assert found.norm == pytest.approx(largest.item(), rel=1e-6)


@torch.no_grad()
def test_nan_weights(made: list[torch.dtype]) -> None:
    """NaN is unequal to itself, but its bits are not: such a weight is made once, and its results are NaN
    until it changes."""
    weight = nn.Parameter(torch.full((16, 6), float("nan")))
    parameters = EnergyParameters((weight, torch.ones(1, 16)), (torch.zeros(16), torch.zeros(1)))
    for _ in range(2):
        assert mlp_energy(torch.randn(3, 6), parameters, activation="relu").isnan().all()
    assert len(made) == 2
    weight.fill_(1.0)
    assert mlp_energy(torch.ones(3, 6), parameters, activation="relu").tolist() == 3 * [96.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 5), (2, 6, 8)])
def test_any_bit_counts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of sizes that are whole words and not, of matrices that lie in the middle of one, and with gaps."""
    plain = torch.randn(shape).to(dtype)
    shifted = torch.randn(plain.numel() + 1).to(dtype)[1:].view(shape)
    # In a buffer that begins in the middle of a word, where an odd offset is the beginning of one.
    room = torch.zeros(8 * plain.numel() + 16, dtype=torch.uint8).numpy()
    buffer = torch.from_numpy(room[dtype.itemsize :][: (plain.numel() + 8) * dtype.itemsize]).view(dtype)
    inside = [buffer[k : k + plain.numel()].view(shape).normal_() for k in range(5)]
    gaps = torch.randn(*shape, 2).to(dtype)[..., 0]
    for weight in (plain, shifted, plain.mT, gaps, torch._neg_view(torch.randn(shape).to(dtype)), *inside):
        before = kept_matrices(weight, "ieee")
        assert kept_matrices(weight, "ieee") is before
        for place in (0, -1):
            weight[(place,) * weight.ndim] += 1.0
            after = kept_matrices(weight, "ieee")
            assert after is not before
            before = after
        assert before.norm == pytest.approx(weight.float().abs().sum(-1).max().item(), rel=1e-6)


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("hidden", [40, 200, 256])
@torch.no_grad()
def test_rows_do_not_know_their_batch(hidden: int, activation: Any, precision: Any) -> None:
    """Guards against a product that adds up otherwise for few rows, and an order of weights made for some.

    Of rows that fill vectors: what a loop over vectors leaves over may round otherwise, which is why samplers
    work in tiles.
    """
    torch.manual_seed(0)
    flow = CouplingFlow(FlowConfig(dim=12, couplings=2, hidden=hidden, activation=activation))
    for parameter in flow.parameters():
        parameter.copy_(torch.randn_like(parameter) / 12.0)
    energy = MLPEnergy(EnergyConfig(dim=12, hidden=hidden, activation=activation)).parameters_in_order()
    options: Any = {"precision": precision, "activation": activation}
    z = torch.randn(4096, 12)
    x, log_det = flow(z, precision=precision)
    value, gradient = mlp_energy_and_gradient(z, energy, **options)
    alone = mlp_energy(z, energy, **options)
    for rows in (slice(0, 64), slice(128, 320), slice(2048, 4096)):
        found = flow(z[rows], precision=precision)
        assert torch.equal(found[0], x[rows])
        assert torch.equal(found[1], log_det[rows])
        found = mlp_energy_and_gradient(z[rows], energy, **options)
        assert torch.equal(found[0], value[rows])
        assert torch.equal(found[1], gradient[rows])
        assert torch.equal(mlp_energy(z[rows], energy, **options), alone[rows])
