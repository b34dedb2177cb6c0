"""Networks whose matrix products are in the precision that the caller asks for."""

from typing import Any, get_args

import torch
from torch import Tensor, nn

from evalp_fast.kernels.mlp_device import Precision
from evalp_fast.kernels.weights_gpu import Kept, bfloat16_copies

PRECISIONS: tuple[str, ...] = get_args(Precision)


def check_precision(precision: str | None) -> None:
    """Raise `ValueError` unless `precision` is None (a default) or one of `PRECISIONS`."""
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def has_own_call(module: nn.Module) -> bool:
    """Whether a call of `module` is more than its class's forward: by hooks of its own (those of all modules
    are not looked at), or by a forward or a call it was given."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    called = type(module).__call__ is not nn.Module.__call__
    return any(hooks) or called or "forward" in vars(module)


class RoundedNetwork(nn.Module):
    """A network whose matrices may be read in bfloat16. On a GPU it keeps copies of them, which every call
    brings up to date, whoever wrote the weights and however (`weights_gpu.py`); on a CPU the kernels keep
    them, in another order (`weights_cpu.py`). They are neither saved nor copied with it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: Kept = {}

    def _rounded(self, weights: tuple[Tensor, ...], precision: Precision | None) -> tuple[Tensor, ...]:
        """bfloat16 copies with `"bf16"` on a GPU; else, or where autograd records, the weights themselves."""
        recorded = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        if precision != "bf16" or recorded or weights[0].device.type == "cpu":
            return weights
        return bfloat16_copies(weights, self._kept)

    def unseen(self) -> str | None:
        """What a call does that a kernel, which reads weights, does not see; None where that is nothing."""
        return "has hooks, or a forward of its own" if has_own_call(self) else None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept.clear()  # the weights go elsewhere
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_kept": {}}
