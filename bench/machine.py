"""The machine that is measured: its device, its name, its versions, its memory and its energy.

What cannot be read on a machine is None, never a guess.
"""

import contextlib
import ctypes
import functools
import gc
import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
PEERS = ("normflows", "nflows", "zuko", "FrEIA", "torchebm", "particles", "torch-fidelity")
_CPU_CACHE = 2 << 20


def synchronise() -> None:
    """Wait for the device."""
    if ON_CUDA:
        torch.cuda.synchronize()


def wall_seconds(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, from an idle device to an idle device."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def cache_bytes() -> int:
    """Size of the L2 cache; on the CPU that of one core."""
    if ON_CUDA:
        return torch.cuda.get_device_properties(DEVICE).L2_cache_size
    with contextlib.suppress(OSError, ValueError):
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) << 10
    return _CPU_CACHE


# --- names and versions -------------------------------------------------------------------------------------


def device_name() -> str:
    """`NVIDIA H200`, or the processor and its threads."""
    if ON_CUDA:
        return torch.cuda.get_device_name(DEVICE)
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        processor = found.group(1).strip() if found else processor
    return f"{processor}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """A name as a folder."""
    return re.sub("[^A-Za-z0-9]+", "-", name).strip("-").lower()


def version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout, with `-dirty` where tracked files differ from it."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        found = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


@functools.cache
def environment() -> dict[str, Any]:
    """What a figure belongs to."""
    packages = ("torch", "triton", "numpy", *PEERS)
    facts: dict[str, Any] = {
        "device": device_name(),
        "python": platform.python_version(),
        "commit": commit(),
        "versions": {package: version(package) for package in packages},
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if ON_CUDA:
        facts |= {"cuda": torch.version.cuda, "hip": torch.version.hip, **nvml_facts()}
    return facts


# --- memory -------------------------------------------------------------------------------------------------


def free_memory() -> int | None:
    """Bytes of the host's memory that are there to be taken."""
    with contextlib.suppress(OSError):
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return None if found is None else int(found.group(1)) << 10
    return None


class Memory(NamedTuple):
    """Peak bytes of one call above what was held before it, and where that was read."""

    peak: int | None
    kind: str
    device: int | None
    """Bytes of the device in use after the call, by NVML; None on a CPU. That is what torch's allocator holds
    since its peak, as it gives nothing back by itself, the context, the libraries and all other processes."""


def empty_cache() -> None:
    """Give memory that is not used back to the device; nothing where the device is broken."""
    if ON_CUDA:
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()


def peak_memory(call: Callable[[], Any]) -> Memory:
    """What one call needs beside its arguments, its result included."""
    gc.collect()
    if ON_CUDA:
        empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_allocated(DEVICE)
        call()
        synchronise()
        return Memory(torch.cuda.max_memory_allocated(DEVICE) - before, "allocator", nvml_memory())
    return Memory(*_peak_resident(call), None)


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) << 10


def _peak_resident(call: Callable[[], Any]) -> tuple[int | None, str]:
    # Freed memory that the C library keeps would hide what the call needs.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before), "resident"
    except (OSError, AssertionError):
        return _sampled_resident(call)


def _sampled_resident(call: Callable[[], Any]) -> tuple[int | None, str]:
    """Where the kernel does not reset its mark: a thread that looks every millisecond."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        call()
        return None, "unknown"
    page = os.sysconf("SC_PAGE_SIZE")
    peak = before = int(pages.read_text().split()[1]) * page
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, int(pages.read_text().split()[1]) * page)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
        peak = max(peak, int(pages.read_text().split()[1]) * page)
    finally:
        done.set()
        watcher.join()
    return peak - before, "resident, sampled"


# --- NVML ---------------------------------------------------------------------------------------------------


@functools.cache
def _nvml() -> tuple[Any, Any] | None:
    """The library and this device's handle, or None."""
    if not ON_CUDA:
        return None
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except Exception:
        return None
    facts: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    # CUDA_VISIBLE_DEVICES renumbers; the UUID and the place on the bus stay.
    for handle in (
        lambda: pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{facts.uuid}"),
        lambda: pynvml.nvmlDeviceGetHandleByPciBusId(
            f"{facts.pci_domain_id:08x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0"
        ),
    ):
        with contextlib.suppress(Exception):
            return pynvml, handle()
    return None


def _ask(question: Callable[[Any, Any], Any]) -> Any:
    """NVML's answer, or None where there is no NVML or the device does not know."""
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        return question(*nvml)
    except Exception:
        return None


def nvml_memory() -> int | None:
    """Bytes in use on the device."""
    return _ask(lambda library, handle: int(library.nvmlDeviceGetMemoryInfo(handle).used))


def joules() -> float | None:
    """The device's energy counter."""
    return _ask(lambda library, handle: library.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)


def _text(value: str | bytes) -> str:
    """Older versions of the library give bytes."""
    return value.decode() if isinstance(value, bytes) else value


def nvml_facts() -> dict[str, Any]:
    """Driver, power limit and highest clock."""
    return {
        "driver": _ask(lambda library, handle: _text(library.nvmlSystemGetDriverVersion())),
        "power_limit_watts": _ask(
            lambda library, handle: library.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3
        ),
        "max_sm_clock_mhz": _ask(
            lambda library, handle: library.nvmlDeviceGetMaxClockInfo(handle, library.NVML_CLOCK_SM)
        ),
    }


def draw() -> float | None:
    """Watts that the device draws, which it averages over some tenths of a second."""
    return _ask(lambda library, handle: library.nvmlDeviceGetPowerUsage(handle) / 1e3)


class Energy(NamedTuple):
    """Energy of one call, the mean power while it ran again and again, and how that was read."""

    joules: float | None
    watts: float | None
    kind: str | None
    """`counter`, or `power x time`: the mean of readings of the power, where there is no counter."""


def energy(call: Callable[[], Any], seconds: float, *, window: float = 0.5) -> Energy:
    """Energy of a call that takes about `seconds` on the device, from `window` seconds of calls.

    The window is of wall-clock time, in which the host may need longer than the device; its length is
    because the counter is coarse. At least one call is made, where there is something to read.
    """
    counted = joules()
    if counted is None and draw() is None:
        return Energy(None, None, None)
    group = max(1, round(0.05 * window / max(seconds, 1e-6)))  # calls that are queued before one waits
    synchronise()
    before, start = joules(), time.perf_counter()
    calls, powers, elapsed = 0, [], 0.0
    while elapsed < window or not calls:
        for _ in range(group):
            call()
            calls += 1
            if time.perf_counter() - start >= window:
                break
        if counted is None and (watts := draw()) is not None:
            powers.append(watts)  # before the queue is empty
        synchronise()
        elapsed = time.perf_counter() - start
    after = joules()
    if counted is not None:
        if before is None or after is None or after <= before:
            return Energy(None, None, None)
        return Energy((after - before) / calls, (after - before) / elapsed, "counter")
    if not powers:
        return Energy(None, None, None)
    watts = sum(powers) / len(powers)
    return Energy(watts * elapsed / calls, watts, "power x time")


# --- launches -----------------------------------------------------------------------------------------------


def launches(call: Callable[[], Any]) -> int | None:
    """Kernels that one call runs on the device, by torch's profiler; None on a CPU."""
    if not ON_CUDA:
        return None
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            synchronise()
        events = [e for e in profiler.events() or () if e.device_type == DeviceType.CUDA]
    except Exception:  # another profiler holds the device, or this torch was built without CUPTI
        return None
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in events)
