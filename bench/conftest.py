"""pytest's side of the harness: the scale, one test for each provider of each problem, and what a run leaves.

A suite is a module with `problems(scale)` and one test that takes `case` and `timed`. The first test of a
problem measures all its selected providers in turns; the tests after it look up their own. So a problem is
one group in pytest-benchmark's table, and its figures were taken side by side.

The time of a run is shared out among its problems: each has its weight's part of what is left when it begins.
"""

import os

# What this package compiles after a while it compiles here in a first call, not in one that is timed.
os.environ.setdefault("EVALP_COMPILE_AFTER", "0")

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

from bench import ceilings, machine
from bench.harness import Problem, Provider, first_line
from bench.measuring import measure, nothing, prepare
from bench.report import terminal_table
from bench.results import Measurement, Results, load, path_for
from bench.sizes import DEFAULT, SCALES, TOTALS, Scale, budget
from bench.wheels import use_wheels

if os.environ.get("WHEELS"):
    use_wheels(os.environ["WHEELS"])


class Case(NamedTuple):
    """One test: a provider and its problem."""

    problem: Problem
    provider: Provider


Key = tuple[str, str]


class _Run:
    """What one pytest session has measured, and what is still to come."""

    def __init__(self, config: pytest.Config):
        self.scale: Scale = cast(Scale, config.getoption("--scale"))
        self.base_budget: float | None = config.getoption("--budget")
        self.limit: float | None = config.getoption("--limit")
        self.began = time.monotonic()
        self.end: float | None = None
        self.folder = Path(os.environ.get("RESULTS") or Path(__file__).parent / "results")
        self.path: Path | None = None
        self.results = Results(machine.environment())
        self.selected: dict[Key, list[Provider]] = {}
        self.weights: dict[Key, float] = {}
        self.measured: list[Measurement] = []
        self.notes: list[str] = []

    def select(self, cases: list[Case]) -> None:
        for case in cases:
            self.selected.setdefault((case.problem.suite, case.problem.name), []).append(case.provider)
        suites = [suite for suite, _ in self.selected]
        for suite, name in self.selected:
            seconds = budget(suite, self.scale, self.base_budget)
            self.weights[suite, name] = seconds / suites.count(suite)

    def look_up(self, case: Case) -> Measurement:
        """This case's measurement; measures its problem where nobody has."""
        problem = case.problem
        key = problem.suite, problem.name
        if key in self.selected:
            self._measure(problem, self.selected.pop(key))
        return self.results.measurements[(*key, case.provider.name)]

    def share(self, key: Key) -> float:
        """Seconds for a problem: its part of those that are left, to which come what others left over."""
        now = time.monotonic()
        if self.end is None:
            self.end = now + sum(self.weights.values())
            if self.base_budget is None:
                self.end = min(self.end, self.began + TOTALS[self.scale])
            if self.limit is not None:  # of everything since pytest began; also where that is more
                self.end = self.began + self.limit
        total = sum(self.weights.values())
        return max(self.end - now, 0.0) * self.weights.pop(key) / total

    def _measure(self, problem: Problem, providers: list[Provider]) -> None:
        if self.path is None:
            self._open()
        try:
            prepare(problem, providers)  # once for all, and so not of this problem's share
            seconds = self.share((problem.suite, problem.name))
            found = measure(problem, providers, budget=seconds, deadline=time.monotonic() + seconds)
        except Exception as error:  # whatever breaks costs one problem, and is told
            found = nothing(problem, providers, f"the harness: {first_line(error)}")
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for m in found:
            m.scale, m.when = self.scale, now
        self.measured += found
        self.results.add(found)
        self.results.ceilings |= ceilings.known()
        assert self.path is not None
        try:
            self.results.save(self.path)  # after every problem: a run that is cut short leaves what it has
        except OSError as error:
            self.say(f"not written: {error}")

    def _open(self) -> None:
        environment = self.results.environment
        self.path = path_for(self.folder, environment, machine.slug(environment["device"]), say=self.say)
        if self.path.exists():
            self.results = load(self.path)

    def say(self, line: str) -> None:
        """To be printed at the end, once."""
        if line not in self.notes:
            self.notes.append(line)


_run = pytest.StashKey[_Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--scale", choices=SCALES, default=DEFAULT, help=f"sizes of the problems ({DEFAULT})")
    group.addoption(
        "--budget",
        type=float,
        default=None,
        help="seconds of a simple suite (flow may take 4 times as many); lifts the run's limit",
    )
    group.addoption("--limit", type=float, default=None, help="seconds of the whole run, shared out likewise")
    group.addoption(
        "--cold", action="store_true", help="compile anew: Inductor's and Triton's caches on disk begin empty"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--cold"):
        folder = tempfile.TemporaryDirectory(prefix="evalp-bench-cache-")
        config.add_cleanup(folder.cleanup)
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            os.environ[name] = f"{folder.name}/{name.split('_')[0].lower()}"
    config.stash[_run] = _Run(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    module: Any = metafunc.module
    problems = module.problems(metafunc.config.getoption("--scale"))
    cases = [Case(problem, provider) for problem in problems for provider in problem.providers]
    ids = [f"{case.problem.name}-{case.provider.name}".replace(" ", "_") for case in cases]
    metafunc.parametrize("case", cases, ids=ids)


def pytest_collection_finish(session: pytest.Session) -> None:
    items = [item for item in session.items if isinstance(item, pytest.Function)]
    cases = [item.callspec.params["case"] for item in items if hasattr(item, "callspec")]
    session.config.stash[_run].select([case for case in cases if isinstance(case, Case)])


class _Replay:
    """A clock that shows the beginnings and ends of intervals that were measured before."""

    def __init__(self, times: list[float]):
        self._readings = [reading for t in times for reading in (0.0, t)]
        self._next = 0

    def __call__(self) -> float:
        self._next += 1
        return self._readings[(self._next - 1) % len(self._readings)]


@pytest.fixture
def timed(request: pytest.FixtureRequest) -> Callable[[Case], Measurement]:
    """Measures a case and shows its times to pytest-benchmark.

    A provider that is not there is skipped with its reason; one whose result is wrong, or that raises, fails.
    """
    run = request.config.stash[_run]

    def time_case(case: Case) -> Measurement:
        m = run.look_up(case)
        if m.status in ("unavailable", "skipped") or (m.status == "out of memory" and not m.ours):
            pytest.skip(f"{m.provider}: {m.reason}")
        if m.status == "refused" and case.provider.known_wrong is not None:
            pytest.xfail(f"{m.provider} is refused: {case.provider.known_wrong}")
        if m.status != "measured":
            pytest.fail(f"{m.provider} is {m.status}: {m.reason}", pytrace=False)
        if not request.config.pluginmanager.hasplugin("benchmark"):
            return m
        group = f"{m.suite}: {m.problem}"
        request.node.add_marker(pytest.mark.benchmark(group=group, timer=_Replay(m.times)))
        benchmark = request.getfixturevalue("benchmark")
        benchmark.pedantic(lambda: None, rounds=len(m.times), iterations=1)
        facts = {k: v for k, v in vars(m).items() if v not in (None, {}, []) and k != "times"}
        benchmark.extra_info.update({**facts, "per_second": m.rate, **run.results.environment})
        return m

    return time_case


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's tables: the short one comes last
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash[_run]
    if not run.measured:
        return
    for note in run.notes:
        terminalreporter.write_line(note)
    terminalreporter.section(f"measured on {run.results.environment['device']}, scale {run.scale}")
    terminalreporter.write_line(terminal_table(run.measured))
    terminalreporter.write_line(f"written to {run.path}; python -m bench.report {run.path}")
