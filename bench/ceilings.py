"""What this device can do at most, measured in the same run: copying, matrix products, and making noise.

The fastest of many calls, as nothing but the device is asked for. A share of them may exceed 1, where a
problem does less than the ceiling's own call: what stays in a cache is not copied through memory, and noise
that is used up at once is not written.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.machine import DEVICE, ON_CUDA, synchronise, wall_seconds
from evalp_fast.kernels.matmul_precision import matmul_precision
from evalp_fast.kernels.philox import Stream, normal

_ROUNDS = 25
_SIDE = 8192 if ON_CUDA else 1536


def _seconds(call: Callable[[], Any], rounds: int = _ROUNDS) -> float:
    call()
    if not ON_CUDA:
        return min(wall_seconds(call) for _ in range(rounds))
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        synchronise()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copying a buffer of 1 GiB (256 MiB on the CPU)."""
    source = torch.zeros(1 << 30 if ON_CUDA else 1 << 28, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source))


_asked_for: list[str] = []


@functools.cache
def matrix_rate(precision: str) -> float:
    """FLOP per second of one large square product; `tf32` on a CPU is float32."""
    _asked_for.append(precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(_SIDE, _SIDE, device=DEVICE).to(dtype) for _ in range(2))
    with matmul_precision(precision):
        return 2 * _SIDE**3 / _seconds(lambda: a @ b, 10)


@functools.cache
def noise_rate() -> float:
    """Standard normals per second that are written to memory and nothing else, by the fastest way.

    Those are `torch.randn`, and this package's counter-based normals: compiled, or on a GPU its kernel. On a
    CPU 4 MiB of them, as the problems there draw: more would leave the cache, and be slower.
    """
    width, rows = 128, 1 << 20 if ON_CUDA else 1 << 13
    index = torch.arange(rows, device=DEVICE)

    def ours(index: Tensor) -> Tensor:
        return normal(0, index, 0, Stream.PROPOSAL, width)

    ways: list[Callable[[], Any]] = [lambda: torch.randn(rows, width, device=DEVICE)]
    with contextlib.suppress(Exception):  # where torch cannot compile, torch.randn is what there is
        function = ours if ON_CUDA else torch.compile(ours, dynamic=False)
        function(index)
        ways.append(lambda: function(index))
    return rows * width / min(_seconds(way) for way in ways)


def known() -> dict[str, float]:
    """Those that were measured so far, by name, in units per second."""
    found = {f"matrix_{p}_flops": matrix_rate(p) for p in _asked_for}
    if copy_bandwidth.cache_info().currsize:
        found["copy_bytes"] = copy_bandwidth()
    if noise_rate.cache_info().currsize:
        found["normals"] = noise_rate()
    return found
