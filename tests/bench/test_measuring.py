"""What is measured, what it is divided by, who has his turn where time is short, and that failures cost
nobody else.
"""

import contextlib
import dataclasses
import importlib
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import ceilings, harness, machine, measuring
from bench.harness import Problem, Provider, Work, Workload, input_sets
from bench.measuring import NO_TIME, measure
from bench.results import Measurement

N = 1000


def double(x: Tensor) -> Tensor:
    return 2 * x


def check(provider: Provider, result: Tensor, x: Tensor) -> None:
    torch.testing.assert_close(result, 2 * x)


def problem(*providers: Provider, setup: Callable[[], Workload] | None = None, **options: Any) -> Problem:
    """Doubling a vector, of two values."""

    def default() -> Workload:
        return Workload(None, [(torch.randn(N),), (torch.randn(N),)], check)

    return Problem("suite", "doubling", {"batch": N}, N, setup or default, providers, **options)


def provider(name: str, call: Callable[..., Any] = double, **options: Any) -> Provider:
    return Provider(name, lambda _: call, **options)


def run(*providers: Provider, budget: float = 0.05, deadline: float = math.inf, **options: Any) -> Any:
    """Measurements by name."""
    found = measure(problem(*providers, **options), providers, budget=budget, deadline=deadline)
    assert [m.provider for m in found] == [p.name for p in providers]
    return {m.provider: m for m in found}


class Calls:
    """A call that counts, and does something at one of its calls."""

    def __init__(self, number: int, act: Callable[[], None]):
        self.number, self.act, self.count = number, act, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.count += 1
        if self.count == self.number:
            self.act()
        return 2 * x


def raises(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_took", {})
    monkeypatch.setattr(measuring, "_pace", {})


# --- what a figure is divided by ----------------------------------------------------------------------------


@pytest.fixture
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(ceilings, "noise_rate", lambda: 2e9)
    monkeypatch.setattr(ceilings, "matrix_rate", {"ieee": 1e11, "tf32": 2e11, "bf16": 4e11}.__getitem__)


@pytest.mark.usefixtures("known_ceilings")
@pytest.mark.parametrize(("precision", "rate"), [("ieee", 1e11), ("bf16", 4e11)])
def test_shares_are_of_the_ceilings_that_belong_to_them(precision: Any, rate: float) -> None:
    work = Work(bytes=8e3, flops=3e6, normals=500)
    m: Measurement = run(provider("evalp_fast", precision=precision), work=work)["evalp_fast"]
    assert m.seconds is not None
    assert m.share_of_copy == pytest.approx(8e3 / m.seconds / 1e9)
    assert m.share_of_matrix == pytest.approx(3e6 / m.seconds / rate)
    assert m.share_of_noise == pytest.approx(500 / m.seconds / 2e9)
    assert m.teraflops == pytest.approx(3e6 / m.seconds / 1e12)
    assert m.ceilings == {"copy": 1e9, "matrix": rate, "noise": 2e9}


def test_a_ceiling_that_cannot_be_measured_costs_the_share_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "copy_bandwidth", raises(torch.OutOfMemoryError("out of memory")))
    one = provider("evalp_fast")
    asked = problem(one, work=Work(bytes=8e3))
    measuring.prepare(asked, [one])
    (m,) = measure(asked, [one], budget=0.05)
    assert (m.status, m.share_of_copy) == ("measured", None)
    assert m.gigabytes_per_second is not None


def test_copying_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def seconds(call: Callable[[], Tensor]) -> float:
        sizes.append(call().nbytes)
        return 0.5

    monkeypatch.setattr(ceilings, "_seconds", seconds)
    assert ceilings.copy_bandwidth.__wrapped__() == 2 * sizes[0] / 0.5


def test_energy_is_for_a_million_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "energy", lambda *a, **k: machine.Energy(2.0, 300.0, "counter"))
    m = run(provider("evalp_fast"))["evalp_fast"]
    assert (m.joules_per_million, m.watts, m.energy_kind) == (2.0 / N * 1e6, 300.0, "counter")


@pytest.mark.parametrize(("name", "compiles"), [("torch.compile", True), ("torch eager", False)])
def test_only_what_was_compiled_has_a_time_for_it(name: str, compiles: bool) -> None:
    def call(x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and not seen:
            seen.append(1)
            time.sleep(0.05)
        return function(x)

    seen: list[int] = []
    function = torch.compile(double, backend="inductor") if compiles else double
    m = run(provider(name, call, compiles=True))[name]
    assert m.status == "measured", m.reason
    assert m.first_call_seconds is not None
    assert m.compile_cache in (("cold", "warm") if compiles else (None,))
    if machine.ON_CUDA or compiles:
        assert m.compile_seconds == pytest.approx(m.first_call_seconds - m.seconds)
    else:
        assert m.compile_seconds is None


def test_parts_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"sleep": lambda: time.sleep(0.01), "rest": lambda: None}
    m = run(provider("evalp_fast", parts=lambda data: parts))["evalp_fast"]
    assert m.parts["sleep"] >= 0.01
    assert 0 < m.parts["rest"] < 0.01
    broken = provider("evalp_fast", parts=lambda data: {"broken": raises(ValueError("no"))})
    m = run(broken)["evalp_fast"]
    assert m.status == "measured"
    assert m.seconds is not None


