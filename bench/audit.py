"""The kernel audit: what the compiler made of each kernel, for GPUs that need not be there.

    python -m bench.audit [--json FILE] [--target sm_90 ...] [--only NAME ...]

Every case of `audit_cases.py` calls a public function (or an op) on meta tensors, notes the launches that it
would make (`recorded_launches`), compiles the kernel with exactly these arguments, constants and launch
configuration for NVIDIA sm_80, sm_90 and sm_100 and AMD gfx942, and reads the machine code: registers,
spills, stack, shared memory, occupancy, float64, 16-byte accesses, matrix instructions, instructions and
streamed bytes per element. `problems` says what in a row breaks a rule:

- no spills, or at most the number that the case states and justifies;
- no float64, unless the case says why;
- in a memory-bound kernel the streams move in 16-byte accesses, and they move the bytes per element that the
  case and the kernel's docstring declare: no more, no less;
- a matrix product uses matrix instructions.

The bound, "issue/mem": time to issue the instructions over time to move the bytes, from the counts and the
data sheets (`MACHINES`). Below 1 the kernel is bound by memory. It is an estimate from static code, to
compare variants with, and no measurement.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.audit_cases import CASES, Case
from evalp_fast.kernels.launch import HAS_TRITON, INTERPRETED, Launch, recorded_launches


@dataclass(frozen=True)
class Machine:
    """A target, and the data sheet of the accelerator that it stands for."""

    name: str
    backend: str
    arch: int | str
    warp: int
    terabytes_per_second: float
    instructions_per_second: float  # issued, summed over lanes


MACHINES = (
    Machine("sm_80", "cuda", 80, 32, 2.04, 108 * 128 * 1.41e9),  # A100 SXM 80 GB
    Machine("sm_90", "cuda", 90, 32, 4.8, 132 * 128 * 1.755e9),  # H200 SXM
    Machine("sm_100", "cuda", 100, 32, 8.0, 148 * 128 * 1.85e9),  # B200
    Machine("gfx942", "hip", "gfx942", 64, 5.3, 304 * 64 * 2.1e9),  # MI300X
)


@dataclass(frozen=True)
class Row:
    """What was read in the machine code of one case for one target. Counts are static."""

    case: str
    kernel: str
    target: str
    warps: int
    registers: int
    spills: int
    stack: int
    shared: int
    wide: int
    accesses: int
    double: bool
    matrix: int
    wgmma: int
    instructions: int
    instructions_per_element: float
    bytes_per_element: float
    issue_over_memory: float | None
    occupancy: float | None = None


_TRITON_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


class _Signature:
    """What Triton would specialise a launch on: types, constants (1 and None count), divisibility by 16."""

    def __init__(self, launch: Launch) -> None:
        self.types: dict[str, Any] = {}
        self.constants: dict[tuple[int, ...], Any] = {}
        self.attributes: dict[tuple[int, ...], list[Any]] = {}
        values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants
        for parameter in launch.kernel.params:
            name, place = parameter.name, (parameter.num,)
            if parameter.is_constexpr:
                self.types[name] = self._constant(place, values[name])
            else:
                self.types[name] = self._type(place, values[name], not parameter.do_not_specialize)

    def _constant(self, place: tuple[int, ...], value: Any) -> str:
        self.constants[place] = value
        return "constexpr"

    def _type(self, place: tuple[int, ...], value: Any, specialise: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(self._type((*place, i), item, specialise) for i, item in enumerate(value))
        if isinstance(value, Tensor):
            self._divisible(place, int(value.storage_offset()) * value.element_size())
            return f"*{_TRITON_TYPES[value.dtype]}"
        if value is None or (specialise and isinstance(value, int) and value == 1):
            return self._constant(place, value)
        if isinstance(value, bool):
            return "u1"
        if isinstance(value, int):
            if specialise:
                self._divisible(place, value)
            return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
        if isinstance(value, float):
            return "fp32"
        raise TypeError(f"no Triton type for {type(value).__name__}")

    def _divisible(self, place: tuple[int, ...], value: int) -> None:
        if value % 16 == 0:
            self.attributes[place] = [["tt.divisibility", 16]]


def launch_of(case: Case) -> Launch:
    """The launch of the case's kernel, recorded."""
    with recorded_launches() as launches:
        case.call()
    return next(launch for launch in launches if launch.kernel.__name__ == case.kernel)


