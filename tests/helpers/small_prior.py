"""A small prior for the tests of its samplers, and how each method samples it."""

from typing import Any

import torch

from evalp_fast.models.energy import EnergyConfig
from evalp_fast.models.flow import FlowConfig
from evalp_fast.priors import EnergyPrior, PriorConfig

DIM = 5
LANGEVIN = {"n_steps": 2, "step_size": 0.2}
METHODS: dict[str, dict[str, Any]] = {
    "flow": {"method": "flow"},
    "sir": {"method": "sir", "proposals": 4},
    "latent": {"method": "langevin", "space": "latent", **LANGEVIN},
    "noise": {"method": "langevin", "space": "noise", **LANGEVIN},
}


def new_prior(base: str = "gaussian", kl_weight: float = 0.5, **energy: Any) -> EnergyPrior:
    torch.manual_seed(0)
    shape = EnergyConfig(**({"dim": DIM, "hidden": 24, "activation": "silu"} | energy))
    prior = EnergyPrior(PriorConfig(FlowConfig(DIM, couplings=2, hidden=16), shape, base, kl_weight))  # type: ignore[arg-type]
    with torch.no_grad():
        prior.flow.weight_out.normal_(std=0.1)
    return prior.requires_grad_(False)
