"""README's table: a row for each kind of problem, whoever is quickest."""

import re
from collections.abc import Callable, Sequence

from bench.results import Measurement, Results, quantity
from bench.sizes import SCALES

# What a row is called, its suite, and how the names of its problems begin.
ROWS = (
    ("flow samples, dim 64, batch {batch}", "flow", "sample, dim 64"),
    ("flow samples, dim 128, batch {batch}", "flow", "sample, dim 128"),
    ("flow log-densities, dim 64, batch {batch}", "flow", "log_prob, dim 64"),
    ("flow log-densities, dim 128, batch {batch}", "flow", "log_prob, dim 128"),
    ("rows through an affine coupling", "coupling", "forward, "),
    ("the same, forward and backward", "coupling", "forward and backward, "),
    ("Langevin chains of {steps} steps, dim 128", "chain", "Langevin, "),
    ("single Langevin steps of 64 numbers", "langevin", "step, "),
    ("Metropolis acceptances of 64 numbers", "langevin", "Metropolis acceptance, "),
    ("SIR samples, {proposals} proposals each", "sir", "race, "),
    ("multinomial draws from {batch} particles", "resampling", "multinomial, "),
    ("systematic draws from {batch} particles", "resampling", "systematic, "),
    ("rows of 100 particles, one draw each", "resampling", "one draw a row, "),
    ("draws from rows of 100, systematic", "resampling", "systematic, {rows} x "),
    ("weights summarized, one row", "resampling", "summarize, "),
    ("weights summarized, rows of 100", "resampling", "summarize, {rows} x "),
    ("normals", "noise", "normal, "),
)

_EACH = "batch {batch}"
_PEERS = re.compile("normflows|nflows|zuko|FrEIA|torchebm|particles|torch-fidelity|torch.*multinomial")


def _kind(m: Measurement) -> str:
    if m.ours:
        return "ours bf16" if m.precision == "bf16" else "ours tf32" if m.precision == "tf32" else "ours"
    if _PEERS.match(m.provider):
        return "peer"
    return "compiled" if "compile" in m.provider else "eager"


def _cell(measurements: Sequence[Measurement], kind: str, label: Callable[[Measurement], str]) -> str:
    """The quickest of that kind, and what it is."""
    found = [m for m in measurements if _kind(m) == kind and m.rate is not None]
    if not found:
        return ""
    best = max(found, key=lambda m: m.rate or 0.0)
    name = label(best)
    return quantity(best.rate) + (f" ({name})" if name else "")


def _rounded(m: Measurement) -> str:
    return m.precision if m.precision != "ieee" else ""


def _compiled(m: Measurement) -> str:
    return ", ".join(filter(None, ("in chunks" if "in chunks" in m.provider else "", _rounded(m))))


def _own(m: Measurement) -> str:
    name = m.provider.removeprefix("evalp_fast").strip()
    return name if name not in ("bf16", "tf32", "modules", "module") else ""


def _power(number: int) -> str:
    exponent = number.bit_length() - 1
    return f"2^{exponent}" if exponent > 13 and number == 1 << exponent else f"{number:,}"


def _matches(name: str, pattern: str) -> bool:
    """A long row's name is its length, and many rows' begins with `rows x`."""
    many = " x {" in pattern or "{rows}" in pattern
    start = pattern.split("{")[0]
    whole = not name.startswith(("systematic, ", "summarize, ", "multinomial, "))
    return name.startswith(start) and (whole or (" x " in name) == many)


def readme_table(results: Results) -> str:
    """The rows that were measured: a rate for each way, the quickest where there are several.

    Where a problem was measured in several sizes, the first is shown; all, where the row is named by it.
    """
    tf32 = any(_kind(m) == "ours tf32" and m.rate for m in results.measurements.values())
    ours = ["evalp_fast bf16", *(["evalp_fast tf32"] if tf32 else []), "evalp_fast float32"]
    head = [f"per second, {results.environment['device']}", *ours, "torch eager", "`torch.compile`", "peers"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    scales, days = set(), set()
    for title, suite, pattern in ROWS:
        for name, measurements in results.problems(suite).items():
            if not _matches(name, pattern) or all(m.rate is None for m in measurements):
                continue
            scales |= {m.scale for m in measurements}
            days |= {m.when[:10] for m in measurements if m.when}
            parameters = measurements[0].parameters
            shown = {k: _power(v) if isinstance(v, int) else v for k, v in parameters.items()}
            cells = [
                title.format(**shown),
                _cell(measurements, "ours bf16", _own),
                *([_cell(measurements, "ours tf32", _own)] if tf32 else []),
                _cell(measurements, "ours", _own),
                _cell(measurements, "eager", _rounded),
                _cell(measurements, "compiled", _compiled),
                _cell(measurements, "peer", lambda m: m.provider),
            ]
            lines.append("| " + " | ".join(cells) + " |")
            if _EACH not in title:
                break
    facts = results.environment
    named = " and ".join(f"`{scale}`" for scale in SCALES if scale in scales)
    parts = [f"torch {facts.get('versions', {}).get('torch')}", f"commit {facts.get('commit')}"]
    parts += [f"scale {named}"] if named else []
    lines += ["", ", ".join([*parts, *sorted(days)]) + "."]
    return "\n".join(lines)
