"""Training: steps per second of each method, on latents and images of the shipped model's shapes.

A step is what the loops of `evalp_fast.training` do: draw the data, loss, gradients, optimiser, moving
average. The flow's likelihood step is also done with the flow libraries, same weights and optimiser.
Checked: the loss and the norm of the gradient of the first step, against float64 with the textbook's
networks or the modules in float64.
"""

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import textbook
from bench.flow_peers import FLOW_PEERS
from bench.harness import Call, Problem, Provider, Workload, absent
from bench.machine import DEVICE
from bench.sizes import Scale, pick
from bench.test_flow import module as flow_module
from evalp_fast.data import to_float
from evalp_fast.kernels.philox import Stream, normal, uniform
from evalp_fast.models.energy import EnergyConfig, MLPEnergy
from evalp_fast.models.flow import CouplingFlow, FlowConfig
from evalp_fast.models.vae import VAE, VAEConfig
from evalp_fast.training.evalp import energy_loss, sampler_loss
from evalp_fast.training.latents import Posterior
from evalp_fast.training.residual import contrast_loss, flow_draws
from evalp_fast.training.run import MovingAverage

TOLERANCE = 2e-3
IMAGES = 4096
# Its log-scales are scaled weights of the same function, whose gradients are scaled the other way.
OTHER_PARAMETERS = ("FrEIA",)

Loss = Callable[[Any], Tensor]


class Step(NamedTuple):
    """A training step in its parts.

    Attributes:
        networks: whose parameters are trained.
        draw: a batch, from the number of the step.
        loss: of a batch.
        averages: what follows the optimiser.
    """

    networks: list[nn.Module]
    draw: Callable[[int], Any]
    loss: Loss
    averages: list[MovingAverage]


def _optimizer(networks: Iterable[nn.Module]) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for network in networks for p in network.parameters()], 1e-4, fused=True)


def run(step: Step) -> Call:
    """The step as a call: the number of the step to its loss and the norm of its gradient."""
    optimizer = _optimizer(step.networks)

    def call(number: int) -> tuple[Tensor, list[nn.Module]]:
        loss = step.loss(step.draw(number))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        for average, network in zip(step.averages, step.networks, strict=False):
            average.update(network)
        return loss.detach(), step.networks

    return call


def parts(make: Callable[[Any], Step], data: Any) -> dict[str, Callable[[], Any]]:
    """Where a step's time goes. `backward` is that of a loss kept for it."""
    step = make(data)
    optimizer = _optimizer(step.networks)
    batch = step.draw(0)
    kept = step.loss(batch)
    kept.backward(retain_graph=True)

    def average() -> None:
        for average, network in zip(step.averages, step.networks, strict=False):
            average.update(network)

    return {
        "data": lambda: step.draw(1),
        "forward": lambda: step.loss(batch),
        "backward": lambda: kept.backward(retain_graph=True),
        "optimiser": optimizer.step,
        "average": average,
    }


def gradient_norm(networks: list[nn.Module]) -> Tensor:
    """Over all parameters."""
    gradients = [p.grad.double().flatten() for n in networks for p in n.parameters() if p.grad is not None]
    return torch.cat(gradients).norm()


def check_against(step: Step) -> Callable[..., None]:
    """The first step of somebody against `step`, which is in float64."""
    loss = step.loss(step.draw(0))
    loss.backward()
    norm = gradient_norm(step.networks)

    def check(provider: Provider, result: tuple[Tensor, list[nn.Module]], number: int) -> None:
        found = {"loss": (result[0], loss), "norm of the gradient": (gradient_norm(result[1]), norm)}
        if provider.name in OTHER_PARAMETERS:
            del found["norm of the gradient"]
        for name, (value, wanted) in found.items():
            error = abs(float(value) - float(wanted)) / max(abs(float(wanted)), 1e-6)
            assert error < TOLERANCE, f"the {name} is {float(value):.6g}, not {float(wanted):.6g}"

    return check


