"""A run that is killed at the worst moments and resumed repeats, to the last bit, one that was not."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")

from evalp_fast.cli import main


def words(text: str) -> list[str]:
    return text.split()


# A child that kills itself (SIGKILL: nothing is flushed, no handler runs) at the worst moments.
_KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(int(sys.argv[3]))
from evalp_fast import cli, data, files
from evalp_fast.training import run

moment, count = sys.argv[1], int(sys.argv[2])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def at_call(owner, name, act, chosen=lambda *a: True):
    original, calls = getattr(owner, name), 0
    def patched(*arguments, **options):
        nonlocal calls
        calls += chosen(*arguments)
        if calls == count:
            act(*arguments)
            die()
        return original(*arguments, **options)
    setattr(owner, name, patched)

def half_a_line(run, step, metrics):
    with run.metrics_file.open("a") as file:
        file.write('{"step": %d, "secon' % step)

def nothing(*_):
    pass

if moment == "inside an epoch":
    at_call(data.DataOrder, "batch", nothing)
elif moment == "half a line of metrics":
    at_call(run.Run, "log", half_a_line)
elif moment == "metrics without a state":
    at_call(run.Run, "save", nothing)
elif moment == "half a state":
    at_call(os, "replace", nothing, lambda source, target: str(target).endswith("state.safetensors"))
else:
    raise ValueError(moment)
cli.main(sys.argv[4:])
"""

_VAE = words("--epochs 3 --batch-size 64 --learning-rate 3e-3 --limit 640 --model.latent-dim 4")
_VAE += words("--model.encoder-channels 8 16 --model.decoder-channels 16 8 8")
_PRIOR = words("--couplings 2 --flow-hidden 16 --flow-epochs 2 --flow-batch-size 128 --energy-hidden 16")
_PRIOR += words(
    "--energy-epochs 2 --energy-batch-size 128 --evaluate-every 1 --moving-average 0.9 --limit 640"
)
_EVALP = words("--preset mnist-evalp --couplings 2 --flow-hidden 16 --energy-hidden 16 --epochs 3")
_EVALP += words("--batch-size 128 --evaluate-every 1 --energy-steps 2 --moving-average 0.9 --limit 640")


def metrics_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def commands(padded_excerpt: Path, tiny_vae: Path) -> dict[str, list[str]]:
    prior = ["train", "prior", "--vae", str(tiny_vae)]
    return {
        "vae": ["train", "vae", "--data", str(padded_excerpt), *_VAE],
        "prior": [*prior, *_PRIOR],
        "evalp": [*prior, *_EVALP],
    }


@pytest.fixture(scope="module")
def uninterrupted(commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """The run of a command that nothing disturbed; each is made once."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = folder / name
            assert main([*commands[name], "--out", str(made[name])]) == 0
        return made[name]

    return make


@pytest.mark.parametrize(
    ("name", "moment", "count"),
    [
        ("vae", "inside an epoch", 14),  # 10 steps an epoch
        ("vae", "half a line of metrics", 2),
        ("vae", "metrics without a state", 3),
        ("vae", "half a state", 2),
        ("vae", "metrics without a state", 1),  # before there is any state
        ("prior", "inside an epoch", 8),  # 5 steps an epoch: in the flow's second
        ("prior", "half a state", 3),  # in the energy's first
        ("prior", "metrics without a state", 4),
        ("evalp", "inside an epoch", 13),
        ("evalp", "half a state", 2),
    ],
)
def test_a_killed_run_resumes_to_the_same_losses(name, moment, count, commands, uninterrupted, tmp_path):
    """Guards against state that is not saved, noise that depends on more than (seed, step), lines of metrics
    that appear twice, and files that a kill leaves half-written."""
    whole, out = uninterrupted(name), tmp_path / "run"
    threads = str(torch.get_num_threads())
    child = [sys.executable, "-c", _KILLED, moment, str(count), threads, *commands[name], "--out", str(out)]
    killed = subprocess.run(child, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (
        not (out / "metrics.jsonl").exists()
        or (out / "metrics.jsonl").read_text() != (whole / "metrics.jsonl").read_text()
    )

    assert main([*commands[name], "--out", str(out), "--resume"]) == 0
    assert metrics_of(out) == metrics_of(whole)
    assert len(metrics_of(whole)) == (4 if name == "prior" else 3)
    for model in ("best", "last"):
        weights = [(run / model / "model.safetensors").read_bytes() for run in (whole, out)]
        assert weights[0] == weights[1]
    # Resuming a finished run changes nothing.
    assert main([*commands[name], "--out", str(out), "--resume"]) == 0
    assert metrics_of(out) == metrics_of(whole)
