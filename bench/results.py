"""What a measurement is, how a run's are stored, and how two runs are compared."""

import dataclasses
import datetime
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

FORMAT = 1
Status = Literal["measured", "unavailable", "refused", "failed", "skipped"]

Key = tuple[str, str, str]


@dataclass
class Measurement:
    """What one provider needed for one problem; None where it was not, or cannot be, measured.

    Attributes:
        suite, problem, provider: its key.
        precision: of the provider's matrix products.
        parameters: the problem's sizes.
        unit, samples: what one call makes, and how many.
        clock: `device` (events) or `wall`.
        status: `measured`; `refused`: its result was wrong; `failed`: it raised; `unavailable`: it is not
            installed or needs another device; `skipped`: no time was left.
        reason: of a status that is not `measured`.
        seconds: the median; `low` and `high` are the quartiles, `times` all of them.
        setup_seconds, first_call_seconds, compile_seconds: before the first call, the first call, and what
            that took longer than the median where it compiles.
        gigabytes_per_second, teraflops: of the bytes and products that the problem needs, whoever solves it.
        share_of_copy, share_of_matrix, share_of_noise: of the device's measured ceilings.
        peak_memory_bytes: of one call, beside its arguments, result included; `peak_memory_kind` says whether
            torch's allocator or the process's resident memory was read.
        device_memory_bytes: in use on the device, by NVML.
        joules_per_million, watts: per million samples, and while it ran.
        launches: kernels per call.
        parts: seconds of the named parts of a call.
        scale, when: which sizes, and when.
    """

    suite: str
    problem: str
    provider: str
    precision: str = "ieee"
    parameters: dict[str, Any] = field(default_factory=dict)
    unit: str = "samples"
    samples: int = 0
    clock: str = "wall"
    status: Status = "skipped"
    reason: str | None = None
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    times: list[float] = field(default_factory=list)
    setup_seconds: float | None = None
    first_call_seconds: float | None = None
    compile_seconds: float | None = None
    gigabytes_per_second: float | None = None
    teraflops: float | None = None
    share_of_copy: float | None = None
    share_of_matrix: float | None = None
    share_of_noise: float | None = None
    peak_memory_bytes: int | None = None
    peak_memory_kind: str | None = None
    device_memory_bytes: int | None = None
    joules_per_million: float | None = None
    watts: float | None = None
    launches: int | None = None
    parts: dict[str, float] = field(default_factory=dict)
    scale: str = ""
    when: str = ""

    @property
    def key(self) -> Key:
        """What it is a measurement of."""
        return self.suite, self.problem, self.provider

    @property
    def rate(self) -> float | None:
        """Samples per second."""
        return None if self.seconds is None else self.samples / self.seconds

    @property
    def spread(self) -> float:
        """Seconds between the quartiles; infinite where there are too few times to know."""
        if self.low is None or self.high is None or len(self.times) < 3:
            return float("inf")
        return self.high - self.low

    @property
    def ours(self) -> bool:
        """Whether it is this package's way."""
        return self.provider.startswith("evalp_fast")

    def set(self, status: Status, reason: str) -> None:
        """Say why there is no number."""
        self.status, self.reason = status, reason

    def set_times(self, times: Sequence[float]) -> None:
        """Median and quartiles of the seconds that were taken."""
        self.status = "measured"
        self.times = [float(f"{t:.6g}") for t in times]
        self.seconds = statistics.median(times)
        quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
        self.low, self.high = quartiles[0], quartiles[2]


def indistinct(a: Measurement, b: Measurement) -> bool:
    """Whether the spread of either is wider than the difference between their medians."""
    if a.seconds is None or b.seconds is None:
        return False
    return max(a.spread, b.spread) > abs(a.seconds - b.seconds)


@dataclass
class Results:
    """A run on one device: the environment, its ceilings, and the measurements by key."""

    environment: dict[str, Any]
    ceilings: dict[str, float] = field(default_factory=dict)
    measurements: dict[Key, Measurement] = field(default_factory=dict)

    def add(self, measurements: Iterable[Measurement]) -> None:
        """A newer measurement replaces the older one of the same key."""
        self.measurements |= {m.key: m for m in measurements}

    def suites(self) -> list[str]:
        """In the order they were run."""
        return list(dict.fromkeys(m.suite for m in self.measurements.values()))

    def problems(self, suite: str) -> dict[str, list[Measurement]]:
        """The measurements of each problem of a suite."""
        found: dict[str, list[Measurement]] = {}
        for m in self.measurements.values():
            if m.suite == suite:
                found.setdefault(m.problem, []).append(m)
        return found

    def save(self, path: Path) -> None:
        """As JSON, in one rename."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "format": FORMAT,
            "environment": self.environment,
            "ceilings": self.ceilings,
            "measurements": [dataclasses.asdict(m) for m in self.measurements.values()],
        }
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)


def load(path: Path) -> Results:
    """What `Results.save` wrote.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']}, this code reads {FORMAT}")
        results = Results(content["environment"], content["ceilings"])
        results.add(Measurement(**m) for m in content["measurements"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold results: {error}") from error
    return results


def path_for(
    folder: Path, environment: dict[str, Any], device: str, day: datetime.date | None = None
) -> Path:
    """`folder/device/date.json`, with `-2` and so on where that is of another commit or other versions."""
    day = day or datetime.datetime.now(datetime.timezone.utc).date()
    for number in range(1, 1000):
        path = (
            folder
            / device
            / (f"{day.isoformat()}.json" if number == 1 else f"{day.isoformat()}-{number}.json")
        )
        if not path.exists() or load(path).environment == environment:
            return path
    raise ValueError(f"{folder / device} holds a thousand results of {day}")


# --- comparison ---------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """How a measurement differs between two runs.

    Attributes:
        ratio: new seconds over old; None where one of them has no number.
        verdict: `slower` or `faster` beyond the noise, `same`, `lost` (no number any more) or `new`.
    """

    key: Key
    old: Measurement | None
    new: Measurement | None
    ratio: float | None
    verdict: Literal["slower", "faster", "same", "lost", "new"]


def compare(old: Results, new: Results, *, tolerance: float = 0.05) -> list[Change]:
    """What changed from `old` to `new`, for all that one of them measured.

    A change counts where the quartiles do not overlap and the medians differ by more than `tolerance` and by
    more than either spread.
    """
    changes = []
    for key in {**old.measurements, **new.measurements}:
        a, b = old.measurements.get(key), new.measurements.get(key)
        before = a.seconds if a is not None else None
        after = b.seconds if b is not None else None
        if before is None and after is None:
            continue
        if before is None or after is None:
            # A problem that the new run did not look at is not lost.
            if b is None:
                continue
            changes.append(Change(key, a, b, None, "lost" if after is None else "new"))
            continue
        assert a is not None
        assert b is not None
        ratio = after / before
        clear = not indistinct(a, b) and abs(ratio - 1) > tolerance
        verdict = "same" if not clear else "slower" if ratio > 1 else "faster"
        changes.append(Change(key, a, b, ratio, verdict))
    return changes
