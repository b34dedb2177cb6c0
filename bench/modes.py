"""One function in torch's ways to run it: eager, and compiled by Inductor, default and max-autotune."""

from collections.abc import Callable
from typing import Any

from bench import textbook
from bench.harness import Call, Precision, Provider
from bench.machine import DEVICE, ON_CUDA
from bench.sizes import Scale
from evalp_fast.kernels.processor import precision_on

Make = Callable[[textbook.Linear, str | None], Callable[[Any], Call]]
"""`(product, mode)` to a provider's `make`; mode is None (eager), `"default"` or `"max-autotune"`."""

PRODUCTS: dict[Precision, textbook.Linear] = {"ieee": textbook.linear, "bf16": textbook.linear_bf16}
# Of these the quickest on this device: what a CPU's `small` compiles.
QUICKEST: Precision = precision_on(DEVICE, "bf16")


def suffix(precision: Precision) -> str:
    """Of a provider's name."""
    return "" if precision == "ieee" else f" {precision}"


def tuned() -> str | None:
    """For what is compiled with max-autotune."""
    return None if ON_CUDA else "max-autotune is left out on a CPU, where it takes minutes"


def not_at_small(scale: Scale, reason: str) -> Callable[[], str | None]:
    """For what a CPU's `small`, which has five minutes, leaves out."""
    return lambda: None if ON_CUDA or scale != "small" else f"left out of small on a CPU: {reason}"


def in_modes(
    make: Make, scale: Scale, *, small: tuple[tuple[str, Precision], ...] = (), name: str = "torch"
) -> list[Provider]:
    """Eager, compiled, and compiled with max-autotune, each with float32 and with bfloat16 products.

    On a CPU there is no max-autotune, and of the compiled ones `small` has those named in `small`.
    """
    found = []
    for mode, label in ((None, " eager"), ("default", ".compile"), ("max-autotune", ".compile max-autotune")):
        for precision, product in PRODUCTS.items():
            missing: Callable[[], str | None] = lambda: None  # noqa: E731
            if mode == "max-autotune":
                missing = tuned
            elif mode is not None and (mode, precision) not in small:
                missing = not_at_small(scale, "compiling it takes too long")
            found.append(
                Provider(
                    f"{name}{label}{suffix(precision)}",
                    make(product, mode),
                    precision,
                    missing,
                    compiles=mode is not None,
                )
            )
    return found
