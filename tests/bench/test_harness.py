"""The harness: what it refuses, in which order it times, and what it says of those that it could not time."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import machine
from bench.harness import Problem, Provider, Work, Workload, absent
from bench.measuring import measure
from bench.report import markdown, terminal_table
from bench.results import Results

N = 1000


def double(x: Tensor) -> Tensor:
    return 2 * x


def problem(*providers: Provider, **options: Any) -> Problem:
    """Doubling a vector."""

    def setup() -> Workload:
        def check(provider: Provider, result: Tensor, x: Tensor) -> None:
            torch.testing.assert_close(result.double(), 2 * x.double())

        return Workload(None, [(torch.randn(N),), (torch.randn(N),)], check)

    return Problem("suite", "doubling", {"batch": N}, N, setup, providers, **options)


def provider(name: str, call: Callable[..., Any] = double, **options: Any) -> Provider:
    return Provider(name, lambda _: call, **options)


def test_a_right_result_is_measured() -> None:
    one = provider("evalp_fast")
    (m,) = measure(problem(one, work=Work(bytes=8 * N)), [one], budget=0.05)
    assert m.status == "measured"
    assert m.seconds is not None
    assert m.low is not None
    assert m.high is not None
    assert m.low <= m.seconds <= m.high
    assert m.rate == pytest.approx(N / m.seconds)
    assert m.gigabytes_per_second == pytest.approx(8 * N / m.seconds / 1e9)
    assert m.share_of_copy is not None
    assert m.share_of_copy > 0
    assert m.first_call_seconds is not None
    assert m.peak_memory_kind == ("allocator" if machine.ON_CUDA else "resident")


def test_a_wrong_result_leaves_no_number() -> None:
    providers = [provider("evalp_fast"), provider("wrong", lambda x: 2.001 * x)]
    right, wrong = measure(problem(*providers), providers, budget=0.05)
    assert right.status == "measured"
    assert wrong.status == "refused"
    assert wrong.reason is not None
    assert "close" in wrong.reason
    assert (wrong.seconds, wrong.rate, wrong.times) == (None, None, [])
    assert wrong.peak_memory_bytes is None


def test_one_that_raises_does_not_stop_the_others() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("out of something\nand more")

    providers = [provider("broken", broken), provider("evalp_fast")]
    failed, right = measure(problem(*providers), providers, budget=0.05)
    assert (failed.status, failed.reason) == ("failed", "RuntimeError: out of something")
    assert right.status == "measured"


def test_data_that_cannot_be_made_fail_all() -> None:
    def setup() -> Workload:
        raise ValueError("no data")

    one = provider("evalp_fast")
    broken = Problem("suite", "p", {}, 1, setup, (one,))
    (m,) = measure(broken, [one], budget=0.05)
    assert m.status == "failed"
    assert m.reason is not None
    assert "no data" in m.reason


def test_what_is_missing_is_reported() -> None:
    providers = [provider("evalp_fast"), provider("peer", missing=absent("no_such_package.module"))]
    found = measure(problem(*providers), providers, budget=0.05)
    assert (found[1].status, found[1].reason) == ("unavailable", "no_such_package is not installed")
    results = Results({"device": "a device"})
    results.add(found)
    assert "unavailable: no_such_package is not installed" in terminal_table(found)
    assert "unavailable: no_such_package is not installed" in markdown(results)


def test_another_precision_under_this_name_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU where "bf16" is float32 our rows of it would repeat those of float32, as bfloat16's."""
    ours = Provider("evalp_fast bf16", lambda _: lambda: None, "bf16")
    monkeypatch.setattr(machine, "DEVICE", torch.device("cpu"))
    for pays in (True, False):
        monkeypatch.setattr("evalp_fast.kernels.processor.BFLOAT16_PAYS", pays)
        assert (ours.absence() is None) is pays
        assert Provider("torch eager bf16", ours.make, "bf16").absence() is None
        assert Provider("evalp_fast", ours.make).absence() is None
    assert Provider("evalp_fast bf16", ours.make, "bf16", lambda: "why").absence() == "why"


def test_absent_names_what_a_package_lacks(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_a_package.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert absent("half_a_package")() == "half_a_package needs no_such_dependency, which is not installed"
    assert absent("evalp_fast.kernels.no_such_kernel")() == "not there yet"
    assert absent("math", "no_such_name")() == "not there yet"
    assert absent("math", "sqrt")() is None


def test_a_broken_peer_is_absent_and_a_broken_module_of_ours_a_failure(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("broken_peer", "evalp_fast_broken"):
        (tmp_path / f"{name}.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    providers = [provider(name, missing=absent(name)) for name in ("evalp_fast_broken", "broken_peer")]
    ours, peer = measure(problem(*providers), providers, budget=0.0)
    assert (ours.status, ours.reason) == ("failed", "ZeroDivisionError: division by zero")
    assert peer.status == "unavailable"
    assert peer.reason is not None
    assert "cannot be imported: ZeroDivisionError" in peer.reason


def test_providers_take_turns() -> None:
    calls: list[str] = []

    def named(name: str) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            calls.append(name)
            return 2 * x

        return call

    providers = [provider(name, named(name)) for name in "abc"]
    found = measure(problem(*providers), providers, budget=100.0)
    rounds = len(found[0].times)
    assert rounds > 5
    # Two calls of each come before: the checked one, and the one whose memory is read.
    timed = calls[6 : 6 + 3 * rounds]
    for number in range(rounds):
        turn = "".join(timed[3 * number : 3 * number + 3])
        assert turn == {0: "abc", 1: "bca", 2: "cab"}[number % 3]


def test_a_slow_provider_is_timed_less_often_but_enough() -> None:
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.02)
        return 2 * x

    providers = [provider("evalp_fast"), provider("slow", slow)]
    fast, slow_one = measure(problem(*providers), providers, budget=0.1)
    assert 3 <= len(slow_one.times) < len(fast.times)


def test_after_the_deadline_nothing_begins() -> None:
    def setup() -> Workload:
        raise AssertionError("the data were made")

    one = provider("evalp_fast")
    late = Problem("suite", "p", {}, 1, setup, (one,))
    (m,) = measure(late, [one], budget=0.0, deadline=time.monotonic())
    assert m.status == "skipped"
    assert m.reason is not None
    assert "time" in m.reason
    assert "skipped: the time" in terminal_table([m])


def test_gradients_are_recorded_only_where_asked_for() -> None:
    def call(x: Tensor) -> Tensor:
        assert torch.is_grad_enabled() is expected
        return 2 * x

    for expected in (False, True):
        one = provider("evalp_fast", call)
        (m,) = measure(problem(one, gradients=expected), [one], budget=0.0)
        assert m.status == "measured", m.reason
    assert torch.is_grad_enabled()


@pytest.mark.skipif(machine.ON_CUDA, reason="on a GPU the allocator is asked")
def test_peak_memory_sees_what_a_call_needs() -> None:
    def call() -> Tensor:
        held = torch.ones(16 << 20)  # 64 MiB, freed before the end
        return held[:10].clone()

    memory = machine.peak_memory(call)
    assert memory.peak is not None
    assert 60 < memory.peak / (1 << 20) < 80
    assert machine.peak_memory(lambda: None).peak in range(1 << 21)


def test_the_sampled_peak_sees_it_too() -> None:
    peak, kind = machine._sampled_resident(lambda: torch.ones(16 << 20))
    assert kind == "resident, sampled"
    assert peak is not None
    assert peak / (1 << 20) > 30
