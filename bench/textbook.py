"""What the suites compute, written down plainly in torch: reference of the checks, and eager competitor.

Nothing here uses this package: neither its kernels nor its modules.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.machine import DEVICE

LOG_2PI = math.log(2.0 * math.pi)
CLAMP = 2.0

Linear = Callable[[Tensor, Tensor, Tensor], Tensor]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """In the dtype of its arguments."""
    return F.linear(x, weight, bias)


def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The product in bfloat16, everything else as it was."""
    return F.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype) + bias


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) of the rows: `[N]`."""
    return -0.5 * (z.square().sum(dim=-1) + z.shape[-1] * LOG_2PI)


# --- the flow -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowWeights:
    """Parameters of L couplings of width D with an MLP of `depth` hidden layers of width H as conditioner.

    `weight_in [L, H, D1]`, `bias_in [L, H]`, `weight_hidden [L, depth-1, H, H]`,
    `bias_hidden [L, depth-1, H]`, `weight_out [L, 2·D2, H]` (log-scales first),
    `bias_out [L, 2·D2]`; D1 = ceil(D/2), D2 = D - D1.
    """

    weight_in: Tensor
    bias_in: Tensor
    weight_hidden: Tensor
    bias_hidden: Tensor
    weight_out: Tensor
    bias_out: Tensor

    @property
    def dim(self) -> int:
        """D."""
        return self.weight_in.shape[2] + self.weight_out.shape[1] // 2

    def double(self) -> "FlowWeights":
        """In float64."""
        return FlowWeights(*(getattr(self, f.name).double() for f in fields(self)))

    def layers(self) -> list[tuple[Tensor, ...]]:
        """The parameters of each coupling, in order."""
        return list(zip(*(getattr(self, f.name).unbind(0) for f in fields(self)), strict=True))

    def flops(self) -> float:
        """Of the matrix products, for one sample."""
        return 2.0 * (self.weight_in.numel() + self.weight_hidden.numel() + self.weight_out.numel())


def flow_weights(dim: int, couplings: int, hidden: int, depth: int, seed: int = 0) -> FlowWeights:
    """Random weights of a flow that changes its noise as much as a trained one does.

    Log-scales of about ±0.3 and shifts of about ±0.3 a coupling: far from the identity, well-conditioned.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, deviation: float) -> Tensor:
        return (deviation * torch.randn(*shape, generator=generator)).to(DEVICE)

    passed = (dim + 1) // 2
    changed = dim - passed
    return FlowWeights(
        normal(couplings, hidden, passed, deviation=(2.0 / passed) ** 0.5),
        normal(couplings, hidden, deviation=0.1),
        normal(couplings, depth - 1, hidden, hidden, deviation=(2.0 / hidden) ** 0.5),
        normal(couplings, depth - 1, hidden, deviation=0.1),
        normal(couplings, 2 * changed, hidden, deviation=0.2 / hidden**0.5),
        normal(couplings, 2 * changed, deviation=0.05),
    )


def shuffle(dim: int) -> Tensor:
    """The perfect shuffle: column i of its result is column `shuffle(dim)[i]`: b0 a0 b1 a1 ..."""
    passed = (dim + 1) // 2
    changed = dim - passed
    first, second = torch.arange(passed), torch.arange(passed, dim)
    order = torch.empty(dim, dtype=torch.int64)
    order[0 : 2 * changed : 2] = second
    order[1 : 2 * changed : 2] = first[:changed]
    order[2 * changed :] = first[changed:]
    return order.to(DEVICE)


def _conditioner(layer: tuple[Tensor, ...], x: Tensor, product: Linear) -> tuple[Tensor, Tensor]:
    weight_in, bias_in, weight_hidden, bias_hidden, weight_out, bias_out = layer
    h = torch.relu(product(x, weight_in, bias_in))
    for weight, bias in zip(weight_hidden.unbind(0), bias_hidden.unbind(0), strict=True):
        h = torch.relu(product(h, weight, bias))
    log_scale, shift = product(h, weight_out, bias_out).chunk(2, dim=1)
    return CLAMP * torch.tanh(log_scale / CLAMP), shift


def flow_forward(
    weights: FlowWeights, order: Tensor, u: Tensor, product: Linear = linear
) -> tuple[Tensor, Tensor]:
    """Noise `[N, D]` to samples, and the log-determinant `[N]`."""
    z, log_det = u, u.new_zeros(u.shape[0])
    passed = weights.weight_in.shape[2]
    for layer in weights.layers():
        log_scale, shift = _conditioner(layer, z[:, :passed], product)
        changed = z[:, passed:] * torch.exp(log_scale) + shift
        z = torch.cat((z[:, :passed], changed), dim=1)[:, order]
        log_det = log_det + log_scale.sum(dim=1)
    return z, log_det


