"""bfloat16 copies of the matrices: those of the weights as they are now, whoever wrote them, and however."""

import copy
import operator
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from evalp_fast.kernels import launch
from evalp_fast.kernels.mlp_device import Precision
from evalp_fast.kernels.weights_gpu import bfloat16_copies
from evalp_fast.models.energy import EnergyConfig, MLPEnergy
from evalp_fast.models.flow import CouplingFlow, FlowConfig
from evalp_fast.models.precision import check_precision

Network = CouplingFlow | MLPEnergy
KINDS = ("flow", "energy")


def new_network(kind: str) -> Network:
    torch.manual_seed(0)
    if kind == "energy":
        return MLPEnergy(EnergyConfig(6, 24, depth=3))
    flow = CouplingFlow(FlowConfig(6, couplings=2, hidden=24))
    with torch.no_grad():
        flow.weight_out.normal_(std=0.2)
    return flow


def matrices(network: Network) -> tuple[Tensor, ...]:
    """The matrices whose products may be in bfloat16, as they are now."""
    if isinstance(network, CouplingFlow):
        return network.weight_in, network.weight_hidden, network.weight_out
    return tuple(layer.weight for layer in list(network.layers)[:-1])  # type: ignore[misc]


def output(network: Network, x: Tensor) -> Tensor:
    """In bfloat16 products."""
    with torch.no_grad():
        out = network(x, precision="bf16")
    return out[0] if isinstance(out, tuple) else out


def x_of_rows(n: int = 8) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(3))


def step(optimizer: type[torch.optim.Optimizer], **options) -> Callable[[Network], None]:
    def change(network: Network) -> None:
        out = network(x_of_rows())
        loss = out[0].square().mean() if isinstance(out, tuple) else out.square().mean()
        loss.backward()
        optimizer(network.parameters(), lr=0.1, **options).step()  # type: ignore[call-arg]

    return change


def in_place(network: Network) -> None:
    with torch.no_grad():
        matrices(network)[0].add_(1.0)


def copy_in_place(network: Network) -> None:
    with torch.no_grad():
        for weight in matrices(network):
            weight.copy_(weight * 1.5)


def in_inference_mode(network: Network) -> None:
    with torch.inference_mode():
        matrices(network)[0].add_(1.0)


def load(network: Network) -> None:
    network.load_state_dict({name: 1.5 * value for name, value in network.state_dict().items()})


def load_by_assignment(network: Network) -> None:
    """Twice: the second may have the memory of what was there before the first."""
    for _ in range(2):
        state = {name: 1.5 * value for name, value in network.state_dict().items()}
        network.load_state_dict(state, assign=True)


def data_assigned(network: Network) -> None:
    for _ in range(2):
        for weight in matrices(network):
            weight.data = weight.data * 1.5


def data_in_place(network: Network) -> None:
    """As moving averages are often written: no version counter sees it."""
    for weight in matrices(network):
        weight.data.mul_(0.5).add_(1.0)


def through_numpy(network: Network) -> None:
    matrices(network)[0].detach().numpy()[...] += 1.0


def from_a_vector(network: Network) -> None:
    vector = nn.utils.parameters_to_vector(network.parameters()).detach()
    nn.utils.vector_to_parameters(1.5 * vector, network.parameters())


def through_half(network: Network) -> None:
    in_place(network)
    network.half()
    network.float()