def problem(
    name: str,
    batch: int,
    make: Callable[[torch.dtype], Step],
    others: tuple[Provider, ...] = (),
    **parameters: Any,
) -> Problem:
    """Steps of one kind; `make` gives the step in a dtype."""

    def setup() -> Workload:
        return Workload(None, [(0,), (1,)], check_against(make(torch.float64)))

    def single(_: Any) -> Step:
        return make(torch.float32)

    return Problem(
        "train",
        f"{name}, batch {batch:,}",
        {"batch": batch, "step": name} | parameters,
        1,
        setup,
        (
            Provider("evalp_fast", lambda _: run(single(None)), parts=lambda data: parts(single, data)),
            *others,
        ),
        unit="steps",
        gradients=True,
    )


def posterior(dim: int) -> Posterior:
    """Of imaginary images."""
    index = torch.arange(IMAGES, device=DEVICE)
    return Posterior(
        normal(3, index, 0, Stream.DATA_ORDER, dim), torch.full((IMAGES, dim), -2.0, device=DEVICE)
    )


def rows_of(step: int, batch: int) -> Tensor:
    """The images of a step."""
    return (torch.arange(batch, device=DEVICE) + step * batch) % IMAGES


# --- the methods' steps -------------------------------------------------------------------------------------


def vae_step(batch: int, dtype: torch.dtype) -> Step:
    """Stage one: the VAE of the `mnist` preset."""
    torch.manual_seed(0)
    config = VAEConfig()
    vae = VAE(config).to(DEVICE, dtype).train()
    noise_of = functools.partial(normal, 0, stream=Stream.POSTERIOR, width=config.latent_dim)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 1, 32, 32), dtype=torch.uint8, generator=generator).to(DEVICE)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        rows = rows_of(step, batch)
        return to_float(images[rows]).to(dtype), noise_of(index=rows, step=step).to(dtype)

    def loss(data: tuple[Tensor, Tensor]) -> Tensor:
        # `VAE.decode` gives float32; float64 images would promote the error alone.
        return vae.loss(*data, 0.1)[0]

    return Step([vae], draw, loss, [])


def likelihood_step(dim: int, couplings: int, hidden: int, batch: int, dtype: torch.dtype) -> Step:
    """The residual recipe's first half: maximum likelihood of the flow."""
    torch.manual_seed(0)
    flow = randomised(CouplingFlow(FlowConfig(dim, couplings, hidden))).to(DEVICE, dtype)
    latents = posterior(dim)

    def draw(step: int) -> Tensor:
        return latents.draw(rows_of(step, batch), seed=0, step=step).to(dtype)

    return Step([flow], draw, lambda z: -flow.log_prob(z).mean(), [MovingAverage(flow, 0.999)])


def contrast_step(dim: int, batch: int, dtype: torch.dtype) -> Step:
    """The residual recipe's second half: the energy by noise contrast with the flow."""
    torch.manual_seed(0)
    flow = randomised(CouplingFlow(FlowConfig(dim, 12, 192))).to(DEVICE)
    energy = MLPEnergy(EnergyConfig(dim, 256, 3, "silu")).to(DEVICE, dtype)
    latents = posterior(dim)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        data = latents.draw(rows_of(step, batch), seed=0, step=step)
        return data.to(dtype), flow_draws(flow, batch, seed=0, step=step, device=DEVICE).to(dtype)

    def loss(data: tuple[Tensor, Tensor]) -> Tensor:
        return contrast_loss(energy(data[0]), energy(data[1]))

    return Step([energy], draw, loss, [MovingAverage(energy, 0.999)])


def game_step(dim: int, batch: int, which: str, dtype: torch.dtype) -> Step:
    """The published game: the energy's step with its gradient penalty, or the sampler's by the reverse KL."""
    torch.manual_seed(0)
    flow = randomised(CouplingFlow(FlowConfig(dim, 8, 128))).to(DEVICE, dtype)
    energy = MLPEnergy(EnergyConfig(dim, 128, 2, "leaky_relu")).to(DEVICE, dtype)
    latents, index = posterior(dim), torch.arange(batch, device=DEVICE)

    def draw(step: int) -> tuple[Tensor, ...]:
        data = latents.draw(rows_of(step, batch), seed=0, step=step).to(dtype)
        noise = normal(0, index, step, Stream.INITIAL, dim).to(dtype)
        if which == "sampler":
            return noise, data
        place = uniform(0, index, step, Stream.INTERPOLATION, 1).to(dtype)
        with torch.no_grad():
            return data, flow(noise)[0], place

    def loss(drawn: Any) -> Tensor:
        if which == "energy":
            return energy_loss(energy, drawn[0], drawn[1], drawn[2], 10.0)
        return sampler_loss(flow, energy, drawn[0], drawn[1], 0.1, "reverse_kl")

    trained: list[nn.Module] = [energy] if which == "energy" else [flow]
    averages = [] if which == "energy" else [MovingAverage(flow, 0.999)]
    return Step(trained, draw, loss, averages)


