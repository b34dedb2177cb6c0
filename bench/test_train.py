"""Training: steps per second of each method, on latents and images of the shipped model's shapes.

A step is what the loops of `evalp_fast.training` do: draw the data, loss, gradients, optimiser, moving
average. The flow's likelihood step is also done with the flow libraries, same weights and optimiser.
Checked, of the first step: the loss, the norm of the gradient and, where the parameters are the same, the
gradient itself, against float64; the parameters, against Adam by hand from the gradient that was found; and
the moving average, by hand from the parameters. Float32 is float32: cuDNN's convolutions would take TF32, as
the provider of that name does.
"""

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import checks, textbook
from bench.flow_peers import FLOW_PEERS
from bench.harness import Call, Precision, Problem, Provider, Workload, absent, compiled, needs_cuda
from bench.machine import DEVICE
from bench.modes import not_at_small
from bench.sizes import Scale, pick
from bench.test_flow import module as flow_module
from evalp_fast.data import to_float
from evalp_fast.kernels.matmul_precision import matmul_precision
from evalp_fast.kernels.philox import Stream, normal, uniform
from evalp_fast.models.energy import EnergyConfig, MLPEnergy
from evalp_fast.models.flow import CouplingFlow, FlowConfig
from evalp_fast.models.vae import VAE, VAEConfig
from evalp_fast.training.evalp import energy_loss, sampler_loss
from evalp_fast.training.latents import Posterior
from evalp_fast.training.residual import contrast_loss, flow_draws
from evalp_fast.training.run import MovingAverage

# Of the loss and of the gradient's norm, relative; of the gradient five times as much.
LIMITS: dict[str, float] = {"ieee": 1e-4, "tf32": 4e-3}
RATE = 1e-4
SLOW = "compiling it takes too long"
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


def _optimizer(networks: list[nn.Module]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters(networks), RATE, fused=True)


class Stepped(NamedTuple):
    """What a step gives: its loss; what is trained, its parameters before the first step; the averages."""

    loss: Tensor
    networks: list[nn.Module]
    before: list[Tensor]
    averages: list[MovingAverage]


def run(step: Step, precision: Precision = "ieee", compile_loss: bool = False) -> Call:
    """The step as a call, from the number of the step."""
    optimizer = _optimizer(step.networks)
    loss_of = compiled(step.loss) if compile_loss else step.loss
    before = [parameter.detach().clone() for parameter in parameters(step.networks)]

    def call(number: int) -> Stepped:
        with matmul_precision(precision):
            loss = loss_of(step.draw(number))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            for average, network in zip(step.averages, step.networks, strict=False):
                average.update(network)
        return Stepped(loss.detach(), step.networks, before, step.averages)

    return call