CHANGES = {
    "SGD": step(torch.optim.SGD),
    "Adam": step(torch.optim.Adam),
    "Adam, foreach": step(torch.optim.Adam, foreach=True),
    "Adam, fused": step(torch.optim.Adam, fused=True),  # raises no version counter either
    "add_": in_place,
    "copy_": copy_in_place,
    "inference mode": in_inference_mode,
    "load_state_dict": load,
    "load_state_dict, assign": load_by_assignment,
    ".data =": data_assigned,
    ".data.add_": data_in_place,
    "numpy": through_numpy,
    "vector_to_parameters": from_a_vector,
    "half, float": through_half,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_copies_follow_every_change(change: str, kind: str) -> None:
    """Guards against a stale copy: samples of weights that are no longer the model's, and no error."""
    network, x = new_network(kind), x_of_rows()
    before = output(network, x)
    CHANGES[change](network)
    after = output(network, x)
    fresh = new_network(kind)
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(after, output(fresh, x))
    assert not torch.equal(after, before)


@pytest.mark.skipif(not launch.INTERPRETED, reason="runs the kernel in Triton's interpreter")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_copies_of_a_gpu_follow_every_change(change: str, kind: str) -> None:
    """As above, of those that the device brings up to date."""
    network, kept = new_network(kind), {}
    with launch.backend("triton"), torch.no_grad():
        copies = bfloat16_copies(matrices(network), kept)
        before = [copied.clone() for copied in copies]
    CHANGES[change](network)
    with launch.backend("triton"), torch.no_grad():
        after = bfloat16_copies(matrices(network), kept)
    for weight, copied in zip(matrices(network), after, strict=True):
        assert torch.equal(copied, weight.bfloat16())
    assert not all(map(torch.equal, before, after))
    assert all(old is new for old, new in zip(copies, after, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_network_is_its_own(kind: str) -> None:
    """Neither sees what becomes of the other's weights."""
    network, x = new_network(kind), x_of_rows()
    before = output(network, x)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(output(other, x), before)
        in_place(other)
        changed = output(other, x)
        assert not torch.equal(changed, before)
        assert torch.equal(output(network, x), before)
        copy_in_place(network)
        assert torch.equal(output(other, x), changed)
        with torch.no_grad():
            for weight in matrices(network):
                weight.copy_(weight / 1.5)
        before = output(network, x)  # up to rounding what it was


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_leaves_nothing_in_the_network(kind: str) -> None:
    """What is saved of it does not grow."""
    network = new_network(kind)
    size, names = len(pickle.dumps(network)), set(network.state_dict())
    output(network, x_of_rows())
    assert len(pickle.dumps(network)) == size
    assert set(network.state_dict()) == names


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode(kind: str) -> None:
    """A network made in it (its tensors have no version), and one used in it and then differentiated."""
    x = x_of_rows()
    with torch.inference_mode():
        made = new_network(kind)
        inside = output(made, x)
    network = new_network(kind).requires_grad_(False)
    assert torch.equal(output(network, x), inside)
    with torch.inference_mode():
        assert torch.equal(output(network, x), inside)
    z = x.clone().requires_grad_()
    out = network(z, precision="bf16")
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_under_vmap(kind: str) -> None:
    network, x = new_network(kind), x_of_rows()
    state = {name: torch.stack((value, 1.5 * value)) for name, value in network.state_dict().items()}

    def call(parameters: dict[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(network, parameters, (x,), {"precision": "bf16"})
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        both = torch.func.vmap(call)(state)
    # The reference rounds the products' results too (to 2^-9), which the path without vmap does not.
    torch.testing.assert_close(both[0], output(network, x), rtol=0, atol=0.05)
    load(network)
    torch.testing.assert_close(both[1], output(network, x), rtol=0, atol=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_network_follows_its_weights(kind: str) -> None:
    """In one graph. Guards against copies that are frozen into it."""
    network, x = new_network(kind), x_of_rows()
    call = torch.compile(network, backend="aot_eager", fullgraph=True)
    for change in (None, in_place, data_in_place):
        if change is not None:
            change(network)
        with torch.no_grad():
            out = call(x, precision="bf16")
        expected = output(network, x)
        # It traces the reference, which rounds the products' results too (to 2^-9).
        tolerance = 0.02 * float(expected.abs().max())
        torch.testing.assert_close(out[0] if kind == "flow" else out, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_training_in_bf16_reaches_the_weights(kind: str) -> None:
    """Guards against a copy that cuts the gradient."""
    network = new_network(kind)
    out = network(x_of_rows(), precision="bf16")
    (out[0].square() if isinstance(out, tuple) else out).sum().backward()
    for weight in matrices(network):
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_for_bf16_alone(kind: str, device: str) -> None:
    network = new_network(kind).to(device)

    def handed_over(precision: Precision | None) -> tuple[Tensor, ...]:
        if isinstance(network, CouplingFlow):
            parameters = network.parameters_stacked(precision)
            return parameters.weight_in, parameters.weight_hidden, parameters.weight_out
        return network.parameters_in_order(precision).weights[:-1]

    weights = matrices(network)
    for precision in (None, "ieee", "tf32"):
        assert all(map(operator.is_, handed_over(precision), weights))
    assert all(map(operator.is_, handed_over("bf16"), weights))  # autograd records
    with torch.no_grad():
        copies = handed_over("bf16")
    for weight, copied in zip(weights, copies, strict=True):
        assert copied.dtype == torch.bfloat16
        assert not copied.requires_grad
        assert device == "meta" or torch.equal(copied, weight.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_stays_here(kind: str) -> None:
    """Guards against copies that are saved with a network, shared by two, or left on the GPU by `cpu()`."""
    network = new_network(kind)
    size = len(pickle.dumps(network))
    network._kept[torch.device("cpu"), 0] = (torch.zeros(1000),)
    assert len(pickle.dumps(network)) == size
    assert not copy.deepcopy(network)._kept
    assert not copy.copy(network)._kept
    assert network._kept
    assert not network.double()._kept


def test_on_the_cpu_the_kernels_round() -> None:
    """They keep the copies (`weights_cpu.py`), by the tensor that they are of."""
    flow = new_network("flow").requires_grad_(False)
    assert flow.parameters_stacked("bf16").weight_in is flow.weight_in  # type: ignore[union-attr, operator]


def test_unknown_precision_is_named() -> None:
    for known in (None, "ieee", "tf32", "bf16"):
        check_precision(known)
    with pytest.raises(ValueError, match="precision must be one of ieee, tf32, bf16, got 'fp16'"):
        check_precision("fp16")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_copies_follow_the_device(kind: str) -> None:
    """There, changed, and back: the memory on the GPU may be what it was before."""
    network, x = new_network(kind).cuda(), x_of_rows()
    before = output(network, x.cuda()).cpu()
    network.cpu()
    torch.testing.assert_close(output(network, x), before, rtol=0, atol=0.2)  # bf16, another sum
    in_place(network)
    network.cuda()
    after = output(network, x.cuda())
    fresh = new_network(kind).cuda()
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(after, output(fresh, x.cuda()))
    assert not torch.equal(after.cpu(), before)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_captured_graph_reads_the_weights_as_they_are(kind: str) -> None:
    """Guards against a graph that holds the address of copies: a replay would read them when they are
    stale, or freed."""
    network, x = new_network(kind).cuda(), x_of_rows().cuda()
    output(network, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = output(network, x)
    for _ in range(2):
        in_place(network)
        graph.replay()
        found = captured.clone()  # before a call that would bring copies up to date
        assert torch.equal(found, output(network, x))
