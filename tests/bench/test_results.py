"""Stored results, their comparison, and the report."""

import datetime
import random
from pathlib import Path
from typing import Any

import pytest

from bench.report import against_ours, main, markdown, quantity, terminal_table
from bench.results import Measurement, Results, compare, indistinct, load, path_for

ENVIRONMENT: dict[str, Any] = {
    "device": "Test Device",
    "commit": "abc",
    "python": "3",
    "versions": {"torch": "2"},
}


def measured(
    provider: str = "evalp_fast", seconds: float = 1.0, spread: float = 0.02, seed: int = 0, **options: Any
) -> Measurement:
    """A measurement of 25 times around `seconds`."""
    generator = random.Random(f"{provider}{seed}")
    m = Measurement("flow", options.pop("problem", "sample, batch 1,024"), provider, samples=1024, **options)
    m.set_times([seconds * (1 + spread * generator.gauss(0, 1)) for _ in range(25)])
    return m


def results(*measurements: Measurement) -> Results:
    found = Results(ENVIRONMENT, {"copy_bytes": 1e10, "matrix_ieee_flops": 1e11})
    found.add(measurements)
    return found


def full() -> Results:
    """Results for every plot and every status."""
    found = []
    for batch in (1 << 10, 1 << 14):
        for provider, factor in (("evalp_fast", 1.0), ("normflows", 3.0)):
            m = measured(
                provider,
                factor * batch / 1e6,
                problem=f"sample, batch {batch:,}",
                parameters={"batch": batch, "dim": 64},
            )
            m.share_of_matrix, m.share_of_noise, m.teraflops = 0.5, 0.1, 0.2
            found.append(m)
    for proposals in (10, 100):
        m = measured(
            problem=f"dim 64, {proposals} proposals", parameters={"batch": 64, "proposals": proposals}
        )
        m.suite, m.peak_memory_bytes, m.joules_per_million, m.launches = "sir", 1 << 20, 3.5, 1
        found.append(m)
    step = measured(problem="VAE")
    step.suite, step.parts = "train", {"forward": 0.3, "backward": 0.6}
    missing = Measurement("flow", "sample, batch 1,024", "zuko")
    missing.set("unavailable", "zuko is not installed")
    wrong = Measurement("flow", "sample, batch 1,024", "nflows")
    wrong.set("refused", "AssertionError: off | by 1")
    return results(*found, step, missing, wrong)


# --- files --------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    before = full()
    before.save(tmp_path / "deep" / "r.json")
    assert load(tmp_path / "deep" / "r.json") == before
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format": 99, "measurements": []}'])
def test_what_is_not_results_is_said_to_be(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"r\.json does not hold results"):
        load(path)


def test_a_newer_measurement_replaces_the_older() -> None:
    found = results(measured(seconds=1.0), measured("normflows"))
    found.add([measured(seconds=2.0)])
    assert [m.provider for m in found.measurements.values()] == ["evalp_fast", "normflows"]
    assert next(iter(found.measurements.values())).seconds == pytest.approx(2.0, rel=0.05)


def test_runs_of_one_day_and_commit_share_a_file(tmp_path: Path) -> None:
    day = datetime.date(2026, 1, 2)
    first = path_for(tmp_path, ENVIRONMENT, "device", day)
    assert first == tmp_path / "device" / "2026-01-02.json"
    results(measured()).save(first)
    assert path_for(tmp_path, ENVIRONMENT, "device", day) == first
    other = path_for(tmp_path, ENVIRONMENT | {"commit": "def"}, "device", day)
    assert other == tmp_path / "device" / "2026-01-02-2.json"


# --- comparison ---------------------------------------------------------------------------------------------


def verdict(old: Measurement, new: Measurement) -> str:
    (change,) = compare(results(old), results(new))
    return change.verdict


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_change(seed: int) -> None:
    assert verdict(measured(spread=0.1, seed=seed), measured(spread=0.1, seed=seed + 100)) == "same"


