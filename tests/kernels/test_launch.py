"""What the launchers share: the backend's choice, offsets, configurations, ops, the fall-back to eager."""

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import Tensor
from torch._inductor.exc import CppCompileError

from evalp_fast.kernels import launch as module
from evalp_fast.kernels.langevin import langevin_step
from evalp_fast.kernels.launch import (
    HAS_TRITON,
    INTERPRETED,
    LaunchConfig,
    backend,
    cdiv,
    compiled,
    compiled_later,
    force_int64_offsets,
    int64_offsets,
    launch,
    next_power_of_2,
    persistent_programs,
    recorded_launches,
    register_op,
    tl,
    triton,
    use_triton,
    why_reference,
)
from evalp_fast.kernels.metropolis import mala_accept
from evalp_fast.kernels.philox import Stream, normal

interpreter = pytest.mark.skipif(not INTERPRETED, reason="kernels on CPU tensors need Triton's interpreter")


@triton.jit
def _double_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, INT64: tl.constexpr):
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    offset = program * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offset, 2.0 * tl.load(x_ptr + offset, mask=offset < n), mask=offset < n)


def _launch_double(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    config = LaunchConfig.elementwise(x.numel(), x.element_size())
    constants = {"BLOCK": config.block_columns, "INT64": int64_offsets(x)}
    grid = (cdiv(x.numel(), config.block_columns),)
    launch(_double_kernel, grid, x, out, x.numel(), **constants, config=config, device=x.device)
    return out


CALLS: list[str] = []


def _double_reference(x: Tensor) -> Tensor:
    CALLS.append("reference")
    return x + x


_double = register_op(
    "test_double",
    "(Tensor x) -> Tensor",
    launcher=_launch_double,
    fake=torch.empty_like,
    reference=_double_reference,
)


def double(x: Tensor) -> Tensor:
    return _double(x) if use_triton(x) else x + x


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh interpreter, because the variables are read at import."""
    environment = {k: v for k, v in os.environ.items() if k not in ("EVALP_BACKEND", "TRITON_INTERPRET")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=300)


# --- the backend ---


def test_cpu_tensors_take_the_reference_unless_forced():
    assert not use_triton(torch.ones(1))
    with backend("reference"):
        assert not use_triton(torch.ones(1))


@interpreter
def test_the_backend_is_forced_and_restored():
    x = torch.arange(1000.0)
    CALLS.clear()
    with backend("triton"):
        assert use_triton(x)
        assert torch.equal(double(x), 2 * x)
        assert CALLS == []
        with backend("reference"):
            assert not use_triton(x)
        assert use_triton(x)
        with pytest.raises(RuntimeError, match="no such dtype"):
            use_triton(x, unsupported="no such dtype")
    assert not use_triton(x, unsupported="no such dtype")
    assert torch.equal(_double(x), 2 * x)
    assert CALLS == ["reference"]


def test_the_reason_for_the_reference_is_told(monkeypatch):
    x = torch.ones(1)
    with backend(None):
        assert why_reference(x) == "the tensors are on the CPU"
        assert why_reference(x, unsupported="no such dtype") == "no such dtype"
    with backend("reference"):
        assert why_reference(x) == "the backend 'reference' was asked for"
    with backend("triton"):
        monkeypatch.setattr(module, "INTERPRETED", False)
        assert "TRITON_INTERPRET=1 was not set" in str(why_reference(x))
        monkeypatch.setattr(module, "HAS_TRITON", False)
        assert why_reference(x) == "Triton is not installed"


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be one of reference, triton"), backend("cuda"):
        pass
    result = run("import evalp_fast.kernels.launch", EVALP_BACKEND="cuda")
    assert result.returncode != 0
    assert "EVALP_BACKEND must be one of reference, triton, or unset, got 'cuda'" in result.stderr


DRAW = (
    "import torch; from evalp_fast.kernels.philox import normal; print(normal(0, torch.arange(2), 0, 0, 2))"
)


def test_a_backend_that_cannot_run_raises_by_name():
    result = run(DRAW, EVALP_BACKEND="triton")
    assert "RuntimeError: the backend 'triton' was asked for and cannot run" in result.stderr


def test_everything_imports_and_runs_without_triton():
    # Guards against a kernel file that needs Triton when it is imported.
    without = "import sys, importlib, pkgutil; sys.modules['triton'] = None\nimport evalp_fast.kernels as k\n"
    everything = (
        "for m in pkgutil.iter_modules(k.__path__): importlib.import_module(f'{k.__name__}.{m.name}')\n"
    )
    has = "from evalp_fast.kernels.launch import HAS_TRITON; print(HAS_TRITON)"
    result = run(without + everything + DRAW + "\n" + has)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("tensor(")
    assert result.stdout.endswith("False\n")
    result = run(without + DRAW, EVALP_BACKEND="triton")
    assert "Triton is not installed" in result.stderr


@pytest.mark.parametrize("name", [None, pytest.param("triton", marks=interpreter)])
def test_the_choice_is_traceable(name):
    x = torch.arange(10.0)
    with backend(name):
        traced = torch.compile(double, fullgraph=True, backend="aot_eager")
        assert torch.equal(traced(x), 2 * x)


@pytest.mark.parametrize("name", [None, pytest.param("triton", marks=interpreter)])
def test_opcheck(name):
    with backend(name):
        torch.library.opcheck(_double, (torch.arange(10.0),))


# --- offsets and configurations ---


def test_offsets_are_int64_near_2_31():
    def on_meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    assert not int64_offsets(torch.ones(3), on_meta(1 << 15, 1 << 15), 1 << 30)
    assert int64_offsets(1 << 31)
    assert int64_offsets(torch.ones(3), on_meta(1 << 16, 1 << 15))
    # What counts is the reach, not the number of elements: a column of a wide matrix reaches its end, a row
    # that is expanded a thousand million times reaches its own.
    assert int64_offsets(on_meta(1 << 16, 1 << 15)[:, 0])
    assert not int64_offsets(on_meta(1, 64).expand(1 << 30, 64))
    assert not int64_offsets(on_meta(64).as_strided((1, 64), (1 << 40, 1)))
    assert not int64_offsets(on_meta(0, 1 << 40))


@interpreter
def test_int64_offsets_can_be_forced():
    x = torch.arange(700.0)
    with backend("triton"), force_int64_offsets():
        assert int64_offsets(x)
        assert torch.equal(double(x), 2 * x)
    assert not int64_offsets(x)


@pytest.mark.parametrize(("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (1024, 1024), (1025, 2048)])
def test_next_power_of_2(n, power):
    assert next_power_of_2(n) == power


@pytest.mark.parametrize("rows", [1, 3, 1 << 20])
@pytest.mark.parametrize("columns", [1, 5, 100, 4096, 1 << 20])
def test_configurations_are_legal(rows, columns):
    config = LaunchConfig.by_rows(rows, columns)
    assert config.block_columns <= 4096
    assert config.block_rows * config.block_columns <= 4096
    assert config.block_columns >= min(columns, 4096)
    flat = LaunchConfig.elementwise(rows * columns, 2)
    assert flat.block_columns * 2 <= 128 * 32


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_columns", 48), ("block_rows", 0), ("num_warps", 3), ("num_stages", 0), ("max_registers", 256)],
)
def test_configurations_are_checked(field, value):
    with pytest.raises(ValueError, match=rf"LaunchConfig\.{field} must be"):
        LaunchConfig(**({"block_columns": 64} | {field: value}))


@pytest.mark.parametrize(("warps", "expected"), [(4, 528), (8, 264), (16, 132), (32, 132)])
def test_persistent_programs_fill_a_gpu(warps, expected, monkeypatch):
    """16 warps on each multiprocessor, but no more programs than tiles; on a CPU two."""
    monkeypatch.setattr(module, "_multiprocessors", lambda index: 132)
    config, gpu = LaunchConfig(block_columns=16, block_rows=32, num_warps=warps), torch.device("cuda", 0)
    assert persistent_programs(gpu, 10**6, config) == expected
    assert persistent_programs(gpu, 65, config) == 3
    assert persistent_programs(gpu, 0, config) == 0
    assert persistent_programs(torch.device("cpu"), 65, config) == 2
    assert persistent_programs(torch.device("cpu"), 32, config) == 1


# --- launches ---


class Recorder:
    """Stands in for a kernel, and keeps what it was launched with."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], tuple, dict]] = []

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **keywords: self.calls.append((grid, args, keywords))


def test_a_limit_of_registers_is_for_cuda_alone() -> None:
    """ROCm's compiler does not know the option, and would refuse the launch."""
    config = LaunchConfig(64, num_warps=4, num_stages=3, max_registers=168)
    assert config.options(cuda=True) == {"num_warps": 4, "num_stages": 3, "maxnreg": 168}
    assert config.options(cuda=False) == {"num_warps": 4, "num_stages": 3}
    assert "maxnreg" not in LaunchConfig(64).options(cuda=True)


@pytest.mark.parametrize("fusion", [True, False])
def test_fp_fusion_is_always_passed(fusion):
    kernel, config = Recorder(), LaunchConfig(64, num_warps=8, num_stages=3)
    launch(kernel, [2, 1], 1, BLOCK=64, config=config, device=torch.device("cpu"), fp_fusion=fusion)
    options = {"BLOCK": 64, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": fusion}
    assert kernel.calls == [((2, 1), (1,), options)]


def test_an_empty_grid_launches_nothing():
    kernel = Recorder()
    launch(kernel, (0, 3), config=LaunchConfig(64), device=torch.device("cpu"))
    assert kernel.calls == []


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_launches_are_recorded_on_meta_tensors():
    with recorded_launches() as launches:
        double(torch.empty(1 << 33, device="meta"))
    assert [recorded.grid for recorded in launches] == [((1 << 33) // 1024,)]
    assert launches[0].constants == {"BLOCK": 1024, "INT64": True}
    assert double(torch.empty(3, device="meta")).shape == (3,)
    assert len(launches) == 1


@pytest.mark.gpu
def test_a_launch_goes_to_its_tensors_device():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    x = torch.arange(1000.0, device=device)
    before = torch.cuda.current_device()
    assert torch.equal(double(x), 2 * x)
    assert torch.cuda.current_device() == before


# --- compiled ---


@pytest.fixture(autouse=True)
def _compilers_unknown(monkeypatch):
    monkeypatch.setattr(module, "_eager_on", set())


def test_compiled_compiles(monkeypatch):
    used = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: used.append(options) or function)
    assert compiled(torch.sin, fullgraph=True)(torch.zeros(3)).tolist() == [0.0] * 3
    assert used == [{"fullgraph": True}]


def caught(*calls) -> list[warnings.WarningMessage]:
    """The warnings of calls that must give cos(0) = 1."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for call in calls:
            assert call(torch.zeros(2)).tolist() == [1.0, 1.0]
    return record


def test_without_a_compiler_eager_runs_and_says_so_once(monkeypatch):
    monkeypatch.setattr(module, "_missing_compiler", lambda kind: "no C++ compiler was found")
    function = compiled(torch.cos)
    record = caught(function, function, compiled(torch.cos))
    wanted = "torch.compile is not used on cpu, which is slower: no C++ compiler was found"
    assert [str(warning.message) for warning in record] == [wanted]
    assert record[0].filename == __file__


def test_a_compiler_that_fails_is_not_asked_again(monkeypatch):
    attempts = []

    def broken(function, **options):
        def call(*args):
            attempts.append(1)
            raise CppCompileError(["g++"], "Python.h: No such file or directory")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(module, "_missing_compiler", lambda kind: None)
    function = compiled(torch.cos)
    record = caught(function, function)
    assert len(record) == 1
    assert record[0].filename == __file__
    assert len(attempts) == 1


def test_a_backend_that_breaks_on_its_own_leaves_the_uncompiled_form(monkeypatch):
    """As torch 2.15's cache of graphs did, of a loop of dynamic shape: a run of hours must not end there."""

    def broken(graph, inputs):
        raise AssertionError("s50 is absent from name_to_symbol")

    monkeypatch.setattr(module, "_missing_compiler", lambda kind: None)
    monkeypatch.setattr(module, "_COMPILE_AFTER", 0.0)
    function = compiled_later(lambda x: x + 1, lambda x: x + 2, backend=broken)
    with pytest.warns(RuntimeWarning, match="torch.compile is not used on cpu"):
        assert function(torch.ones(2)).tolist() == [3.0, 3.0]
    assert function(torch.ones(2)).tolist() == [3.0, 3.0]


def test_an_error_of_the_function_is_not_hidden():
    def refuse(x: Tensor) -> Tensor:
        raise ValueError("x must be positive")

    function = compiled(refuse, backend="eager")
    with pytest.raises(ValueError, match="x must be positive"):
        function(torch.zeros(2))
    assert module._eager_on == set()


def test_compiled_is_inlined_in_a_compiled_region():
    inner = compiled(lambda x: x + 1)
    outer = torch.compile(lambda x: inner(x) * 2, fullgraph=True, backend="aot_eager")
    assert outer(torch.ones(2)).tolist() == [4.0, 4.0]


def test_a_machine_without_a_compiler():
    code = (
        "import torch; from evalp_fast.kernels.launch import compiled\n"
        "print(compiled(lambda x: x + 1)(torch.zeros(2)).sum().item())"
    )
    result = run(code, CXX="/nonexistent/compiler")
    assert result.stdout == "2.0\n", result.stderr
    assert "torch.compile is not used on cpu" in result.stderr


@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=interpreter)])
def test_autograd_sees_what_an_op_writes(name):
    # Guards against a backward pass that multiplies by numbers that are no longer those of the forward pass.
    index, weight = torch.arange(4), torch.ones(4, 8, requires_grad=True)
    x, energy, counts = torch.zeros(4, 8), torch.zeros(4), torch.zeros(4, 2, dtype=torch.int64)
    noise = {"seed": 0, "index": index, "step": 0}

    def accept(written: Tensor) -> None:
        state = written, energy, torch.zeros(4, 8)
        mala_accept(*state, torch.ones(4, 8), energy, x, 0.1, **noise, out=state, counts=counts)

    writers = (
        lambda written: normal(0, index, 0, Stream.PROPOSAL, 8, out=written),
        lambda written: langevin_step([written], [x], 0.1, **noise, out=[written]),
        accept,
    )
    with backend(name):
        for write in writers:
            written = torch.zeros(4, 8)
            total = (weight * written).sum()
            with torch.no_grad():
                write(written)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                total.backward()
            with torch.inference_mode():  # whose tensors have no version to raise
                write(torch.zeros(4, 8))
    assert energy._version > 0
    assert counts._version > 0