def compile_launch(launch: Launch, machine: Machine) -> Any:
    """The kernel compiled as Triton would at this launch on this machine."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = _Signature(launch)
    source = ASTSource(launch.kernel, signature.types, signature.constants, signature.attributes)
    options = {
        **launch.config.options(cuda=machine.backend == "cuda"),
        "enable_fp_fusion": launch.fp_fusion,
    }
    return triton.compile(
        source, target=GPUTarget(machine.backend, machine.arch, machine.warp), options=options
    )


def _disassembled(cubin: bytes) -> str:
    """Resource usage and machine code by NVIDIA's disassembler, from Triton's wheel."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# Bytes of shared memory of a multiprocessor; a program has 1 KiB less.
_SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024, "gfx942": 65 * 1024}


def _occupancy(machine: Machine, warps: int, registers: int, shared: int) -> float | None:
    """The share of a multiprocessor's 64 warps that its registers and shared memory have room for.

    By NVIDIA's tables for these targets: 65,536 registers, given to warps in units of 256; 1 KiB of shared
    memory for each program beside its own. None for AMD.
    """
    if machine.name not in _SHARED:
        return None
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    by_shared = _SHARED[machine.name] // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32) * warps / 64


_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def _nvidia_counts(compiled: Any) -> dict[str, Any]:
    text = _disassembled(compiled.asm["cubin"])
    usage = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", text))
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text)
    instructions = [line.split(".") for line in lines if line not in ("NOP", "BRA")]
    accesses = [
        next((_WIDTHS[part] for part in parts[1:] if part in _WIDTHS), 4)
        for parts in instructions
        if parts[0] in ("LDG", "STG", "LDGSTS")
    ]
    heads = Counter(parts[0] for parts in instructions)
    return {
        "registers": int(usage["REG"]),
        "spills": heads["STL"] + heads["LDL"],
        "stack": int(usage["STACK"]),
        "accesses": accesses,
        "double": ".f64" in compiled.asm["ptx"],
        "matrix": sum(heads[name] for name in ("HMMA", "HGMMA", "UTCHMMA", "QGMMA", "OMMA")),
        "wgmma": heads["HGMMA"],
        "instructions": len(instructions),
    }


_AMD_WIDTHS = {
    "dwordx4": 16,
    "dwordx3": 12,
    "dwordx2": 8,
    "dword": 4,
    "short": 2,
    "ushort": 2,
    "byte": 1,
    "ubyte": 1,
}


