"""The sampler of the latent prior: a stack of affine couplings (RealNVP, Dinh et al. 2017, eq. 7-8)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evalp_fast.kernels.checks import check_clamp
from evalp_fast.kernels.flow import FlowParameters, Noise, coupling_flow
from evalp_fast.kernels.mlp_device import ACTIVATIONS, Activation, Precision
from evalp_fast.models.precision import RoundedNetwork

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
        normalization: `"actnorm"` ends every coupling with a learned scale and shift of each column (Glow,
            Kingma & Dhariwal 2018, section 3.1), at first the identity; `"none"` does not.
    """

    dim: int
    couplings: int = 8
    hidden: int = 128
    depth: int = 2
    activation: Activation = "relu"
    clamp: float | None = 2.0
    mixing: Literal["shuffle", "swap"] = "shuffle"
    normalization: Literal["none", "actnorm"] = "none"

    def __post_init__(self) -> None:
        if self.dim < 2:
            raise ValueError(f"dim must be at least 2, got {self.dim}")
        for name in ("couplings", "hidden", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_clamp(self.clamp)
        if self.mixing not in ("shuffle", "swap"):
            raise ValueError(f"mixing must be 'shuffle' or 'swap', got {self.mixing!r}")
        if self.normalization not in ("none", "actnorm"):
            raise ValueError(f"normalization must be 'none' or 'actnorm', got {self.normalization!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")


class CouplingFlow(RoundedNetwork):
    """An invertible map g from noise u ~ N(0, I) to latents z, with exact log-determinants.

    Coupling l leaves the first half of the columns as it is and maps the second half to
    `x·exp(c·tanh(s/c)) + t`, where `(s, t)` is an MLP of the first half; then the columns are mixed. The
    last layers start at zero, so that a new flow is a permutation and its density is N(0, I).

    The parameters of all couplings are stacked along their first axis, as `coupling_flow` takes them:
    `weight_in [L, H, D1]`, `weight_hidden [L, depth-1, H, H]`, `weight_out [L, 2·D2, H]` and the biases, with
    `D1 = ceil(D/2)`. They are float32, also where the products are in bfloat16.
    """

    norm_log_scale: nn.Parameter | None
    norm_shift: nn.Parameter | None

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        count, hidden, depth = config.couplings, config.hidden, config.depth
        passed = (config.dim + 1) // 2
        changed = config.dim - passed
        self.weight_in = nn.Parameter(torch.empty(count, hidden, passed))
        self.bias_in = nn.Parameter(torch.zeros(count, hidden))
        self.weight_hidden = nn.Parameter(torch.empty(count, depth - 1, hidden, hidden))
        self.bias_hidden = nn.Parameter(torch.zeros(count, depth - 1, hidden))
        self.weight_out = nn.Parameter(torch.zeros(count, 2 * changed, hidden))
        self.bias_out = nn.Parameter(torch.zeros(count, 2 * changed))
        gain = nn.init.calculate_gain("relu")
        for l in range(count):  # noqa: E741
            nn.init.orthogonal_(self.weight_in[l], gain)
            for d in range(depth - 1):
                nn.init.orthogonal_(self.weight_hidden[l, d], gain)
        normalized = config.normalization == "actnorm"
        for name in ("norm_log_scale", "norm_shift"):
            start = nn.Parameter(torch.zeros(count, config.dim)) if normalized else None
            self.register_parameter(name, start)

    def parameters_stacked(self, precision: Precision | None = None) -> FlowParameters:
        """The parameters as the kernels take them; the matrices in bfloat16 where the products are.

        On a GPU these are without gradients the flow's own copies, which its next call brings up to date.
        """
        weights = self._rounded((self.weight_in, self.weight_hidden, self.weight_out), precision)
        return FlowParameters(
            weight_in=weights[0],
            bias_in=self.bias_in,
            weight_hidden=weights[1],
            bias_hidden=self.bias_hidden,
            weight_out=weights[2],
            bias_out=self.bias_out,
            norm_log_scale=self.norm_log_scale,
            norm_shift=self.norm_shift,
        )

    def options(self, precision: Precision | None = None) -> dict[str, Any]:
        """The keyword arguments of `coupling_flow` that this flow determines."""
        return {
            "precision": precision or "ieee",
            "activation": self.config.activation,
            "clamp": self.config.clamp,
            "mixing": self.config.mixing,
        }

    def _check(self, x: Tensor, name: str) -> None:
        if x.ndim != 2 or x.shape[1] != self.config.dim:
            raise ValueError(f"{name} must have shape [N, {self.config.dim}], got {tuple(x.shape)}")

    def forward(
        self, u: Tensor | Noise, *, precision: Precision | None = None, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Noise to latents: `(z [N, D], log|det dz/du| [N])`.

        Args:
            u: `[N, D]`, or a `Noise`: which numbers to draw, from N(0, `temperature`·I). A GPU's kernel draws
                them on the chip.
            precision: of the matrix products.
            temperature: of a `Noise`.
        """
        if isinstance(u, Tensor):
            self._check(u, "u")
        parameters = self.parameters_stacked(precision)
        return coupling_flow(u, parameters, temperature=temperature, **self.options(precision))

    def inverse(self, z: Tensor, *, precision: Precision | None = None) -> tuple[Tensor, Tensor]:
        """Latents to noise: `(u [N, D], log|det du/dz| [N])`."""
        self._check(z, "z")
        return coupling_flow(z, self.parameters_stacked(precision), inverse=True, **self.options(precision))

    def log_prob(self, z: Tensor, *, precision: Precision | None = None) -> Tensor:
        """log g(z) of the rows of `z` `[N, D]`: `[N]`."""
        u, log_det = self.inverse(z, precision=precision)
        return standard_normal_log_prob(u) + log_det
