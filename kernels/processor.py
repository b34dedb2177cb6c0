"""What the CPU forms have to know of this processor, of torch's build for it, and of its memory."""

import functools
from collections.abc import Mapping
from typing import Any

import torch

from .launch import reference_forced, why_reference
from .mlp_device import Precision


def _fuses(dtype: torch.dtype) -> bool:
    """Whether this build and this processor have oneDNN's products that do something to their sums."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


FUSES = {dtype: _fuses(dtype) for dtype in (torch.float32, torch.bfloat16)}


def _capabilities() -> Mapping[str, Any]:
    """What torch knows of the processor. A torch that does not tell knows nothing."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def _bfloat16_pays() -> bool | None:
    """Whether this processor multiplies bfloat16 faster than float32; None where nobody has measured that.

    With AMX it does, and by AVX-512 on AMD's: in README's benchmarks flows and SIR are 1.6 to 1.8 times as
    fast on Zen 4. By AVX-512 alone on Intel's it takes longer: torch's flows, eager and compiled, 1.5 to 1.7
    times as long on an Emerald Rapids with its AMX hidden (bench/results, 2026-11-22); and longer still where
    it is emulated.
    """
    if not FUSES[torch.bfloat16]:
        return False
    known = _capabilities()
    if known.get("amx_bf16", False):
        return True
    name = known.get("cpu_name", "")
    if name.startswith("Intel"):
        return False
    return True if name.startswith("AMD") and known.get("avx512_bf16", False) else None


BFLOAT16_PAYS = _bfloat16_pays()


def _cache_bytes() -> int:
    """Of a core's second cache, where torch tells; not more than what a few cores may share."""
    return min(max(_capabilities().get("l2_cache_size", 0), 1 << 20), 4 << 20)


CACHE_BYTES = _cache_bytes()


@functools.cache
def keep_freed_memory() -> None:
    """Once in a process: let glibc keep up to 62 MiB of freed memory, for the next chunk to take.

    It returns freed memory to the system above a limit, twice the largest block up to 32 MiB that it has seen
    freed. Below that a chunk's layers are taken from the system anew at each call, and every page of them is
    cleared first, thousands a call. The block is never touched, so it costs nothing; other allocators do as
    they do.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def precision_on(device: torch.device, precision: Precision) -> Precision:
    """What is computed of `precision`, where no kernel does: on a CPU float32 for "tf32", and for "bf16" too
    where bfloat16 does not pay. The reference rounds to bfloat16 all the same where it is forced by name."""
    if device.type != "cpu" or (precision == "bf16" and (BFLOAT16_PAYS is not False or reference_forced())):
        return precision
    return "ieee"


def quick_precision(device: torch.device) -> Precision:
    """ "bf16" where that pays on a CPU, and on a GPU with Triton and matrix units for bfloat16, whose rate is
    many times that of float32 (no kernel has been timed); else "ieee". Not where the reference or the
    interpreter was asked for by name, which is to see what they compute."""
    kernels = why_reference(torch.empty(0, device=device)) is None
    if device.type == "cuda":
        return "bf16" if kernels and _has_bfloat16_units(device) else "ieee"
    plain = device.type == "cpu" and not kernels and not reference_forced()
    return "bf16" if plain and BFLOAT16_PAYS else "ieee"


def _has_bfloat16_units(gpu: torch.device) -> bool:
    known = torch.cuda.get_device_properties(gpu)
    return known.gcnArchName.startswith("gfx94") if torch.version.hip else known.major >= 8


__all__ = ["BFLOAT16_PAYS", "CACHE_BYTES", "FUSES", "keep_freed_memory", "precision_on", "quick_precision"]