# --- inputs -------------------------------------------------------------------------------------------------


def test_input_sets_differ_and_are_all_used(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = input_sets(lambda: (torch.randn(3),))
    assert len(sets) >= 2
    assert not torch.equal(sets[0][0], sets[1][0])
    monkeypatch.setattr(machine, "cache_bytes", lambda: 100)
    assert len(input_sets(lambda: (torch.randn(10),))) == 10
    assert len(input_sets(lambda: (torch.randn(100),))) == 2

    seen: list[float] = []

    def call(x: Tensor) -> Tensor:
        seen.append(float(x[0]))
        return 2 * x

    inputs = [(torch.full((N,), value),) for value in (1.0, 2.0, 3.0)]
    m = run(provider("evalp_fast", call), setup=lambda: Workload(None, inputs, check), budget=100.0)
    rounds = len(m["evalp_fast"].times)
    assert seen[2 : 2 + rounds] == [1.0 + k % 3 for k in range(rounds)]


def test_what_was_found_before_is_refused() -> None:
    kept: list[Tensor] = []

    def caches(x: Tensor) -> Tensor:
        kept.append(2 * x)
        return kept[0]

    found = run(provider("evalp_fast"), provider("caches", caches))
    assert found["evalp_fast"].status == "measured"
    stale = found["caches"]
    assert (stale.status, stale.seconds, stale.times) == ("refused", None, [])
    assert stale.reason.startswith("after timing, on other inputs: AssertionError")
    # Training goes on from its last step, which nothing here knows.
    inputs = [(torch.zeros(N),), (torch.ones(N),)]
    m = run(provider("evalp_fast", caches), setup=lambda: Workload(None, inputs, check, stateful=True))
    assert m["evalp_fast"].status == "refused"
    kept.clear()
    m = run(provider("evalp_fast", caches), setup=lambda: Workload(None, inputs, check, stateful=True))
    assert m["evalp_fast"].status == "measured"


@pytest.mark.parametrize("compiles", [False, True])
def test_nobody_is_exempt_from_the_check(compiles: bool) -> None:
    m = run(provider("torch.compile", lambda x: 2.1 * x, compiles=compiles))["torch.compile"]
    assert (m.status, m.seconds) == ("refused", None)
    assert m.reason.startswith("AssertionError")  # at the first call: it was never timed


def test_earlier_shapes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo

    resets: list[int] = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    run(provider("evalp_fast"))
    assert resets


# --- failures -----------------------------------------------------------------------------------------------


# Of the first provider: the first call, that of its memory, one of the rounds, and the last, checked again.
@pytest.mark.parametrize("number", [1, 2, 4, 5])
def test_who_raises_at_any_call_costs_nobody_else(number: int) -> None:
    broken = provider("broken", Calls(number, raises(RuntimeError("no more"))))
    found = run(broken, provider("evalp_fast"), budget=0.0)
    assert (found["broken"].status, found["broken"].seconds) == ("failed", None)
    assert "RuntimeError: no more" in found["broken"].reason
    assert found["evalp_fast"].status == "measured"
    assert len(found["evalp_fast"].times) >= 3


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    ],
)
@pytest.mark.parametrize("number", [1, 4])
def test_being_out_of_memory_is_said_and_costs_nobody_else(error: Exception, number: int) -> None:
    found = run(provider("evalp_fast"), provider("peer", Calls(number, raises(error))))
    assert (found["peer"].status, found["peer"].seconds) == ("out of memory", None)
    assert type(error).__name__ in found["peer"].reason
    assert found["evalp_fast"].status == "measured"


def test_what_follows_the_timing_does_not_take_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "launches", raises(AssertionError("built without CUPTI")))
    m = run(provider("evalp_fast"))["evalp_fast"]
    assert m.status == "measured"
    assert m.seconds is not None


