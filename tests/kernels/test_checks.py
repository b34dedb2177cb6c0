"""The checks that public functions share, and that the functions of one launch use them for all arguments."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from evalp_fast.kernels import checks
from evalp_fast.kernels.energy import EnergyParameters, mlp_energy, mlp_energy_and_gradient
from evalp_fast.kernels.flow import FlowParameters, Noise, coupling_flow
from evalp_fast.kernels.latent_chain import langevin_chain
from evalp_fast.kernels.sir import sir

DIM, HIDDEN = 4, 6
FLOW = FlowParameters(
    torch.ones(1, HIDDEN, 2),
    torch.zeros(1, HIDDEN),
    torch.zeros(1, 0, HIDDEN, HIDDEN),
    torch.zeros(1, 0, HIDDEN),
    torch.full((1, 4, HIDDEN), 0.1),
    torch.zeros(1, 4),
)
ENERGY = EnergyParameters(
    (torch.ones(HIDDEN, DIM), torch.ones(1, HIDDEN)), (torch.zeros(HIDDEN), torch.zeros(1))
)
Z = torch.ones(3, DIM)

CALLS: dict[str, Callable[..., Any]] = {
    "flow": lambda **given: coupling_flow(**{"z": (0, 0, 3), "parameters": FLOW, **given}),
    "energy": lambda **given: mlp_energy(**{"z": Z, "parameters": ENERGY, **given}),
    "gradient": lambda **given: mlp_energy_and_gradient(**{"z": Z, "parameters": ENERGY, **given}),
    "sir": lambda **given: sir(
        **{"seed": 0, "start": 0, "n": 3, "proposals": 2, "flow": FLOW, "energy": ENERGY, **given}
    ),
    "chain": lambda **given: langevin_chain(
        **{"z": Z, "parameters": ENERGY, "n_steps": 2, "step_size": 0.1, **given}
    ),
}
NO_NUMBERS: list[Any] = ["1", [1.0], 1j, True, torch.ones(()), torch.ones(3), {}]
NO_INTEGERS: list[Any] = ["1", None, 1.5, True, math.nan, torch.ones(2), np.float32(1)]
NO_NAMES: list[Any] = ["x", None, 1, ["relu"], {}]
NO_SWITCHES: list[Any] = ["False", None, 1, math.nan, torch.tensor(True)]
OUTSIDE = [torch.tensor([-1, 0, 1]), torch.tensor([0, 1, 1 << 56])]

BAD: dict[str, dict[str, list[Any]]] = {
    "flow": {
        "temperature": [*NO_NUMBERS, None, 0.0, -1.0, math.nan, math.inf],
        "clamp": [*NO_NUMBERS, 0.0, -1.0, math.nan, math.inf, 1e-39, 1e39],
        "inverse": NO_SWITCHES,
        **dict.fromkeys(("precision", "activation", "mixing"), NO_NAMES),
        "z": [
            *(Noise(value, range(3)) for value in [*NO_INTEGERS, 1 << 63, -(1 << 63) - 1]),
            *(Noise(0, range(3), value) for value in [*NO_INTEGERS, -1, 1 << 32]),
            *(Noise(0, index) for index in (*OUTSIDE, range(-1, 2), range(1 << 56, (1 << 56) + 1))),
            *((0, value, 3) for value in ("1", 1.5, True, None, -1, 1 << 56)),
            *((0, 0, value) for value in ("1", 1.5, True, None, -1, 1 << 57)),
            *(("1", 0, 3), (0, 0)),
        ],
    },
    "sir": {
        "temperature": [*NO_NUMBERS, None, 0.0, math.nan, math.inf],
        "energy_scale": [*NO_NUMBERS, None, math.nan, math.inf, -math.inf],
        "clamp": [*NO_NUMBERS, 0.0, math.nan, 1e-39],
        **dict.fromkeys(("precision", "base", "weights", "mixing"), NO_NAMES),
        "seed": [*NO_INTEGERS, 1 << 63],
        **{name: [*NO_INTEGERS, -1, 1 << 57] for name in ("start", "n", "proposals")},
        "index": [*OUTSIDE, [0, 1, 2], range(3), torch.zeros(3)],
        "device": ["xyz", "meta", 1.5, ["cpu"]],
        "energy": [None, ENERGY._replace(weights="abc"), ENERGY._replace(weights=("a", "b"))],
    },
    "chain": {
        **{name: [*NO_NUMBERS, None, 0.0, math.nan, math.inf] for name in ("temperature", "step_size")},
        "prior_precision": [*NO_NUMBERS, None, -1.0, math.nan, math.inf],
        "energy_scale": [*NO_NUMBERS, None, math.nan, math.inf],
        **{name: [*NO_INTEGERS, -1, 1 << 31] for name in ("n_steps", "thin")},
        "seed": [*NO_INTEGERS, 1 << 63],
        "first_step": [*NO_INTEGERS, -1, 1 << 32],
        "adjusted": NO_SWITCHES,
        "return_trajectory": NO_SWITCHES,
        "index": [*OUTSIDE, [0, 1, 2]],
        **dict.fromkeys(("precision", "activation"), NO_NAMES),
    },
    "energy": {
        **dict.fromkeys(("precision", "activation"), NO_NAMES),
        "parameters": [
            *(None, (1, 2), ("abc", "def"), ENERGY._replace(weights="ab")),
            ENERGY._replace(weights=("a", "b")),
            ENERGY._replace(biases=(torch.zeros(HIDDEN), "b")),
            ENERGY._replace(weights=(torch.tensor(1.0), ENERGY.weights[1])),
            ENERGY._replace(weights=(torch.ones(DIM), ENERGY.weights[1])),
            ENERGY._replace(weights=(ENERGY.weights[0], torch.tensor(1.0))),
            ENERGY._replace(biases=(torch.tensor(1.0), ENERGY.biases[1])),
        ],
    },
}

BAD["gradient"] = BAD["energy"]


@pytest.mark.parametrize(("function", "name"), [(f, name) for f, given in BAD.items() for name in given])
def test_a_bad_argument_is_named(function: str, name: str) -> None:
    """Guards against Python's own errors ("'<' not supported between ..."), and against taking "False" for
    True, True for 1 and 1.7 for 1."""
    called = "parameters" if name == "energy" else name
    for value in BAD[function][name]:
        with pytest.raises((TypeError, ValueError), match=rf"^({name}|{called})\b.* must "):
            CALLS[function](**{name: value})


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        ("flow", "temperature", np.float32(0.5)),
        ("flow", "temperature", 1),
        ("flow", "clamp", np.float64(2.0)),
        ("flow", "clamp", torch.finfo(torch.float32).tiny),
        ("flow", "z", (torch.tensor([3]), 0, 2)),
        ("sir", "temperature", np.float32(0.5)),
        ("sir", "energy_scale", 0),
        ("sir", "index", torch.tensor([0, (1 << 56) - 1, 0])),
        ("sir", "device", "cpu"),
        ("chain", "step_size", np.float32(0.1)),
        ("chain", "first_step", torch.tensor([2])),
        ("chain", "prior_precision", 0),
        ("energy", "parameters", EnergyParameters(list(ENERGY.weights), list(ENERGY.biases))),  # type: ignore[arg-type]
    ],
)
def test_a_good_argument_is_taken(function: str, name: str, value: Any) -> None:
    CALLS[function](**{name: value})


def test_integers_and_numbers() -> None:
    for value in (1, -3, 1 << 70):
        assert checks.is_integer(value)
        assert checks.is_number(value)
    for value in (1.0, np.float32(2), np.int64(3)):
        assert not checks.is_integer(value)
        assert checks.is_number(value)
    for value in (True, "1", None, 1j, [1], torch.ones(())):
        assert not checks.is_integer(value)
        assert not checks.is_number(value)


def test_numbers_of_samples_are_not_read_where_that_costs() -> None:
    """Of a tensor on another device, of one that a compiler or a transform stands in for: no data at all."""
    bad = torch.tensor([-1])
    with pytest.raises(ValueError, match=r"index must be within \[0, 2\^56\), got numbers from -1 to -1"):
        checks.check_numbers_of_samples("index", bad)
    checks.check_numbers_of_samples("index", bad.to("meta"))
    checks.check_numbers_of_samples("index", bad[:0])

    def check(index: torch.Tensor) -> torch.Tensor:
        checks.check_numbers_of_samples("index", index)
        return index + 1

    torch.vmap(check)(bad[:, None])
    torch.compile(check, fullgraph=True, backend="eager")(bad)
