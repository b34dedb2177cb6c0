"""What a measurement is, how a run's are stored, and how two runs are compared."""

import dataclasses
import datetime
import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

FORMAT = 1
Status = Literal["measured", "unavailable", "refused", "failed", "out of memory", "skipped"]

FEWEST = 3
"""Times that show a spread."""

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
        status: `measured`; `refused`: its result was wrong; `failed`: it raised; `out of memory`: it asked
            for more than there is; `unavailable`: it is not installed or needs another device; `skipped`: no
            time was left, or one call would take too long.
        reason: of a status that is not `measured`.
        seconds: the median; `low` and `high` are the quartiles, `times` all of them.
        setup_seconds, first_call_seconds, compile_seconds: before the first call, the first call, and what
            that took longer than the median where something was compiled.
        compile_cache: `warm` where Inductor found all it needed in its cache on disk, `cold` where it had to
            compile, None where it had nothing to do.
        gigabytes_per_second, teraflops: of the bytes and products that the problem needs, whoever solves it.
        share_of_copy, share_of_matrix, share_of_noise: of the device's measured ceilings.
        ceilings: what they are shares of, a second.
        peak_memory_bytes: of one call, beside its arguments, result included; `peak_memory_kind` says whether
            torch's allocator or the process's resident memory was read.
        device_memory_bytes: in use on the device after the call, by NVML: by anyone, with what the allocator
            keeps since its peak, the context and the libraries.
        joules_per_million, watts: per million samples, and while it ran; `energy_kind` says whether the
            device's counter was read or its power.
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
    compile_cache: str | None = None
    gigabytes_per_second: float | None = None
    teraflops: float | None = None
    share_of_copy: float | None = None
    share_of_matrix: float | None = None
    share_of_noise: float | None = None
    ceilings: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    peak_memory_kind: str | None = None
    device_memory_bytes: int | None = None
    joules_per_million: float | None = None
    watts: float | None = None
    energy_kind: str | None = None
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
        if self.low is None or self.high is None or len(self.times) < FEWEST:
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


def quantity(value: float | None, unit: str = "") -> str:
    """Three digits and a prefix: `1.23 M`."""
    if value is None:
        return ""
    if value == 0:
        return f"0 {unit}".rstrip()
    for factor, prefix in (
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
        (1, ""),
        (1e-3, "m"),
        (1e-6, "µ"),
    ):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:.3g} {prefix}{unit}".rstrip()
    return f"{value * 1e9:.3g} n{unit}".rstrip()


@dataclass
class Results:
    """A run on one device: the environment, the ceilings measured last, and the measurements by key."""

    environment: dict[str, Any]
    ceilings: dict[str, float] = field(default_factory=dict)
    measurements: dict[Key, Measurement] = field(default_factory=dict)

    def add(self, measurements: Iterable[Measurement]) -> None:
        """A newer measurement replaces the older one of the same key, unless it had no time for a number."""
        for m in measurements:
            old = self.measurements.get(m.key)
            if m.status != "skipped" or old is None or old.seconds is None:
                self.measurements[m.key] = m

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
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)


def load(path: Path) -> Results:
    """What `Results.save` wrote.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']}, this code reads {FORMAT}")
        results = Results(content["environment"], content["ceilings"])
        if not isinstance(results.environment, dict) or not isinstance(
            results.environment.get("device"), str
        ):
            raise ValueError("its environment names no device")
        if not isinstance(results.ceilings, dict):
            raise ValueError("its ceilings are no table")
        _positive(results.ceilings, "ceiling")
        results.add(_measurement(m) for m in content["measurements"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold results: {error}") from error
    return results


def _positive(values: dict[str, Any], what: str) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"the {what} {name} is {value!r}, not a positive number")


def _measurement(stored: dict[str, Any]) -> Measurement:
    m = Measurement(**stored)
    what = f"{m.suite} / {m.problem} / {m.provider}:"
    for f in dataclasses.fields(m):
        value = getattr(m, f.name)
        numeric = f.type in (float | None, int | None)
        if numeric and value is not None and not isinstance(value, int | float):
            raise ValueError(f"{what} {f.name} is {value!r}, not a number")
    if m.status == "measured" or m.seconds is not None:
        _positive({name: getattr(m, name) for name in ("seconds", "low", "high")}, what)
    if not isinstance(m.samples, int) or not isinstance(m.times, list) or not isinstance(m.parts, dict):
        raise ValueError(f"{what} samples, times or parts are of another kind")
    return m


def path_for(
    folder: Path,
    environment: dict[str, Any],
    device: str,
    day: datetime.date | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """`folder/device/date.json`, with `-2` and so on where that is of another commit or other versions.

    A commit that is unknown, or whose files were changed, is another one each time. A file that cannot be
    read is left alone, and named to `say`.
    """
    day = day or datetime.datetime.now(datetime.timezone.utc).date()
    commit = environment.get("commit")
    known = commit is not None and not commit.endswith("-dirty")
    for number in range(1, 1000):
        name = f"{day.isoformat()}.json" if number == 1 else f"{day.isoformat()}-{number}.json"
        path = folder / device / name
        if not path.exists():
            return path
        try:
            if known and load(path).environment == environment:
                return path
        except (OSError, ValueError) as error:
            say(f"left alone: {error}")
    raise ValueError(f"{folder / device} holds a thousand results of {day}")


# --- comparison ---------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """How a measurement differs between two runs.

    Attributes:
        ratio: new seconds over old; None where one of them has no number.
        verdict: `slower` or `faster` beyond the noise, `same`, `unknown` (too few times to know the noise),
            `lost` (no number any more) or `new`.
    """

    key: Key
    old: Measurement | None
    new: Measurement | None
    ratio: float | None
    verdict: Literal["slower", "faster", "same", "unknown", "lost", "new"]


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
        if min(len(a.times), len(b.times)) < FEWEST:
            verdict = "unknown"
        changes.append(Change(key, a, b, ratio, verdict))
    return changes
