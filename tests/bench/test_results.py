"""Stored results, their comparison, and the report."""

import datetime
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.readme import readme_table
from bench.report import against_ours, main, markdown, terminal_table
from bench.results import Measurement, Results, compare, indistinct, load, path_for, quantity

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
    for batch in (1 << 10, 1 << 12, 1 << 14):
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


def test_a_run_without_time_takes_no_number_away() -> None:
    """Of a problem that two scales share; but a wrong result does."""
    late, wrong = (Measurement("flow", "sample, batch 1,024", "evalp_fast") for _ in range(2))
    late.set("skipped", "the time for this problem was spent")
    wrong.set("refused", "off by one")
    found = results(measured(seconds=1.0))
    found.add([late])
    assert [m.status for m in found.measurements.values()] == ["measured"]
    found.add([wrong])
    found.add([late])
    assert [m.status for m in found.measurements.values()] == ["skipped"]


def test_runs_of_one_day_and_commit_share_a_file(tmp_path: Path) -> None:
    day = datetime.date(2026, 1, 2)
    first = path_for(tmp_path, ENVIRONMENT, "device", day)
    assert first == tmp_path / "device" / "2026-01-02.json"
    results(measured()).save(first)
    assert path_for(tmp_path, ENVIRONMENT, "device", day) == first
    other = path_for(tmp_path, ENVIRONMENT | {"commit": "def"}, "device", day)
    assert other == tmp_path / "device" / "2026-01-02-2.json"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"environment": None}, "names no device"),
        ({"environment": {}}, "names no device"),
        ({"ceilings": None}, "ceilings are no table"),
        ({"ceilings": {"copy_bytes": 0}}, "the ceiling copy_bytes is 0, not a positive number"),
        ({"measurements": None}, "not iterable"),
        ({"seconds": "x"}, "seconds is 'x', not a number"),
        ({"seconds": 0}, "seconds is 0, not a positive number"),
        ({"seconds": float("nan")}, "seconds is nan, not a positive number"),
        ({"low": None}, "low is None, not a positive number"),
        ({"peak_memory_bytes": "x"}, "peak_memory_bytes is 'x', not a number"),
        ({"samples": "x"}, "samples, times or parts"),
        ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow"),
    ],
)
def test_damage_is_named_in_one_line(
    change: dict[str, Any], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    results(measured()).save(path)
    content = json.loads(path.read_text())
    (content if change.keys() <= content.keys() else content["measurements"][0]).update(change)
    path.write_text(json.dumps(content))
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith(f"bench.report: {path} does not hold results: ")
    assert text in error


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    results(measured()).save(path)
    before = path.read_text()
    written: list[Path] = []

    def full(self: Path, text: str, **options: Any) -> int:
        written.append(self)
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        results(measured(seconds=2.0)).save(path)
    assert written
    assert path.read_text() == before


def test_a_damaged_file_of_the_day_is_left_alone_and_said_to_be(tmp_path: Path) -> None:
    day, said = datetime.date(2026, 1, 2), []
    first = tmp_path / "device" / "2026-01-02.json"
    first.parent.mkdir()
    first.write_text("{half of a file")
    found = path_for(tmp_path, ENVIRONMENT, "device", day, said.append)
    assert found == first.with_name("2026-01-02-2.json")
    assert len(said) == 1
    assert said[0].startswith(f"left alone: {first} does not hold results")
    assert first.read_text() == "{half of a file"


@pytest.mark.parametrize("commit", [None, "abc-dirty"])
def test_runs_of_code_that_has_no_name_do_not_share_a_file(commit: str | None, tmp_path: Path) -> None:
    day, environment = datetime.date(2026, 1, 2), ENVIRONMENT | {"commit": commit}
    Results(environment).save(path_for(tmp_path, environment, "device", day))
    assert path_for(tmp_path, environment, "device", day).name == "2026-01-02-2.json"


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


def test_too_few_times_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = measured()
    for times in ([10.0], [10.0, 10.1]):
        few.set_times(times)
        assert verdict(measured(), few) == verdict(few, measured()) == "unknown"
    few.set_times([10.0, 10.1, 10.2])
    assert verdict(measured(), few) == "slower"
    few.set_times([10.0])
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    results(measured()).save(old)
    results(few).save(new)
    assert main(["--compare", str(old), str(new)]) == 0
    text = capsys.readouterr().out
    assert "## unknown: fewer than 3 times" in text
    assert "flow / sample, batch 1,024 / evalp_fast: 1 s" in text
    assert "0 of 1 are the same within the noise" in text


def test_what_is_lost_is_an_error_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = Measurement("flow", "sample, batch 1,024", "evalp_fast")
    gone.set("failed", "RuntimeError: no")
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    results(measured()).save(old)
    results(gone).save(new)
    assert main(["--compare", str(old), str(new)]) == 1
    assert "## lost" in capsys.readouterr().out


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


@pytest.mark.parametrize("kind", ["copy", "matrix", "noise"])
def test_the_plot_of_ceilings_shows_the_one_that_is_closest(kind: str) -> None:
    pytest.importorskip("matplotlib")
    from bench import plots

    m = measured()
    m.share_of_copy, m.share_of_matrix, m.share_of_noise = 0.1, 0.2, 0.3
    setattr(m, f"share_of_{kind}", 0.75)
    figure = plots.ceilings([m])
    assert figure is not None
    axis: Any = figure.axes[0]
    assert [bar.get_width() for bar in axis.patches] == [0.75]
    legend = axis.get_legend()
    texts = [text.get_text() for text in legend.get_texts()]
    colours = dict(zip(texts, [handle.get_facecolor() for handle in legend.legend_handles], strict=True))
    assert axis.patches[0].get_facecolor() == colours[kind]
    plots.plt.close(figure)


def test_a_first_call_says_what_the_cache_held_and_energy_how_it_was_read() -> None:
    m = measured(
        first_call_seconds=2.0, compile_cache="cold", joules_per_million=3.0, device_memory_bytes=1 << 30
    )
    m.energy_kind = "power x time"
    text = markdown(results(m))
    for expected in ("2 s (cold)", "3 (by power)", "device memory", "1 GiB"):
        assert expected in text


def test_a_terminal_without_unicode_gets_a_question_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"
    results(measured(), measured("normflows", spread=0.5)).save(path)
    bytes_written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_written, encoding="ascii"))
    assert main([str(path), "--plots", "none"]) == 0
    sys.stdout.flush()
    assert b"1 s ? " in bytes_written.getvalue()


