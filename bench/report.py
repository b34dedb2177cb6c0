"""`python -m bench.report RESULTS...`: stored results as a Markdown table and plots; or two runs compared.

python -m bench.report bench/results/DEVICE/DATE.json    # the table; the plots go beside the file
python -m bench.report FILE --suite flow --suite chain --plots none
python -m bench.report --compare OLD.json NEW.json       # exit status 1 where something got slower
python -m bench.report --readme FILE                     # a row for each kind of problem: README's table
"""

import argparse
import contextlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.readme import readme_table
from bench.results import FEWEST, Change, Measurement, Results, compare, indistinct, load, quantity

WIDER = "≈"
"""Marks a ratio whose measurements' spread is wider than their difference."""


# --- numbers as text ----------------------------------------------------------------------------------------


def _bytes(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / (1 << 20):.3g} MiB" if value < 1 << 30 else f"{value / (1 << 30):.3g} GiB"


def _duration(m: Measurement) -> str:
    if m.seconds is None:
        return ""
    spread = "" if m.spread == float("inf") else f" ± {m.spread / m.seconds / 2:.0%}"
    return f"{quantity(m.seconds, 's')}{spread}"


def _share(m: Measurement) -> str:
    shares = {"copy": m.share_of_copy, "matrix": m.share_of_matrix, "noise": m.share_of_noise}
    return ", ".join(f"{value:.0%} {name}" for name, value in shares.items() if value is not None)


def fastest_of_ours(measurements: Iterable[Measurement]) -> Measurement | None:
    """The measured way of this package that takes least time."""
    ours = [m for m in measurements if m.ours and m.seconds is not None]
    return min(ours, key=lambda m: m.seconds or 0.0, default=None)


def against_ours(m: Measurement, best: Measurement | None) -> str:
    """How many times as long as the fastest of ours it takes, marked where the noise is wider than that."""
    if best is None or m.seconds is None or best.seconds is None:
        return ""
    if m is best:
        return "1"
    return f"{WIDER if indistinct(m, best) else ''}{m.seconds / best.seconds:.2f}"


# --- tables -------------------------------------------------------------------------------------------------


def terminal_table(measurements: Sequence[Measurement]) -> str:
    """Short: what is printed after a run."""
    lines = [f"{'':<34}{'per second':>12}{'time':>18}{'x ours':>8}{'memory':>10}  share of"]
    problem, idle = None, False
    for m in measurements:
        group = [n for n in measurements if (n.suite, n.problem) == (m.suite, m.problem)]
        if (m.suite, m.problem) != problem:
            problem = m.suite, m.problem
            same = {(n.status, n.reason) for n in group if n.status != "unavailable"}
            idle = same == {("skipped", m.reason)}
            lines.append(f"{m.suite}: {m.problem}" + (f", skipped: {m.reason}" if idle else ""))
        if idle:
            continue
        if m.status != "measured":
            lines.append(f"  {m.provider:<32}{m.status}: {m.reason}")
            continue
        lines.append(
            f"  {m.provider:<32}{quantity(m.rate):>12}{_duration(m):>18}"
            f"{against_ours(m, fastest_of_ours(group)):>8}{_bytes(m.peak_memory_bytes):>10}"
            f"  {_share(m)}".rstrip()
        )
    return "\n".join(lines)


COLUMNS = (
    "provider",
    "products",
    "per second",
    "time",
    "x ours",
    "GB/s",
    "TFLOP/s",
    "share of ceilings",
    "peak memory",
    "device memory",
    "J per million",
    "launches",
    "first call",
)


def _row(m: Measurement, best: Measurement | None) -> list[str]:
    if m.status != "measured":
        return [m.provider, m.precision, f"{m.status}: {m.reason}"] + [""] * (len(COLUMNS) - 3)
    return [
        m.provider,
        m.precision,
        quantity(m.rate),
        _duration(m),
        against_ours(m, best),
        "" if m.gigabytes_per_second is None else f"{m.gigabytes_per_second:.3g}",
        "" if m.teraflops is None else f"{m.teraflops:.3g}",
        _share(m),
        _bytes(m.peak_memory_bytes),
        _bytes(m.device_memory_bytes),
        _joules(m),
        "" if m.launches is None else str(m.launches),
        quantity(m.first_call_seconds, "s") + (f" ({m.compile_cache})" if m.compile_cache else ""),
    ]


def _joules(m: Measurement) -> str:
    if m.joules_per_million is None:
        return ""
    by_power = " (by power)" if m.energy_kind == "power x time" else ""
    return f"{m.joules_per_million:.3g}{by_power}"


