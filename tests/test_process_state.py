"""What a process has set, and does at the same time, changes no number that the package computes."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evalp_fast.kernels.categorical import categorical
from evalp_fast.kernels.checks import compiling
from evalp_fast.kernels.coupling import affine_coupling
from evalp_fast.kernels.importance import summarize
from evalp_fast.kernels.philox import normal
from evalp_fast.kernels.resampling import resample
from evalp_fast.models.energy import EnergyConfig
from evalp_fast.models.flow import FlowConfig
from evalp_fast.models.vae import VAEConfig
from evalp_fast.pipeline import EVaLP, EVaLPConfig
from evalp_fast.priors import PriorConfig


@contextlib.contextmanager
def compiling_elsewhere() -> Iterator[None]:
    """torch's flag is up in all threads while one compiles."""
    torch.compiler._is_compiling_flag = True
    try:
        assert torch.compiler.is_compiling()
        assert not compiling()
        yield
    finally:
        torch.compiler._is_compiling_flag = False


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def new_model(folder: Path) -> None:
    torch.manual_seed(0)
    vae = VAEConfig(image_size=8, latent_dim=6, encoder_channels=(4,), decoder_channels=(8, 4))
    prior = PriorConfig(FlowConfig(6, couplings=2, hidden=16), EnergyConfig(6, hidden=16))
    model = EVaLP(EVaLPConfig(vae, prior))
    torch.nn.init.normal_(model.get_parameter("prior.flow.weight_out"), std=0.1)
    model.save_pretrained(folder)


def results(folder: Path) -> list[Tensor]:
    model = EVaLP.from_pretrained(folder)
    x = torch.randn(
        300, 40, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu"
    )
    found = [model.sample(300, method=method) for method in ("prior", "flow", "sir")]
    found += [model.sample(9, method="langevin", space=space, n_steps=2) for space in ("latent", "noise")]
    found += [*model.posterior(found[0]), model.reconstruct(found[0])]
    found += [normal(0, torch.arange(300, device="cpu"), 0, 1, 9), *affine_coupling(x, 0.1 * x, x)]
    found += [resample(x, 7, seed=0), resample(x, 300, scheme="residual"), categorical(x, seed=0)]
    return [*found, *summarize(x)]


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "another thread compiles": compiling_elsewhere,
    "meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "gradients": torch.enable_grad,
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    new_model(folder)
    return folder


@pytest.fixture(scope="module")
def expected(model_folder: Path) -> list[Tensor]:
    return results(model_folder)


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_the_state_of_the_process_changes_no_number(
    state: Any, model_folder: Path, expected: list[Tensor]
) -> None:
    """Guards against defaults of torch, and against its flags, that decide on a type, a device or a path."""
    with state():
        found = results(model_folder)
    for x, y in zip(found, expected, strict=True):
        assert (x.dtype, x.device) == (y.dtype, y.device)
        assert torch.equal(x, y)


def test_what_this_thread_compiles_is_seen() -> None:
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        return x + 1.0 if compiling() else x

    assert torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(1)).item() == 1.0

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(compiling())
            return x + 1.0

    torch.export.export(Module(), (torch.zeros(2),), strict=False)
    assert seen == [True]
