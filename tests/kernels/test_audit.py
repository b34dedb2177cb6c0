"""The kernel audit: the compiled code of every kernel keeps the rules, and the rules can be broken."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(1800)  # it compiles some 280 kernels
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # bench is not installed
audit = importlib.import_module("bench.audit")
audit_cases = importlib.import_module("bench.audit_cases")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of `python -m bench.audit`, in a process without the interpreter: in it nothing compiles."""
    path = tmp_path_factory.mktemp("audit") / "audit.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.audit", "--json", str(path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert path.exists(), result.stderr
    return {"output": result.stdout, "code": result.returncode, **json.loads(path.read_text())}


def test_no_kernel_breaks_a_rule(report):
    broken = [
        f"{row['case']} on {row['target']}: {row['problems']}" for row in report["rows"] if row["problems"]
    ]
    assert broken == []
    assert report["code"] == 0


def test_every_case_is_compiled_for_every_target(report):
    seen = {(row["case"], row["target"]) for row in report["rows"]}
    wanted = {(case.name, machine.name) for case in audit_cases.CASES for machine in audit.MACHINES}
    assert seen == wanted
    assert len(wanted) == len(audit_cases.CASES) * len(audit.MACHINES)  # names are unique
    for row in report["rows"]:
        assert row["registers"] > 0
        assert row["instructions"] > 0
        assert row["case"] in report["output"]


LOOPS = """
import re
from bench import audit, audit_cases
from evalp_fast.kernels.launch import force_int64_offsets

energy = "128 200x2 leaky_relu bf16"
names = ["flow 16 bf16", "flow backward 64 bf16", "sir 16 bf16"]
names += [f"energy value {energy}", f"energy chain {energy}"]
with force_int64_offsets():
    for name in names:
        case = next(case for case in audit_cases.CASES if case.name == name)
        code = audit.compile_launch(audit.launch_of(case), audit.MACHINES[1]).asm["ttir"]
        print(re.search(r"scf[.]for .* : +(i64|i32)", code).group(1))
"""


def test_loops_over_many_tiles_count_in_64_bits():
    """Where offsets need them. Guards against a last step that passes 2^31, becomes negative, and goes on:
    the interpreter counts in Python's integers."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LOOPS]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["i64"] * 5, result.stderr


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_the_scratch_of_sir_is_small(precision):
    """Of a million samples on 132 multiprocessors, at D 128, 8 couplings of 256 x 2 and an energy of 200 x 2:
    below 64 MiB."""
    case = next(case for case in audit_cases.CASES if case.name == f"sir 128 {precision}")
    launch = audit.launch_of(case)
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    assert arguments["flow_memory"] is None
    scratch = [arguments[name] for name in ("states_ptr", "memory_ptr", "race_ptr")]
    program = sum(tensor.numel() * tensor.element_size() for tensor in scratch) // launch.grid[0]
    assert 16 << 20 < program * 132 * 16 // launch.config.num_warps < 64 << 20


def test_every_exception_has_its_reason():
    for case in audit_cases.CASES:
        assert bool(case.spills) == bool(case.spill_reason), case.name
        assert not case.narrow_on or case.narrow, case.name


# --- the rules can be broken ---

CASE = audit_cases.CASES[0]  # normals: memory-bound, 4 bytes an element
ROW = audit.Row(
    case=CASE.name,
    kernel=CASE.kernel,
    target="sm_90",
    warps=4,
    registers=32,
    spills=0,
    stack=0,
    shared=0,
    wide=4,
    accesses=5,
    double=False,
    matrix=0,
    wgmma=0,
    instructions=600,
    instructions_per_element=40.0,
    bytes_per_element=4.0,
    issue_over_memory=1.0,
)


def test_a_good_row_has_no_problem():
    assert audit.problems(CASE, ROW) == []


@pytest.mark.parametrize(
    ("case", "row", "problem"),
    [
        ({}, {"spills": 2, "stack": 8}, "2 spill instructions"),
        ({"spills": 1, "spill_reason": "why"}, {"spills": 2, "stack": 8}, "2 spill instructions"),
        (
            {"spills": 2, "spill_reason": "why", "no_spills_on": ("sm_90",)},
            {"spills": 2, "stack": 8},
            "2 spill instructions",
        ),
        ({}, {"double": True}, "float64"),
        ({}, {"shared": 232_449}, "232449 bytes of shared memory, a program has 232448"),
        ({"matrix": True}, {}, "no matrix instruction"),
        ({"wgmma": True}, {"matrix": 8}, "0 of 8 matrix instructions are wgmma"),
        ({"wgmma": True}, {"matrix": 8, "wgmma": 7}, "7 of 8 matrix instructions are wgmma"),
        ({}, {"wide": 0}, "no 16-byte access"),
        ({"narrow": "why", "narrow_on": ("gfx942",)}, {"wide": 0}, "no 16-byte access"),
        ({}, {"bytes_per_element": 6.0}, "6.00 bytes per element stream, 4 are declared"),
        ({"bytes_per_element": 23.0}, {"bytes_per_element": 23.0}, "docstring does not state 23 bytes"),
    ],
)
def test_a_rule_that_is_broken_is_named(case, row, problem):
    found = audit.problems(dataclasses.replace(CASE, **case), dataclasses.replace(ROW, **row))
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "programs"),
    [
        (8, 255, 50_000, 1),  # 65,536 registers are 8 warps of 256 a thread
        (8, 128, 50_000, 2),
        (8, 129, 50_000, 1),  # given out 256 to a warp at a time: 8 a thread
        (4, 64, 100_000, 2),  # shared memory
        (4, 16, 0, 16),  # 64 warps
    ],
)
def test_occupancy(warps, registers, shared, programs):
    machine = next(machine for machine in audit.MACHINES if machine.name == "sm_90")
    assert audit._occupancy(machine, warps, registers, shared) == programs * warps / 64


@pytest.mark.parametrize(
    ("case", "row"),
    [
        ({"spills": 2, "spill_reason": "why"}, {"spills": 2, "stack": 8}),
        ({"double": "why"}, {"double": True}),
        ({"narrow": "why"}, {"wide": 0, "bytes_per_element": 2.0}),
        ({"narrow": "why", "narrow_on": ("sm_90",)}, {"wide": 0}),
        ({"repeated": 1.0}, {"bytes_per_element": 5.0}),
        ({"memory_bound": False, "bytes_per_element": None}, {"wide": 0, "bytes_per_element": 64.0}),
    ],
)
def test_an_exception_is_allowed(case, row):
    assert audit.problems(dataclasses.replace(CASE, **case), dataclasses.replace(ROW, **row)) == []
