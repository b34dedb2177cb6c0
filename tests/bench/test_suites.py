"""The suites as pytest sees them: their sizes, a run from the command line, and the wheels."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.sizes import SCALES, TOTALS, Scale, budget, pick
from bench.wheels import use_wheels

ROOT = Path(__file__).parents[2]
SUITES = sorted(path.stem.removeprefix("test_") for path in (ROOT / "bench").glob("test_*.py"))


def test_all_suites_are_there() -> None:
    wanted = "noise coupling resampling langevin flow energy sir chain decode generate fid train"
    assert sorted(wanted.split()) == SUITES


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_has_problems_with_names_of_their_own(suite: str, scale: Scale) -> None:
    problems = importlib.import_module(f"bench.test_{suite}").problems(scale)
    assert problems
    assert len({p.name for p in problems}) == len(problems)
    for problem in problems:
        assert problem.suite == suite
        assert problem.samples >= 1
        names = [provider.name for provider in problem.providers]
        assert len(set(names)) == len(names)
        assert names[0].startswith("evalp_fast")


def test_the_sweep_shows_how_cost_grows() -> None:
    for suite in ("noise", "flow", "chain"):
        problems = importlib.import_module(f"bench.test_{suite}").problems("sweep")
        batches = [problem.parameters["batch"] for problem in problems]
        assert min(batches) == 1 << 10
        assert max(batches) == 1 << 24


def test_small_takes_five_minutes_at_most() -> None:
    for scale in ("small", "large"):
        assert sum(budget(suite, scale) for suite in SUITES) <= TOTALS[scale] + 10
    assert TOTALS["small"] < 300
    assert budget("flow", "small", 2.0) > budget("noise", "small", 2.0) == 2.0


def test_pick() -> None:
    assert [pick(scale, 1, 2, 3) for scale in SCALES] == [1, 2, 3, 3]
    assert pick("sweep", 1, 2, 3, 4) == 4


# --- from the command line ----------------------------------------------------------------------------------

SUITE = """
import torch
from bench.harness import Problem, Provider, Workload, absent

def problems(scale):
    n = {"small": 10, "medium": 20, "large": 30, "sweep": 40}[scale]

    def check(provider, result, x):
        torch.testing.assert_close(result, 2 * x)

    def setup():
        return Workload(None, [(torch.randn(n),)], check)

    providers = (
        Provider("evalp_fast", lambda _: lambda x: x + x),
        Provider("wrong", lambda _: lambda x: x * x),
        Provider("known", lambda _: lambda x: x * x, known_wrong="it squares"),
        Provider("peer", lambda _: None, missing=absent("no_such_peer")),
    )
    return [Problem("fake", f"doubling {n}", {"batch": n}, n, setup, providers)]

def test_fake(case, timed):
    timed(case)
"""


def run(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """A pytest of its own on the suite above, and the measurements that it stored."""
    (folder / "test_fake.py").write_text(SUITE)
    environment = os.environ | {"RESULTS": str(folder / "results"), "PYTHONPATH": str(ROOT)}
    environment.pop("WHEELS", None)
    command = [sys.executable, "-m", "pytest", "-p", "bench.conftest", "-rs", "test_fake.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    stored = list((folder / "results").rglob("*.json"))
    return done, json.loads(stored[0].read_text())["measurements"] if stored else []


def test_a_run_reports_everybody(tmp_path: Path) -> None:
    done, stored = run(tmp_path, "--scale", "medium")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed, 1 skipped, 1 xfailed" in done.stdout
    assert {m["provider"]: (m["status"], m["samples"], m["scale"]) for m in stored} == {
        "evalp_fast": ("measured", 20, "medium"),
        "wrong": ("refused", 20, "medium"),
        "known": ("refused", 20, "medium"),
        "peer": ("unavailable", 20, "medium"),
    }
    assert "peer: no_such_peer is not installed" in done.stdout
    assert "wrong is refused: AssertionError" in done.stdout
    table = done.stdout[done.stdout.index("measured on") :]
    assert "unavailable: no_such_peer is not installed" in table
    if importlib.util.find_spec("pytest_benchmark"):
        assert "benchmark 'fake: doubling 20': 1 tests" in done.stdout
        assert done.stdout.index("benchmark 'fake: doubling 20'") < done.stdout.index("measured on")


def test_a_run_without_pytest_benchmark_and_of_one_provider(tmp_path: Path) -> None:
    done, stored = run(
        tmp_path, "--scale", "small", "-p", "no:benchmark", "-k", "evalp_fast", "--budget", "1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(m["provider"], m["status"], m["problem"]) for m in stored] == [
        ("evalp_fast", "measured", "doubling 10")
    ]
    assert "benchmark 'fake" not in done.stdout


# --- wheels -------------------------------------------------------------------------------------------------


def test_wheels_are_found_behind_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a_peer-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("a_peer_in_a_wheel/__init__.py", "answer = 42\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert use_wheels(tmp_path) == ["a_peer-1.0-py3-none-any.whl"]
    assert "evalp-bench-wheels" in sys.path[-1]
    assert importlib.import_module("a_peer_in_a_wheel").answer == 42
    entries = len(sys.path)
    use_wheels(tmp_path)
    assert len(sys.path) == entries


def test_a_folder_without_wheels_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="WHEELS must name a folder that holds wheels"):
        use_wheels(tmp_path)
