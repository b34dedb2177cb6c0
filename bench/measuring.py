"""How a problem is measured: every provider is checked first, then all are timed in turns.

The result of a provider's first call is checked, against float64 or, for draws, by a statistic. Only a
provider that passed is timed: a red check leaves no number. Those that passed are then called one after the
other, round by round, each round beginning with another one, so that whatever else the machine does meets all
of them alike. Then each is checked again, on inputs of other values: one that returns what it found before is
refused.

Where the time is short, this package comes first, then eager torch, then the peers, then what compiles. What
one of them does, raises or asks for costs nobody but itself.

On CUDA short calls are timed by events, on sets of inputs that together exceed the L2 cache four times,
after a buffer of twice its size was cleared (which also hides the launch from the clock). Whole samplers
are timed on the wall clock, from an idle device to an idle device, as everything is on a CPU.
"""

import contextlib
import gc
import itertools
import math
import signal
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from bench import ceilings, machine
from bench.harness import Call, Inputs, Problem, Provider, Work, Workload, first_line
from bench.machine import DEVICE, ON_CUDA
from bench.results import Measurement

MAX_ROUNDS = 50 if ON_CUDA else 25
MIN_ROUNDS = 3
LONGEST_CALL = 30.0  # seconds of one call on a CPU
_PATIENCE = 2.0  # seconds that are there for the first rounds, whatever the budget
_ENERGY_WINDOW = 0.5 if ON_CUDA else 0.0  # seconds of calls whose energy is read
NO_TIME = "the time for this problem was spent"


@dataclass
class _Running:
    """A provider that passed its check, and about how many seconds a call of it takes."""

    provider: Provider
    call: Call
    result: Measurement
    estimate: float
    times: list[float] = field(default_factory=list)


def too_large(work: Work) -> str | None:
    """Why a CPU had better not try: a call of minutes, or more memory than there is, which would end the run.

    A GPU is always asked: it is quick, and being out of memory is an error there like any other.
    """
    if ON_CUDA:
        return None
    rate = _ceiling(lambda: ceilings.matrix_rate("ieee")) if work.flops > 1e11 else None
    seconds = 0.0 if rate is None else work.flops / rate
    if seconds > LONGEST_CALL:
        return f"one call would take about {seconds:.0f} s here"
    needed = 5 * work.bytes if work.memory is None else work.memory
    free = machine.free_memory()
    if free is not None and needed > 0.7 * free:
        return f"needs about {needed / (1 << 30):.0f} GiB, {free / (1 << 30):.0f} are free"
    return None


def prepare(problem: Problem, providers: Sequence[Provider]) -> None:
    """Measure the ceilings that the problem's figures will be compared with."""
    if problem.work.bytes:
        _ceiling(ceilings.copy_bandwidth)
    if problem.work.normals:
        _ceiling(ceilings.noise_rate)
    if problem.work.flops:
        for provider in providers:
            with contextlib.suppress(Exception):
                if provider.absence() is None:
                    ceilings.matrix_rate(provider.precision)


def _ceiling(measured: Callable[[], float]) -> float | None:
    """None where it cannot be measured: a device that is full has figures without shares."""
    try:
        return measured()
    except Exception:
        return None


def order(provider: Provider) -> int:
    """Who is admitted first where the time is short."""
    name = provider.name
    if "max-autotune" in name:
        return 4
    if "compile" in name:
        return 3
    if name.startswith("evalp_fast"):
        return 0
    return 1 if name.startswith(("torch ", "torch.")) else 2


