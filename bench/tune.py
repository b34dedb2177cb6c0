"""Other tiles for the kernels of one launch: what they cost in the machine code, and on a GPU in time.

    python -m bench.tune [SUBJECT ...] [--target sm_90] [--rounds 5] [--timed 16]

Each subject is a case of the audit, which compiles every candidate for the target. Where there is a GPU,
those that fit its shared memory and spill least then run in turns with the tiles that are in use, which are
the first line: first against float64, then for time. Nothing is changed: `flow_tiles`, `held_in_memory`
and `TILES` are where the best would be written.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench import audit
from bench.audit_cases import CASES
from bench.ceilings import matrix_rate
from bench.machine import ON_CUDA
from evalp_fast.kernels import flow_device, flow_layers_device, layers_device
from evalp_fast.kernels.energy import mlp_energy_and_gradient
from evalp_fast.kernels.latent_chain import langevin_chain
from evalp_fast.kernels.launch import HAS_TRITON, INTERPRETED, backend
from evalp_fast.kernels.sir import sir
from evalp_fast.models.energy import EnergyConfig, MLPEnergy
from evalp_fast.models.flow import CouplingFlow, FlowConfig

CHECKED = 1024  # rows that are compared with float64

Networks = tuple[CouplingFlow, MLPEnergy]
Call = Callable[[Networks, int, str], Tensor]


class Tiles(NamedTuple):
    """Rows of a tile, features of a tile and of a chunk, warps, stages of the pipeline; and whether a flow's
    hidden layers are in memory, as an energy's are."""

    rows: int
    width: int
    chunk: int
    warps: int
    stages: int
    held: bool = False


class Subject(NamedTuple):
    """A kernel at the sizes of a case of the audit.

    Attributes:
        case: the case's name.
        dim: columns D of the networks.
        rows: of the call that is timed.
        flops: useful FLOPs of a row.
        limit: how far bfloat16 may be from float64, in norm: three times what it is on a CPU. The slope of a
            leaky ReLU flips where its argument is rounded to the other side of 0.
        call: from the networks, a number of rows and a precision to values that are compared, `[rows, ...]`.
        candidates: the tiles that are tried.
    """

    case: str
    dim: int
    rows: int
    flops: float
    limit: float
    call: Call
    candidates: tuple[Tiles, ...]


def _points(networks: Networks, rows: int) -> Tensor:
    like = next(networks[0].parameters())
    generator = torch.Generator(like.device).manual_seed(1)
    z = torch.randn(rows, networks[0].config.dim, generator=generator, device=like.device)
    return z.to(like.dtype)


def _flow(networks: Networks, rows: int, precision: Any) -> Tensor:
    return networks[0](_points(networks, rows), precision=precision)[0]


def _inverse(networks: Networks, rows: int, precision: Any) -> Tensor:
    return networks[0].inverse(_points(networks, rows), precision=precision)[0]


def _gradient(networks: Networks, rows: int, precision: Any) -> Tensor:
    parameters = networks[1].parameters_in_order(precision)
    return mlp_energy_and_gradient(_points(networks, rows), parameters, precision=precision)[1]


def _chain(networks: Networks, rows: int, precision: Any) -> Tensor:
    parameters, z = networks[1].parameters_in_order(precision), _points(networks, rows)
    return langevin_chain(z, parameters, n_steps=60, step_size=0.1, precision=precision).samples


def _sir(networks: Networks, rows: int, precision: Any) -> Tensor:
    flow, energy = networks[0].parameters_stacked(precision), networks[1].parameters_in_order(precision)
    return sir(0, 0, rows, 100, flow, energy, precision=precision).diagnostics.log_mean_weight


def _flow_flops(dim: int) -> float:
    half = dim // 2
    return 2.0 * 8 * (half * 256 + 256 * 256 + 2 * half * 256)


def _all(held: bool, *sizes: tuple[int, ...]) -> tuple[Tiles, ...]:
    return tuple(Tiles(*each, held) for each in itertools.product(*sizes))


_OF_ENERGIES = _all(False, (32, 64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4))
_OF_FLOWS = (
    *_all(False, (64, 128), (128, 256), (32, 64, 128), (4, 8), (2, 3, 4)),
    *_all(True, (64, 128), (64, 128), (32, 64), (4, 8), (2, 3)),
)
_ENERGY_FLOPS = 2.0 * 200 * (128 + 200 + 1)
_ENERGY = "128 200x2 leaky_relu bf16"
SUBJECTS = {
    subject.case: subject
    for subject in (
        Subject("flow 64 bf16", 64, 1 << 20, _flow_flops(64), 6e-3, _flow, _OF_FLOWS),
        Subject("flow 128 bf16", 128, 1 << 20, _flow_flops(128), 6e-3, _flow, _OF_FLOWS),
        Subject("flow 128 bf16 inverse", 128, 1 << 20, _flow_flops(128), 6e-3, _inverse, _OF_FLOWS),
        Subject(
            "sir 128 bf16", 128, 1 << 16, 100 * (_flow_flops(128) + _ENERGY_FLOPS), 1e-2, _sir, _OF_FLOWS
        ),
        Subject(f"energy gradient {_ENERGY}", 128, 1 << 20, 2 * _ENERGY_FLOPS, 0.25, _gradient, _OF_ENERGIES),
        Subject(f"energy chain {_ENERGY}", 128, 1 << 17, 61 * 2 * _ENERGY_FLOPS, 3e-4, _chain, _OF_ENERGIES),
    )
}


