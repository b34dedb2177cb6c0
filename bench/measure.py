"""How the kernels are timed: a check of the result first, then the clock, then the share of the copy's speed.

A call is checked on its first inputs, against float64 or, for draws, by a statistic. Only a call that passed
is timed: a red check leaves no number. Then every set of inputs is called once to warm up, and timed calls
take the sets in turn. On CUDA the sets together exceed the L2 cache four times, a buffer of twice its size is
cleared before each call (which also hides the launch from the clock), and events do the timing; the figure is
the median. "Share" is the share of the bandwidth that a copy of a large buffer reaches in the same run.
"""

import functools
import importlib.metadata
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
ROUNDS = 30 if ON_CUDA else 10

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """What is computed.

    Attributes:
        inputs: sets of arguments, alike in all but their values.
        check: raises AssertionError where the result (first argument) is wrong for the inputs (the others).
        elements: how many numbers are counted.
        bytes_per_element: what must be moved for each, whoever computes it.
    """

    inputs: list[Inputs]
    check: Callable[..., None]
    elements: int
    bytes_per_element: float


@dataclass(frozen=True)
class Measurement:
    """What one provider needed for one problem."""

    name: str
    seconds: float
    elements: int
    bytes_per_element: float
    nanoseconds_per_element: float
    gigabytes_per_second: float
    copy_gigabytes_per_second: float
    share_of_copy: float


def size(on_cpu: int, on_cuda: int) -> int:
    """A problem's size on this device."""
    return on_cuda if ON_CUDA else on_cpu


def input_sets(make: Callable[[], Inputs]) -> list[Inputs]:
    """At least two sets of inputs by `make`; on CUDA enough of them to exceed the L2 cache four times."""
    torch.manual_seed(0)
    sets = [make(), make()]
    while ON_CUDA and sum(t.nbytes for inputs in sets for t in inputs) < 4 * _cache_bytes():
        sets.append(make())
    return sets


def inductor(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile(function)`, on CUDA with all of Inductor's tuning.

    Without CUDA graphs, which would copy the inputs at every call.
    """
    torch._dynamo.reset()  # earlier problems' shapes must not make this one dynamic
    return torch.compile(function, fullgraph=True, mode="max-autotune-no-cudagraphs" if ON_CUDA else None)


def measure(name: str, problem: Problem, call: Callable[..., Any], benchmark: Any) -> Measurement:
    """Check, then time: `benchmark` is pytest-benchmark's fixture, whose wall-clock table takes part.

    Raises:
        AssertionError: the result is wrong; nothing was timed.
    """
    problem.check(call(*problem.inputs[0]), *problem.inputs[0])
    for inputs in problem.inputs:
        call(*inputs)
    turns, seconds = itertools.cycle(problem.inputs), []
    benchmark.pedantic(lambda: seconds.append(_seconds(call, next(turns))), rounds=ROUNDS, iterations=1)
    median = statistics.median(seconds)
    speed = problem.elements * problem.bytes_per_element / median / 1e9
    measurement = Measurement(
        name=name,
        seconds=median,
        elements=problem.elements,
        bytes_per_element=problem.bytes_per_element,
        nanoseconds_per_element=median / problem.elements * 1e9,
        gigabytes_per_second=speed,
        copy_gigabytes_per_second=copy_bandwidth(),
        share_of_copy=speed / copy_bandwidth(),
    )
    benchmark.extra_info.update(asdict(measurement) | environment())
    return measurement


def _seconds(call: Callable[..., Any], inputs: Inputs) -> float:
    if not ON_CUDA:
        start = time.perf_counter()
        call(*inputs)
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _eraser().zero_()
    begin.record()
    call(*inputs)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def _cache_bytes() -> int:
    return torch.cuda.get_device_properties(DEVICE).L2_cache_size


@functools.cache
def _eraser() -> Tensor:
    return torch.empty(2 * _cache_bytes(), dtype=torch.uint8, device=DEVICE)


@functools.cache
def copy_bandwidth() -> float:
    """Gigabytes per second, read and written, of copying a buffer of 1 GiB (256 MiB on the CPU)."""
    source = torch.zeros(size(1 << 28, 1 << 30), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = statistics.median(_seconds(target.copy_, (source,)) for _ in range(ROUNDS))
    return 2 * source.nbytes / seconds / 1e9


@functools.cache
def environment() -> dict[str, str]:
    """The device and the versions that a figure belongs to."""
    processor = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    versions = {package: _version(package) for package in ("torch", "triton", "torchebm")}
    return {
        "device": torch.cuda.get_device_name(DEVICE) if ON_CUDA else processor,
        "python": platform.python_version(),
        **versions,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def table(measurements: Iterable[Measurement]) -> str:
    """What is printed after a run."""
    lines = [f"{'':<58}{'time':>11}{'ns/element':>12}{'B/element':>11}{'GB/s':>9}{'of copy':>9}"]
    lines += [
        f"{m.name:<58}{m.seconds * 1e3:>8.3f} ms{m.nanoseconds_per_element:>12.4f}"
        f"{m.bytes_per_element:>11.4g}{m.gigabytes_per_second:>9.2f}{m.share_of_copy:>9.1%}"
        for m in measurements
    ]
    return "\n".join(lines)


# --- checks of draws ----------------------------------------------------------------------------------------


def check_normal(numbers: Tensor) -> None:
    """The first four moments of standard normals, within six standard errors."""
    numbers = numbers.double().flatten()
    deviations = {1: 1.0, 2: 2.0**0.5, 3: 15.0**0.5, 4: 96.0**0.5}
    for power, deviation in deviations.items():
        error = float(numbers.pow(power).mean()) - (0.0, 1.0, 0.0, 3.0)[power - 1]
        assert abs(error) < 6 * deviation / numbers.numel() ** 0.5, f"moment {power} is off by {error}"


def check_draws(drawn: Tensor, log_weights: Tensor, groups: int = 50) -> None:
    """Draws of columns, `[rows, num]`: chi-square of `groups` groups by rank of the log-weight, `[rows, n]`.

    Schemes with less variance than independent draws stay below the bound too.
    """
    rows, n = log_weights.shape
    drawn = drawn.reshape(rows, -1)
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < n
    order = log_weights.argsort(dim=1, descending=True)
    group = torch.arange(n, device=order.device) * groups // n
    group_of_column = torch.empty_like(order).scatter_(1, order, group.expand(rows, n))
    observed = torch.bincount(group_of_column.gather(1, drawn).flatten(), minlength=groups).double()
    share = torch.softmax(log_weights.double(), dim=1).gather(1, order).sum(dim=0) / rows
    expected = torch.zeros_like(observed).index_add_(0, group, share) * drawn.numel()
    rare = expected < 20  # counted as one
    observed, expected = (torch.cat((t[~rare], t[rare].sum().view(1))) for t in (observed, expected))
    excess = float(((observed - expected).square() / expected.clamp_min(1.0)).sum())
    limit = groups - 1 + 6 * (2.0 * (groups - 1)) ** 0.5
    assert excess < limit, f"chi-square of the draws is {excess:.0f}, above {limit:.0f}"