@pytest.mark.skipif(machine.ON_CUDA, reason="a GPU is always asked")
def test_what_is_too_large_for_a_cpu_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "matrix_rate", lambda precision: 1e11)
    forbidden = provider("evalp_fast", raises(AssertionError("it was called")))
    m = run(forbidden, work=Work(flops=1e13))["evalp_fast"]
    assert (m.status, m.reason) == ("skipped", "one call would take about 100 s here")
    monkeypatch.setattr(machine, "free_memory", lambda: 1 << 30)
    m = run(forbidden, work=Work(bytes=1e9))["evalp_fast"]
    assert (m.status, m.reason) == ("skipped", "needs about 5 GiB, 1 are free")
    assert run(provider("evalp_fast"), work=Work(bytes=1e9, memory=1e3))["evalp_fast"].status == "measured"


def test_what_took_long_in_a_smaller_batch_is_not_tried_in_a_larger_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against a sweep that ends in calls of minutes. Each provider by its own pace."""
    monkeypatch.setattr(measuring, "ON_CUDA", False)

    def slow(x: Tensor) -> Tensor:
        time.sleep(0.02)
        return 2 * x

    calls = Calls(0, lambda: None)
    providers = provider("evalp_fast", slow), provider("torch eager", calls)

    def sized(batch: int, name: str = "doubling") -> Problem:
        return dataclasses.replace(problem(*providers), name=name, parameters={"batch": batch})

    def measured(batch: int, name: str = "doubling") -> Any:
        return {m.provider: m for m in measure(sized(batch, name), providers, budget=0.05)}

    assert {m.status for m in measured(N).values()} == {"measured"}
    found = measured(3000 * N)
    assert found["evalp_fast"].status == "skipped"
    assert re.fullmatch(r"one call would take about (6|7)\d s here", found["evalp_fast"].reason)
    assert found["torch eager"].status == "measured"
    assert measured(3000 * N, "halving")["evalp_fast"].status == "measured"  # another problem
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(measuring, "ON_CUDA", True)
        assert measuring._too_slow(sized(3000 * N), providers[0]) is None
    assert measured(1000 * N)["evalp_fast"].status == "measured"  # of 20 seconds: it is tried


# --- time ---------------------------------------------------------------------------------------------------


def test_ours_come_first_and_what_compiles_last() -> None:
    made: list[str] = []

    def named(name: str) -> Provider:
        def make(_: Any) -> Callable[[Tensor], Tensor]:
            made.append(name)
            return double

        return Provider(name, make)

    names = ("torch.compile max-autotune bf16", "zuko", "torch compile", "torch eager", "evalp_fast bf16")
    found = run(*map(named, names))
    assert made == ["evalp_fast bf16", "torch eager", "zuko", "torch compile", names[0]]
    assert list(found) == list(names)


class Clock:
    """`time.monotonic` and `perf_counter` that go on when somebody says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(measuring.time, "monotonic", found)
    monkeypatch.setattr(measuring.time, "perf_counter", found)

    @contextlib.contextmanager
    def never(deadline: float) -> Iterator[None]:
        yield

    monkeypatch.setattr(measuring, "_broken_off", never)
    return found


def slow(clock: Clock, name: str, first: float, each: float, **options: Any) -> Provider:
    """One that takes `first` seconds at its first call and `each` at the others."""
    calls: list[int] = []

    def call(x: Tensor) -> Tensor:
        clock.pass_by(each if calls else first)
        calls.append(1)
        return 2 * x

    return provider(name, call, **options)


def test_who_has_no_time_is_skipped_with_that_reason_and_ours_is_not(clock: Clock) -> None:
    ours, peer, other = (slow(clock, name, 1.0, 1.0) for name in ("evalp_fast", "peer", "other"))
    # Ours takes 2 s to admit and needs 4 for its rounds; the peer begins, the other has no time any more.
    found = run(ours, peer, other, budget=6.5, deadline=clock.now + 6.5)
    assert [m.status for m in found.values()] == ["measured", "measured", "skipped"]
    assert found["other"].reason == NO_TIME


def test_the_first_has_its_turn_where_the_data_took_all_the_time(clock: Clock) -> None:
    def setup() -> Workload:
        clock.pass_by(20.0)
        return Workload(None, [(torch.randn(N),)], check)

    found = run(provider("evalp_fast"), provider("peer"), setup=setup, budget=5.0, deadline=clock.now + 5.0)
    assert [(m.status, len(m.times)) for m in found.values()] == [("measured", 3), ("skipped", 0)]


def test_compiling_that_is_known_to_take_too_long_does_not_begin_again(clock: Clock) -> None:
    def attempt(seconds: float) -> Measurement:
        quick, compiled = provider("evalp_fast"), slow(clock, "torch.compile", 30.0, 0.0, compiles=True)
        return run(quick, compiled, budget=seconds, deadline=clock.now + seconds)["torch.compile"]

    assert attempt(40.0).status == "measured"
    before = clock.now
    late = attempt(20.0)
    assert (late.status, clock.now) == ("skipped", before)
    assert late.reason == f"{NO_TIME}: 20 s were left, and compiling needs about 30"
    assert attempt(40.0).status == "measured"