@contextlib.contextmanager
def cut(subject: Subject, sizes: Tiles | None) -> Iterator[None]:
    """Within the block the subject's flow, or else its energy, is cut into such tiles; None leaves theirs."""
    if sizes is None:
        yield
    elif subject.candidates is _OF_FLOWS and not sizes.held:
        with mock.patch.object(flow_device, "flow_tiles", return_value=flow_device._Tiles(*sizes[:5])):
            yield
    else:
        with (
            mock.patch.object(flow_layers_device, "held_in_memory", return_value=True),
            mock.patch.dict(layers_device.TILES, {"bf16": layers_device.Tiles(*sizes[:5])}),
        ):
            yield


def compiled(job: tuple[str, Tiles | None, str]) -> audit.Row | str:
    """The audit's row for a subject with such tiles on a target, or why there is none."""
    name, sizes, target = job
    case = next(case for case in CASES if case.name == name)
    machine = next(machine for machine in audit.MACHINES if machine.name == target)
    with cut(SUBJECTS[name], sizes):
        try:
            row = audit.audit(case, machine)
        except Exception as error:  # compilers fail in many ways
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:80]}"
    return row if row.occupancy != 0 else f"needs {row.shared:,} bytes of shared memory"


def networks(dim: int, device: str) -> Networks:
    """A flow and an energy of the audit's sizes, which are not the identity and not zero."""
    torch.manual_seed(0)
    flow, energy = CouplingFlow(FlowConfig(dim, 8, 256)), MLPEnergy(EnergyConfig(dim, 200, 2, "leaky_relu"))
    with torch.no_grad():
        flow.weight_out.normal_(std=0.3 * 256**-0.5)
    return flow.to(device).eval(), energy.to(device).eval()


@torch.no_grad()
def timed(subject: Subject, tried: list[Tiles | None], rounds: int, device: str) -> list[float | str]:
    """Median seconds of each on the GPU, in turns; or why there are none: an error, or a wrong answer."""
    nets = networks(subject.dim, device)
    exact_nets = tuple(net.double() for net in networks(subject.dim, device))
    exact = subject.call(exact_nets, CHECKED, "ieee")  # pyright: ignore[reportArgumentType]
    found: list[float | str] = []
    seconds: list[list[float]] = [[] for _ in tried]
    for sizes in tried:
        with cut(subject, sizes), backend("triton"):
            try:
                error = float((subject.call(nets, CHECKED, "bf16") - exact).norm() / exact.norm())
                found.append("" if error <= subject.limit else f"wrong: error {error:.1e} in norm")
            except Exception as problem:
                found.append(f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0][:80]}")
    for _ in range(rounds + 1):  # the first to warm up
        for k, sizes in enumerate(tried):
            if not found[k]:
                with cut(subject, sizes), backend("triton"):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    subject.call(nets, subject.rows, "bf16")
                    end.record()
                    torch.cuda.synchronize()
                    seconds[k].append(begin.elapsed_time(end) / 1e3)
    return [why or median(times[1:]) for why, times in zip(found, seconds, strict=True)]


def table(subject: Subject, rows: list[tuple[Tiles | None, audit.Row, float | str]]) -> str:
    """The candidates as Markdown, the tiles that are in use first."""
    lines = [
        "| rows | width | chunk | warps | stages | layers in | registers | spills | shared | time |"
        " of the matrix rate |"
    ]
    lines.append("|---" * 11 + "|")
    for sizes, row, time in rows:
        held = sizes is not None and (sizes.held or subject.candidates is _OF_ENERGIES)
        cells = map(str, sizes[:5]) if sizes is not None else ("in use", "", "", str(row.warps), "")
        cells = *cells, "" if sizes is None else "memory" if held else "registers"
        rate = (
            f"{subject.rows * subject.flops / time / matrix_rate('bf16'):.0%}"
            if isinstance(time, float)
            else ""
        )
        shown = f"{time * 1e3:.3f} ms" if isinstance(time, float) else time
        code = f"{row.registers}", f"{row.spills}", f"{row.shared:,}"
        lines.append(f"| {' | '.join((*cells, *code, shown, rate))} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints a table for each subject."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of: {', '.join(SUBJECTS)} (all)")
    targets = [machine.name for machine in audit.MACHINES]
    parser.add_argument("--target", default="sm_90", choices=targets, help="what is compiled for (sm_90)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each (5)")
    parser.add_argument("--timed", type=int, default=16, help="candidates that are timed, at most (16)")
    options = parser.parse_args(arguments)
    if not HAS_TRITON or INTERPRETED:
        print("tuning needs Triton, and TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    unknown = [name for name in options.subjects if name not in SUBJECTS]
    if unknown:
        parser.error(f"SUBJECT must be one of {', '.join(SUBJECTS)}, got {', '.join(unknown)}")
    for name in options.subjects or SUBJECTS:
        subject = SUBJECTS[name]
        tried = [None, *subject.candidates]
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            rows = list(pool.map(compiled, ((name, sizes, options.target) for sizes in tried)))
        pairs = [(s, row) for s, row in zip(tried, rows, strict=True) if isinstance(row, audit.Row)]
        pairs = pairs[:1] + sorted(pairs[1:], key=lambda pair: (pair[1].spills, pair[1].instructions))
        times: list[float | str] = [""] * len(pairs)
        if ON_CUDA:
            pairs = pairs[: options.timed + 1]
            times = timed(subject, [sizes for sizes, _ in pairs], options.rounds, "cuda")
        lines = [(sizes, row, time) for (sizes, row), time in zip(pairs, times, strict=True)]
        if ON_CUDA:
            lines[1:] = sorted(lines[1:], key=lambda line: (isinstance(line[2], str), line[2]))
        print(f"\n## {name}, {options.target}: {len(tried) - len(pairs)} of {len(tried)} not shown\n")
        print(table(subject, lines), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
