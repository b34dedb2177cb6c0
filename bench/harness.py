"""How a problem is measured: every provider is checked first, then all are timed in turns.

A *problem* is what is computed; a *provider* is somebody's way to compute it. The result of a provider's
first call is checked, against float64 or, for draws, by a statistic. Only a provider that passed is timed:
a red check leaves no number. Those that passed are then called one after the other, round by round, each
round beginning with another one, so that whatever else the machine does meets all of them alike.

On CUDA short calls are timed by events, on sets of inputs that together exceed the L2 cache four times,
after a buffer of twice its size was cleared (which also hides the launch from the clock). Whole samplers
are timed on the wall clock, from an idle device to an idle device, as everything is on a CPU.
"""

import contextlib
import gc
import importlib
import importlib.util
import itertools
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bench import ceilings, machine
from bench.machine import DEVICE, ON_CUDA
from bench.results import Measurement

Call = Callable[..., Any]
Inputs = tuple[Any, ...]
Precision = Literal["ieee", "tf32", "bf16"]

MAX_ROUNDS = 50 if ON_CUDA else 25
MIN_ROUNDS = 3
LONGEST_CALL = 30.0  # seconds of one call on a CPU
_PATIENCE = 2.0  # seconds that are there for the first rounds, whatever the budget


@dataclass(frozen=True)
class Provider:
    """Somebody's way to solve a problem.

    Attributes:
        name: ours begin with `evalp_fast`.
        make: from the workload's `data` to the call that is timed.
        precision: of its matrix products, which says what its rate is compared with.
        missing: why it cannot run here, or None.
        compiles: its first call compiles.
        known_wrong: why its result is known to be refused; such a test does not fail.
        parts: from `data` to named calls that together are one call; each is timed too.
    """

    name: str
    make: Callable[[Any], Call]
    precision: Precision = "ieee"
    missing: Callable[[], str | None] = lambda: None
    compiles: bool = False
    known_wrong: str | None = None
    parts: Callable[[Any], dict[str, Callable[[], Any]]] | None = None


@dataclass
class Workload:
    """A problem's data.

    Attributes:
        data: what providers are made from.
        inputs: sets of arguments, alike in all but their values.
        check: raises AssertionError where the result (second argument) of a provider (first) is wrong for the
            inputs (the others).
    """

    data: Any
    inputs: list[Inputs]
    check: Callable[..., None]


@dataclass(frozen=True)
class Work:
    """What one call needs, whoever does it.

    Attributes:
        bytes: read from and written to memory, at least.
        flops: of the matrix products that the result depends on.
        normals: standard normals drawn.
        memory: bytes that a plain way to do it holds at once; by default five times `bytes`.
    """

    bytes: float = 0.0
    flops: float = 0.0
    normals: float = 0.0
    memory: float | None = None


@dataclass(frozen=True)
class Problem:
    """What is computed.

    Attributes:
        suite, name: unique together.
        parameters: the sizes, for the plots.
        samples: how many `unit`s one call makes.
        setup: makes the workload; called only when the problem is measured.
        providers: ours first.
        clock: `device` for single calls, `wall` for whole samplers.
        gradients: run with autograd recording.
    """

    suite: str
    name: str
    parameters: dict[str, Any]
    samples: int
    setup: Callable[[], Workload]
    providers: Sequence[Provider]
    work: Work = field(default_factory=Work)
    unit: str = "samples"
    clock: Literal["device", "wall"] = "wall"
    gradients: bool = False


# --- for the suites -----------------------------------------------------------------------------------------


def input_sets(make: Callable[[], Inputs]) -> list[Inputs]:
    """Two sets of inputs by `make`, or enough of them to exceed the L2 cache four times (16 at most)."""
    torch.manual_seed(0)
    sets = [make(), make()]
    size = sum(t.nbytes for t in sets[0] if isinstance(t, Tensor))
    while size and len(sets) * size < 4 * machine.cache_bytes() and len(sets) < 16:
        sets.append(make())
    return sets


