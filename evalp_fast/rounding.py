"""What bfloat16 products do to a prior's samples: whether they may be drawn in it without being asked for.

Both are asked of the reference, which rounds no less than the kernels: one answer on every machine, and on a
GPU no kernel that is compiled for the question alone.
"""

import torch
from torch import Tensor

from evalp_fast.kernels import philox
from evalp_fast.kernels.energy import mlp_energy_reference
from evalp_fast.kernels.flow import FlowOptions, coupling_flow_reference
from evalp_fast.kernels.mlp_reference import without_autocast
from evalp_fast.kernels.philox import Stream
from evalp_fast.models.energy import MLPEnergy
from evalp_fast.models.flow import CouplingFlow
from evalp_fast.models.precision import Precision

_DRAWS = 128
# In standard deviations of the noise, and in nats: noise of this size widens a law by half a thousandth.
_CLOSE = 0.03


@torch.no_grad()
def flow_draws_as_well(flow: CouplingFlow, temperature: float) -> bool:
    """Whether the flow's draws in bfloat16 have the law that they have in float32.

    A draw z = g(u) that is rounded is the draw of another noise, g⁻¹(z), in float32: it is close to u, in the
    root mean square over 128 draws at most 0.03 standard deviations away. That is a measure of the law in all
    its scales: a ridge of a hundredth of its length is narrower than the rounding of its place.
    """
    u = _noise(flow, temperature)
    back = _pass(flow, _pass(flow, u, "bf16"), "ieee", inverse=True)
    return bool((back - u).square().mean().sqrt() <= _CLOSE * temperature**0.5)


@torch.no_grad()
def weights_are_as_good(flow: CouplingFlow, energy: MLPEnergy, scale: float, temperature: float) -> bool:
    """Whether log-weights with the energy times `scale` in bfloat16 are those of float32, but for a constant:
    a standard deviation of at most 0.03 nats apart, over 128 of the flow's draws."""
    z = _pass(flow, _noise(flow, temperature), "ieee")
    parameters = energy.parameters_in_order()
    with without_autocast(z.device):
        rounded = mlp_energy_reference(z, parameters, "bf16", energy.config.activation)
        exact = mlp_energy_reference(z, parameters, "ieee", energy.config.activation)
    return bool((rounded - exact).std() * scale <= _CLOSE)


def _noise(flow: CouplingFlow, temperature: float) -> Tensor:
    index = torch.arange(_DRAWS, device=flow.bias_in.device)
    return philox.normal(0, index, 0, Stream.PROPOSAL, flow.config.dim) * temperature**0.5


def _pass(flow: CouplingFlow, x: Tensor, precision: Precision, *, inverse: bool = False) -> Tensor:
    options = FlowOptions(inverse=inverse, **flow.options(precision))
    with without_autocast(x.device):
        return coupling_flow_reference(x, flow.parameters_stacked(), options)[0]
