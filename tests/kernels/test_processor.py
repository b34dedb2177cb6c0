"""What a precision is on a CPU: float32, but for bfloat16 where that is faster."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evalp_fast.kernels import launch, processor
from evalp_fast.kernels.energy import EnergyParameters, mlp_energy, mlp_energy_and_gradient
from evalp_fast.kernels.flow import coupling_flow
from evalp_fast.kernels.latent_chain import langevin_chain
from evalp_fast.kernels.processor import precision_on, quick_precision
from evalp_fast.kernels.sir import sir
from evalp_fast.models.flow import CouplingFlow, FlowConfig
from evalp_fast.models.image_flow import ImageFlowConfig, ImageRealNVP
from evalp_fast.models.vae import VAE, VAEConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("known", "pays"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, None),
        ({"cpu_name": "Neoverse"}, None),
        ({}, None),
    ],
)
def test_where_bfloat16_pays(
    known: dict[str, Any], pays: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr(processor, "FUSES", {torch.bfloat16: True})
    assert processor._bfloat16_pays() is pays
    monkeypatch.setattr(processor, "FUSES", {torch.bfloat16: False})
    assert processor._bfloat16_pays() is False


def test_a_torch_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """`get_capabilities` came after the oldest torch that is supported."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert processor._capabilities() == {}


@pytest.mark.parametrize(
    ("told", "taken"),
    [
        ({}, 1),
        ({"l2_cache_size": 1 << 18}, 1),
        ({"l2_cache_size": 2 << 20}, 2),
        ({"l2_cache_size": 64 << 20}, 4),
    ],
)
def test_a_chunk_is_a_few_megabytes(
    told: dict[str, Any], taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where torch tells nothing, or takes a cache that all cores share for each one's own."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert processor._cache_bytes() == taken << 20


@pytest.mark.parametrize("pays", [True, False, None])
def test_what_a_precision_is(pays: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is known bfloat16 is what was asked for."""
    monkeypatch.setattr(processor, "BFLOAT16_PAYS", pays)
    assert precision_on(CPU, "ieee") == precision_on(CPU, "tf32") == "ieee"
    assert precision_on(CPU, "bf16") == ("ieee" if pays is False else "bf16")
    for precision in ("ieee", "tf32", "bf16"):
        assert precision_on(GPU, precision) == precision
    with launch.backend("reference"):
        assert precision_on(CPU, "bf16") == "bf16"


@pytest.mark.parametrize("pays", [True, False, None])
def test_the_quick_precision_of_a_cpu(pays: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a guess, and never of the reference and the interpreter, whose numbers are compared."""
    monkeypatch.setattr(processor, "BFLOAT16_PAYS", pays)
    assert quick_precision(CPU) == ("bf16" if pays else "ieee")
    for name in launch.BACKENDS:
        if name == "reference" or launch.INTERPRETED:
            with launch.backend(name):
                assert quick_precision(CPU) == "ieee"
    assert quick_precision(torch.device("meta")) == "ieee"


@pytest.mark.parametrize(
    ("reason", "hip", "properties", "quick"),
    [
        (None, None, {"major": 9}, "bf16"),
        (None, None, {"major": 8}, "bf16"),
        (None, None, {"major": 7}, "ieee"),
        ("Triton is not installed", None, {"major": 9}, "ieee"),
        (None, "7.0", {"major": 9, "gcnArchName": "gfx942:sramecc+"}, "bf16"),
        (None, "7.0", {"major": 9, "gcnArchName": "gfx906"}, "ieee"),
    ],
)
def test_the_quick_precision_of_a_gpu(
    reason: str | None,
    hip: str | None,
    properties: dict[str, Any],
    quick: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processor, "why_reference", lambda *_: reason)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**properties))
    assert quick_precision(GPU) == quick


