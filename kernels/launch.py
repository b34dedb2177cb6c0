"""What all kernel files share: Triton where it exists, the backend's choice, launches and ops.

A kernel file never imports Triton itself. It writes

    from .launch import LaunchConfig, cdiv, int64_offsets, launch, register_op, tl, triton, use_triton

    @triton.jit
    def _double_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, INT64: tl.constexpr):
        block = tl.program_id(0)
        if INT64:
            block = block.to(tl.int64)
        ...

    def _launch_double(x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        config = LaunchConfig.elementwise(x.numel(), x.element_size())
        grid = (cdiv(x.numel(), config.block_columns),)
        launch(_double_kernel, grid, x, out, x.numel(),
               BLOCK=config.block_columns, INT64=int64_offsets(x), config=config, device=x.device)
        return out

    _double = register_op("double", "(Tensor x) -> Tensor", launcher=_launch_double,
                          reference=double_reference, fake=lambda x: torch.empty_like(x))

    def double(x: Tensor) -> Tensor:
        return _double(x) if use_triton(x) else double_reference(x)

and it imports and works where Triton does not exist: `triton` and `tl` are then stand-ins whose every
attribute and call gives the stand-in back, so that decorators, `tl.constexpr` annotations and global
`tl.constexpr(...)` constants do no harm, and `use_triton` never lets a launcher be reached.

The backend. `EVALP_BACKEND=reference|triton`, read once at import, or `backend(...)` as a context manager:

    automatic    a CUDA or ROCm tensor takes the kernel, anything else the reference; what the kernel cannot
                 do (Triton missing, a dtype it does not take) falls back to the reference
    "reference"  always the reference
    "triton"     always the kernel, or a RuntimeError that says why it cannot run. CPU tensors take it in
                 Triton's interpreter (`TRITON_INTERPRET=1`, set before Triton is imported)

`use_triton` is plain Python on module globals: `torch.compile(fullgraph=True)` traces through it and guards
on it.

The op. `register_op` binds a launcher as the op's CUDA implementation (ROCm shares the key) and the reference
as its CPU implementation, so that `torch.library.opcheck` works without a GPU; with the backend forced to
"triton" the CPU implementation is the launcher too, in the interpreter. The reference that is handed in must
return fresh tensors: an op may not return its input or a view of it.

The audit. Under `recorded_launches` nothing is launched: functions and ops take their launchers on meta
tensors, and `launch` notes what it was given, so that a tool can compile the very launches that users make.
"""

import contextlib
import functools
import importlib
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .checks import compiling

_TRUE = ("1", "true", "yes", "on", "y")

P = ParamSpec("P")
R = TypeVar("R")


class _Missing:
    """Stands in for a Triton module where there is none: every attribute and every call gives it back."""

    def __getattr__(self, name: str) -> "_Missing":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **kwargs: object) -> "_Missing":
        return self


def _load(name: str) -> Any:
    """The module, or None. A Triton that is installed but cannot be loaded counts as missing."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):
        return None


if TYPE_CHECKING:
    # Triton's stubs know kernels only as ordinary functions: for a type checker everything in it is Any.
    class _AnyAttribute(type):
        def __getattr__(cls, name: str) -> Any: ...

    class tl(metaclass=_AnyAttribute):
        class constexpr(Any):
            def __init__(self, value: object) -> None: ...

    triton: Any = None
else:
    triton, tl = _load("triton"), _load("triton.language")

HAS_TRITON: bool = triton is not None and tl is not None
if not HAS_TRITON and not TYPE_CHECKING:
    triton = tl = _Missing()

_OUT_OF_RESOURCES: tuple[type[Exception], ...] = ()
if HAS_TRITON:
    _OUT_OF_RESOURCES = (importlib.import_module("triton.runtime.errors").OutOfResources,)

INTERPRETED: bool = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in _TRUE
"""Whether kernels run in Triton's interpreter, on CPU tensors (Triton reads it as it defines one)."""