def measure(
    problem: Problem, providers: Sequence[Provider], *, budget: float, deadline: float = math.inf
) -> list[Measurement]:
    """One measurement for each provider, in their order, in about `budget` seconds.

    A provider that is missing, fails or is refused has a measurement with a reason and no number, and so has
    one for which no time is left before `deadline`, on `time.monotonic`. Compilation by Inductor is broken
    off at the deadline.
    """
    results = {p.name: _blank(problem, p) for p in providers}
    for provider in providers:
        try:
            reason = provider.absence()
        except Exception as error:
            results[provider.name].set("failed", first_line(error))
            continue
        if reason is not None:
            results[provider.name].set("unavailable", reason)
        elif (slow := _too_slow(problem, provider)) is not None:
            results[provider.name].set("skipped", slow)
        elif time.monotonic() >= deadline:
            results[provider.name].set("skipped", NO_TIME)
    able = [p for p in providers if results[p.name].reason is None]
    obstacle = too_large(problem.work) if able else None
    if obstacle is not None:
        for provider in able:
            results[provider.name].set("skipped", obstacle)
        able = []
    if able:
        if "torch._dynamo" in sys.modules:  # its import takes seconds
            torch._dynamo.reset()  # earlier problems' shapes must not make this one dynamic
        with torch.set_grad_enabled(problem.gradients), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _measure_those(problem, able, results, budget, deadline)
        gc.collect()
        machine.empty_cache()
    return list(results.values())


def _measure_those(
    problem: Problem,
    able: list[Provider],
    results: dict[str, Measurement],
    budget: float,
    deadline: float,
) -> None:
    """Admit, time and check again; fills `results`."""
    stop = time.monotonic() + budget
    try:
        workload = problem.setup()
    except Exception as error:
        for provider in able:
            results[provider.name].set("failed", f"the problem's data: {first_line(error)}")
        return
    running: list[_Running] = []
    for place, provider in enumerate(sorted(able, key=order)):
        result = results[provider.name]
        # Those that were admitted need their rounds, and a call to be checked again.
        needed = (MIN_ROUNDS + 1) * sum(one.estimate for one in running)
        # The data are made: the first has its turn, however long that took.
        obstacle = _no_time(problem, provider, deadline - needed) if place else None
        if obstacle is not None:
            result.set("skipped", obstacle)
        elif (one := _admit(problem, workload, provider, result, deadline)) is not None:
            running.append(one)
    running.sort(key=lambda one: able.index(one.provider))
    now = time.monotonic()
    # What checks and compilation took is not there for rounds any more. Energy is read after them.
    reserve = min(_ENERGY_WINDOW * len(running), 0.4 * max(deadline - now, 0.0))
    _time_in_turns(problem, workload, running, max(stop - now, 0.2 * budget), deadline - reserve)
    kept = [one for one in running if one.result.reason is None and _check_again(workload, one)]
    for one in sorted(kept, key=lambda one: order(one.provider)):
        _finish(problem, workload, one, deadline)


def nothing(problem: Problem, providers: Sequence[Provider], reason: str) -> list[Measurement]:
    """For a problem that could not be measured at all."""
    found = [_blank(problem, provider) for provider in providers]
    for m in found:
        m.set("failed", reason)
    return found


def _blank(problem: Problem, provider: Provider) -> Measurement:
    return Measurement(
        suite=problem.suite,
        problem=problem.name,
        provider=provider.name,
        precision=provider.precision,
        parameters=dict(problem.parameters),
        unit=problem.unit,
        samples=problem.samples,
        clock=problem.clock,
    )


def _fail(result: Measurement, error: BaseException) -> None:
    """Say what was raised. A device or a host that is full is no fault of the code."""
    full = "out of memory" in str(error).lower() or "can't allocate memory" in str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and full):
        result.set("out of memory", first_line(error))
    else:
        result.set("refused" if isinstance(error, AssertionError) else "failed", first_line(error))


# Seconds of a call for each of its batch, by provider and all of a problem but the batch, of the last size.
_pace: dict[tuple[Any, ...], float] = {}


def _without_batch(problem: Problem, provider: Provider) -> tuple[Any, ...]:
    rest = ((name, value) for name, value in problem.parameters.items() if name != "batch")
    return problem.suite, problem.name.split(",")[0], provider.name, *rest


def _too_slow(problem: Problem, provider: Provider) -> str | None:
    """Why a CPU had better not try it, by what it took in a smaller batch: see `too_large`."""
    seconds = _pace.get(_without_batch(problem, provider), 0.0) * problem.parameters.get("batch", 0)
    if ON_CUDA or seconds <= LONGEST_CALL:
        return None
    return f"one call would take about {seconds:.0f} s here"


