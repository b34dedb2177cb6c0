"""pytest's side of the harness: the scale, one test for each provider of each problem, and what a run leaves.

A suite is a module with `problems(scale)` and one test that takes `case` and `timed`. The first test of a
problem measures all its selected providers in turns; the tests after it look up their own. So a problem is
one group in pytest-benchmark's table, and its figures were taken side by side.
"""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

from bench import ceilings, machine
from bench.harness import Problem, Provider, measure, prepare
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


class _Run:
    """What one pytest session has measured, and what is still to come."""

    def __init__(self, config: pytest.Config):
        self.scale: Scale = cast(Scale, config.getoption("--scale"))
        self.base_budget = config.getoption("--budget")
        total = math.inf if self.base_budget is not None else TOTALS[self.scale]
        self.end = time.monotonic() + total
        self.folder = Path(os.environ.get("RESULTS") or Path(__file__).parent / "results")
        self.path: Path | None = None
        self.results = Results(machine.environment())
        self.selected: dict[tuple[str, str], list[Provider]] = {}
        self.deadlines: dict[str, float] = {}
        self.measured: list[Measurement] = []

    def select(self, cases: list[Case]) -> None:
        for case in cases:
            self.selected.setdefault((case.problem.suite, case.problem.name), []).append(case.provider)

    def look_up(self, case: Case) -> Measurement:
        """This case's measurement; measures its problem where nobody has."""
        problem = case.problem
        key = problem.suite, problem.name, case.provider.name
        if key not in self.results.measurements or (problem.suite, problem.name) in self.selected:
            self._measure(problem)
        return self.results.measurements[key]

    def _measure(self, problem: Problem) -> None:
        providers = self.selected.pop((problem.suite, problem.name))
        if self.path is None:
            self._open()
        prepare(problem, providers)
        seconds = budget(problem.suite, self.scale, self.base_budget)
        deadline = self.deadlines.setdefault(problem.suite, min(time.monotonic() + seconds, self.end))
        left = deadline - time.monotonic()
        others = sum(suite == problem.suite for suite, _ in self.selected)
        found = measure(problem, providers, budget=max(left, 0.0) / (others + 1), deadline=deadline)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for m in found:
            m.scale, m.when = self.scale, now
        self.measured += found
        self.results.add(found)
        self.results.ceilings |= ceilings.known()
        assert self.path is not None
        self.results.save(self.path)  # after every problem: a run that is cut short leaves what it has

    def _open(self) -> None:
        environment = self.results.environment
        self.path = path_for(self.folder, environment, machine.slug(environment["device"]))
        if self.path.exists():
            self.results = load(self.path)


_run = pytest.StashKey[_Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--scale", choices=SCALES, default=DEFAULT, help=f"sizes of the problems ({DEFAULT})")
    group.addoption(
        "--budget",
        type=float,
        default=None,
        help="seconds of a simple suite (flow may take 4.5 times as many); lifts the run's limit",
    )


def pytest_configure(config: pytest.Config) -> None:
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
        if m.status in ("unavailable", "skipped"):
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
    terminalreporter.section(f"measured on {run.results.environment['device']}, scale {run.scale}")
    terminalreporter.write_line(terminal_table(run.measured))
    terminalreporter.write_line(f"written to {run.path}; python -m bench.report {run.path}")