def flow_inverse(
    weights: FlowWeights, order: Tensor, z: Tensor, product: Linear = linear
) -> tuple[Tensor, Tensor]:
    """Samples to noise, and the log-determinant of that."""
    u, log_det = z, z.new_zeros(z.shape[0])
    passed, back = weights.weight_in.shape[2], torch.argsort(order)
    for layer in reversed(weights.layers()):
        u = u[:, back]
        log_scale, shift = _conditioner(layer, u[:, :passed], product)
        changed = (u[:, passed:] - shift) * torch.exp(-log_scale)
        u = torch.cat((u[:, :passed], changed), dim=1)
        log_det = log_det - log_scale.sum(dim=1)
    return u, log_det


def flow_log_prob(weights: FlowWeights, order: Tensor, z: Tensor, product: Linear = linear) -> Tensor:
    """log g(z) of the rows: `[N]`."""
    u, log_det = flow_inverse(weights, order, z, product)
    return standard_normal_log_prob(u) + log_det


# --- the energy ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnergyWeights:
    """Parameters of an MLP energy: weights `[out, in]` and biases of its layers; SiLU between them."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    def double(self) -> "EnergyWeights":
        """In float64."""
        return EnergyWeights(*(tuple(t.double() for t in ts) for ts in (self.weights, self.biases)))

    def flops(self) -> float:
        """Of the matrix products, for one energy; its gradient needs as many again."""
        return 2.0 * sum(w.numel() for w in self.weights)


def energy_weights(dim: int, hidden: int, depth: int, seed: int = 1) -> EnergyWeights:
    """Random weights with energies of about ±1 and gradients of the size of the prior's."""
    generator = torch.Generator().manual_seed(seed)
    widths = [dim, *[hidden] * depth, 1]
    weights = [
        torch.randn(o, i, generator=generator) * (2.0 / i) ** 0.5 for i, o in itertools.pairwise(widths)
    ]
    biases = [0.1 * torch.randn(o, generator=generator) for o in widths[1:]]
    return EnergyWeights(tuple(w.to(DEVICE) for w in weights), tuple(b.to(DEVICE) for b in biases))


def energy(weights: EnergyWeights, z: Tensor, product: Linear = linear) -> Tensor:
    """f(z) of the rows: `[N]`. The last layer, one column, is never rounded."""
    h = z
    for weight, bias in zip(weights.weights[:-1], weights.biases[:-1], strict=True):
        h = F.silu(product(h, weight, bias))
    return F.linear(h, weights.weights[-1], weights.biases[-1]).squeeze(-1)


def energy_and_gradient(weights: EnergyWeights, z: Tensor, product: Linear = linear) -> tuple[Tensor, Tensor]:
    """f(z) `[N]` and its gradient `[N, D]`, by autograd."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = energy(weights, z, product)
        (gradient,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), gradient


# --- samplers, of noise that is given -----------------------------------------------------------------------


def langevin(
    potential: Callable[[Tensor], Tensor],
    z: Tensor,
    steps: int,
    step_size: float,
    noise: Callable[[int], Tensor],
    uniforms: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """The ends of Langevin chains from `z` on exp(-potential), in the dtype of `z`.

    `noise` maps a step to its normals `[N, D]`. Where `uniforms` (a step to `[N]` numbers) is given, each
    step is accepted or not by Metropolis and Hastings (Roberts & Tweedie 1996).
    """

    def state(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = potential(z)
            (slope,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), slope

    value, slope = state(z)
    for step in range(steps):
        proposal = z - 0.5 * step_size * slope + math.sqrt(step_size) * noise(step).to(z.dtype)
        new_value, new_slope = state(proposal)
        accepted = torch.ones_like(value, dtype=torch.bool)
        if uniforms is not None:
            forward = (proposal - z + 0.5 * step_size * slope).square().sum(dim=1)
            backward = (z - proposal + 0.5 * step_size * new_slope).square().sum(dim=1)
            log_ratio = value - new_value - (backward - forward) / (2 * step_size)
            accepted = uniforms(step).to(z.dtype).log() <= log_ratio
        z = torch.where(accepted[:, None], proposal, z)
        slope = torch.where(accepted[:, None], new_slope, slope)
        value = torch.where(accepted, new_value, value)
    return z


def race(
    weigh: Callable[[Tensor], tuple[Tensor, Tensor]], blocks: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """One proposal of each sample by its weight, in float64: the first whose clock, over its weight, rings.

    `weigh` maps noise `[M, D]` to proposals and log-weights `[M]`; `blocks` are proposals in order: their
    noise `[N, number, D]` and exponential clocks `[N, number]`. Returns the winners `[N, D]` and the log of
    the mean weight `[N]`.
    """
    leaders, winners, totals, proposals = [], [], [], 0
    for u, clocks in blocks:
        count, number, _ = u.shape
        z, weights = weigh(u.double().flatten(0, 1))
        weights = weights.view(count, number)
        leader, place = (weights - clocks.double().log()).max(dim=1)
        leaders.append(leader)
        winners.append(z.view(count, number, -1)[torch.arange(count, device=z.device), place])
        totals.append(weights.logsumexp(dim=1))
        proposals += number
    first = torch.stack(leaders).argmax(dim=0)
    winner = torch.stack(winners)[first, torch.arange(len(first), device=first.device)]
    return winner, torch.stack(totals).logsumexp(dim=0) - math.log(proposals)