# Seconds that admission took, by suite and provider: what compiled for a minute will do so again.
_took: dict[tuple[str, str], float] = {}


def _no_time(problem: Problem, provider: Provider, until: float) -> str | None:
    """Why it does not begin: the time is spent, or compiling is known to take longer than what is left."""
    left = until - time.monotonic()
    if left <= 0:
        return NO_TIME
    took = _took.get((problem.suite, provider.name), 0.0)
    if order(provider) >= 3 and took > left:
        return f"{NO_TIME}: {left:.0f} s were left, and compiling needs about {took:.0f}"
    return None


class _TimeUp(BaseException):
    """The deadline came. No Exception, which compilers catch, to go on with something else."""


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: one that is left half imported breaks all that follows."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def _broken_off(deadline: float) -> Iterator[None]:
    """Raise `_TimeUp` at `deadline`, and again every two seconds where somebody stopped it."""
    if deadline == math.inf or threading.current_thread() is not threading.main_thread():
        yield
        return
    due = deadline

    def ring(_: int, frame: FrameType | None) -> None:
        nonlocal due
        if time.monotonic() >= due and not _importing(frame):
            due = time.monotonic() + 2.0
            raise _TimeUp

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 1e-3), 0.1)
    try:
        yield
    finally:
        due = math.inf
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


def _inductor_cache() -> tuple[int, int]:
    """How many graphs Inductor has found in its cache on disk, and how many not."""
    if "torch._dynamo" not in sys.modules:
        return 0, 0
    from torch._dynamo.utils import counters

    seen = counters["inductor"]
    return seen["fxgraph_cache_hit"], seen["fxgraph_cache_miss"] + seen["fxgraph_cache_bypass"]


def _admit(
    problem: Problem, workload: Workload, provider: Provider, result: Measurement, deadline: float
) -> _Running | None:
    """Make the call, call it once, check what it gave, read its memory. None where that fails."""
    inputs = workload.inputs[0]
    start = time.monotonic()
    interrupts = order(provider) >= 3
    try:
        with _broken_off(deadline if interrupts else math.inf):
            result.setup_seconds, call = _clocked(lambda: provider.make(workload.data))
            hits, misses = _inductor_cache()
            result.first_call_seconds, outcome = _clocked(lambda: call(*inputs))
        found, compiled_now = (
            now - then for now, then in zip(_inductor_cache(), (hits, misses), strict=True)
        )
        if found or compiled_now:
            result.compile_cache = "cold" if compiled_now else "warm"
        workload.check(provider, outcome, *inputs)
        del outcome
        took: list[float] = []
        memory = machine.peak_memory(lambda: took.append(machine.wall_seconds(lambda: call(*inputs))))
        result.peak_memory_bytes, result.peak_memory_kind, result.device_memory_bytes = memory
        _took[problem.suite, provider.name] = time.monotonic() - start
        _pace[_without_batch(problem, provider)] = took[0] / max(problem.parameters.get("batch", 1), 1)
        return _Running(provider, call, result, took[0])
    except _TimeUp:
        took_already = time.monotonic() - start
        _took[problem.suite, provider.name] = 2 * took_already
        result.set("skipped", f"{NO_TIME}: broken off after compiling for {took_already:.0f} s")
        torch._dynamo.reset()
    except Exception as error:
        _fail(result, error)
    machine.empty_cache()
    return None


