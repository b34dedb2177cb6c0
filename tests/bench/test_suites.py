"""The suites as pytest sees them: their sizes, a run from the command line, and the wheels."""

import functools
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.conftest import Case, _Run
from bench.harness import Problem, Provider
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for the caches of a CPU")
@pytest.mark.parametrize("kind", ["sample", "log_prob"])
def test_large_batches_are_compiled_in_chunks_too(kind: str) -> None:
    """On a CPU the quickest that torch.compile can do, with the results of the whole batch."""
    flow = importlib.import_module("bench.test_flow")
    found = {problem.name: problem for scale in ("small", "medium") for problem in flow.problems(scale)}
    for batch, chunked in (("4,096", False), ("65,536", True)):
        names = [provider.name for provider in found[f"{kind}, dim 64, batch {batch}"].providers]
        assert any("in chunks" in name for name in names) == chunked
    x, seen = torch.arange(10.0), []

    def double(part: torch.Tensor) -> torch.Tensor:
        seen.append(len(part))
        return 2 * part

    assert torch.equal(flow.by_parts(double, 4)(x), 2 * x)
    assert seen == [4, 4, 2]


def test_small_takes_five_minutes_at_most() -> None:
    for scale in ("small", "large"):
        assert sum(budget(suite, scale) for suite in SUITES) <= TOTALS[scale] + 10
    assert TOTALS["small"] < 300
    assert budget("flow", "small", 2.0) > budget("noise", "small", 2.0) == 2.0


def test_pick() -> None:
    assert [pick(scale, 1, 2, 3) for scale in SCALES] == [1, 2, 3, 3]
    assert pick("sweep", 1, 2, 3, 4) == 4


# --- the time of a run --------------------------------------------------------------------------------------


class Options:
    """pytest's configuration, as far as a run reads it."""

    def __init__(self, **values: object):
        self.values = {"--scale": "small", "--budget": None, "--limit": None} | values

    def getoption(self, name: str) -> object:
        return self.values[name]


def case(suite: str, name: str) -> Case:
    one = Provider("evalp_fast", lambda _: lambda: None)
    return Case(Problem(suite, name, {}, 1, lambda: pytest.fail("it was measured"), (one,)), one)


def a_run(monkeypatch: pytest.MonkeyPatch, now: list[float], **options: object) -> _Run:
    monkeypatch.setattr("bench.conftest.time.monotonic", lambda: now[0])
    found = _Run(Options(**options))  # type: ignore[arg-type]
    found.select([case("noise", "a"), case("noise", "b"), case("flow", "c")])
    return found


def test_the_time_is_shared_by_weight_and_what_is_left_over_passes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    found = a_run(monkeypatch, now, **{"--budget": 10.0})
    # 5 and 5 for noise, 40 for flow, of 50.
    assert found.share(("noise", "a")) == pytest.approx(5.0)
    now[0] += 1.0
    assert found.share(("noise", "b")) == pytest.approx(49.0 * 5 / 45)
    now[0] += 45.0  # far too long: the last has what is left
    assert found.share(("flow", "c")) == pytest.approx(4.0)


def test_a_run_ends_at_its_total_or_at_the_limit_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, seconds in (({}, 12 + 48.0), ({"--limit": 20.0}, 20.0), ({"--limit": 500.0}, 500.0)):
        now = [100.0]
        found = a_run(monkeypatch, now, **options)
        assert found.share(("noise", "a")) == pytest.approx(seconds * 6 / 60), options
    now = [0.0]
    found = a_run(monkeypatch, now)
    now[0] = TOTALS["small"] - 11.0  # collecting took that long
    assert found.share(("noise", "a")) == pytest.approx(11.0 * 6 / 60)
    now[0] = TOTALS["small"]
    assert found.share(("flow", "c")) == 0.0


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


# Two problems that are quick, one whose harness breaks, and one that does not end.
TROUBLE = """
import time, torch
from bench import measuring
from bench.harness import Problem, Provider, Workload

measure = measuring.measure

def broken(problem, *arguments, **options):
    if problem.name == "broken":
        raise KeyError("a fault of the harness")
    return measure(problem, *arguments, **options)

import bench.conftest
bench.conftest.measure = broken

def endless(x):
    while True:
        time.sleep(0.1)

def problems(scale):
    def check(provider, result, x):
        torch.testing.assert_close(result, 2 * x)

    def setup():
        return Workload(None, [(torch.randn(3),)], check)

    calls = {"a": lambda x: 2 * x, "broken": lambda x: 2 * x, "b": lambda x: 2 * x, "endless": endless}
    return [
        Problem("fake", name, {}, 1, setup, (Provider("evalp_fast", lambda _, call=call: call),))
        for name, call in calls.items()
    ]

def test_fake(case, timed):
    timed(case)
"""


def start(folder: Path, suite: str, *arguments: str) -> subprocess.Popen[str]:
    """A pytest of its own. SIGINT reaches it, though a shell's background jobs are told to ignore it."""
    (folder / "test_fake.py").write_text(suite)
    environment = os.environ | {"RESULTS": str(folder / "results"), "PYTHONPATH": str(ROOT)}
    for name in ("WHEELS", "PYTEST_XDIST_WORKER"):  # a worker of pytest-xdist measures nothing
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-p", "bench.conftest", "-rs", "test_fake.py", *arguments]
    pipe = subprocess.PIPE
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed
    )


def measurements(folder: Path) -> list[dict[str, Any]]:
    """What a run has stored so far."""
    stored = list((folder / "results").rglob("*.json"))
    return json.loads(stored[0].read_text())["measurements"] if stored else []


def run(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """A run of the first suite, and the measurements that it stored."""
    running = start(folder, SUITE, *arguments)
    printed, errors = running.communicate()
    done = subprocess.CompletedProcess(running.args, running.returncode, printed, errors)
    return done, measurements(folder)


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


def test_what_breaks_costs_one_problem_and_an_interruption_none_that_is_done(tmp_path: Path) -> None:
    running = start(tmp_path, TROUBLE, "--scale", "small")
    end = time.monotonic() + 120
    while len(measurements(tmp_path)) < 3 and running.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    try:
        printed, errors = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == pytest.ExitCode.INTERRUPTED, printed + errors
    found = {m["problem"]: (m["status"], m["reason"]) for m in measurements(tmp_path)}
    assert found == {
        "a": ("measured", None),
        "broken": ("failed", "the harness: KeyError: 'a fault of the harness'"),
        "b": ("measured", None),
    }
    table = printed[printed.index("measured on") :]
    for name in found:
        assert f"fake: {name}" in table
    assert "evalp_fast is failed: the harness" in printed


def test_compiling_anew_has_caches_of_its_own(tmp_path: Path) -> None:
    suite = (
        SUITE
        + """
import os

def test_caches():
    folders = [os.environ[name] for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]
    print(folders)
    assert len(set(folders)) == 2 and all("evalp-bench-cache-" in folder for folder in folders)
"""
    )
    running = start(tmp_path, suite, "--cold", "-k", "caches", "-s")
    printed, errors = running.communicate()
    assert running.returncode == 0, printed + errors
    assert not list(Path(tempfile.gettempdir()).glob("evalp-bench-cache-*"))


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
