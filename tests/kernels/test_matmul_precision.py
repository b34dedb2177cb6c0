"""TF32 within a block, and torch's settings after it, by whichever of torch's functions they were made."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from evalp_fast.kernels.matmul_precision import matmul_precision

CUDA, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


def set_to(owner: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(owner, name, value)


SETTINGS: dict[str, Callable[[], Any]] = {
    "torch's own": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older, products": set_to(CUDA, "allow_tf32", True),
    "older, convolutions": set_to(CUDNN, "allow_tf32", False),
    "newer, products": set_to(CUDA, "fp32_precision", "tf32"),
    "newer, convolutions": set_to(CUDNN.conv, "fp32_precision", "ieee"),
    "newer, all": set_to(torch.backends, "fp32_precision", "tf32"),
    "newer, CPU": set_to(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
}


def told(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return "not told"


def settings() -> list[Any]:
    """All that torch tells of them, or that it does not."""
    owners = (CUDA, CUDNN.conv, CUDNN.rnn, CUDNN, torch.backends.mkldnn.matmul, torch.backends)
    older = (torch.get_float32_matmul_precision, lambda: CUDA.allow_tf32, lambda: CUDNN.allow_tf32)
    return [owner.fp32_precision for owner in owners] + [told(read) for read in older]


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if CUDA was in use; and torch's settings as they were."""
    owners = (torch.backends, CUDNN, CUDA, CUDNN.conv, CUDNN.rnn, torch.backends.mkldnn.matmul)
    before = [owner.fp32_precision for owner in owners]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    yield
    torch.set_float32_matmul_precision("highest")
    CUDNN.allow_tf32 = True
    for owner, value in zip(owners, before, strict=True):
        owner.fp32_precision = value  # type: ignore[attr-defined]


@pytest.mark.parametrize("precision", ["tf32", "ieee", "bf16", None])
@pytest.mark.parametrize("made", SETTINGS.values(), ids=SETTINGS)
def test_settings_are_of_the_block(made: Callable[[], Any], precision: Any, on_cuda: None) -> None:
    """Guards against torch's two sets of functions, of which one raises after the other; and against what is
    left behind, also where the block raises."""
    made()
    before = settings()
    with contextlib.suppress(KeyError), matmul_precision(precision):
        inside = {setting.fp32_precision for setting in (CUDA, CUDNN.conv, CUDNN.rnn)}
        assert inside == {"tf32" if precision == "tf32" else "ieee"}
        assert {CUDA.allow_tf32, CUDNN.allow_tf32} == {precision == "tf32"}, "what Inductor may read"
        raise KeyError
    assert all(old in (new, "not told") for old, new in zip(before, settings(), strict=True))


def test_without_cuda_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled function would be compiled anew for another setting."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    before = settings()
    with matmul_precision("tf32"):
        assert settings() == before