def _amd_counts(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def value(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", text)[-1])

    lines = re.findall(r"^\s+((?:v|s|global|buffer|flat|ds|scratch)_[a-z0-9_]+)", text, re.MULTILINE)
    memory = [re.match(r"(?:global|buffer|flat)_(?:load|store)_([a-z0-9]+)", line) for line in lines]
    return {
        "registers": value("vgpr_count"),
        "spills": value("vgpr_spill_count") + sum(line.startswith("scratch_") for line in lines),
        "stack": value("private_segment_fixed_size"),
        "accesses": [_AMD_WIDTHS.get(match[1], 4) for match in memory if match],
        "double": any(re.fullmatch(r"v_.*_f64(_.*)?", line) for line in lines),
        "matrix": sum(line.startswith(("v_mfma", "v_smfmac")) for line in lines),
        "wgmma": 0,
        "instructions": len(lines),
    }


def _allowed(case: Case) -> tuple[float, ...]:
    """The streamed bytes per element that a case may show."""
    declared = case.bytes_per_element
    return () if declared is None else (declared, declared + case.repeated)


def _unrolled(case: Case, streamed: float) -> int:
    """How often the code of one pass is there: the number that brings the bytes to those declared, or 1."""
    for factor in range(1, 17):
        if any(abs(streamed / factor - number) <= 0.01 * number for number in _allowed(case)):
            return factor
    return 1


def audit(case: Case, machine: Machine) -> Row:
    """Compile one case for one machine and read the code."""
    launch = launch_of(case)
    compiled = compile_launch(launch, machine)
    counts = (_nvidia_counts if machine.backend == "cuda" else _amd_counts)(compiled)
    accesses = counts.pop("accesses")
    wide = sum(width == 16 for width in accesses)
    elements = case.elements(launch)
    threads = launch.config.num_warps * machine.warp
    # The streams are the widest accesses; a row's own numbers are read by narrower ones.
    streamed = sum(width for width in accesses if width == max(accesses)) * threads / elements
    unrolled = _unrolled(case, streamed)
    per_element = counts["instructions"] * threads / elements / unrolled
    issue = None
    if case.bytes_per_element:
        memory_seconds = case.bytes_per_element / (machine.terabytes_per_second * 1e12)
        issue = per_element / machine.instructions_per_second / memory_seconds
    return Row(
        case=case.name,
        kernel=case.kernel,
        target=machine.name,
        warps=launch.config.num_warps,
        shared=compiled.metadata.shared,
        wide=wide,
        accesses=len(accesses),
        instructions_per_element=per_element,
        bytes_per_element=streamed / unrolled,
        issue_over_memory=issue,
        occupancy=_occupancy(machine, launch.config.num_warps, counts["registers"], compiled.metadata.shared),
        **counts,
    )


def _audit_by_number(pair: tuple[int, int]) -> Row:
    return audit(CASES[pair[0]], MACHINES[pair[1]])


def problems(case: Case, row: Row) -> list[str]:
    """The rules that a row breaks, in words."""
    found = []
    if row.accesses == 0:
        found.append("no access to memory: the compiler has made an empty kernel of it")
    spills = 0 if row.target in case.no_spills_on else case.spills
    if row.spills > spills:
        found.append(f"{row.spills} spill instructions ({row.stack} bytes of stack), {spills} are allowed")
    most = _SHARED[row.target] - 1024
    if row.shared > most:
        found.append(f"{row.shared} bytes of shared memory, a program has {most}: it cannot be launched")
    if row.double and not case.double:
        found.append("float64 arithmetic")
    if case.matrix and row.matrix == 0:
        found.append("no matrix instruction")
    if case.wgmma and row.target == "sm_90" and not 0 < row.wgmma == row.matrix:
        found.append(f"{row.wgmma} of {row.matrix} matrix instructions are wgmma")
    narrow = bool(case.narrow) and (not case.narrow_on or row.target in case.narrow_on)
    if case.memory_bound and not narrow and row.wide == 0:
        found.append("no 16-byte access to memory")
    declared = case.bytes_per_element
    strange = all(abs(row.bytes_per_element - number) > 0.01 * number for number in _allowed(case))
    if declared and not narrow and strange:
        found.append(f"{row.bytes_per_element:.2f} bytes per element stream, {declared:g} are declared")
    if case.memory_bound and declared and not _states(case, declared):
        found.append(f"the kernel's docstring does not state {declared:g} bytes per element")
    return found


def _states(case: Case, declared: float) -> bool:
    """Whether the kernel's docstring speaks of bytes and has the number, or two of which it is the sum."""
    text = launch_of(case).kernel.fn.__doc__ or ""
    numbers = {float(number) for number in re.findall(r"\b\d+\b", text)}
    sums = numbers | {a + b for a in numbers for b in numbers}
    return "byte" in text.lower() and declared in sums


def _table(rows: list[Row]) -> str:
    header: tuple[str, ...] = (
        "case",
        "target",
        "regs",
        "spill",
        "stack",
        "shared",
        "occup",
        "16B",
        "f64",
        "mma",
        "instr/el",
        "B/el",
        "issue/mem",
    )
    lines: list[tuple[str, ...]] = [header]
    for row in rows:
        bound = "" if row.issue_over_memory is None else f"{row.issue_over_memory:.2f}"
        occupancy = "" if row.occupancy is None else f"{row.occupancy:.0%}"
        numbers = row.registers, row.spills, row.stack, row.shared, occupancy, f"{row.wide}/{row.accesses}"
        costs = "yes" if row.double else "", row.matrix, f"{row.instructions_per_element:.1f}"
        lines.append(
            (row.case, row.target, *map(str, (*numbers, *costs)), f"{row.bytes_per_element:.1f}", bound)
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def main(arguments: list[str] | None = None) -> int:
    """Prints the table, writes JSON, and returns 1 where a rule is broken."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.audit", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, help="also write the rows, with their problems, to this file")
    parser.add_argument("--target", nargs="+", choices=[m.name for m in MACHINES], help="these targets only")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="cases whose name or kernel contains one of these"
    )
    options = parser.parse_args(arguments)
    if not HAS_TRITON or INTERPRETED:
        print("the audit needs Triton, and TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    machines = [m for m in MACHINES if options.target is None or m.name in options.target]
    cases = [
        c for c in CASES if options.only is None or any(n in f"{c.name} {c.kernel}" for n in options.only)
    ]
    rows, report, broken = [], [], 0
    pairs = [(CASES.index(case), MACHINES.index(machine)) for case in cases for machine in machines]
    # By fork, because a case holds functions; a compiler's work is one thread's.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        for (case, _), row in zip(pairs, pool.map(_audit_by_number, pairs), strict=True):
            found = problems(CASES[case], row)
            rows.append(row)
            report.append({**asdict(row), "problems": found})
            broken += len(found)
    print(_table(rows))
    for entry in report:
        for problem in entry["problems"]:
            print(f"PROBLEM {entry['case']} {entry['target']}: {problem}")
    if options.json:
        import triton

        versions = {"torch": torch.__version__, "triton": triton.__version__}
        options.json.write_text(json.dumps({"versions": versions, "rows": report}, indent=1))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
