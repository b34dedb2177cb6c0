"""Latents to images, end to end: uint8 images of the shipped model, by each of its methods, on the host.

Checked: the images are the decoder's of the same latents (in bf16, up to its rounding), and the latents'
mean energy and mean square agree with those of float32 draws of another seed.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import checks
from bench.harness import Call, Precision, Problem, Provider, Workload
from bench.machine import DEVICE
from bench.sizes import Scale, pick
from evalp_fast.pipeline import EVaLP

# Mean absolute difference of pixels, of 255, between images and the decoder's in float32.
LIMITS: dict[str, float] = {"ieee": 0.05, "tf32": 0.5, "bf16": 4.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "prior": {},
    "flow": {},
    "sir": {"proposals": 100},
    "langevin": {"n_steps": 60, "adjusted": True},
}


def load() -> EVaLP:
    """The model that ships."""
    return EVaLP.from_pretrained("mnist", device=DEVICE)


def ours(method: Any, n: int, precision: Precision, compile_it: bool) -> Callable[[EVaLP], Call]:
    """`EVaLP.sample` to uint8, and to the host."""

    def make(model: EVaLP) -> Call:
        if compile_it:
            model = load().compile()  # in place: the others keep theirs
        sample = functools.partial(
            model.sample, n, method=method, output="uint8", precision=precision, **OPTIONS[method]
        )
        return lambda seed: sample(seed=seed).cpu()

    return make


def parts(method: Any, n: int) -> Callable[[EVaLP], dict[str, Callable[[], Any]]]:
    """Latents, decoding, and all that is left."""

    def make(model: EVaLP) -> dict[str, Callable[[], Any]]:
        latents = model.sample(n, method=method, output="latent", **OPTIONS[method])
        images = model.vae.decode(latents)
        return {
            "latents": lambda: model.sample(n, method=method, output="latent", **OPTIONS[method]),
            "decoder": lambda: [
                model.vae.decode(part) for part in latents.split(8192 if DEVICE.type == "cuda" else 256)
            ],
            "to uint8 and host": lambda: (255 * images).round().to(torch.uint8).cpu(),
        }

    return make


def problem(method: str, n: int, scale: Scale) -> Problem:
    """n images by a method."""

    def setup() -> Workload:
        model = load()
        prior = model.prior
        assert prior is not None
        options: dict[str, Any] = {"method": method, "output": "latent", **OPTIONS[method]}

        def figures(latents: Tensor) -> dict[str, Tensor]:
            return {"the energy": prior.energy(latents), "the mean square": latents.square().mean(dim=1)}

        wanted = figures(model.sample(n, seed=1, **options))

        def check(provider: Provider, images: Tensor, seed: int) -> None:
            shape = (n, 1, 32, 32)
            assert images.shape == shape, f"shape {tuple(images.shape)}, not {shape}"
            assert images.dtype == torch.uint8, f"dtype {images.dtype}, not uint8"
            latents = model.sample(n, seed=seed, precision=provider.precision, **options)
            for name, value in figures(latents).items():
                checks.mean_close(value, wanted[name], name)
            exact = 255 * torch.cat([model.vae.decode(part) for part in latents.split(256)])
            # Compiled products round otherwise, and a choice among proposals may then fall another way.
            difference = (images.to(DEVICE).float() - exact).abs().flatten(1).mean(dim=1)
            typical = float(difference.median()) - 0.25  # rounding to uint8 is 0.25 on average
            limit = LIMITS[provider.precision]
            assert typical <= limit, f"a pixel is off by {typical:.3g} of 255; the limit is {limit}"

        return Workload(model, [(0,), (2,)], check)

    modes: list[Provider] = []
    if method in ("sir", "langevin") and (scale != "small" or method == "sir"):
        modes.append(Provider("evalp_fast compiled", ours(method, n, "ieee", True), compiles=True))
    return Problem(
        "generate",
        f"mnist, {method}, {n:,} images",
        {"batch": n, "method": method, "model": "mnist"},
        n,
        setup,
        (
            Provider("evalp_fast", ours(method, n, "ieee", False), parts=parts(method, n)),
            Provider("evalp_fast bf16", ours(method, n, "bf16", False), "bf16"),
            *modes,
        ),
        unit="images",
    )


def problems(scale: Scale) -> list[Problem]:
    """Each method; the number of images is what it makes in a second or less."""
    if scale == "sweep":
        return [problem("flow", 1 << p, scale) for p in range(10, 19, 2)]
    counts = pick(
        scale,
        {"prior": 1024, "flow": 1024, "sir": 256, "langevin": 256},
        {"prior": 8192, "flow": 8192, "sir": 1024, "langevin": 1024},
        {"prior": 1 << 17, "flow": 1 << 17, "sir": 1 << 15, "langevin": 1 << 15},
    )
    return [problem(method, n, scale) for method, n in counts.items()]


def test_generate(case: Any, timed: Any) -> None:
    timed(case)
