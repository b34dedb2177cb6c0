"""The fixture that times one call, and the table and the file that a run leaves.

The results go to the folder named by RESULTS, `bench/results` by default, one file a device.
"""

import importlib.util
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.measure import Measurement, Problem, environment, measure, table

_done = pytest.StashKey[list[Measurement]]()

if importlib.util.find_spec("pytest_benchmark") is None:

    @pytest.fixture
    def benchmark() -> Any:
        """Stands in for pytest-benchmark's: runs the rounds, and keeps no table of its own."""

        def pedantic(function: Callable[[], Any], rounds: int, iterations: int) -> None:
            for _ in range(rounds * iterations):
                function()

        return SimpleNamespace(pedantic=pedantic, extra_info={})


@pytest.fixture
def measured(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Problem, Callable[..., Any]], None]:
    """Checks and times a call; the result joins the table under the test's name."""

    def run(problem: Problem, call: Callable[..., Any]) -> None:
        name = request.node.name.removeprefix("test_")
        measurement = measure(name, problem, call, benchmark)
        request.config.stash.setdefault(_done, []).append(measurement)

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    measurements = config.stash.get(_done, [])
    if not measurements:
        return
    where = environment()
    terminalreporter.section("kernels")
    terminalreporter.write_line(", ".join(f"{key} {value}" for key, value in where.items()))
    terminalreporter.write_line(table(measurements))
    folder = Path(os.environ.get("RESULTS") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"kernels-{re.sub('[^A-Za-z0-9]+', '-', where['device']).strip('-').lower()}.json"
    path.write_text(
        json.dumps({"environment": where, "measurements": [asdict(m) for m in measurements]}, indent=1) + "\n"
    )
    terminalreporter.write_line(f"written to {path}")
