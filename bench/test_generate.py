"""Latents to images, end to end: uint8 images of the shipped model, by each of its methods, on the host.

Checked: the images are those that float64 makes of the same noise: latents by the textbook's flow, race and
chain with the model's weights, then the decoder. Rounding may turn an acceptance or a close race, so a share
of the images has to agree; of another method, or after another number of steps, none does.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench import checks, textbook
from bench.harness import Call, Precision, Problem, Provider, Workload
from bench.machine import DEVICE
from bench.modes import not_at_small, suffix
from bench.sizes import Scale, pick
from bench.test_decode import layers as decoder_layers
from bench.test_sir import our_blocks
from evalp_fast.kernels.philox import Stream, normal, uniform
from evalp_fast.pipeline import EVaLP

# Mean absolute difference of pixels, of 255, between images and the decoder's in float32.
LIMITS: dict[str, float] = {"ieee": 0.05, "tf32": 0.5, "bf16": 4.0}
SHARES: dict[str, float] = {"ieee": 0.95, "tf32": 0.9, "bf16": 0.7}
# A chain through the trained flow magnifies rounding: measured on a CPU, 0.69 and 0.2 agree.
CHAIN_SHARES: dict[str, float] = {"ieee": 0.4, "tf32": 0.15, "bf16": 0.06}
CHECKED = 64
PRECISIONS: tuple[Precision, ...] = ("ieee", "bf16")
OPTIONS: dict[str, dict[str, Any]] = {
    "prior": {},
    "flow": {},
    "sir": {"proposals": 100},
    "langevin": {"n_steps": 60, "step_size": 0.1, "adjusted": True},
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
        draw = functools.partial(
            model.sample, n, method=method, output="latent", precision="ieee", **OPTIONS[method]
        )
        latents = draw()
        images = model.vae.decode(latents)
        return {
            "latents": draw,
            "decoder": lambda: [
                model.vae.decode(part) for part in latents.split(8192 if DEVICE.type == "cuda" else 256)
            ],
            "to uint8 and host": lambda: (255 * images).round().to(torch.uint8).cpu(),
        }

    return make


def exact_latents(model: EVaLP, method: str, seed: int, index: Tensor) -> Tensor:
    """What `method` gives for the samples with these numbers, in float64, by the textbook."""
    prior = model.prior
    assert prior is not None
    shape = prior.config.flow
    assert (shape.activation, shape.clamp, shape.mixing) == ("relu", textbook.CLAMP, "shuffle")
    assert (prior.config.base, prior.config.energy.activation) == ("flow", "silu")
    weights = textbook.FlowWeights(**{name: value.double() for name, value in prior.flow.named_parameters()})
    layers = [layer for layer in prior.energy_net.layers if isinstance(layer, nn.Linear)]
    energy = textbook.EnergyWeights(
        tuple(layer.weight.double() for layer in layers), tuple(layer.bias.double() for layer in layers)
    )
    dim, order, options = shape.dim, textbook.shuffle(shape.dim), OPTIONS[method]

    def weigh(u: Tensor) -> tuple[Tensor, Tensor]:
        z = textbook.flow_forward(weights, order, u)[0]
        return z, -textbook.energy(energy, z)

    u = normal(seed, index, 0, Stream.PROPOSAL, dim).double()
    if method == "prior":
        return u
    if method == "flow":
        return weigh(u)[0]
    if method == "sir":
        return textbook.race(weigh, our_blocks(seed, index, options["proposals"], dim))[0]
    # The chain is one of u: its law is the prior's, seen through the flow.
    ends = textbook.langevin(
        lambda u: 0.5 * u.square().sum(dim=1) - weigh(u)[1],
        u,
        options["n_steps"],
        options["step_size"],
        lambda step: normal(seed, index, step, Stream.LANGEVIN, dim),
        lambda step: uniform(seed, index, step, Stream.ACCEPTANCE, 1)[:, 0],
    )
    return weigh(ends)[0]


def problem(method: str, n: int, scale: Scale) -> Problem:
    """n images by a method."""

    def setup() -> Workload:
        model, rows = load(), checks.some(n, CHECKED)
        decoder = copy.deepcopy(model.vae).double().eval()

        @functools.cache
        def wanted(seed: int) -> Tensor:
            with torch.no_grad():
                return 255 * decoder_layers(decoder, exact_latents(model, method, seed, rows))

        def check(provider: Provider, images: Tensor, seed: int) -> None:
            shape = (n, 1, 32, 32)
            assert images.shape == shape, f"shape {tuple(images.shape)}, not {shape}"
            assert images.dtype == torch.uint8, f"dtype {images.dtype}, not uint8"
            found = images[rows.to(images.device)].to(DEVICE).double()
            # A pixel is rounded to uint8 by 0.5 at most.
            difference = ((found - wanted(seed)).abs() - 0.5).clamp_min(0.0).flatten(1).mean(dim=1)
            agreeing = float((difference <= LIMITS[provider.precision]).double().mean())
            share = (CHAIN_SHARES if method == "langevin" else SHARES)[provider.precision]
            assert agreeing >= share, f"{agreeing:.0%} of the images are right, not {share:.0%}"

        return Workload(model, [(0,), (2,)], check)

    left_out = not_at_small(scale, "of the methods, it is compiled for sir")
    modes = [
        Provider(
            f"evalp_fast compiled{suffix(precision)}",
            ours(method, n, precision, True),
            precision,
            (lambda: None) if (method, precision) == ("sir", "ieee") else left_out,
            compiles=True,
        )
        for precision in PRECISIONS
    ]
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