def compiled(function: Call, mode: str | None = None) -> Call:
    """`torch.compile` of the whole of `function`, for the shapes that it meets first.

    `max-autotune` runs without CUDA graphs, which would copy the inputs at every call.
    """
    mode = "max-autotune-no-cudagraphs" if mode == "max-autotune" else mode
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def by_inductor(
    function: Call, name: str = "torch.compile", wrap: Callable[[Call], Call] = lambda call: call
) -> tuple[Provider, ...]:
    """`function` compiled, and on a GPU with max-autotune too; `wrap` is put around what was compiled."""

    def provider(name: str, mode: str | None) -> Provider:
        return Provider(name, lambda _: wrap(compiled(function, mode)), compiles=True)

    found = (provider(name, None),)
    return (*found, provider(f"{name} max-autotune", "max-autotune")) if ON_CUDA else found


def absent(module: str, name: str | None = None) -> Callable[[], str | None]:
    """Why `module` (or `name` in it) cannot be used, for `Provider.missing`."""

    def reason() -> str | None:
        try:
            if importlib.util.find_spec(module) is None:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            package = module.split(".")[0]
            if (error.name or package).split(".")[0] == package:
                return "not there yet" if package == "evalp_fast" else f"{package} is not installed"
            return f"{package} needs {error.name}, which is not installed"
        except Exception as error:
            if module.startswith("evalp_fast"):  # ours must work: that is a failure, not an absence
                raise
            return f"{module} cannot be imported: {first_line(error)}"
        return None if name is None or hasattr(found, name) else "not there yet"

    return reason


def needs_cuda() -> str | None:
    """For providers that only a GPU has."""
    return None if ON_CUDA else "needs a GPU"


