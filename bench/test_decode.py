"""Decoding latents to images: the shipped model's decoder, and one as wide as CelebA-64's, untrained.

Rivals: the same layers in torch's default memory layout, eager and by Inductor.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import checks
from bench.harness import Call, Precision, Problem, Provider, Workload, compiled, input_sets
from bench.machine import DEVICE
from bench.sizes import SWEEP, Scale, pick
from evalp_fast.models.vae import VAE
from evalp_fast.pipeline import EVaLP
from evalp_fast.training.presets import VAE_PRESETS

CHECKED = 64
LIMITS: dict[str, float] = {"ieee": 1e-5, "tf32": 2e-3, "bf16": 2e-2}


def shipped() -> VAE:
    """The decoder that ships, 32 x 32."""
    return EVaLP.from_pretrained("mnist", device=DEVICE).vae.eval().requires_grad_(False)


def wide() -> VAE:
    """The published decoder for 64 x 64 colour images, untrained: its speed does not depend on that."""
    torch.manual_seed(0)
    return VAE(VAE_PRESETS["celeba64"].model).to(DEVICE).eval().requires_grad_(False)


MODELS: dict[str, Callable[[], VAE]] = {"mnist": shipped, "celeba64, untrained": wide}


def ours(precision: Precision, compile_it: bool) -> Callable[[VAE], Call]:
    """`VAE.decode`, channels last."""

    def make(vae: VAE) -> Call:
        def decode(z: Tensor) -> Tensor:
            return vae.decode(z, precision=precision)

        return compiled(decode) if compile_it else decode

    return make


def plain(compile_it: bool) -> Callable[[VAE], Call]:
    """The layers one after the other, in torch's default layout."""

    def make(vae: VAE) -> Call:
        vae = copy.deepcopy(vae).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

        def decode(z: Tensor) -> Tensor:
            h = vae.from_latent(z).unflatten(1, (-1, vae.first_side, vae.first_side))
            return torch.sigmoid(vae.decoder(h))

        return compiled(decode) if compile_it else decode

    return make


def problem(model: str, n: int, scale: Scale) -> Problem:
    """n images."""

    def setup() -> Workload:
        vae = MODELS[model]()
        exact = copy.deepcopy(vae).double()

        def check(provider: Provider, images: Tensor, z: Tensor) -> None:
            wanted = torch.sigmoid(
                exact.decoder(
                    exact.from_latent(z[:CHECKED].double()).unflatten(1, (-1, vae.first_side, vae.first_side))
                )
            )
            assert images.shape == (n, *wanted.shape[1:]), f"shape {tuple(images.shape)}"
            checks.relative_error(images[:CHECKED], wanted, LIMITS[provider.precision], "an image")

        dim = vae.config.latent_dim
        return Workload(vae, input_sets(lambda: (torch.randn(n, dim, device=DEVICE),)), check)

    return Problem(
        "decode",
        f"{model}, batch {n:,}",
        {"batch": n, "model": model},
        n,
        setup,
        (
            Provider("evalp_fast", ours("ieee", False)),
            Provider("evalp_fast bf16", ours("bf16", False), "bf16"),
            Provider("evalp_fast bf16 compiled", ours("bf16", True), "bf16", compiles=True),
            Provider("torch eager", plain(False)),
            *([] if scale == "small" else [Provider("torch.compile", plain(True), compiles=True)]),
        ),
        unit="images",
    )


def problems(scale: Scale) -> list[Problem]:
    """The shipped decoder; beyond `small` the wide one too."""
    if scale == "sweep":
        return [problem("mnist", n, scale) for n in SWEEP if n <= 1 << 18]
    found = [problem("mnist", pick(scale, 256, 2048, 1 << 15), scale)]
    if scale != "small":
        found.append(problem("celeba64, untrained", pick(scale, 16, 64, 1 << 12), scale))
    return found


def test_decode(case: Any, timed: Any) -> None:
    timed(case)
