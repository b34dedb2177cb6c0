"""Matrix products in the precision that the caller asks for; everything else stays in float32."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Precision = Literal["ieee", "tf32", "bf16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


def check_precision(precision: str | None) -> None:
    """Raise `ValueError` unless `precision` is None (the default, `"ieee"`) or one of `PRECISIONS`."""
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def linear(x: Tensor, weight: Tensor, bias: Tensor, precision: Precision | None = None) -> Tensor:
    """`x @ weight.T + bias` with the product in `precision`; result and bias are in `x`'s dtype.

    `"bf16"` rounds both operands to bfloat16. `"tf32"` is float32 here: on CUDA the caller enters
    `matmul_precision`, because torch keeps that choice in a global setting.
    """
    if precision == "bf16":
        return F.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype) + bias
    return F.linear(x, weight, bias)


class matmul_precision:
    """Within the block float32 products on CUDA run in TF32 (`"tf32"`) or in full float32 (otherwise)."""

    def __init__(self, precision: Precision | None):
        self.wanted = precision == "tf32"

    def __enter__(self) -> None:
        # Convolutions have a switch of their own, which torch leaves on by default.
        self.before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.wanted

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before
