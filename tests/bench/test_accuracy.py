"""The table of accuracy that the documentation shows: it comes out, and its errors are of the right size."""

import re
import sys

import pytest

from bench import accuracy


@pytest.mark.filterwarnings("ignore")
def test_errors_are_those_of_the_precision(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy", "-n", "256", "--draws", "64", "--device", "cpu"])
    accuracy.main()
    rows = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines()[2:]}
    assert set(rows) == {"ieee", "tf32, emulated", "the same, cut off", "bf16"}
    largest = {name: [float(e) for e in re.findall(r"([\d.e+-]+) \(rms", row)] for name, row in rows.items()}
    assert all(0 < error < 3e-5 for error in largest["ieee"])
    x, log_det, energy = largest["tf32, emulated"]
    assert all(1e-5 < error < 0.02 for error in (x, log_det, energy))
    x, log_det, there_and_back, energy = largest["bf16"]
    assert all(1e-4 < error < 0.2 for error in (x, log_det, energy))
    # The way back sees the same inputs, so the same rounded products.
    assert 0 < there_and_back < 3e-5
    in_norm = {name: float(row.split("|")[3]) for name, row in rows.items()}
    assert 0 < in_norm["ieee"] < 1e-5
    assert 1e-4 < in_norm["tf32, emulated"] < 2e-3 < in_norm["the same, cut off"]
    assert 1e-4 < in_norm["bf16"] < 2e-2
    assert "100.0%" in rows["ieee"]
