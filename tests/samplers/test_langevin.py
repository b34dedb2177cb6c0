"""Langevin chains: the law that each kind of chain keeps, at which temperature, and what is recorded."""

import math

import pytest
import torch
from torch import Tensor

from evalp_fast.kernels.langevin import langevin_step
from evalp_fast.models.flow import CouplingFlow, FlowConfig
from evalp_fast.samplers.base import draw
from evalp_fast.samplers.direct import GaussianSampler
from evalp_fast.samplers.langevin import LangevinSampler, energy_and_gradient, langevin

PRECISION = torch.tensor([0.5, 1.0, 2.0])


def quadratic(x: Tensor) -> Tensor:
    """U(x) = Σ a·x²/2: at temperature T the law is N(0, T/a)."""
    return 0.5 * (PRECISION.to(x) * x.square()).sum(dim=1)


def starts(n: int, dim: int = 3, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_unadjusted_law_on_a_quadratic(temperature: float) -> None:
    """x ← (1 - ηa/2)x + √(ηT)ξ has the variance T/(a(1 - ηa/4)), not T/a. Guards against η taken for η/2."""
    step_size, n = 0.6, 20_000
    x = langevin(starts(n), quadratic, n_steps=100, step_size=step_size, temperature=temperature).samples
    variance = temperature / (PRECISION * (1 - step_size * PRECISION / 4))
    relative = x.square().mean(dim=0) / variance - 1
    assert relative.abs().max() < 4 * math.sqrt(2 / n)
    # Such a deviation is visible: the law without the step's bias is excluded.
    assert (variance / (temperature / PRECISION) - 1).max() > 20 * math.sqrt(2 / n)


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_adjusted_law_on_a_quadratic(temperature: float) -> None:
    """The same step without its bias."""
    step_size, n = 0.6, 20_000
    chains = langevin(
        starts(n), quadratic, n_steps=100, step_size=step_size, temperature=temperature, adjusted=True
    )
    relative = chains.samples.square().mean(dim=0) * PRECISION / temperature - 1
    assert relative.abs().max() < 4 * math.sqrt(2 / n)
    assert 0.5 < chains.acceptance.mean() < 0.999


def mixture_chains(mixture, *, adjusted: bool) -> Tensor:
    """10⁵ samples: 20,000 chains, each recorded 5 times, from step 40 on and 20 steps apart.

    The chains start from a law that is wrong (one broad Gaussian). A step of 0.5 crosses the whole law within
    a few steps, so that states 20 steps apart are as good as independent, as the chi-square test assumes.
    """
    chains = langevin(
        starts(20_000, 2, 2.0),
        lambda z: -mixture.log_prob(z),
        n_steps=120,
        step_size=0.5,
        adjusted=adjusted,
        thin=20,
        return_trajectory=True,
        seed=2,
    )
    assert chains.trajectory is not None
    assert chains.trajectory.shape == (6, 20_000, 2)
    return chains.trajectory[1:].flatten(0, 1)


def test_adjusted_law_is_the_mixture(mixture) -> None:
    """Guards against a wrong acceptance ratio: one without the proposal densities, or with a sign turned."""
    samples = mixture_chains(mixture, adjusted=True)
    assert samples.shape == (100_000, 2)
    assert mixture.p_value(samples) > 1e-3


def test_the_test_sees_the_bias_of_the_unadjusted_step(mixture) -> None:
    assert mixture.p_value(mixture_chains(mixture, adjusted=False)) < 1e-9


def test_latent_and_noise_space_have_one_law(mixture) -> None:
    """A chain on u with the volume element ends, through the flow, where a chain on z does.

    Guards against the log-determinant left out, which the second half does on purpose.
    """
    torch.manual_seed(0)
    flow = CouplingFlow(FlowConfig(2, couplings=2, hidden=8, clamp=1.0))
    with torch.no_grad():
        flow.weight_out.normal_(std=0.5)
        flow.bias_out.normal_(std=0.3)

    def samples(volume: float) -> Tensor:
        def potential(u: Tensor) -> Tensor:
            z, log_det = flow(u)
            return -(mixture.log_prob(z) + volume * log_det)

        sampler = LangevinSampler(
            GaussianSampler(2),
            potential,
            n_steps=40,
            step_size=0.5,
            adjusted=True,
            transform=lambda u: flow(u)[0],
        )
        return sampler(1, torch.arange(20_000)).samples.detach()

    assert mixture.p_value(samples(1.0)) > 1e-3
    assert mixture.p_value(samples(0.0)) < 1e-9


def test_trajectory_is_the_update() -> None:
    """The chain is `langevin_step` with the contract's noise: step k of chain i from (seed, index[i], k)."""
    x, index = starts(5), torch.tensor([7, 3, 1 << 40, 0, 9])
    chains = langevin(
        x,
        quadratic,
        n_steps=6,
        step_size=0.2,
        temperature=0.5,
        clamp=(-0.8, 0.9),
        thin=2,
        return_trajectory=True,
        return_diagnostics=True,
        seed=4,
        index=index,
    )
    states, energies = [], []
    for step in range(6):
        value, gradient = energy_and_gradient(quadratic, x)
        torch.testing.assert_close(gradient, PRECISION * x)
        energies.append(value.mean())
        noise = {"seed": 4, "index": index, "step": step}
        x = langevin_step(x, gradient, 0.2, temperature=0.5, clamp=(-0.8, 0.9), **noise)
        states.append(x)
    assert chains.trajectory is not None
    assert torch.equal(chains.trajectory, torch.stack(states[1::2]))
    assert chains.energy is not None
    assert torch.equal(chains.energy, torch.stack(energies[1::2]))
    assert torch.equal(chains.samples, states[-1])
    assert torch.equal(chains.acceptance, torch.ones(5))
    assert chains.samples.min() >= torch.tensor(-0.8)
    assert chains.samples.max() <= torch.tensor(0.9)


@pytest.mark.parametrize("adjusted", [False, True])
def test_chain_is_a_function_of_its_number(adjusted: bool) -> None:
    energy_of = CouplingFlow(FlowConfig(4, couplings=2, hidden=16))
    with torch.no_grad():
        energy_of.weight_out.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    sampler = LangevinSampler(
        GaussianSampler(4),
        lambda z: -energy_of.log_prob(z),
        n_steps=5,
        step_size=0.5,
        adjusted=adjusted,
    )
    whole = draw(sampler, 600, seed=9)
    for n, start, batch_size in ((1, 0, None), (1, 599, None), (300, 255, 7), (600, 0, 100)):
        part = draw(sampler, n, seed=9, start=start, batch_size=batch_size)
        assert torch.equal(part.samples, whole.samples[start : start + n])
        assert torch.equal(part.diagnostics["acceptance"], whole.diagnostics["acceptance"][start : start + n])
    # Nor on its place in a tile, except for rounding: noise numbered within the tile would repeat in each.
    other = draw(sampler, 600, seed=9, tile=48).samples
    assert ((other - whole.samples).abs() < 1e-4).all(dim=1).float().mean() > 0.98
    empty = draw(sampler, 0)
    assert empty.samples.shape == (0, 4)
    assert empty.diagnostics["acceptance"].shape == (0,)


def test_acceptance_is_counted_in_float32() -> None:
    """Guards against the caller's default type: in bfloat16 a sum of ones ends at 256."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        start = torch.zeros(2, 3, dtype=torch.float32)
        chains = langevin(start, quadratic, n_steps=300, step_size=1e-6, adjusted=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert chains.acceptance.dtype == torch.float32
    assert torch.equal(chains.acceptance, torch.ones(2))


def test_chain_leaves_its_start_alone() -> None:
    x = starts(10)
    before = x.clone()
    chains = langevin(x, quadratic, n_steps=3, step_size=0.1)
    assert torch.equal(x, before)
    assert not chains.samples.requires_grad
    still = langevin(x, quadratic, n_steps=0, step_size=0.1, adjusted=True)
    assert torch.equal(still.samples, x)
    assert still.trajectory is None
    assert torch.equal(still.acceptance, torch.ones(10))


@pytest.mark.parametrize("n_steps", [0, 1, 2])
def test_fewer_steps_than_are_thinned(n_steps: int) -> None:
    """What was asked for has no states then, and is a tensor all the same."""
    chains = langevin(
        starts(4),
        quadratic,
        n_steps=n_steps,
        step_size=0.1,
        thin=3,
        return_trajectory=True,
        return_diagnostics=True,
    )
    assert chains.trajectory is not None
    assert chains.trajectory.shape == (0, 4, 3)
    assert chains.energy is not None
    assert chains.energy.shape == (0,)


def test_double_precision_and_other_shapes() -> None:
    x = starts(4, 3).double()[:, None].expand(4, 2, 3)
    chains = langevin(x, lambda y: y.square().flatten(1).sum(dim=1), n_steps=3, step_size=0.1)
    assert chains.samples.dtype == torch.float64
    assert chains.samples.shape == (4, 2, 3)


def test_proposal_of_infinite_energy_is_rejected() -> None:
    """A hard wall: no chain ever crosses it."""

    def walled(x: Tensor) -> Tensor:
        return quadratic(x) + torch.where(x[:, 0] < 0, torch.inf, 0.0)

    chains = langevin(starts(500).abs(), walled, n_steps=40, step_size=0.5, adjusted=True)
    assert chains.samples[:, 0].min() >= 0
    assert 0.3 < chains.acceptance.mean() < 0.99
    half_normal = math.sqrt(2 / math.pi / 0.5)
    assert float(chains.samples[:, 0].mean()) == pytest.approx(half_normal, abs=4 * 0.85 / math.sqrt(500))


def test_diverged_chains_are_counted() -> None:
    x = starts(10)
    x[:3] *= 1e18
    with pytest.raises(ValueError, match=r"3 of 10 chains are no longer finite: lower step_size \(10.0\)"):
        langevin(
            x,
            lambda z: z.square().square().sum(dim=1) * (z.abs().amax(dim=1) > 1e15),
            n_steps=3,
            step_size=10.0,
        )


@pytest.mark.parametrize("adjusted", [False, True])
def test_start_without_an_energy_is_counted(adjusted: bool) -> None:
    """A chain whose energy is NaN can accept nothing: it must not pass for a sample."""

    def energy(z: Tensor) -> Tensor:
        return torch.where(z[:, 0] > 1, torch.nan, quadratic(z))

    x = torch.zeros(5, 3)
    x[:2] = 2.0
    with pytest.raises(ValueError, match="2 of 5 chains start where the energy is NaN"):
        langevin(x, energy, n_steps=3, step_size=1e-6, adjusted=adjusted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": -1}, "n_steps must be at least 0"),
        ({"step_size": 0.0}, "step_size must be positive and finite"),
        ({"step_size": math.inf}, "step_size must be positive and finite"),
        ({"temperature": 0.0}, "temperature must be positive and finite"),
        ({"thin": 0}, "thin must be at least 1"),
        ({"adjusted": True, "clamp": (-1.0, 1.0)}, "clamp changes the law"),
        ({"clamp": (1.0, -1.0)}, "clamp"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        langevin(starts(4), quadratic, **({"n_steps": 1, "step_size": 0.1} | options))


def test_bad_energy_is_named() -> None:
    with pytest.raises(ValueError, match=r"energy must return shape \(4,\), one value a row, got \(\)"):
        langevin(starts(4), lambda x: x.sum(), n_steps=1, step_size=0.1)