BACKENDS = ("reference", "triton")


def _checked_backend(name: str | None, argument: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}, or unset, got {name!r}")
    return name


_backend: str | None = _checked_backend(os.environ.get("EVALP_BACKEND") or None, "EVALP_BACKEND")
_force_int64 = False
_recorded: "list[Launch] | None" = None
_given_way: ContextVar[list[str] | None] = ContextVar("_given_way", default=None)


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Override `EVALP_BACKEND` inside a `with` block: "reference", "triton", or None for automatic.

    The choice is the process's, not the thread's.

    Raises:
        ValueError: an unknown name.
    """
    global _backend
    before, _backend = _backend, _checked_backend(name, "backend")
    try:
        yield
    finally:
        _backend = before


def reference_forced() -> bool:
    """Whether the backend "reference" was asked for by name: then nothing takes its place, on no device."""
    return _backend == "reference"


def triton_version() -> tuple[int, ...]:
    """Major and minor version of the Triton that is installed."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def why_reference(*tensors: Tensor, unsupported: str | None = None) -> str | None:
    """Why a public function runs its reference on these tensors, or None where it runs its kernel.

    Args:
        tensors: the arguments; they are on one device, which the caller has checked.
        unsupported: what about them the kernel cannot do, if anything ("float64 has no kernel").
    """
    if _recorded is not None or unsupported is not None:
        return unsupported
    if _backend == "reference":
        return "the backend 'reference' was asked for"
    if not HAS_TRITON:
        return "Triton is not installed"
    elsewhere = [tensor.device.type.upper() for tensor in tensors if not tensor.is_cuda]
    if not elsewhere or (_backend == "triton" and INTERPRETED):
        return None
    uninterpreted = " and TRITON_INTERPRET=1 was not set before Triton was imported"
    return f"the tensors are on the {elsewhere[0]}" + (uninterpreted if _backend == "triton" else "")


def use_triton(*tensors: Tensor, unsupported: str | None = None) -> bool:
    """Whether a public function runs its kernel (else its reference): arguments as for `why_reference`.

    Raises:
        RuntimeError: the backend "triton" was asked for by name and cannot run.
    """
    reason = why_reference(*tensors, unsupported=unsupported)
    if reason is not None and _backend == "triton" and _recorded is None:
        raise RuntimeError(f"the backend 'triton' was asked for and cannot run: {reason}")
    return reason is None


# 2^31 less the reach of the last block's masked lanes: their offsets are computed, though never followed.
_INT32_OFFSETS = 2**31 - 2**20


def int64_offsets(*extents: Tensor | int) -> bool:
    """Whether a kernel needs int64 offsets: some tensor's last element (or `rows * stride`) is near 2^31.

    Launchers pass the answer on as a `tl.constexpr`. `force_int64_offsets` makes it True for small shapes.
    """
    return _force_int64 or any(_reach(extent) >= _INT32_OFFSETS for extent in extents)


def _reach(extent: Tensor | int) -> int:
    if isinstance(extent, int):
        return extent
    if extent.numel() == 0:
        return 0
    return sum((size - 1) * stride for size, stride in zip(extent.shape, extent.stride(), strict=True))


@contextlib.contextmanager
def force_int64_offsets() -> Iterator[None]:
    """In this `with` block every launch takes int64 offsets: for tests, which cannot hold 2^31 elements."""
    global _force_int64
    before, _force_int64 = _force_int64, True
    try:
        yield
    finally:
        _force_int64 = before