def first_line(error: BaseException) -> str:
    """`ValueError: what it says`, one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


# --- measuring ----------------------------------------------------------------------------------------------


@dataclass
class _Running:
    """A provider that passed its check."""

    provider: Provider
    call: Call
    result: Measurement
    times: list[float] = field(default_factory=list)


def too_large(work: Work) -> str | None:
    """Why a CPU had better not try: a call of minutes, or more memory than there is, which would end the run.

    A GPU is always asked: it is quick, and being out of memory is an error there like any other.
    """
    if ON_CUDA:
        return None
    seconds = work.flops / ceilings.matrix_rate("ieee") if work.flops > 1e11 else 0.0
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
        ceilings.copy_bandwidth()
    if problem.work.normals:
        ceilings.noise_rate()
    if problem.work.flops:
        for provider in providers:
            with contextlib.suppress(Exception):
                if provider.missing() is None:
                    ceilings.matrix_rate(provider.precision)


def measure(
    problem: Problem, providers: Sequence[Provider], *, budget: float, deadline: float = math.inf
) -> list[Measurement]:
    """One measurement for each provider, in their order, in about `budget` seconds.

    A provider that is missing, fails or is refused has a measurement with a reason and no number, and so has
    one whose turn to begin comes after `deadline`, on `time.monotonic`.
    """
    results = {p.name: _blank(problem, p) for p in providers}
    for provider in providers:
        try:
            reason = provider.missing()
        except Exception as error:
            results[provider.name].set("failed", first_line(error))
            continue
        if reason is not None:
            results[provider.name].set("unavailable", reason)
        elif time.monotonic() >= deadline:
            results[provider.name].set("skipped", "the time for this suite was spent")
    able = [p for p in providers if results[p.name].reason is None]
    obstacle = too_large(problem.work) if able else None
    if obstacle is not None:
        for provider in able:
            results[provider.name].set("skipped", obstacle)
        able = []
    if able:
        stop = time.monotonic() + budget
        if "torch._dynamo" in sys.modules:  # its import takes seconds
            torch._dynamo.reset()  # earlier problems' shapes must not make this one dynamic
        with torch.set_grad_enabled(problem.gradients), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                workload = problem.setup()
            except Exception as error:
                for provider in able:
                    results[provider.name].set("failed", f"the problem's data: {first_line(error)}")
                return list(results.values())
            running = []
            for provider in able:
                if time.monotonic() >= deadline:
                    results[provider.name].set("skipped", "the time for this suite was spent")
                elif (one := _admit(problem, workload, provider, results[provider.name])) is not None:
                    running.append(one)
            # What checks and compilation took is not there for rounds any more.
            _time_in_turns(problem, workload, running, max(stop - time.monotonic(), 0.2 * budget), deadline)
            for one in running:
                _finish(problem, workload, one)
        del workload, running
        gc.collect()
        if ON_CUDA:
            torch.cuda.empty_cache()
    return list(results.values())


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


def _admit(problem: Problem, workload: Workload, provider: Provider, result: Measurement) -> _Running | None:
    """Make the call, call it once, check what it gave, read its memory. None where that fails."""
    inputs = workload.inputs[0]
    try:
        start = time.perf_counter()
        call = provider.make(workload.data)
        result.setup_seconds = time.perf_counter() - start
        outcome: list[Any] = []
        result.first_call_seconds = machine.wall_seconds(lambda: outcome.append(call(*inputs)))
        workload.check(provider, outcome.pop(), *inputs)
        memory = machine.peak_memory(lambda: call(*inputs))
        result.peak_memory_bytes, result.peak_memory_kind, result.device_memory_bytes = memory
    except AssertionError as error:
        result.set("refused", first_line(error))
        return None
    except torch.OutOfMemoryError as error:
        # Of ours it is a failure; how much the others can hold is theirs.
        result.set("failed" if result.ours else "unavailable", first_line(error))
        return None
    except Exception as error:
        result.set("failed", first_line(error))
        return None
    return _Running(provider, call, result)


def _time_in_turns(
    problem: Problem, workload: Workload, running: list[_Running], budget: float, deadline: float
) -> None:
    """Rounds in which each provider is called once; one that has used its share of the budget stays out.

    After `deadline` no round begins but the first.
    """
    share = budget / max(1, len(running))
    turns = itertools.cycle(workload.inputs)
    clock = _device_seconds if ON_CUDA and problem.clock == "device" else _wall_seconds
    for round_number in range(MAX_ROUNDS):
        if round_number and time.monotonic() >= deadline:
            break
        first = round_number % max(1, len(running))
        inputs = next(turns)
        for one in [*running[first:], *running[:first]]:
            spent = sum(one.times)
            enough = share if len(one.times) >= MIN_ROUNDS else max(4 * share, _PATIENCE)
            if one.times and spent >= enough:
                continue
            one.times.append(clock(one.call, inputs))


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


def _finish(problem: Problem, workload: Workload, one: _Running) -> None:
    """The figures that follow from the times, and those that need further calls."""
    result, work = one.result, problem.work
    result.set_times(one.times)
    seconds = result.seconds
    assert seconds is not None
    if one.provider.compiles and result.first_call_seconds is not None:
        result.compile_seconds = max(0.0, result.first_call_seconds - seconds)
    if work.bytes:
        result.gigabytes_per_second = work.bytes / seconds / 1e9
        result.share_of_copy = work.bytes / seconds / ceilings.copy_bandwidth()
    if work.flops:
        result.teraflops = work.flops / seconds / 1e12
        result.share_of_matrix = work.flops / seconds / ceilings.matrix_rate(one.provider.precision)
    if work.normals:
        result.share_of_noise = work.normals / seconds / ceilings.noise_rate()

    def again() -> Any:
        return one.call(*workload.inputs[0])

    result.launches = machine.launches(again)
    energy = machine.energy(again, seconds)
    result.watts = energy.watts
    if energy.joules is not None:
        result.joules_per_million = energy.joules / problem.samples * 1e6
    if one.provider.parts is not None:
        parts = one.provider.parts(workload.data)
        for call in parts.values():
            call()
        result.parts = {
            name: statistics.median(machine.wall_seconds(call) for _ in range(3))
            for name, call in parts.items()
        }
