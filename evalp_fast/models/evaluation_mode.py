"""Evaluation mode for as long as something is computed."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch import nn

T = TypeVar("T")


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Within the block `module` and all in it are in evaluation mode; afterwards each is in its own again.

    Where all are in it already nothing is written, so that threads can share a model which is. Others
    cannot share one that is being trained. It is the flags that are written: a `train()` of a user's own is
    not called.
    """
    # A part that TorchScript has frozen has no flag.
    training = [part for part in module.modules() if getattr(part, "training", False)]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def each_in_evaluation_mode(module: nn.Module, results: Iterable[T]) -> Iterator[T]:
    """The same results, computed in evaluation mode, which does not last while the caller has one of them."""
    remaining = iter(results)
    while True:
        with evaluation_mode(module):
            try:
                result = next(remaining)
            except StopIteration:
                return
        yield result


__all__ = ["each_in_evaluation_mode", "evaluation_mode"]
