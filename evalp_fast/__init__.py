"""Fast samplers for latent-variable models with energy-based priors."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from evalp_fast.pipeline import EVaLP, EVaLPConfig
    from evalp_fast.priors import EnergyPrior, PriorConfig
    from evalp_fast.samplers.langevin import langevin

# Imported on first use: torch takes seconds to import, and the command line's help does not need it.
_HOMES = {
    "EVaLP": "evalp_fast.pipeline",
    "EVaLPConfig": "evalp_fast.pipeline",
    "EnergyPrior": "evalp_fast.priors",
    "PriorConfig": "evalp_fast.priors",
    "langevin": "evalp_fast.samplers.langevin",
}

__all__ = ["EVaLP", "EVaLPConfig", "EnergyPrior", "PriorConfig", "__version__", "langevin"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
