"""Decoding latents to images: the shipped model's decoder, and one as wide as CelebA-64's, untrained.

Rivals: the same layers in torch's default memory layout, and in bfloat16 with the channels last, eager and by
Inductor. Errors are measured against what tells one image from another: the distance from the mean image.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench import checks
from bench.harness import Call, Precision, Problem, Provider, Workload, compiled, input_sets, needs_cuda
from bench.machine import DEVICE
from bench.modes import not_at_small, tuned
from bench.sizes import SWEEP, Scale, pick
from evalp_fast.kernels.matmul_precision import matmul_precision
from evalp_fast.models.vae import VAE
from evalp_fast.pipeline import EVaLP
from evalp_fast.training.presets import VAE_PRESETS

CHECKED = 32
# Root mean square, relative. Measured on a CPU, the worse of both models: 1.5e-6, and 1.2e-2 by autocast.
LIMITS: dict[str, float] = {"ieee": 1e-5, "tf32": 5e-3, "bf16": 4e-2}


def shipped() -> VAE:
    """The decoder that ships, 32 x 32."""
    return EVaLP.from_pretrained("mnist", device=DEVICE).vae.eval().requires_grad_(False)


def wide() -> VAE:
    """The published decoder for 64 x 64 colour images, untrained, but with the activations of a trained one.

    As it is made its images are all alike. Its normalisation takes the statistics of some latents, and the
    last layer is scaled, so that pixels take all values.
    """
    torch.manual_seed(0)
    vae = VAE(VAE_PRESETS["celeba64"].model).to(DEVICE).requires_grad_(False)
    for layer in vae.decoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean over all batches: there is one
    vae.train().decode(torch.randn(32, vae.config.latent_dim, device=DEVICE))
    last = vae.decoder[-1]
    assert isinstance(last, nn.Conv2d)
    last.weight.mul_(4.0)
    return vae.eval()


LAYOUTS: dict[Precision, str] = {"ieee": "", "bf16": " bf16 channels last"}
MODELS: dict[str, Callable[[], VAE]] = {"mnist": shipped, "celeba64, untrained": wide}


def ours(precision: Precision, compile_it: bool) -> Callable[[VAE], Call]:
    """`VAE.decode`, channels last."""

    def make(vae: VAE) -> Call:
        def decode(z: Tensor) -> Tensor:
            return vae.decode(z, precision=precision)

        return kept_to(precision, compiled(decode) if compile_it else decode)

    return make


def plain(precision: Precision, mode: str | None) -> Callable[[VAE], Call]:
    """The layers one after the other: in torch's default layout, or in bfloat16 with the channels last."""

    def make(vae: VAE) -> Call:
        vae = copy.deepcopy(vae)
        if precision == "bf16":
            vae = vae.to(dtype=torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
        else:
            vae = vae.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

        def decode(z: Tensor) -> Tensor:
            return layers(vae, z.to(vae.from_latent.weight.dtype)).float()

        return kept_to(precision, decode if mode is None else compiled(decode, mode))

    return make


def kept_to(precision: Precision, call: Call) -> Call:
    """With float32 convolutions in float32, or in TF32, which is cuDNN's default, if that is asked for."""

    def in_precision(z: Tensor) -> Tensor:
        with matmul_precision(precision):
            return call(z)

    return in_precision


def layers(vae: VAE, z: Tensor) -> Tensor:
    """The decoder's layers, in the dtype of its parameters."""
    return torch.sigmoid(vae.decoder(vae.from_latent(z).unflatten(1, (-1, vae.first_side, vae.first_side))))


def problem(model: str, n: int, scale: Scale) -> Problem:
    """n images."""

    def setup() -> Workload:
        vae = MODELS[model]()
        exact = copy.deepcopy(vae).double()
        rows = checks.some(n, CHECKED)

        right: dict[int, Tensor] = {}  # by where the latents lie: the same for all providers

        def check(provider: Provider, images: Tensor, z: Tensor) -> None:
            if z.data_ptr() not in right:
                right[z.data_ptr()] = layers(exact, z[rows].double())
            wanted = right[z.data_ptr()]
            shape = (n, *wanted.shape[1:])
            assert images.shape == shape, f"shape {tuple(images.shape)}, not {shape}"
            assert images.dtype == torch.float32, f"dtype {images.dtype}, not float32"
            checks.finite(images, "an image")
            limit = LIMITS[provider.precision]
            checks.relative_error(images[rows], wanted, limit, "an image", wanted.mean(dim=0, keepdim=True))

        dim = vae.config.latent_dim
        return Workload(vae, input_sets(lambda: (torch.randn(n, dim, device=DEVICE),)), check)

    rivals = [
        Provider(
            f"torch{label}{layout}", plain(precision, mode), precision, missing, compiles=mode is not None
        )
        for mode, label, missing in (
            (None, " eager", lambda: None),
            ("default", ".compile", not_at_small(scale, "compiling it takes too long")),
            ("max-autotune", ".compile max-autotune", tuned),
        )
        for precision, layout in LAYOUTS.items()
    ]
    return Problem(
        "decode",
        f"{model}, batch {n:,}",
        {"batch": n, "model": model},
        n,
        setup,
        (
            Provider("evalp_fast", ours("ieee", False)),
            Provider("evalp_fast tf32", ours("tf32", False), "tf32", needs_cuda),
            Provider("evalp_fast bf16", ours("bf16", False), "bf16"),
            Provider("evalp_fast bf16 compiled", ours("bf16", True), "bf16", compiles=True),
            *rivals,
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
