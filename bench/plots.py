"""The plots of a report: rates by batch, memory by proposals, shares of ceilings, parts of a step."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter

from bench.results import Measurement, Results

_DPI = 110
_COLOURS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]

Point = tuple[float, float]


def draw(results: Results, folder: Path, stem: str) -> list[Path]:
    """Write the plots for which there is data to `folder/stem-NAME.png`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawers: dict[str, Callable[[list[Measurement]], Figure | None]] = {
        "throughput": throughput,
        "memory": memory,
        "ceilings": ceilings,
        "parts": parts,
    }
    measured = [m for m in results.measurements.values() if m.seconds is not None]
    written = []
    for name, drawer in drawers.items():
        figure = drawer(measured)
        if figure is None:
            continue
        figure.suptitle(
            f"{results.environment['device']}, commit {results.environment.get('commit')}", fontsize=8
        )
        path = folder / f"{stem}-{name}.png"
        figure.savefig(path, dpi=_DPI, bbox_inches="tight")
        plt.close(figure)
        written.append(path)
    return written


def _families(
    measured: list[Measurement], parameter: str, points: int
) -> dict[str, dict[str, list[Measurement]]]:
    """Problems that differ in one parameter alone, and of each the measurements by provider, in its order.

    Only families with at least `points` values of the parameter.
    """
    families: dict[str, dict[str, list[Measurement]]] = {}
    for m in measured:
        if parameter not in m.parameters:
            continue
        rest = [f"{k} {v}" for k, v in m.parameters.items() if k != parameter]
        kind = m.problem.split(",")[0]
        name = ", ".join([f"{m.suite}: {kind}", *rest])
        families.setdefault(name, {}).setdefault(m.provider, []).append(m)
    kept = {}
    for name, providers in families.items():
        values = {m.parameters[parameter] for ms in providers.values() for m in ms}
        if len(values) >= points:
            kept[name] = {p: sorted(ms, key=lambda m: m.parameters[parameter]) for p, ms in providers.items()}
    return kept


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = -(-count // columns)
    size = 5 * columns, 3.6 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    flat = list(axes.flatten())
    for unused in flat[count:]:
        unused.set_axis_off()
    return figure, flat


def _curves(
    measured: list[Measurement],
    parameter: str,
    points: int,
    value: Callable[[Measurement], float | None],
    label: str,
) -> Figure | None:
    families = _families(measured, parameter, points)
    families = {
        name: providers
        for name, providers in families.items()
        if any(value(m) is not None for ms in providers.values() for m in ms)
    }
    if not families:
        return None
    figure, axes = _grid(len(families))
    for axis, (name, providers) in zip(axes, families.items(), strict=False):
        for number, (provider, ms) in enumerate(providers.items()):
            places = [(m.parameters[parameter], v) for m in ms if (v := value(m)) is not None]
            if places:
                axis.plot(
                    *zip(*places, strict=True),
                    marker="o",
                    markersize=3,
                    linewidth=2 if ms[0].ours else 1,
                    color=_COLOURS[number % len(_COLOURS)],
                    linestyle="-" if number < len(_COLOURS) else "--",
                    label=provider,
                )
        axis.set(yscale="log", xlabel=parameter, ylabel=label)
        axis.set_xscale("log", base=2)
        axis.yaxis.set_major_formatter(EngFormatter())
        axis.yaxis.set_minor_formatter(EngFormatter())
        axis.tick_params(axis="y", which="both", labelsize=7)
        axis.set_title(textwrap.fill(name, 60), fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6, framealpha=0.5)
    return figure


def throughput(measured: list[Measurement]) -> Figure | None:
    """Samples per second against the batch, where there are three of it or more."""
    return _curves(measured, "batch", 3, lambda m: m.rate, "samples per second")


def memory(measured: list[Measurement]) -> Figure | None:
    """Peak memory of a call against the number of proposals."""
    return _curves(
        measured,
        "proposals",
        2,
        lambda m: None if m.peak_memory_bytes is None else max(m.peak_memory_bytes, 1) / (1 << 20),
        "peak memory, MiB",
    )


def ceilings(measured: list[Measurement]) -> Figure | None:
    """Which share of the device's ceilings ours reach: of the ceiling that each comes closest to."""
    bars: list[tuple[str, float, str]] = []
    for m in measured:
        shares = {"copy": m.share_of_copy, "matrix": m.share_of_matrix, "noise": m.share_of_noise}
        known = {kind: share for kind, share in shares.items() if share is not None}
        if m.ours and known:
            kind = max(known, key=lambda kind: known[kind])
            bars.append(
                (
                    f"{m.suite}: {m.problem}, {m.provider.removeprefix('evalp_fast').strip()}",
                    known[kind],
                    kind,
                )
            )
    if not bars:
        return None
    figure, axis = plt.subplots(figsize=(7, 0.6 + 0.22 * len(bars)))
    colours = {"copy": _COLOURS[0], "matrix": _COLOURS[1], "noise": _COLOURS[2]}
    for place, (_, share, kind) in enumerate(bars):
        axis.barh(place, share, color=colours[kind])
    axis.set_yticks(range(len(bars)), [name.rstrip(", ") for name, _, _ in bars], fontsize=6)
    axis.invert_yaxis()
    axis.axvline(1.0, color="black", linewidth=0.5)
    axis.set_xlabel("share of the ceiling measured in the same run")
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    axis.legend(handles, list(colours), fontsize=6)
    return figure


def parts(measured: list[Measurement]) -> Figure | None:
    """Where the time of a step goes."""
    split = [m for m in measured if m.parts]
    if not split:
        return None
    names = list(dict.fromkeys(name for m in split for name in m.parts))
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.3 * len(split)))
    for place, m in enumerate(split):
        left = 0.0
        for name, seconds in m.parts.items():
            number = names.index(name)
            axis.barh(place, seconds * 1e3, left=left, color=_COLOURS[number % len(_COLOURS)])
            left += seconds * 1e3
    axis.set_yticks(range(len(split)), [f"{m.suite}: {m.problem}, {m.provider}" for m in split], fontsize=6)
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds a step")
    handles = [Rectangle((0, 0), 1, 1, color=_COLOURS[i % len(_COLOURS)]) for i in range(len(names))]
    axis.legend(handles, names, fontsize=6)
    return figure
