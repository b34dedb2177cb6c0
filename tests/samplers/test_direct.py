"""The samplers of one pass: the noise contract, temperature, and bits that do not depend on the batch."""

import math

import pytest
import torch

from evalp_fast.kernels import launch, philox
from evalp_fast.models.flow import CouplingFlow, FlowConfig
from evalp_fast.samplers.base import Draws, default_tile, draw
from evalp_fast.samplers.direct import FlowSampler, FunctionSampler, GaussianSampler

DIM = 6


@pytest.fixture(scope="module")
def flow() -> CouplingFlow:
    torch.manual_seed(0)
    flow = CouplingFlow(FlowConfig(DIM, couplings=3, hidden=32))
    with torch.no_grad():
        flow.weight_out.normal_(std=0.1)
    return flow


def test_gaussian_is_the_proposal_noise() -> None:
    index = torch.arange(100, 400)
    noise = philox.normal(3, index, 0, philox.Stream.PROPOSAL, DIM)
    assert torch.equal(GaussianSampler(DIM)(3, index).samples, noise)
    torch.testing.assert_close(GaussianSampler(DIM, 0.25)(3, index).samples, 0.5 * noise)


def test_flow_maps_the_same_noise(flow: CouplingFlow) -> None:
    """So that image i of the prior and of the flow start from one point."""
    index = torch.arange(300)
    with torch.no_grad():
        samples = FlowSampler(flow, DIM, 2.0)(3, index).samples
        expected, _ = flow(math.sqrt(2.0) * GaussianSampler(DIM)(3, index).samples)
    torch.testing.assert_close(samples, expected)


def test_law_of_the_gaussian() -> None:
    """Guards against a temperature that scales the deviation by T instead of its square root."""
    temperature, n = 0.36, 20_000
    samples = draw(GaussianSampler(DIM, temperature), n).samples.double()
    variance = samples.square().mean(dim=0)
    # Four standard errors of a mean square: T·sqrt(2/n) each.
    assert (variance - temperature).abs().max() < 4 * temperature * math.sqrt(2 / n)
    assert samples.mean(dim=0).abs().max() < 4 * math.sqrt(temperature / n)


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_sample_is_a_function_of_its_number(kind: str, flow: CouplingFlow) -> None:
    """To the last bit. Guards against products whose shape follows the batch."""
    sampler = GaussianSampler(DIM) if kind == "gaussian" else FlowSampler(flow, DIM)
    whole = draw(sampler, 700, seed=9).samples
    assert whole.shape == (700, DIM)
    for n, start, batch_size in ((1, 0, None), (1, 699, None), (300, 255, 7), (64, 500, 1000), (700, 0, 33)):
        part = draw(sampler, n, seed=9, start=start, batch_size=batch_size).samples
        assert torch.equal(part, whole[start : start + n])
    assert not torch.equal(draw(sampler, 700, seed=10).samples, whole)


@pytest.mark.parametrize("start", [2047, 2048, 2300, 1 << 40, (1 << 56) - 3])
def test_sample_does_not_depend_on_the_tile_it_is_asked_from(start: int, flow: CouplingFlow) -> None:
    """Across the edges of tiles, and with numbers that need all their 56 bits."""
    sampler = FlowSampler(flow, DIM)
    n = 3
    together = draw(sampler, n, seed=2, start=start).samples
    for k in range(n):
        assert torch.equal(draw(sampler, 1, seed=2, start=start + k).samples[0], together[k])
    if start >= 1 << 32:
        low = draw(sampler, n, seed=2, start=start & 0xFFFFFFFF).samples
        assert not torch.isclose(low, together).any()  # another sample than that of the low 32 bits


def test_a_function_as_a_sampler() -> None:
    """It is given seed and numbers, in tiles of the size it asks for, and its `info` replaces any other."""
    asked = []

    def function(seed: int, index: torch.Tensor) -> Draws:
        asked.append((seed, int(index[0]), len(index)))
        return Draws(index[:, None].float(), {"twice": 2 * index}, {"path": "inner"})

    sampler = FunctionSampler(function, {"path": "one launch"}, tiles=2)
    size = 2 * default_tile(torch.device("cpu"))
    found = draw(sampler, 5, seed=7, start=size - 2)
    assert asked == [(7, 0, size), (7, size, size)]
    assert found.info == {"path": "one launch"}
    assert torch.equal(found.samples[:, 0], torch.arange(size - 2.0, size + 3.0))
    assert torch.equal(found.diagnostics["twice"], 2 * torch.arange(size - 2, size + 3))
    assert FunctionSampler(function, {}).tiles == 1


@pytest.mark.filterwarnings("ignore:flow runs in plain torch")
def test_info_of_a_kernel_that_gives_way() -> None:
    """Guards against "one launch" of samples that the reference drew, where a GPU has no room for the launch;
    and against a reason that is said of other samples than its own."""
    fits = False

    def function(seed: int, index: torch.Tensor) -> Draws:
        if not fits:
            launch._without_kernel("flow", RuntimeError("out of shared memory"), abs)
        return Draws(index[:, None].float(), {})

    sampler = FunctionSampler(function, {"path": "one launch", "precision": "bf16"})
    index, reason = torch.arange(3), "flow: out of shared memory"
    assert sampler(0, index).info == {"path": "composed", "reason": reason, "precision": "bf16"}
    composed = {"path": "composed", "reason": "float64 has no kernel"}
    assert FunctionSampler(function, composed)(0, index).info == composed
    started = FunctionSampler(lambda seed, index: sampler(seed, index), {"path": "one launch"})
    assert started(0, index).info == {"path": "one launch"}
    fits = True
    assert sampler(0, index).info == {"path": "one launch", "precision": "bf16"}


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperature_is_named(temperature: float, flow: CouplingFlow) -> None:
    for make in (
        lambda: GaussianSampler(DIM, temperature),
        lambda: FlowSampler(flow, DIM, temperature),
    ):
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            make()