def test_rounds_end_at_the_deadline_but_quick_ones_are_three(clock: Clock) -> None:
    quick = run(slow(clock, "evalp_fast", 9.0, 0.5), budget=100.0, deadline=clock.now + 5.0)
    assert len(quick["evalp_fast"].times) == 3
    long = run(slow(clock, "evalp_fast", 9.0, 5.0), budget=100.0, deadline=clock.now + 5.0)
    assert len(long["evalp_fast"].times) == 1
    in_time = run(slow(clock, "evalp_fast", 1.0, 1.0), budget=100.0, deadline=clock.now + 10.5)
    assert len(in_time["evalp_fast"].times) == 9


def test_after_the_deadline_no_further_calls(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(machine, "launches", lambda call: asked.append(1))
    run(slow(clock, "evalp_fast", 9.0, 0.5), budget=100.0, deadline=clock.now + 5.0)
    assert not asked
    run(slow(clock, "evalp_fast", 1.0, 0.01), budget=100.0, deadline=clock.now + 50.0)
    assert asked


def test_compiling_is_broken_off_at_the_deadline() -> None:
    def endless(x: Tensor) -> Tensor:
        while True:
            with contextlib.suppress(Exception):  # as autotuners do
                time.sleep(0.01)

    start = time.monotonic()
    providers = (provider("evalp_fast"), provider("torch.compile", endless, compiles=True))
    found = run(*providers, budget=3.0, deadline=start + 3.0)
    assert time.monotonic() - start < 60
    assert found["evalp_fast"].status == "measured"
    assert found["torch.compile"].status == "skipped"
    assert found["torch.compile"].reason.startswith(f"{NO_TIME}: broken off after compiling")


def test_an_import_is_not_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_module.py").write_text("import time\ntime.sleep(3)\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)

    def imports(x: Tensor) -> Tensor:
        importlib.import_module("slow_module")
        time.sleep(60)
        return 2 * x

    providers = (provider("evalp_fast"), provider("torch.compile", imports, compiles=True))
    found = run(*providers, budget=2.0, deadline=time.monotonic() + 2.0)
    assert found["torch.compile"].status == "skipped"
    assert importlib.import_module("slow_module").whole


# --- energy, and which device -------------------------------------------------------------------------------


def test_no_energy_where_nothing_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "joules", lambda: None)
    monkeypatch.setattr(machine, "draw", lambda: None)
    assert machine.energy(raises(AssertionError("it was called")), 1e-3) == (None, None, None)


def test_energy_is_that_of_the_calls_within_the_window(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        clock.pass_by(0.03)

    monkeypatch.setattr(machine, "joules", lambda: 10.0 + 2.0 * len(calls))
    # The device needs a microsecond and the host 30 ms: half a million calls would take hours.
    found = machine.energy(call, 1e-6, window=0.5)
    assert len(calls) == 17
    assert found.joules == pytest.approx(2.0)
    assert found.watts == pytest.approx(2.0 / 0.03)
    assert found.kind == "counter"


def test_power_stands_in_for_a_counter_and_is_labelled(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(machine, "joules", lambda: None)
    monkeypatch.setattr(machine, "draw", lambda: 250.0)
    found = machine.energy(lambda: clock.pass_by(0.1), 0.1, window=0.5)
    assert found == (pytest.approx(25.0), 250.0, "power x time")


class Library:
    """NVML with two devices."""

    def __init__(self, knows_uuid: bool):
        self.knows_uuid = knows_uuid

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if not self.knows_uuid:
            raise RuntimeError("not supported")
        return {"GPU-b": "second"}[uuid]

    def nvmlDeviceGetHandleByPciBusId(self, bus: str) -> str:
        return {"00000000:5e:00.0": "second"}[bus]


@pytest.mark.parametrize("knows_uuid", [True, False])
def test_the_energy_is_read_of_the_device_that_runs(
    knows_uuid: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Facts:
        uuid, pci_domain_id, pci_bus_id, pci_device_id = "b", 0, 0x5E, 0

    library = Library(knows_uuid)
    monkeypatch.setattr(machine, "ON_CUDA", True)
    monkeypatch.setattr(machine.importlib, "import_module", lambda name: library)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Facts)
    assert machine._nvml.__wrapped__() == (library, "second")


def test_a_torch_without_a_profiler_has_no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.profiler

    monkeypatch.setattr(machine, "ON_CUDA", True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: None)
    monkeypatch.setattr(torch.profiler, "profile", lambda **k: raises(AssertionError("no CUPTI"))())
    assert machine.launches(lambda: None) is None


def test_the_suites_see_the_harness_alone() -> None:
    assert not hasattr(harness, "measure")
