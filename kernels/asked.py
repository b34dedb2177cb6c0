"""What a backward pass asks of an `autograd.Function`.

`ctx.needs_input_grad` says which inputs have a gradient at all. torch's own operations compute of these the
ones that the pass at hand is for: `torch.autograd.grad(f, z)`, of which a chain of Langevin is made, wants
nothing of the weights. A function that does as they do has to ask the engine.
"""

from itertools import compress
from typing import Any

import torch

from .checks import compiling

# Private, and older than any version that is supported: where it has moved, all gradients are computed.
_executes: Any = getattr(torch._C, "_will_engine_execute_node", None)


def any_is_asked_for(ctx: Any, first: int, end: int) -> bool:
    """Whether the backward pass that runs wants the gradient of one of the inputs `first .. end-1`."""
    needed = ctx.needs_input_grad
    if _executes is None or compiling() or not any(needed[first:end]):
        return any(needed[first:end])
    # One edge for each input that is a tensor, and a node on those that need a gradient.
    nodes = [node for node, _ in getattr(ctx, "next_functions", ()) if node is not None]
    if len(nodes) != sum(needed):
        return True
    places = compress(range(len(needed)), needed)
    return any(_is_executed(node) for place, node in zip(places, nodes, strict=True) if first <= place < end)


def _is_executed(node: Any) -> bool:
    try:
        return _executes(node)
    except RuntimeError:  # a leaf whose gradient `torch.autograd.grad` returns, or no engine that could tell
        return True


__all__ = ["any_is_asked_for"]
