"""Configurations survive JSON, and whatever nobody would read is refused."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from evalp_fast.configuration import from_dict
from evalp_fast.models.energy import EnergyConfig
from evalp_fast.models.flow import FlowConfig
from evalp_fast.models.vae import VAEConfig
from evalp_fast.pipeline import EVaLPConfig
from evalp_fast.priors import PriorConfig
from evalp_fast.training.presets import PRIOR_PRESETS, VAE_PRESETS


@dataclass(frozen=True)
class Inner:
    widths: tuple[int, ...] = (1, 2)
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None


def through_json(value):
    return from_dict(type(value), json.loads(json.dumps(dataclasses.asdict(value))))


@pytest.mark.parametrize(
    "value",
    [
        Outer("x", Inner((3, 4, 5), "b"), None),
        Outer("x", maybe=Inner(())),
        EVaLPConfig(VAEConfig(3, 64, 8, (4, 8), (8, 4), 5)),
        EVaLPConfig(
            VAEConfig(latent_dim=4), PriorConfig(FlowConfig(4, clamp=None), EnergyConfig(4), "gaussian", 0.1)
        ),
        *VAE_PRESETS.values(),
        *PRIOR_PRESETS.values(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_round_trip(value) -> None:
    assert through_json(value) == value


def test_missing_key_is_named() -> None:
    """Also one that has a default: whoever wrote the file may have had another."""
    with pytest.raises(TypeError, match="missing key 'inner' for Outer"):
        from_dict(Outer, {"name": "x"})


def test_unknown_key_is_named() -> None:
    with pytest.raises(TypeError, match="unknown key 'nmae' for Outer; known: inner, maybe, name"):
        from_dict(Outer, {"nmae": "x"})
    with pytest.raises(TypeError, match="unknown key 'depth' for Inner; known: kind, widths"):
        from_dict(Outer, {"name": "x", "maybe": {"depth": 3}})


def test_value_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="couplings must be at least 1"):
        from_dict(FlowConfig, dataclasses.asdict(FlowConfig(4)) | {"couplings": 0})
