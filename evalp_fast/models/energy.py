"""The latent energy f(z): an MLP with one output (the energy network of EVaLP)."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from evalp_fast.models.activations import ACTIVATIONS, Activation
from evalp_fast.models.precision import Precision, linear


@dataclass(frozen=True)
class EnergyConfig:
    """Shape of an `MLPEnergy`.

    Attributes:
        dim: latent dimension D.
        hidden: width of the hidden layers.
        depth: number of hidden layers.
        activation: of the hidden layers.
        zero_init: start with f = 0 everywhere (the last layer at zero), so that a new prior is its base.
    """

    dim: int
    hidden: int = 128
    depth: int = 2
    activation: Activation = "leaky_relu"
    zero_init: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")


class MLPEnergy(nn.Module):
    """f: `[N, D]` to `[N]`; a lower energy is more likely."""

    def __init__(self, config: EnergyConfig):
        super().__init__()
        self.config = config
        widths = [config.dim, *[config.hidden] * config.depth, 1]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        if config.zero_init:
            nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, z: Tensor, *, precision: Precision | None = None) -> Tensor:
        """The energy of the rows of `z`; the last layer, a single column, is always in float32."""
        if z.ndim != 2 or z.shape[1] != self.config.dim:
            raise ValueError(f"z must have shape [N, {self.config.dim}], got {tuple(z.shape)}")
        activation = ACTIVATIONS[self.config.activation]
        *hidden, last = self.layers
        for layer in hidden:
            assert isinstance(layer, nn.Linear)
            z = activation(linear(z, layer.weight, layer.bias, precision))
        return last(z).squeeze(-1)

    def gradient(self, z: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """`(f(z) [N], ∇f(z) [N, D])`; differentiable again with `create_graph=True`."""
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            energy = self(z)
            (gradient,) = torch.autograd.grad(energy.sum(), z, create_graph=create_graph)
        return energy, gradient
