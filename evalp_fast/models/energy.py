"""The latent energy f(z): an MLP with one output (the energy network of EVaLP)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from evalp_fast.kernels.energy import EnergyParameters, mlp_energy, mlp_energy_and_gradient
from evalp_fast.kernels.mlp_device import ACTIVATIONS, Activation, Precision
from evalp_fast.kernels.mlp_reference import activate, without_autocast
from evalp_fast.models.precision import RoundedNetwork, has_own_call


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


class MLPEnergy(RoundedNetwork):
    """f: `[N, D]` to `[N]`; a lower energy is more likely.

    The kernels read the layers' weights. Where a layer is no plain `nn.Linear` (an adapter around it, one
    without a bias, or with hooks such as those of pruning) the layers themselves are called, as they are.
    Parametrized ones are plain.
    """

    def __init__(self, config: EnergyConfig):
        super().__init__()
        self.config = config
        widths = [config.dim, *[config.hidden] * config.depth, 1]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        if config.zero_init:
            nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def parameters_in_order(self, precision: Precision | None = None) -> EnergyParameters:
        """The parameters as the kernels take them; the hidden layers' matrices in bfloat16 where the products
        are.

        On a GPU these are without gradients the energy's own copies, which its next call brings up to date.

        Raises:
            TypeError: where a layer is more than its weights.
        """
        changed = self._changed_layer()
        if changed is not None:
            raise TypeError(f"{changed}: a kernel would not see what it does")
        return self._in_order(precision)

    def _in_order(self, precision: Precision | None) -> EnergyParameters:
        layers: Any = self.layers
        *hidden, last = (layer.weight for layer in layers)
        weights = (*self._rounded(tuple(hidden), precision), last)
        return EnergyParameters(weights, tuple(layer.bias for layer in layers))

    def unseen(self) -> str | None:
        changed = self._changed_layer()
        return super().unseen() if changed is None else f"is changed: {changed}"

    def _changed_layer(self) -> str | None:
        """Which layer is more than its weights, and what it is; None where none is."""
        for number, layer in enumerate(self.layers):
            if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
                return f"layers[{number}] is a {type(layer).__name__}, not an nn.Linear"
            if has_own_call(layer):
                return f"layers[{number}] has hooks, or a forward of its own"
            if layer.bias is None:
                return f"layers[{number}] has no bias"
        return None

    def _check(self, z: Tensor) -> None:
        if z.ndim != 2 or z.shape[1] != self.config.dim:
            raise ValueError(f"z must have shape [N, {self.config.dim}], got {tuple(z.shape)}")

    def _by_layers(self, z: Tensor) -> Tensor:
        *hidden, last = self.layers
        with without_autocast(z.device):
            for layer in hidden:
                z = activate(layer(z), self.config.activation)
            return last(z).squeeze(-1)

    def forward(self, z: Tensor, *, precision: Precision | None = None) -> Tensor:
        """The energy of the rows of `z`; the last layer, a single column, is always in float32."""
        self._check(z)
        if self._changed_layer() is not None:
            return self._by_layers(z)
        parameters = self._in_order(precision)
        return mlp_energy(z, parameters, precision=precision or "ieee", activation=self.config.activation)

    def gradient(self, z: Tensor, *, precision: Precision | None = None) -> tuple[Tensor, Tensor]:
        """`(f(z) [N], ∇f(z) [N, D])`, in one launch on a GPU; differentiable in z and the parameters."""
        self._check(z)
        if self._changed_layer() is not None:
            value, pull_back, *_ = torch.func.vjp(self._by_layers, z)
            return value, pull_back(torch.ones_like(value))[0]
        parameters = self._in_order(precision)
        return mlp_energy_and_gradient(
            z, parameters, precision=precision or "ieee", activation=self.config.activation
        )