def _networks() -> dict[str, Any]:
    """Each network that takes a precision, as a function of it to a result."""
    torch.manual_seed(0)
    flow = CouplingFlow(FlowConfig(dim=6, couplings=2, hidden=16))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    sizes = (16, 6), (16, 16), (1, 16)
    weights = tuple(torch.randn(size) / size[1] ** 0.5 for size in sizes)
    energy = EnergyParameters(weights, tuple(torch.randn(size[0]) for size in sizes))
    z = torch.randn(20, 6)
    vae = VAE(VAEConfig(latent_dim=6, encoder_channels=(8,), decoder_channels=(8, 8))).eval()
    image_flow = ImageRealNVP(ImageFlowConfig(channels=1, height=8, width=8, hidden=8)).eval()
    with torch.no_grad():
        for parameter in image_flow.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    images = torch.rand(3, 1, 8, 8)

    def with_gradient(precision: Any) -> torch.Tensor:
        point = z.clone().requires_grad_()
        return torch.autograd.grad(flow(point, precision=precision)[0].sum(), point)[0]

    return {
        "flow": lambda precision: flow(z, precision=precision)[0].detach(),
        "flow's gradient": with_gradient,
        "flow from rounded matrices": lambda precision: flow_of_rounded(flow, z, precision),
        "energy": lambda precision: mlp_energy(z, energy, precision=precision),
        "energy's gradient": lambda precision: mlp_energy_and_gradient(z, energy, precision=precision)[1],
        "chain": lambda precision: (
            langevin_chain(z, energy, n_steps=3, step_size=0.1, seed=0, precision=precision).samples
        ),
        "energy of rounded matrices": lambda precision: energy_of_rounded(energy, z, precision),
        "SIR": lambda precision: (
            sir(
                0, 0, 20, 8, flow.requires_grad_(False).parameters_stacked(), energy, precision=precision
            ).log_weight
        ),
        "compiled flow": lambda precision: compiled(
            lambda z: coupling_flow(z, flow.parameters_stacked(), precision=precision)[0].detach()
        )(z),
        "compiled energy": lambda precision: compiled(lambda z: mlp_energy(z, energy, precision=precision))(
            z
        ),
        "compiled chain": lambda precision: compiled(
            lambda z: langevin_chain(z, energy, n_steps=3, step_size=0.1, seed=0, precision=precision).samples
        )(z),
        "decoder": lambda precision: vae.decode(z, precision=precision).detach(),
        "image flow": lambda precision: image_flow.log_prob(images, precision=precision).detach(),
    }


def compiled(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def energy_of_rounded(energy: EnergyParameters, z: torch.Tensor, precision: Any) -> torch.Tensor:
    *hidden, last = energy.weights
    rounded = [weight.bfloat16() for weight in hidden]
    weights = rounded if precision == "bf16" else [weight.float() for weight in rounded]
    return mlp_energy(z, EnergyParameters((*weights, last), energy.biases), precision=precision)


def flow_of_rounded(flow: CouplingFlow, z: torch.Tensor, precision: Any) -> torch.Tensor:
    """With matrices that are bfloat16 already, as a caller may hand them over, and a gradient."""
    stacked = flow.parameters_stacked()
    names = ("weight_in", "weight_hidden", "weight_out")
    plain = {name: getattr(stacked, name).detach().bfloat16() for name in names}
    if precision != "bf16":
        plain = {name: matrix.float() for name, matrix in plain.items()}
    point = z.clone().requires_grad_()
    x, _ = coupling_flow(point, stacked._replace(**plain), precision=precision)
    return torch.autograd.grad(x.square().sum(), point)[0]


@pytest.mark.parametrize("name", _networks())
def test_bf16_where_it_does_not_pay_is_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit; and where it pays it is not, or the other half of this would say nothing."""
    call = _networks()[name]
    exact = call("ieee")
    assert not torch.equal(call("bf16"), exact)
    monkeypatch.setattr(processor, "BFLOAT16_PAYS", False)
    assert torch.equal(call("bf16"), exact)
