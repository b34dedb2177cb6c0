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
    """The rows of each call of the reference."""
    calls: list[int] = []

    def counted(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        calls.append(x.shape[0])
        return affine_coupling_reference(x, *rest)

    monkeypatch.setattr(coupling_cpu, "affine_coupling_reference", counted)
    return calls


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
    """Rows in parts of 64, whole or not, are the rows at once, bit for bit; also where a wider tensor's
    half is read. Guards against a mask that is not cut as the rows are."""
    monkeypatch.setattr(coupling_cpu, "_ELEMENTS", 65 * math.prod(shape[1:]))
    wide = inputs(*shape[:-1], 2 * shape[-1])
    x, log_scale, shift = (tensor[..., : shape[-1]] for tensor in wide)
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    chosen = {"none": None, "shared": masks[:1].sum(0) > 0, "one row": masks[:1], "every sample": masks}[mask]
    if chosen is not None and chosen.shape[0] == 0:
        chosen = None
    y, log_det = affine_coupling(x, log_scale, shift, inverse=inverse, clamp=clamp, mask=chosen)
    exact = affine_coupling_reference(x, log_scale, shift, chosen, clamp, inverse)
    assert torch.equal(y, exact[0])
    assert torch.equal(log_det, exact[1])
    rest = shape[0] % 64
    assert parts == ([64] * (shape[0] // 64) + [rest] * (rest > 0) or [0])


def test_long_rows_are_not_parted(parts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which 64 are too much for a part: a sum would be cut between threads, by its place in the batch."""
    monkeypatch.setattr(coupling_cpu, "_ELEMENTS", 63 * 5)
    affine_coupling(*inputs(200, 5))
    assert parts == [200]