def test_a_loop_is_compiled_once_it_has_taken_its_time(monkeypatch):
    calls: list[str] = []

    def uncompiled(x: Tensor) -> Tensor:
        calls.append("uncompiled")
        return x + 1.0

    add = module.compiled_later(lambda x: x + 1.0, uncompiled, backend="eager")
    for after, expected in ((0.0, 0), (3600.0, 1), (3600.0, 2), (1e-9, 2)):
        monkeypatch.setattr(module, "_COMPILE_AFTER", after)
        assert torch.equal(add(torch.zeros(3)), torch.ones(3))
        assert len(calls) == expected


def test_an_error_of_the_compiler_ends_no_run(monkeypatch):
    """Such as a cache that cannot be written, or a stance of torch.compile that forbids what is new."""
    compilations: list[int] = []

    def forbidden(graph, inputs):
        compilations.append(1)
        raise NotADirectoryError("the compiler's cache")

    monkeypatch.setattr(module, "_COMPILE_AFTER", 0.0)
    monkeypatch.setattr(module, "_compiler_errors", lambda: (ZeroDivisionError,))
    add = module.compiled_later(lambda x: x + 1.0, lambda x: x + 2.0, backend=forbidden)
    with pytest.warns(RuntimeWarning, match="not compiled, which is slower: BackendCompilerFailed"):
        assert add(torch.zeros(1)).item() == 2.0
    assert add(torch.zeros(1)).item() == 2.0
    assert len(compilations) == 1
    assert module._eager_on == set()