def markdown(results: Results, suites: Sequence[str] = ()) -> str:
    """All measurements, a table for each problem; columns that nothing fills are left out."""
    facts = results.environment
    versions = ", ".join(f"{k} {v or 'not installed'}" for k, v in facts.get("versions", {}).items())
    ceilings = ", ".join(f"{name} {quantity(value, '/s')}" for name, value in results.ceilings.items())
    lines = [
        f"# {facts['device']}",
        "",
        f"Commit {facts.get('commit')}, Python {facts.get('python')}, {versions}.",
    ]
    lines += ["", f"Ceilings, a second: {ceilings or 'none was measured'}.", ""]
    lines += [
        f"`x ours`: time over that of the fastest of ours; {WIDER} where the spread exceeds the difference. "
        "± is half the distance of the quartiles. Peak memory is that of one call beside its arguments, "
        "device memory all that NVML sees after it. A first call is `cold` where Inductor compiled in it, "
        "`warm` where it found that in its cache on disk.",
        "",
    ]
    for suite in results.suites():
        if suites and suite not in suites:
            continue
        for problem, measurements in results.problems(suite).items():
            first = measurements[0]
            lines += [f"## {suite}: {problem}", "", f"{first.samples:,} {first.unit} a call.", ""]
            best = fastest_of_ours(measurements)
            rows = [_row(m, best) for m in measurements]
            used = [i for i in range(len(COLUMNS)) if i < 3 or any(row[i] for row in rows)]
            lines += [_line([COLUMNS[i] for i in used]), _line(["---"] * len(used))]
            lines += [_line([row[i] for i in used]) for row in rows]
            lines.append("")
            for m in measurements:
                if m.parts:
                    parts = ", ".join(f"{name} {quantity(value, 's')}" for name, value in m.parts.items())
                    lines += [f"{m.provider}: {parts}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# --- comparison ---------------------------------------------------------------------------------------------


def comparison(changes: Sequence[Change], old: Results, new: Results) -> str:
    """What got slower, was lost, got faster; and how the machine itself changed meanwhile."""
    lines = [f"# {old.environment.get('commit')} → {new.environment.get('commit')}", ""]
    if old.environment.get("device") != new.environment.get("device"):
        lines += [f"Two devices: {old.environment.get('device')} and {new.environment.get('device')}.", ""]
    for name, before in old.ceilings.items():
        after = new.ceilings.get(name)
        if after is not None and abs(after / before - 1) > 0.1:
            lines += [
                f"The machine's own {name} went from {quantity(before)} to {quantity(after)} a second.",
                "",
            ]
    for verdict in ("slower", "lost", "faster", "new", "unknown"):
        found = [c for c in changes if c.verdict == verdict]
        if not found:
            continue
        few = f": fewer than {FEWEST} times do not show the noise" if verdict == "unknown" else ""
        lines += [f"## {verdict}{few}", ""]
        for change in found:
            name = " / ".join(change.key)
            if change.ratio is None:
                m = change.new
                why = "" if m is None or m.reason is None else f": {m.status}, {m.reason}"
                lines.append(f"- {name}{why}")
                continue
            assert change.old is not None
            assert change.new is not None
            lines.append(
                f"- {name}: {_duration(change.old)} → {_duration(change.new)}: {change.ratio:.2f} of the time"
            )
        lines.append("")
    same = sum(c.verdict == "same" for c in changes)
    lines.append(f"{same} of {len(changes)} are the same within the noise.")
    return "\n".join(lines) + "\n"


def _files(arguments: Sequence[str]) -> list[Path]:
    paths = [Path(argument) for argument in arguments]
    return [file for path in paths for file in (sorted(path.rglob("*.json")) if path.is_dir() else [path])]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 1 where something got slower or was lost, 2 for errors."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("results", nargs="*", help="JSON files, or folders that hold them")
    parser.add_argument("--suite", action="append", default=[], help="only this suite; may be repeated")
    parser.add_argument("--plots", default=None, help="folder of the plots (beside each file), or none")
    parser.add_argument("--readme", metavar="FILE", help="README's table, and nothing else")
    parser.add_argument("--compare", nargs=2, metavar=("OLD", "NEW"), help="two files")
    options: Any = parser.parse_args(arguments)
    with contextlib.suppress(AttributeError):  # a terminal that cannot show ± shows a question mark
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        if options.readme:
            print(readme_table(load(Path(options.readme))))
            return 0
        if options.compare:
            old, new = (load(Path(name)) for name in options.compare)
            changes = compare(old, new)
            print(comparison(changes, old, new))
            return int(any(c.verdict in ("slower", "lost") for c in changes))
        files = _files(options.results)
        if not files:
            parser.error("name a file or a folder of results")
        for file in files:
            results = load(file)
            print(markdown(results, options.suite))
            if options.plots != "none":
                from bench.plots import draw

                folder = file.parent if options.plots is None else Path(options.plots)
                for path in draw(results, folder, file.stem):
                    print(f"![{path.stem}]({path})")
    except (OSError, ValueError, ImportError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