def test_a_change_beyond_the_noise_is_flagged() -> None:
    assert verdict(measured(), measured(seconds=1.2, seed=1)) == "slower"
    assert verdict(measured(), measured(seconds=0.8, seed=1)) == "faster"
    assert verdict(measured(spread=0.3), measured(seconds=1.2, spread=0.3, seed=1)) == "same"
    # Clear of the noise, but too small to matter.
    assert verdict(measured(spread=1e-4), measured(seconds=1.03, spread=1e-4, seed=1)) == "same"


def test_a_number_that_is_gone_is_flagged_and_an_unasked_one_is_not() -> None:
    refused = Measurement("flow", "sample, batch 1,024", "evalp_fast")
    refused.set("refused", "wrong")
    assert verdict(measured(), refused) == "lost"
    assert verdict(refused, measured()) == "new"
    assert compare(results(measured()), results()) == []


def test_too_few_times_distinguish_nothing() -> None:
    a, b = measured(), measured("normflows", seconds=2.0)
    assert not indistinct(a, b)
    b.set_times([2.0, 2.0])
    assert indistinct(a, b)
    assert against_ours(b, a).startswith("≈")


# --- the report ---------------------------------------------------------------------------------------------


def test_ratios_are_to_the_fastest_of_ours_and_marked_where_noise_is_wider() -> None:
    found = [
        measured("evalp_fast", 2.0),
        measured("evalp_fast bf16", 1.0),
        measured("normflows", 3.0),
        measured("zuko", 1.01, spread=0.1),
    ]
    text = markdown(results(*found))
    cells = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[4] for line in text.splitlines() if " | " in line
    }
    assert cells["evalp_fast bf16"].strip(" |") == "1"
    assert float(cells["evalp_fast"].strip(" |")) == pytest.approx(2.0, abs=0.06)
    assert float(cells["normflows"].strip(" |")) == pytest.approx(3.0, abs=0.09)
    assert cells["zuko"].startswith("≈")


def test_the_report_shows_all_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "2026-01-02.json"
    full().save(path)
    assert main([str(path)]) == 0
    text = capsys.readouterr().out
    for expected in (
        "# Test Device",
        "Commit abc",
        "copy_bytes 10 G/s",
        "unavailable: zuko is not installed",
        "refused: AssertionError: off \\| by 1",
        "50% matrix, 10% noise",
        "1 MiB",
        "3.5",
        "forward 300 ms, backward 600 ms",
    ):
        assert expected in text
    plots = {p.name for p in tmp_path.glob("*.png")}
    assert plots == {f"2026-01-02-{name}.png" for name in ("throughput", "memory", "ceilings", "parts")}
    for plot in tmp_path.glob("*.png"):
        assert plot.stat().st_size > 5000
        assert f"{plot}" in text


def test_the_report_of_some_suites_and_no_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full().save(tmp_path / "a" / "r.json")
    assert main([str(tmp_path), "--suite", "sir", "--plots", "none"]) == 0
    text = capsys.readouterr().out
    assert "## sir: dim 64, 10 proposals" in text
    assert "## flow" not in text
    assert not list(tmp_path.rglob("*.png"))


def test_the_comparison_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    results(measured(), measured("normflows")).save(old)
    changed = results(measured(seconds=1.5), measured("normflows", seed=1))
    changed.ceilings["copy_bytes"] = 5e9
    changed.save(new)
    assert main(["--compare", str(old), str(new)]) == 1
    text = capsys.readouterr().out
    assert "## slower" in text
    assert "flow / sample, batch 1,024 / evalp_fast" in text
    assert "1 of 2 are the same within the noise" in text
    assert "copy_bytes went from 10 G to 5 G a second" in text
    assert main(["--compare", str(old), str(old)]) == 0


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.startswith("bench.report: ")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 s"), (1234.0, "1.23 ks"), (0.9999e6, "1 Ms"), (2.5e-3, "2.5 ms"), (3e-9, "3 ns"), (None, "")],
)
def test_quantities(value: float | None, text: str) -> None:
    assert quantity(value, "s") == text


def test_the_short_table_has_a_line_for_each() -> None:
    found = list(full().measurements.values())
    lines = terminal_table(found).splitlines()
    problems = {(m.suite, m.problem) for m in found}
    assert len(lines) >= 1 + len(found) + len(problems)