def cdiv(numerator: int, denominator: int) -> int:
    """The quotient rounded up: the number of blocks."""
    return -(-numerator // denominator)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for n <= 1): a block that covers `n`."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is launched. The class methods hold the defaults, by the shape of the work.

    Attributes:
        block_columns: elements that a program takes along a row (or of a flat buffer). A power of two.
        block_rows: rows that a program takes at a time. A power of two.
        num_warps: warps per program.
        num_stages: depth of the software pipeline of the kernel's loops.
        max_registers: of a thread, on CUDA. Without it ptxas may put numbers aside to make room for one more
            program on a multiprocessor.
    """

    block_columns: int
    block_rows: int = 1
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None

    def __post_init__(self) -> None:
        for name in ("block_columns", "block_rows", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"LaunchConfig.{name} must be a power of two, got {value}")
        if self.num_stages < 1:
            raise ValueError(f"LaunchConfig.num_stages must be at least 1, got {self.num_stages}")
        if self.max_registers is not None and not 16 <= self.max_registers <= 255:
            raise ValueError(f"LaunchConfig.max_registers must be in [16, 255], got {self.max_registers}")

    def options(self, *, cuda: bool) -> dict[str, int]:
        """What the compiler is told."""
        told = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**told, "maxnreg": self.max_registers} if cuda and self.max_registers is not None else told

    @classmethod
    def elementwise(cls, numel: int, element_size: int = 4) -> "LaunchConfig":
        """A flat buffer: 4 warps, and two 16-byte accesses a thread for each operand."""
        block = 128 * 2 * max(16 // element_size, 1)
        return cls(block_columns=min(block, max(next_power_of_2(numel), 16)), num_warps=4)

    @classmethod
    def by_rows(cls, rows: int, columns: int, *, max_columns: int = 4096, tile: int = 2048) -> "LaunchConfig":
        """Whole rows, to reduce along them: many short rows a program, or one row in blocks of `max_columns`.

        About 16 elements a thread: enough independent loads to cover the latency, few enough for registers.
        """
        block_columns = min(next_power_of_2(columns), max_columns)
        block_rows = min(max(tile // block_columns, 1), next_power_of_2(rows))
        num_warps = min(max(block_rows * block_columns // (32 * 16), 1), 8)
        return cls(block_columns=block_columns, block_rows=block_rows, num_warps=next_power_of_2(num_warps))


def persistent_programs(device: torch.device, rows: int, config: LaunchConfig) -> int:
    """How many programs share the tiles of `rows` rows, each taking one after the other: on a GPU 16 warps
    for each multiprocessor, whether it holds them at once or not; in the interpreter two programs in all."""
    tiles = cdiv(rows, config.block_rows)
    if device.type != "cuda":
        return min(tiles, 2)
    return min(tiles, max(16 // config.num_warps, 1) * _multiprocessors(device.index))


@functools.cache
def _multiprocessors(index: int | None) -> int:
    device = torch.cuda.current_device() if index is None else index
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Launch:
    """What `launch` was given."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    config: LaunchConfig
    fp_fusion: bool


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """In this `with` block launches are noted in the list and not made: call functions on meta tensors."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(
    kernel: Any,
    grid: Sequence[int],
    *args: Any,
    config: LaunchConfig,
    device: torch.device,
    fp_fusion: bool = True,
    **constants: Any,
) -> None:
    """Run `kernel` on `grid` programs on `device`; nothing where the grid is empty.

    `fp_fusion` (contraction of a product and a sum into one rounding) is always passed on, because Triton's
    default for it changes between versions. The configuration's blocks are not passed on: name them in
    `constants`.
    """
    if any(extent == 0 for extent in grid):
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, tuple(grid), args, constants, config, fp_fusion))
        return
    with _on_device(device):
        kernel[tuple(grid)](
            *args,
            **constants,
            **config.options(cuda=device.type == "cuda" and torch.version.cuda is not None),
            enable_fp_fusion=fp_fusion,
        )


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments' device is."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def register_op(
    name: str,
    schema: str,
    *,
    launcher: Callable[..., Any],
    fake: Callable[..., Any],
    reference: Callable[..., Any],
) -> Callable[..., Any]:
    """Define `torch.ops.evalp_fast.<name>` and return its overload, which costs 4-5 µs a call.

    Args:
        name: the op's name.
        schema: as for `torch.library.define`, with `Tensor(a!)` for arguments that are written.
        launcher: the implementation on CUDA and ROCm: allocates, launches. It stays an ordinary function, so
            that a test can call it on CPU tensors in the interpreter. Where a kernel asks for more shared
            memory than the GPU has, the reference runs, and a warning says so once.
        fake: the same allocations and nothing else, for tracing. Shapes may be symbolic.
        reference: the same signature in plain torch, the implementation on CPU. Returns fresh tensors.

    Gradients are not the op's: put them in an `autograd.Function` whose forward and backward call ops.
    """
    qualified = f"evalp_fast::{name}"
    # The tag tells torch.compile that the op obeys its schema, which opcheck verifies in the tests.
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    operation = getattr(torch.ops.evalp_fast, name).default
    arguments = operation._schema.arguments
    written = [k for k, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

    @functools.wraps(launcher)
    def on_gpu(*args: Any, **kwargs: Any) -> Any:
        try:
            result = launcher(*args, **kwargs)
        except _OUT_OF_RESOURCES as error:
            result = _without_kernel(name, error, reference)(*args, **kwargs)
        # Autograd does not see what an op writes: a backward pass that needs the old values must fail.
        for k in written:
            _count_write(args[k])
        return result

    @functools.wraps(reference)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        return on_gpu(*args, **kwargs) if _backend == "triton" and INTERPRETED else reference(*args, **kwargs)

    @functools.wraps(fake)
    def on_meta(*args: Any, **kwargs: Any) -> Any:
        return fake(*args, **kwargs) if _recorded is None else launcher(*args, **kwargs)

    torch.library.impl(qualified, "CUDA", on_gpu)
    torch.library.impl(qualified, "CPU", on_cpu)
    torch.library.register_fake(qualified, on_meta)
    return operation


def _without_kernel(name: str, error: Exception, reference: Callable[..., Any]) -> Callable[..., Any]:
    """What runs in place of a kernel that asks for more shared memory than the GPU has; a warning says so."""
    if _backend == "triton":
        raise error
    given_way = _given_way.get()
    if given_way is not None:
        given_way.append(f"{name}: {error}")
    warnings.warn(f"{name} runs in plain torch: {error}", RuntimeWarning, stacklevel=3)
    return reference


@contextlib.contextmanager
def kernels_that_give_way() -> Iterator[list[str]]:
    """In this `with` block, and thread: which kernels the reference stood in for at their launch, and why."""
    found: list[str] = []
    before = _given_way.set(found)
    try:
        yield found
    finally:
        _given_way.reset(before)


def _count_write(argument: Any) -> None:
    """Raise the version of a tensor or of all in a list. One of inference mode has none."""
    tensors = argument if isinstance(argument, list | tuple) else (argument,)
    torch.autograd.graph.increment_version(t for t in tensors if t is not None and not t.is_inference())


def compiled(
    function: Callable[P, R], *, otherwise: Callable[P, R] | None = None, **options: Any
) -> Callable[P, R]:
    """`torch.compile(function, **options)` where this machine can compile, else `otherwise`, by default the
    function itself.

    On CPU Inductor needs a C++ compiler; on a GPU it needs Triton. Which one is decided at each call by the
    first tensor argument. Where it is missing, or fails on its own (a compiler without Python's headers), one
    warning says so and the function runs as it is. Inside a region that is being compiled the function is
    inlined.
    """

    @functools.cache
    def optimised() -> Callable[P, R]:
        return torch.compile(function, **options)  # at the first call: it imports the compiler, for seconds

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if compiling():
            return function(*args, **kwargs)
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        kind = next((tensor.device.type for tensor in tensors), "cpu")
        if kind not in _eager_on:
            reason = _missing_compiler(kind)
            if reason is None:
                try:
                    return optimised()(*args, **kwargs)
                except _compiler_errors() as error:
                    reason = str(error).strip().partition("\n")[0]
            _eager_on.add(kind)
            message = f"torch.compile is not used on {kind}, which is slower: {reason}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return (otherwise or function)(*args, **kwargs)

    return call


_COMPILE_AFTER = float(os.environ.get("EVALP_COMPILE_AFTER") or 10.0)


def compiled_later(
    function: Callable[P, R], uncompiled: Callable[P, R] | None = None, **options: Any
) -> Callable[P, R]:
    """`uncompiled` (by default `function` itself) until it has taken 10 seconds, then `compiled(function)`.

    For loops on the CPU, which take tens of seconds to compile the first time and some from Inductor's cache:
    a run pays for them when it has spent about as much without. `EVALP_COMPILE_AFTER` is the number of
    seconds, 0 for at once and inf for never. Both must give the same bits. An error of the compiled form
    leaves the other for good, with a warning: `function` has to be one that raises none of its own.
    """
    before = uncompiled or function
    optimised: Callable[..., R] = compiled(function, otherwise=before, **options)
    spent = 0.0
    ready = given_up = False

    def run_optimised(*args: Any, **kwargs: Any) -> R:
        # In one mode of gradients and autocast, as torch.compile makes a variant for each, and has a limit.
        with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
            plain = (x.clone() if isinstance(x, Tensor) and x.is_inference() else x for x in args)
            return optimised(*plain, **kwargs)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal spent, ready, given_up
        if spent >= _COMPILE_AFTER and "cpu" not in _eager_on and not given_up:
            try:
                result = run_optimised(*args, **kwargs)
                ready = True
                return result
            except Exception as error:
                # Whatever it is, it is the compiler's, and no reason to end a run.
                given_up = True
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                message = f"{function.__name__} is not compiled, which is slower: {reason}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            except BaseException:
                given_up = not ready  # a compiler that was interrupted while it was imported stays broken
                raise
        begin = time.perf_counter()
        result = before(*args, **kwargs)
        spent += time.perf_counter() - begin
        return result

    return call


# The types of device for which `compiled` has found that it cannot compile, and has said so.
_eager_on: set[str] = set()


@functools.cache
def _missing_compiler(kind: str) -> str | None:
    """What Inductor would miss for this type of device, if anything."""
    if kind != "cpu":
        return None if HAS_TRITON else "Triton is not installed"
    missing = "no C++ compiler was found"
    _import_quietly("torch.utils.cpp_extension")
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return None if get_cpp_compiler() else missing
    except ImportError:  # a private name: where it has moved, ask as Inductor does
        return None if shutil.which(os.environ.get("CXX", "g++")) else missing
    except RuntimeError:
        return missing


def _import_quietly(name: str) -> None:
    """Import a module of torch that, on its way into Inductor, would warn of a CUDA that is not there."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        _load(name)
    finally:
        logger.setLevel(before)


def _compiler_errors() -> tuple[type[Exception], ...]:
    """What torch raises when its compiler fails; an error of the user's function is none of these."""
    import torch._dynamo.exc as dynamo
    import torch._inductor.exc as inductor

    names = ("BackendCompilerFailed", "InductorError", "InvalidCxxCompiler", "CppCompileError")
    return tuple(
        getattr(module, name) for module in (dynamo, inductor) for name in names if hasattr(module, name)
    )


__all__ = [
    "BACKENDS",
    "HAS_TRITON",
    "INTERPRETED",
    "Launch",
    "LaunchConfig",
    "backend",
    "cdiv",
    "compiled",
    "compiled_later",
    "force_int64_offsets",
    "int64_offsets",
    "kernels_that_give_way",
    "launch",
    "next_power_of_2",
    "persistent_programs",
    "recorded_launches",
    "reference_forced",
    "register_op",
    "tl",
    "triton",
    "triton_version",
    "use_triton",
    "why_reference",
]
