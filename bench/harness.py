"""What a problem is, who solves it, and what the suites build both from.

A *problem* is what is computed; a *provider* is somebody's way to compute it. `bench/measuring.py` says how
they are measured.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bench import machine
from bench.machine import ON_CUDA
from evalp_fast.kernels.processor import precision_on

Call = Callable[..., Any]
Inputs = tuple[Any, ...]
Precision = Literal["ieee", "tf32", "bf16"]


@dataclass(frozen=True)
class Provider:
    """Somebody's way to solve a problem.

    Attributes:
        name: ours begin with `evalp_fast`.
        make: from the workload's `data` to the call that is timed.
        precision: of its matrix products, which says what its rate is compared with.
        missing: why it cannot run here, or None; to be asked by `absence`.
        compiles: its first call compiles, where there is something to compile.
        known_wrong: why its result is known to be refused; such a test does not fail.
        parts: from `data` to named calls that together are one call; each is timed too.
    """

    name: str
    make: Callable[[Any], Call]
    precision: Precision = "ieee"
    missing: Callable[[], str | None] = lambda: None
    compiles: bool = False
    known_wrong: str | None = None
    parts: Callable[[Any], dict[str, Callable[[], Any]]] | None = None

    def absence(self) -> str | None:
        """Why it cannot run here, or is another's number under its name."""
        reason = self.missing()
        computed = precision_on(machine.DEVICE, self.precision)
        if reason is None and self.name.startswith("evalp_fast") and computed != self.precision:
            return f"{self.precision} is {computed} on this processor"
        return reason


@dataclass
class Workload:
    """A problem's data.

    Attributes:
        data: what providers are made from.
        inputs: sets of arguments, alike in all but their values.
        check: raises AssertionError where the result (second argument) of a provider (first) is wrong for the
            inputs (the others).
        stateful: a call changes what later ones give, as a training step does: only the first can be checked.
    """

    data: Any
    inputs: list[Inputs]
    check: Callable[..., None]
    stateful: bool = False


@dataclass(frozen=True)
class Work:
    """What one call needs, whoever does it.

    Attributes:
        bytes: read from and written to memory, at least.
        flops: of the matrix products that the result depends on.
        normals: standard normals drawn.
        memory: bytes that a plain way to do it holds at once; by default five times `bytes`.
    """

    bytes: float = 0.0
    flops: float = 0.0
    normals: float = 0.0
    memory: float | None = None


@dataclass(frozen=True)
class Problem:
    """What is computed.

    Attributes:
        suite, name: unique together.
        parameters: the sizes, for the plots.
        samples: how many `unit`s one call makes.
        setup: makes the workload; called only when the problem is measured.
        providers: ours first.
        clock: `device` for single calls, `wall` for whole samplers.
        gradients: run with autograd recording.
    """

    suite: str
    name: str
    parameters: dict[str, Any]
    samples: int
    setup: Callable[[], Workload]
    providers: Sequence[Provider]
    work: Work = field(default_factory=Work)
    unit: str = "samples"
    clock: Literal["device", "wall"] = "wall"
    gradients: bool = False


# --- for the suites -----------------------------------------------------------------------------------------


def input_sets(make: Callable[[], Inputs]) -> list[Inputs]:
    """Two sets of inputs by `make`, or enough of them to exceed the L2 cache four times (16 at most)."""
    torch.manual_seed(0)
    sets = [make(), make()]
    size = sum(t.nbytes for t in sets[0] if isinstance(t, Tensor))
    while size and len(sets) * size < 4 * machine.cache_bytes() and len(sets) < 16:
        sets.append(make())
    return sets


def compiled(function: Call, mode: str | None = None) -> Call:
    """`torch.compile` of the whole of `function`, for the shapes that it meets first.

    `max-autotune` runs without CUDA graphs, which would copy the inputs at every call.
    """
    mode = "max-autotune-no-cudagraphs" if mode == "max-autotune" else mode
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def by_inductor(
    function: Call, name: str = "torch.compile", wrap: Callable[[Call], Call] = lambda call: call
) -> tuple[Provider, ...]:
    """`function` compiled, and on a GPU with max-autotune too; `wrap` is put around what was compiled."""

    def provider(name: str, mode: str | None) -> Provider:
        return Provider(name, lambda _: wrap(compiled(function, mode)), compiles=True)

    found = (provider(name, None),)
    return (*found, provider(f"{name} max-autotune", "max-autotune")) if ON_CUDA else found


def absent(module: str, name: str | None = None) -> Callable[[], str | None]:
    """Why `module` (or `name` in it) cannot be used, for `Provider.missing`."""

    def reason() -> str | None:
        try:
            if importlib.util.find_spec(module) is None:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            package = module.split(".")[0]
            if (error.name or package).split(".")[0] == package:
                return "not there yet" if package == "evalp_fast" else f"{package} is not installed"
            return f"{package} needs {error.name}, which is not installed"
        except Exception as error:
            if module.startswith("evalp_fast"):  # ours must work: that is a failure, not an absence
                raise
            return f"{module} cannot be imported: {first_line(error)}"
        return None if name is None or hasattr(found, name) else "not there yet"

    return reason


def needs_cuda() -> str | None:
    """For providers that only a GPU has."""
    return None if ON_CUDA else "needs a GPU"


def first_line(error: BaseException) -> str:
    """`ValueError: what it says`, one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
