"""The sampler of the latent prior: a stack of affine couplings (RealNVP, Dinh et al. 2017, eq. 7-8)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from evalp_fast.kernels.coupling import affine_coupling
from evalp_fast.models.activations import ACTIVATIONS, Activation
from evalp_fast.models.precision import Precision, linear

LOG_2PI = math.log(2.0 * math.pi)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) of the rows of `z` `[N, D]`: `[N]`."""
    return -0.5 * (z.square().sum(dim=-1) + z.shape[-1] * LOG_2PI)


@dataclass(frozen=True)
class FlowConfig:
    """Shape of a `CouplingFlow`.

    Attributes:
        dim: latent dimension D, at least 2.
        couplings: number of affine couplings.
        hidden: width of the hidden layers of every conditioner.
        depth: number of hidden layers of every conditioner.
        activation: of the hidden layers.
        clamp: bound c of the log-scales, by `c·tanh(s/c)`; None leaves them unbounded.
        mixing: what moves the columns between couplings. `"shuffle"` interleaves the two halves, so that
            every pair of columns meets within log2(D) couplings; `"swap"` exchanges the halves (the
            alternating mask of the published code).
    """

    dim: int
    couplings: int = 8
    hidden: int = 128
    depth: int = 2
    activation: Activation = "relu"
    clamp: float | None = 2.0
    mixing: Literal["shuffle", "swap"] = "shuffle"

    def __post_init__(self) -> None:
        if self.dim < 2:
            raise ValueError(f"dim must be at least 2, got {self.dim}")
        for name in ("couplings", "hidden", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.clamp is not None and not self.clamp > 0:
            raise ValueError(f"clamp must be positive or None, got {self.clamp}")
        if self.mixing not in ("shuffle", "swap"):
            raise ValueError(f"mixing must be 'shuffle' or 'swap', got {self.mixing!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")


class CouplingFlow(nn.Module):
    """An invertible map g from noise u ~ N(0, I) to latents z, with exact log-determinants.

    Coupling l leaves the first half of the columns as it is and maps the second half to
    `x·exp(c·tanh(s/c)) + t`, where `(s, t)` is an MLP of the first half; then the columns are mixed. The
    last layers start at zero, so that a new flow is a permutation and its density is N(0, I).

    The parameters of all couplings are stacked along their first axis: `weight_in [L, H, D1]`,
    `weight_hidden [L, depth-1, H, H]`, `weight_out [L, 2·D2, H]` and the biases, with `D1 = ceil(D/2)`.
    """

    mixing: Tensor
    unmixing: Tensor

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        count, hidden, depth = config.couplings, config.hidden, config.depth
        self.passed = (config.dim + 1) // 2
        self.changed = config.dim - self.passed
        self.weight_in = nn.Parameter(torch.empty(count, hidden, self.passed))
        self.bias_in = nn.Parameter(torch.zeros(count, hidden))
        self.weight_hidden = nn.Parameter(torch.empty(count, depth - 1, hidden, hidden))
        self.bias_hidden = nn.Parameter(torch.zeros(count, depth - 1, hidden))
        self.weight_out = nn.Parameter(torch.zeros(count, 2 * self.changed, hidden))
        self.bias_out = nn.Parameter(torch.zeros(count, 2 * self.changed))
        gain = nn.init.calculate_gain("relu")
        for l in range(count):  # noqa: E741
            nn.init.orthogonal_(self.weight_in[l], gain)
            for d in range(depth - 1):
                nn.init.orthogonal_(self.weight_hidden[l, d], gain)
        first, second = torch.arange(self.passed), torch.arange(self.passed, config.dim)
        if config.mixing == "swap":
            order = torch.cat((second, first))
        else:  # b0 a0 b1 a1 ...: every column is changed by half of the couplings, also columns 0 and D-1
            order = torch.empty(config.dim, dtype=torch.int64)
            order[0 : 2 * self.changed : 2] = second
            order[1 : 2 * self.changed : 2] = first[: self.changed]
            order[2 * self.changed :] = first[self.changed :]
        self.register_buffer("mixing", order, persistent=False)
        self.register_buffer("unmixing", torch.argsort(order), persistent=False)

    def _conditioner(self, layer: tuple[Tensor, ...], passed: Tensor, precision: Precision | None) -> Tensor:
        """The MLP of one coupling: `[N, D1]` to `[N, 2·D2]`, log-scales first."""
        weight_in, bias_in, weight_hidden, bias_hidden, weight_out, bias_out = layer
        activation = ACTIVATIONS[self.config.activation]
        h = activation(linear(passed, weight_in, bias_in, precision))
        for weight, bias in zip(weight_hidden.unbind(0), bias_hidden.unbind(0), strict=True):
            h = activation(linear(h, weight, bias, precision))
        return linear(h, weight_out, bias_out, precision)

    def _layers(self) -> list[tuple[Tensor, ...]]:
        # One unbind per stack: indexing layer by layer would make autograd write a full stack for each.
        stacks = (
            self.weight_in,
            self.bias_in,
            self.weight_hidden,
            self.bias_hidden,
            self.weight_out,
            self.bias_out,
        )
        return list(zip(*(stack.unbind(0) for stack in stacks), strict=True))

    def _check(self, x: Tensor, name: str) -> None:
        if x.ndim != 2 or x.shape[1] != self.config.dim:
            raise ValueError(f"{name} must have shape [N, {self.config.dim}], got {tuple(x.shape)}")

    def forward(self, u: Tensor, *, precision: Precision | None = None) -> tuple[Tensor, Tensor]:
        """Noise to latents: `(z [N, D], log|det dz/du| [N])`. `precision` is that of the matrix products."""
        self._check(u, "u")
        z, log_det = u, u.new_zeros(u.shape[0])
        for layer in self._layers():
            passed, changed = z.split((self.passed, self.changed), dim=1)
            log_scale, shift = self._conditioner(layer, passed, precision).chunk(2, dim=1)
            changed, layer_log_det = affine_coupling(changed, log_scale, shift, clamp=self.config.clamp)
            z = torch.cat((passed, changed), dim=1)[:, self.mixing]
            log_det = log_det + layer_log_det
        return z, log_det

    def inverse(self, z: Tensor, *, precision: Precision | None = None) -> tuple[Tensor, Tensor]:
        """Latents to noise: `(u [N, D], log|det du/dz| [N])`."""
        self._check(z, "z")
        u, log_det = z, z.new_zeros(z.shape[0])
        for layer in reversed(self._layers()):
            passed, changed = u[:, self.unmixing].split((self.passed, self.changed), dim=1)
            log_scale, shift = self._conditioner(layer, passed, precision).chunk(2, dim=1)
            changed, layer_log_det = affine_coupling(
                changed, log_scale, shift, inverse=True, clamp=self.config.clamp
            )
            u = torch.cat((passed, changed), dim=1)
            log_det = log_det + layer_log_det
        return u, log_det

    def log_prob(self, z: Tensor, *, precision: Precision | None = None) -> Tensor:
        """log g(z) of the rows of `z` `[N, D]`: `[N]`."""
        u, log_det = self.inverse(z, precision=precision)
        return standard_normal_log_prob(u) + log_det