def randomised(flow: CouplingFlow) -> CouplingFlow:
    """A new flow is a permutation, and half of its gradients are zero: not this one."""
    with torch.no_grad():
        flow.weight_out.normal_(std=0.2 / flow.config.hidden**0.5)
    return flow


# --- the likelihood step of the libraries -------------------------------------------------------------------


def peer_problem(dim: int, batch: int) -> Problem:
    """Maximum likelihood of the flow of the `flow` suite: ours, the textbook's and everybody's."""
    weights = textbook.flow_weights(dim, 8, 256, 2)

    def draw(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return normal(1, rows_of(step, batch), step, Stream.DATA_ORDER, dim).to(dtype)

    def ours(_: Any) -> Step:
        flow = flow_module(weights)
        return Step([flow], draw, lambda z: -flow.log_prob(z).mean(), [])

    class Textbook(nn.Module):
        def __init__(self, dtype: torch.dtype):
            super().__init__()
            self.stacks = nn.ParameterDict(
                {k: nn.Parameter(v.to(dtype, copy=True)) for k, v in vars(weights).items()}
            )
            self.order = textbook.shuffle(dim)

        def forward(self, z: Tensor) -> Tensor:
            return textbook.flow_log_prob(textbook.FlowWeights(**dict(self.stacks.items())), self.order, z)

    def plain(dtype: torch.dtype) -> Step:
        flow = Textbook(dtype).to(DEVICE)
        return Step([flow], lambda step: draw(step, dtype), lambda z: -flow(z).mean(), [])

    def peer(name: str) -> Callable[[Any], Call]:
        def make(_: Any) -> Call:
            flow = FLOW_PEERS[name][1](copy.deepcopy(weights))
            network = flow.network.train()
            return run(Step([network], draw, lambda z: -flow.log_prob(z).mean(), []))

        return make

    def setup() -> Workload:
        return Workload(None, [(0,), (1,)], check_against(plain(torch.float64)))

    return Problem(
        "train",
        f"flow likelihood, dim {dim}, batch {batch:,}",
        {"batch": batch, "dim": dim, "step": "flow likelihood"},
        1,
        setup,
        (
            Provider("evalp_fast", lambda _: run(ours(None)), parts=lambda data: parts(ours, data)),
            Provider("torch eager", lambda _: run(plain(torch.float32))),
            *(Provider(name, peer(name), missing=absent(needed)) for name, (needed, _) in FLOW_PEERS.items()),
        ),
        unit="steps",
        gradients=True,
    )


def problems(scale: Scale) -> list[Problem]:
    """Each method's step; batches of the presets, larger ones at `large`."""
    batch = pick(scale, 256, 512, 8192)
    found = [
        problem("VAE", batch, lambda dtype: vae_step(batch, dtype)),
        problem(
            "residual: flow likelihood",
            batch,
            lambda dtype: likelihood_step(16, 12, 192, batch, dtype),
            dim=16,
        ),
        problem("residual: energy contrast", batch, lambda dtype: contrast_step(16, batch, dtype), dim=16),
        problem("EVaLP: energy", batch, lambda dtype: game_step(16, batch, "energy", dtype), dim=16),
        problem("EVaLP: sampler", batch, lambda dtype: game_step(16, batch, "sampler", dtype), dim=16),
    ]
    return [*found, peer_problem(64, batch)]


def test_train(case: Any, timed: Any) -> None:
    timed(case)