def test_an_interrupted_compiler_is_not_asked_again(monkeypatch):
    """Guards against a compiler that was imported by half, which raises for ever after; but a loop that was
    interrupted while it ran stays compiled."""
    interrupt = True

    def backend_of(graph, inputs):
        def run(*inputs):
            if interrupt:
                raise KeyboardInterrupt
            return graph(*inputs)

        return run

    monkeypatch.setattr(module, "_COMPILE_AFTER", 0.0)
    first, later = (
        module.compiled_later(lambda x: x + 1.0, lambda x: x + 2.0, backend=backend_of) for _ in range(2)
    )
    with pytest.raises(KeyboardInterrupt):
        first(torch.zeros(1))
    interrupt = False
    assert first(torch.zeros(1)).item() == 2.0
    torch._dynamo.reset()
    assert later(torch.zeros(1)).item() == 1.0
    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        later(torch.zeros(1))
    interrupt = False
    assert later(torch.zeros(1)).item() == 1.0


def test_a_kernel_that_no_longer_fits_gives_way_to_the_reference() -> None:
    """Guards against OutOfResources, which Triton raises at the launch, on GPUs with less shared memory."""
    error = RuntimeError("out of resource: shared memory")
    with pytest.warns(RuntimeWarning, match="double runs in plain torch: out of resource"):
        assert module._without_kernel("double", error, abs)(-2) == 2
    with backend("triton"), pytest.raises(RuntimeError, match="out of resource"):
        module._without_kernel("double", error, abs)
    if HAS_TRITON:
        from triton.runtime.errors import OutOfResources

        assert (OutOfResources,) == module._OUT_OF_RESOURCES


@interpreter
def test_what_gave_way_is_told_to_who_asked() -> None:
    """By an op whose launch fails, in its own thread; and to nobody once the block is left."""
    from triton.runtime.errors import OutOfResources

    def no_room(x: Tensor) -> Tensor:
        module._backend = None  # automatic, as on a GPU; `backend` puts back what was before it
        raise OutOfResources(300_000, 232_448, "shared memory")

    op = register_op(
        "test_no_room",
        "(Tensor x) -> Tensor",
        launcher=no_room,
        fake=torch.empty_like,
        reference=lambda x: 2 * x,
    )

    def call() -> None:
        with backend("triton"), pytest.warns(RuntimeWarning, match="test_no_room runs in plain torch"):
            assert torch.equal(op(torch.ones(3)), torch.full((3,), 2.0))

    with module.kernels_that_give_way() as outer:
        with module.kernels_that_give_way() as inner:
            call()
        assert outer == []
        assert len(inner) == 1
        assert inner[0].startswith("test_no_room: out of resource")
        elsewhere = threading.Thread(target=lambda: outer.append(str(module._given_way.get())))
        elsewhere.start()
        elsewhere.join()
        assert outer == ["None"]
    call()
    assert len(inner) == 1
    assert outer == ["None"]
