"""Affine coupling on a CPU in parts: the numbers of the reference on all rows at once."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from evalp_fast.kernels import coupling_cpu
from evalp_fast.kernels.coupling import affine_coupling
from evalp_fast.kernels.coupling_reference import affine_coupling_reference


def inputs(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that are worked on at a time."""
    calls: list[int] = []
    original = coupling_cpu._write_rows

    def counted(y: Tensor, *rest: Any) -> None:
        calls.append(y.shape[0])
        original(y, *rest)

    monkeypatch.setattr(coupling_cpu, "_write_rows", counted)
    return calls


def at_once(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many elements be worked on at a time, by three threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(coupling_cpu, "CACHE_BYTES", -(-elements // 3) * coupling_cpu._BYTES)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("clamp", [None, 1.5])
@pytest.mark.parametrize("shape", [(1, 3), (128, 3), (193, 3), (0, 3), (130, 3, 5, 7)], ids=str)
@pytest.mark.parametrize("mask", ["none", "shared", "one row", "every sample"])
def test_by_parts(
    mask: str,
    shape: tuple[int, ...],
    clamp: float | None,
    inverse: bool,
    parts: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows in parts of 64, whole or not, are the rows at once, bit for bit, and the reference's up to
    rounding; also where a wider tensor's half is read. Guards against a mask that is not cut as the rows
    are, and against writing to what was given."""
    wide = inputs(*shape[:-1], 2 * shape[-1])
    before = [tensor.clone() for tensor in wide]
    x, log_scale, shift = (tensor[..., : shape[-1]] for tensor in wide)
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    chosen = {"none": None, "shared": masks[:1].sum(0) > 0, "one row": masks[:1], "every sample": masks}[mask]
    if chosen is not None and chosen.shape[0] == 0:
        chosen = None
    arguments: dict[str, Any] = {"inverse": inverse, "clamp": clamp, "mask": chosen}
    whole = affine_coupling(x, log_scale, shift, **arguments)
    assert parts == [shape[0]] * (shape[0] > 0)
    parts.clear()
    at_once(65 * math.prod(shape[1:]), monkeypatch)
    found = affine_coupling(x, log_scale, shift, **arguments)
    rest = shape[0] % 64
    assert parts == [64] * (shape[0] // 64) + [rest] * (rest > 0)
    exact = affine_coupling_reference(x.double(), log_scale.double(), shift.double(), chosen, clamp, inverse)
    for tensor, same, right in zip(found, whole, exact, strict=True):
        assert torch.equal(tensor, same)
        assert tensor.is_contiguous() == right.is_contiguous()
        torch.testing.assert_close(tensor.double(), right, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, again) for tensor, again in zip(wide, before, strict=True))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("clamp", [0.3, 2.0, 4.0, 4.1, 1e3, 2e38])
def test_clamps_of_any_size(clamp: float, inverse: bool) -> None:
    """Also of what is far or none. Guards against a difference of large numbers: the sigmoid's error is 1e-7
    of the clamp."""
    far = torch.tensor([-math.inf, -1e30, -50.0, -1e-3, 0.0, 1e-9, 3.0, 1e4, math.inf, math.nan])
    found = coupling_cpu.clamped_log_scale(far, clamp, inverse)
    exact = (clamp * torch.tanh(far.double() / clamp)) * (-1.0 if inverse else 1.0)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=2e-7 * min(clamp, 4.0), equal_nan=True)


def test_long_rows_are_not_parted(parts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which 64 are too much for a part: a sum would be cut between threads, by its place in the batch."""
    at_once(63 * 5, monkeypatch)
    affine_coupling(*inputs(200, 5))
    assert parts == [200]