def _clocked(call: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock seconds, and what was returned."""
    outcome: list[Any] = []
    seconds = machine.wall_seconds(lambda: outcome.append(call()))
    return seconds, outcome.pop()


def _time_in_turns(
    problem: Problem, workload: Workload, running: list[_Running], budget: float, deadline: float
) -> None:
    """Rounds in which each provider is called once; one that has used its share of the budget stays out.

    After `deadline` no round begins but the first, or the first three where they are quick: fewer times do
    not show their spread. One that raises is out, without a number.
    """
    share = budget / max(1, len(running))
    quick = sum(one.estimate for one in running) * MIN_ROUNDS <= _PATIENCE
    turns = itertools.cycle(workload.inputs)
    clock = _device_seconds if ON_CUDA and problem.clock == "device" else _wall_seconds
    running = list(running)
    for round_number in range(MAX_ROUNDS):
        if round_number >= (MIN_ROUNDS if quick else 1) and time.monotonic() >= deadline:
            break
        first = round_number % max(1, len(running))
        inputs = next(turns)
        for one in [*running[first:], *running[:first]]:
            spent = sum(one.times)
            enough = share if len(one.times) >= MIN_ROUNDS else max(4 * share, _PATIENCE)
            if one.times and spent >= enough:
                continue
            try:
                one.times.append(clock(one.call, inputs))
            except Exception as error:
                _fail(one.result, error)
                running.remove(one)
                machine.empty_cache()


def _wall_seconds(call: Call, inputs: Inputs) -> float:
    return machine.wall_seconds(lambda: call(*inputs))


def _device_seconds(call: Call, inputs: Inputs) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _clear_cache()
    begin.record()
    call(*inputs)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


_erasers: list[Tensor] = []


def _clear_cache() -> None:
    if not _erasers:
        _erasers.append(torch.empty(2 * machine.cache_bytes(), dtype=torch.uint8, device=DEVICE))
    _erasers[0].zero_()


def _check_again(workload: Workload, one: _Running) -> bool:
    """Whether it is still right, on inputs that it was not admitted with."""
    if workload.stateful or len(workload.inputs) < 2:
        return True
    inputs = workload.inputs[-1]
    try:
        workload.check(one.provider, one.call(*inputs), *inputs)
    except Exception as error:
        _fail(one.result, error)
        one.result.reason = f"after timing, on other inputs: {one.result.reason}"
        return False
    return True


def _finish(problem: Problem, workload: Workload, one: _Running, deadline: float) -> None:
    """The figures that follow from the times, and, before the deadline, those that need further calls."""
    result, work = one.result, problem.work
    result.set_times(one.times)
    seconds = result.seconds
    assert seconds is not None
    compiled_here = result.compile_cache is not None or (ON_CUDA and result.ours)
    if one.provider.compiles and compiled_here and result.first_call_seconds is not None:
        result.compile_seconds = max(0.0, result.first_call_seconds - seconds)

    def share(amount: float, name: str, ceiling: Callable[[], float]) -> float | None:
        found = _ceiling(ceiling)
        if found is None:
            return None
        result.ceilings[name] = found
        return amount / seconds / found

    if work.bytes:
        result.gigabytes_per_second = work.bytes / seconds / 1e9
        result.share_of_copy = share(work.bytes, "copy", ceilings.copy_bandwidth)
    if work.flops:
        result.teraflops = work.flops / seconds / 1e12
        precision = one.provider.precision
        result.share_of_matrix = share(work.flops, "matrix", lambda: ceilings.matrix_rate(precision))
    if work.normals:
        result.share_of_noise = share(work.normals, "noise", ceilings.noise_rate)
    if time.monotonic() + seconds >= deadline:
        return
    try:
        _look_closer(problem, workload, one, seconds)
    except Exception as error:  # the times stand
        result.reason = f"timed, and then: {first_line(error)}"
        machine.empty_cache()


def _look_closer(problem: Problem, workload: Workload, one: _Running, seconds: float) -> None:
    """Launches, energy and the parts of a call."""

    def again() -> Any:
        return one.call(*workload.inputs[0])

    one.result.launches = machine.launches(again)
    energy = machine.energy(again, seconds, window=_ENERGY_WINDOW)
    one.result.watts, one.result.energy_kind = energy.watts, energy.kind
    if energy.joules is not None:
        one.result.joules_per_million = energy.joules / problem.samples * 1e6
    if one.provider.parts is not None:
        parts = one.provider.parts(workload.data)
        for call in parts.values():
            call()
        one.result.parts = {
            name: statistics.median(machine.wall_seconds(call) for _ in range(3))
            for name, call in parts.items()
        }
