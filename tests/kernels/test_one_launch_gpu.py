"""Networks and samplers of one launch in a captured CUDA graph: a replay takes the seed as it is then."""

import pytest
import torch
from torch import Tensor

from evalp_fast.kernels.energy import EnergyParameters, mlp_energy, mlp_energy_and_gradient
from evalp_fast.kernels.flow import FlowParameters, Noise, coupling_flow
from evalp_fast.kernels.latent_chain import langevin_chain
from evalp_fast.kernels.sir import sir

ROWS = 1000  # no whole number of tiles
each_precision = pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])


def draw(*shape: int, seed: int) -> Tensor:
    """Small normals on the GPU, which depend on nothing but their seed."""
    return (0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).cuda()


def make_flow(dim: int = 16, hidden: int = 64, layers: int = 4) -> FlowParameters:
    half = dim // 2
    shapes = (
        *((layers, hidden, half), (layers, hidden), (layers, 1, hidden, hidden), (layers, 1, hidden)),
        *((layers, dim, hidden), (layers, dim)),
    )
    return FlowParameters(*(draw(*shape, seed=k) / shape[-1] ** 0.5 for k, shape in enumerate(shapes)))


def make_energy(dim: int = 16, hidden: int = 64) -> EnergyParameters:
    weights = (draw(hidden, dim, seed=10), draw(hidden, hidden, seed=11), draw(1, hidden, seed=12))
    return EnergyParameters(weights, (draw(hidden, seed=13), draw(hidden, seed=14), draw(1, seed=15)))


def captured(call, warm_up=2):
    """The graph of `call`, which has run before, so that its kernel is there, and what it writes to."""
    for _ in range(warm_up):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@pytest.mark.gpu
@each_precision
@pytest.mark.parametrize("dim", [16, 15])
def test_a_captured_flow_draws_anew(precision, dim: int) -> None:
    passed, changed = (dim + 1) // 2, dim // 2
    parameters = make_flow()
    parameters = parameters._replace(
        weight_in=parameters.weight_in[..., :passed].contiguous(),
        weight_out=parameters.weight_out[:, : 2 * changed].contiguous(),
        bias_out=parameters.bias_out[:, : 2 * changed].contiguous(),
    )
    seed = torch.tensor([1], device="cuda")
    graph, out = captured(lambda: coupling_flow(Noise(seed, range(ROWS)), parameters, precision=precision))
    draws = []
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        wanted = coupling_flow(Noise(value, range(ROWS)), parameters, precision=precision)
        assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))
        draws.append(out[0].clone())
    assert not torch.equal(*draws)


@pytest.mark.gpu
@each_precision
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_a_captured_flow_reads_its_input_anew(precision, inverse: bool) -> None:
    parameters, z = make_flow(), draw(ROWS, 16, seed=20)
    graph, out = captured(lambda: coupling_flow(z, parameters, precision=precision, inverse=inverse))
    z.copy_(draw(ROWS, 16, seed=21))
    graph.replay()
    wanted = coupling_flow(z, parameters, precision=precision, inverse=inverse)
    assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))


@pytest.mark.gpu
@each_precision
@pytest.mark.parametrize("function", [mlp_energy, mlp_energy_and_gradient])
def test_a_captured_energy_reads_its_input_anew(precision, function) -> None:
    parameters, z = make_energy(), draw(ROWS, 16, seed=20)
    graph, out = captured(lambda: function(z, parameters, precision=precision))
    z.copy_(draw(ROWS, 16, seed=21))
    graph.replay()
    wanted = function(z, parameters, precision=precision)
    pairs = [(out, wanted)] if isinstance(out, Tensor) else zip(out, wanted, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.gpu
@each_precision
@pytest.mark.parametrize("proposals", [1, 100])
def test_a_captured_sir_draws_anew(precision, proposals: int) -> None:
    flow, energy, seed = make_flow(), make_energy(), torch.tensor([1], device="cuda")
    graph, out = captured(lambda: sir(seed, 5, ROWS, proposals, flow, energy, precision=precision))
    draws = []
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        wanted = sir(value, 5, ROWS, proposals, flow, energy, precision=precision)
        assert torch.equal(out.z, wanted.z)
        assert torch.equal(out.log_weight, wanted.log_weight)
        assert all(torch.equal(a, b) for a, b in zip(out.diagnostics, wanted.diagnostics, strict=True))
        draws.append(out.z.clone())
    assert not torch.equal(*draws)


@pytest.mark.gpu
@each_precision
@pytest.mark.parametrize("adjusted", [False, True], ids=["ULA", "MALA"])
def test_a_captured_chain_goes_on_with_new_noise(precision, adjusted: bool) -> None:
    """Seed and first step are read at each replay: two replays are two parts of the same chain."""
    energy, z = make_energy(), draw(ROWS, 16, seed=20)
    seed, first = torch.tensor([1], device="cuda"), torch.tensor([0], device="cuda")
    options = {"n_steps": 5, "step_size": 0.1, "adjusted": adjusted, "precision": precision}
    graph, out = captured(lambda: langevin_chain(z, energy, seed=seed, first_step=first, **options))
    for number, start in ((1, 0), (1, 5), (2, 5)):
        seed.fill_(number)
        first.fill_(start)
        graph.replay()
        wanted = langevin_chain(z, energy, seed=number, first_step=start, **options)
        assert torch.equal(out.samples, wanted.samples)
        assert torch.equal(out.acceptance, wanted.acceptance)
        assert torch.equal(out.energy, wanted.energy)
        z.copy_(out.samples)
