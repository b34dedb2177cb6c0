"""The tuner: its calls are those of the audit's cases, its tiles reach the compiler, and wrong ones show."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import audit, tune
from bench.audit_cases import CASES
from evalp_fast.kernels.energy_device import energy_shape
from evalp_fast.kernels.flow import FlowOptions
from evalp_fast.kernels.flow_layers_device import flow_form
from evalp_fast.kernels.launch import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
SIZES, HELD = tune.Tiles(64, 128, 32, 4, 3), tune.Tiles(64, 128, 32, 4, 3, held=True)


@needs_triton
@pytest.mark.parametrize("name", tune.SUBJECTS)
def test_a_subject_is_its_case(name: str) -> None:
    """The networks of the subject give the launch that the audit's case gives, whatever its tiles."""
    subject = tune.SUBJECTS[name]
    case = next(case for case in CASES if case.name == name)
    nets = tune.networks(subject.dim, "cpu")
    for sizes in (None, SIZES, HELD):
        with tune.cut(subject, sizes):
            launch = audit.launch_of(case)
            flow = flow_form(nets[0].parameters_stacked("bf16"), _options(nets))
            energy = energy_shape(subject.dim, 200, "leaky_relu", "bf16")
        shapes = launch.constants
        if "F" in shapes:
            assert (shapes["F"], shapes["M"], launch.config) == flow
            assert (shapes["M"] is not None) == (sizes is HELD)
        else:
            assert shapes["E"] == energy[0]
            assert launch.config == energy[1]
        if sizes is not None:
            assert (launch.config.block_rows, launch.config.num_warps) == (64, 4)
    assert audit.launch_of(case).config.num_warps == 8


def _options(nets: tune.Networks) -> FlowOptions:
    options = nets[0].options("bf16")
    return FlowOptions(inverse=False, **options)


@torch.no_grad()
@pytest.mark.parametrize("name", tune.SUBJECTS)
def test_bfloat16_is_within_the_limit(name: str) -> None:
    """On a CPU, where another form of the same functions runs; and so near to it that it says something."""
    subject = tune.SUBJECTS[name]
    nets = tune.networks(subject.dim, "cpu")
    exact_nets = tuple(net.double() for net in tune.networks(subject.dim, "cpu"))
    exact = subject.call(exact_nets, 64, "ieee")  # pyright: ignore[reportArgumentType]
    assert exact.dtype == torch.float64
    error = float((subject.call(nets, 64, "bf16") - exact).norm() / exact.norm())
    assert subject.limit / 10 < error < subject.limit


@needs_triton
def test_a_table_of_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What compiles is there with its spills, the tiles in use first; what needs too much memory is not."""
    root = Path(__file__).parents[2]
    code = (
        "import sys; sys.path.insert(0, '.'); from bench import tune\n"
        "one, large = tune.Tiles(64, 128, 32, 4, 3), tune.Tiles(128, 256, 128, 8, 4)\n"
        "rows = [tune.compiled(('flow 128 bf16', sizes, 'sm_90')) for sizes in (None, one, large)]\n"
        "print(rows[2])\n"
        "print(tune.table(tune.SUBJECTS['flow 128 bf16'], [(None, rows[0], ''), (one, rows[1], '')]))\n"
    )
    environment = {key: value for key, value in tune.os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert "bytes of shared memory" in lines[0]
    assert lines[3].startswith("| in use |")
    assert lines[4].startswith("| 64 | 128 | 32 | 4 | 3 | registers |")
    assert all(line.split("|")[8].strip() == "0" for line in lines[3:5])  # spills


@pytest.mark.gpu
@pytest.mark.parametrize("name", tune.SUBJECTS)
def test_candidates_are_timed(name: str) -> None:
    subject = tune.SUBJECTS[name]._replace(rows=4096)
    found = tune.timed(subject, [None, SIZES, HELD], 2, "cuda")
    assert isinstance(found[0], float)
