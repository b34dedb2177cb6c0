"""Which memory the kernels of one launch read and write: between two barriers, and from program to program.

The interpreter runs a program's threads as one and its programs one after another, so that numbers are right
where on a GPU threads would race, and scratch that two programs share does no harm. So each access is noted
here: its addresses, in order, with the barriers between them. compute-sanitizer's racecheck watches shared
memory alone.
"""

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from evalp_fast.kernels.energy import EnergyParameters, mlp_energy, mlp_energy_and_gradient
from evalp_fast.kernels.flow import FlowParameters, coupling_flow
from evalp_fast.kernels.latent_chain import langevin_chain
from evalp_fast.kernels.launch import INTERPRETED, backend
from evalp_fast.kernels.sir import sir

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")

DIM, HIDDEN, COUPLINGS, ROWS = 7, 20, 3, 70


def normals(seed: int, *shape: int) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


FLOW = FlowParameters(
    normals(1, COUPLINGS, HIDDEN, 4),
    normals(2, COUPLINGS, HIDDEN),
    normals(3, COUPLINGS, 2, HIDDEN, HIDDEN),
    normals(4, COUPLINGS, 2, HIDDEN),
    normals(5, COUPLINGS, 6, HIDDEN),
    normals(6, COUPLINGS, 6),
    normals(7, COUPLINGS, DIM),
    normals(8, COUPLINGS, DIM),
)
ENERGY = EnergyParameters(
    (normals(9, HIDDEN, DIM), normals(10, HIDDEN, HIDDEN), normals(11, 1, HIDDEN)),
    (normals(12, HIDDEN), normals(13, HIDDEN), normals(14, 1)),
)
Z = normals(15, ROWS, DIM)


class Access(NamedTuple):
    """Sorted addresses that one instruction reads or writes."""

    writes: bool
    addresses: np.ndarray

    def overlaps(self, other: "Access") -> bool:
        return len(np.intersect1d(self.addresses, other.addresses, assume_unique=True)) > 0


class Watch:
    """Counts conflicts between barriers, and pairs of programs of a launch of which one writes what the other
    reads or writes."""

    def __init__(self) -> None:
        self.conflicts = 0
        self.shared = 0
        self.launches: list[int] = []  # the number of programs of each
        self._programs: list[list[Access]] = []
        self._since: list[Access] = []

    def barrier(self) -> None:
        self._since = []

    def begin(self, program: int) -> None:
        self.barrier()
        if program == 0:
            self.end()
        self._programs.append([])

    def end(self) -> None:
        """Of a launch. Another one may be given the memory that this one's programs had."""
        for first, second in combinations(self._programs, 2):
            (all_1, writes_1), (all_2, writes_2) = map(_everything, (first, second))
            if len(np.intersect1d(writes_1, all_2)) or len(np.intersect1d(all_1, writes_2)):
                self.shared += 1
        if self._programs:
            self.launches.append(len(self._programs))
        self._programs = []

    def access(self, writes: bool, addresses: np.ndarray, mask: np.ndarray) -> None:
        chosen = np.broadcast_to(mask, addresses.shape).astype(bool)
        one = Access(writes, np.unique(addresses[chosen].astype(np.int64)))
        if len(one.addresses) == 0:
            return
        for other in self._since:
            # What is read and then written in its place depends on itself.
            in_place = writes and not other.writes and np.array_equal(one.addresses, other.addresses)
            if (writes or other.writes) and not in_place and one.overlaps(other):
                self.conflicts += 1
        self._since.append(one)
        self._programs[-1].append(one)


def _everything(accesses: list[Access]) -> tuple[np.ndarray, np.ndarray]:
    """All addresses, and those that are written."""
    written = [access.addresses for access in accesses if access.writes]
    return np.concatenate([access.addresses for access in accesses]), np.concatenate(
        written or [np.array([])]
    )


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    interpreter: Any = pytest.importorskip("triton.runtime.interpreter")
    builder, noted = interpreter.InterpreterBuilder, Watch()
    load, store = builder.create_masked_load, builder.create_masked_store
    begin = builder.set_grid_idx

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        noted.access(False, pointers.data, mask.data)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        noted.access(True, pointers.data, mask.data)
        return store(self, pointers, value, mask, *rest)

    def watched_begin(self: Any, x: int, y: int, z: int) -> Any:
        noted.begin(x)
        return begin(self, x, y, z)

    monkeypatch.setattr(builder, "create_masked_load", watched_load)
    monkeypatch.setattr(builder, "create_masked_store", watched_store)
    monkeypatch.setattr(builder, "set_grid_idx", watched_begin)
    monkeypatch.setattr(builder, "create_barrier", lambda self: noted.barrier())
    with backend("triton"):
        yield noted


def flow(**options: Any) -> Callable[[], Any]:
    return lambda: coupling_flow(Z, FLOW, activation="silu", **options)


def gradients(inverse: bool, *, of_all: bool) -> Callable[[], Any]:
    def call() -> None:
        leaves = [t.detach().clone().requires_grad_(of_all) for t in FLOW if t is not None]
        z = Z.clone().requires_grad_()
        x, log_det = coupling_flow(z, FlowParameters(*leaves), inverse=inverse, activation="silu")
        torch.autograd.grad(x.sum() + log_det.sum(), [z, *leaves] if of_all else [z])

    return call


CALLS: dict[str, Callable[[], Any]] = {
    "flow in memory": flow(),
    "flow in memory, inverse": flow(inverse=True),
    "flow in registers": flow(precision="tf32"),
    "inverse of a flow in registers": flow(precision="tf32", inverse=True),
    "noise": lambda: coupling_flow((3, 5, ROWS), FLOW, mixing="swap"),
    "gradient": gradients(False, of_all=False),
    "gradient, inverse": gradients(True, of_all=False),
    "all gradients": gradients(False, of_all=True),
    "all gradients, inverse": gradients(True, of_all=True),
    "energy": lambda: mlp_energy(Z, ENERGY),
    "energy and gradient": lambda: mlp_energy_and_gradient(Z, ENERGY),
    "chain": lambda: langevin_chain(Z, ENERGY, n_steps=2, step_size=0.1, adjusted=True),
    "sir": lambda: sir(3, 5, ROWS, 3, FLOW, ENERGY),
    "sir in registers": lambda: sir(3, 5, ROWS, 3, FLOW, ENERGY, precision="tf32"),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_threads_and_programs_keep_out_of_each_others_way(name: str, watch: Watch) -> None:
    """Two programs for three tiles. Guards against missing barriers, and scratch that is shared."""
    CALLS[name]()
    watch.end()
    assert watch.launches[-1] == 2
    assert set(watch.launches) == {2} or "registers" in name  # in "tf32" others round the weights before
    assert watch.conflicts == 0
    assert watch.shared == 0


@pytest.mark.parametrize("name", ["flow in memory", "inverse of a flow in registers", "chain"])
def test_a_missing_barrier_is_seen(name: str, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "barrier", lambda: None)
    CALLS[name]()
    assert watch.conflicts > 0