# --- README's table -----------------------------------------------------------------------------------------


def rate(
    suite: str, problem: str, provider: str, samples: float, precision: str = "ieee", **options: Any
) -> Measurement:
    m = Measurement(suite, problem, provider, precision, samples=int(samples), **options)
    m.set_times([1.0] * 3)
    m.scale, m.when = "small", "2026-01-02T03:04:05Z"
    return m


def test_readme_s_table_has_the_quickest_of_each_kind_and_says_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow, long = ("flow", "sample, dim 64, batch 4,096"), ("resampling", "systematic, 1,048,576")
    large = ("flow", "sample, dim 64, batch 65,536")
    size: dict[str, Any] = {"parameters": {"batch": 1 << 20, "rows": 1, "scheme": "systematic"}}
    refused = Measurement("resampling", long[1], "torch.multinomial")
    refused.set("refused", "wrong")
    found = [
        rate(*flow, "evalp_fast bf16", 197e3, "bf16", parameters={"batch": 4096}),
        rate(*flow, "evalp_fast", 117e3),
        rate(*flow, "evalp_fast modules", 119e3),
        rate(*flow, "torch eager", 90e3),
        rate(*flow, "torch eager bf16", 123e3, "bf16"),
        rate(*flow, "torch.compile bf16", 216e3, "bf16"),
        rate(*flow, "FrEIA", 98e3),
        rate(*flow, "zuko", 79e3),
        rate(*large, "evalp_fast", 120e3, parameters={"batch": 1 << 16}),
        rate(*large, "torch.compile", 90e3),
        rate(*large, "torch.compile in chunks bf16", 110e3, "bf16"),
        # Here all others are quicker, and the table says so.
        rate(*long, "evalp_fast", 38.7e6, **size),
        rate(*long, "torch eager", 42.5e6, **size),
        rate(*long, "torch.compile", 51e6, **size),
        rate(*long, "particles", 75.9e6, **size),
        rate(
            "resampling",
            "systematic, 8,192 x 100",
            "evalp_fast",
            76e6,
            parameters={"batch": 819200, "rows": 8192},
        ),
        refused,
    ]
    found[-2].scale = "medium"  # of another run of the same commit
    path = tmp_path / "r.json"
    results(*found).save(path)
    assert main(["--readme", str(path)]) == 0
    text = capsys.readouterr().out
    assert text == readme_table(results(*found)) + "\n"
    assert text.splitlines() == [
        "| per second, Test Device | evalp_fast bf16 | evalp_fast float32 | torch eager | `torch.compile` "
        "| peers |",
        "|---|---|---|---|---|---|",
        "| flow samples, dim 64, batch 4,096 | 197 k | 119 k | 123 k (bf16) | 216 k (bf16) | 98 k (FrEIA) |",
        "| flow samples, dim 64, batch 2^16 |  | 120 k |  | 110 k (in chunks, bf16) |  |",
        "| systematic draws from 2^20 particles |  | 38.7 M | 42.5 M | 51 M | 75.9 M (particles) |",
        "| draws from rows of 100, systematic |  | 76 M |  |  |  |",
        "",
        "torch 2, commit abc, scale `small` and `medium`, 2026-01-02.",
    ]


def test_readme_s_rows_are_of_problems_that_the_suites_have() -> None:
    """A row whose name is none of a suite's would be left out in silence."""
    import importlib

    from bench.readme import ROWS

    found = []
    for suite in {suite for _, suite, _ in ROWS}:
        for problem in importlib.import_module(f"bench.test_{suite}").problems("small"):
            m = rate(suite, problem.name, "evalp_fast", 1, parameters=problem.parameters)
            found.append(m)
    assert len(readme_table(results(*found)).splitlines()) == 2 + len(ROWS) + 2