def parameters(networks: list[nn.Module]) -> list[nn.Parameter]:
    """All of them, in order."""
    return [parameter for network in networks for parameter in network.parameters()]


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


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """One vector, in float64."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def gradient(networks: list[nn.Module]) -> Tensor:
    """Of all parameters: zero where there is none."""
    found = parameters(networks)
    return flat(p.new_zeros(p.shape) if p.grad is None else p.grad for p in found)


def check_against(step: Step) -> Callable[..., None]:
    """The first step of somebody against `step`, which is in float64."""
    loss = step.loss(step.draw(0))
    loss.backward()
    right, shapes = gradient(step.networks), [p.shape for p in parameters(step.networks)]

    def check(provider: Provider, result: Stepped, number: int) -> None:
        limit = LIMITS[provider.precision]
        own = gradient(result.networks)
        found = {"loss": (result.loss, loss), "norm of the gradient": (own.norm(), right.norm())}
        if provider.name in OTHER_PARAMETERS:
            del found["norm of the gradient"]
        for name, (value, wanted) in found.items():
            error = abs(value.item() - wanted.item()) / max(abs(wanted.item()), 1e-6)
            assert error < limit, f"the {name} is {value.item():.6g}, not {wanted.item():.6g}"
        if [p.shape for p in parameters(result.networks)] == shapes:
            checks.relative_error(own, right, 5 * limit, "the gradient")
        before, after = flat(result.before), flat(parameters(result.networks))
        # Adam's first step: its averages are the gradient and its square (Kingma & Ba 2015, algorithm 1).
        moved = -RATE * own / (own.abs() + 1e-8)
        checks.relative_error(after - before, moved, 0.02, "what the optimiser moved")
        for average, network in zip(result.averages, result.networks, strict=False):
            start = flat(result.before[: len(average.average)])
            # Its first decay is 1/10, whatever the later ones.
            wanted = 0.9 * (flat(network.parameters()) - start)
            checks.relative_error(flat(average.average.values()) - start, wanted, 0.02, "the moving average")

    return check


def problem(
    name: str,
    batch: int,
    make: Callable[[torch.dtype], Step],
    scale: Scale,
    *,
    convolutions: bool = False,
    compiles: bool = True,
    **sizes: Any,
) -> Problem:
    """Steps of one kind; `make` gives the step in a dtype. torch's TF32 is of use to `convolutions` alone."""

    def setup() -> Workload:
        return Workload(None, [(0,), (1,)], check_against(make(torch.float64)), stateful=True)

    def single(_: Any) -> Step:
        return make(torch.float32)

    def tf32(_: Any) -> Call:
        return run(single(None), "tf32")

    return Problem(
        "train",
        f"{name}, batch {batch:,}",
        {"batch": batch, "step": name} | sizes,
        1,
        setup,
        (
            Provider("evalp_fast", lambda _: run(single(None)), parts=lambda data: parts(single, data)),
            *([Provider("evalp_fast tf32", tf32, "tf32", needs_cuda)] if convolutions else []),
            Provider(
                "evalp_fast compiled",
                lambda _: run(single(None), compile_loss=True),
                missing=not_at_small(scale, SLOW)
                if compiles
                else lambda: "torch compiles no gradient penalty",
                compiles=True,
            ),
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


def peer_problem(dim: int, batch: int, scale: Scale) -> Problem:
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
        return Workload(None, [(0,), (1,)], check_against(plain(torch.float64)), stateful=True)

    return Problem(
        "train",
        f"flow likelihood, dim {dim}, batch {batch:,}",
        {"batch": batch, "dim": dim, "step": "flow likelihood"},
        1,
        setup,
        (
            Provider("evalp_fast", lambda _: run(ours(None)), parts=lambda data: parts(ours, data)),
            Provider(
                "evalp_fast compiled",
                lambda _: run(ours(None), compile_loss=True),
                missing=not_at_small(scale, SLOW),
                compiles=True,
            ),
            Provider("torch eager", lambda _: run(plain(torch.float32))),
            Provider(
                "torch.compile",
                lambda _: run(plain(torch.float32), compile_loss=True),
                missing=not_at_small(scale, SLOW),
                compiles=True,
            ),
            *(Provider(name, peer(name), missing=absent(needed)) for name, (needed, _) in FLOW_PEERS.items()),
        ),
        unit="steps",
        gradients=True,
    )


def problems(scale: Scale) -> list[Problem]:
    """Each method's step; batches of the presets, larger ones at `large`. The sweep is of the libraries'."""
    if scale == "sweep":
        return [peer_problem(64, 1 << p, scale) for p in range(8, 19, 2)]
    batch = pick(scale, 256, 512, 8192)

    def likelihood(dtype: torch.dtype) -> Step:
        return likelihood_step(16, 12, 192, batch, dtype)

    return [
        problem("VAE", batch, lambda dtype: vae_step(batch, dtype), scale, convolutions=True),
        problem("residual: flow likelihood", batch, likelihood, scale, dim=16),
        problem(
            "residual: energy contrast", batch, lambda dtype: contrast_step(16, batch, dtype), scale, dim=16
        ),
        problem(
            "EVaLP: energy",
            batch,
            lambda dtype: game_step(16, batch, "energy", dtype),
            scale,
            compiles=False,
            dim=16,
        ),
        problem("EVaLP: sampler", batch, lambda dtype: game_step(16, batch, "sampler", dtype), scale, dim=16),
        peer_problem(64, batch, scale),
    ]


def test_train(case: Any, timed: Any) -> None:
    timed(case)
