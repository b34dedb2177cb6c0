"""Weights as the CPU's products read them: rounded, in oneDNN's order, and kept until they change.

To put a matrix in that order takes as long as a product with a thousand rows, and makes every product with it
a tenth faster, to the same bits or to others (by the version of oneDNN). So it is done always, and once: the
result is kept with the tensor, beside a copy of the numbers that it was made from. A call compares the two. A
version counter would be quicker, but what is written to `weight.data` does not count, as averages of weights
are often swapped in; a sample of the weights before would be wrong without a word.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .processor import FUSES

# The order may depend on the number of rows that it is for. One for all, so that it is no part of the result.
_ROWS = 4096


class Matrices(NamedTuple):
    """A stack of weights `[..., outs, ins]` for `mlp_cpu`.

    Attributes:
        each: the matrices, one by one: `[outs, ins]`, or `[ins, outs]` where they are transposed.
        norm: the largest sum of a row's absolute values; products of x are at most that times max|x|.
    """

    each: tuple[Tensor, ...]
    norm: float


class _Kept(NamedTuple):
    numbers: Tensor
    forms: dict[tuple[torch.dtype, bool], Matrices]


_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _matrices(weight: Tensor, dtype: torch.dtype, transposed: bool) -> Matrices:
    weight = weight.to(dtype)
    if transposed:
        weight = weight.transpose(-1, -2)
    norm = weight.abs().sum(-1, dtype=torch.float32).amax().item() if weight.numel() else 0.0
    each = weight.flatten(0, -3).unbind(0) if weight.ndim > 2 else (weight,)
    if FUSES[dtype]:
        each = tuple(torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), _ROWS) for matrix in each)
    return Matrices(each, norm)


def _unchanged(kept: Tensor, now: Tensor) -> bool:
    """Whether the numbers of `now` are those of its copy `kept`; said of NaN only where bits are compared."""
    if kept.shape != now.shape or kept.dtype != now.dtype:
        return False
    places = now.nbytes, now.data_ptr(), now.storage_offset() * now.element_size()
    if now.is_contiguous() and not now.is_neg() and all(place % 8 == 0 for place in places):
        # Eight bytes at a time, which halves the time that it takes.
        kept, now = (tensor.detach().flatten().view(torch.int64) for tensor in (kept, now))
    return torch.equal(kept, now)


@torch.no_grad()
def kept_matrices(weight: Tensor, precision: str, *, transposed: bool = False) -> Matrices:
    """The matrices of `weight` `[..., outs, ins]`, float32 or bfloat16, in the type of the products.

    Made anew where a number of `weight` is not what it was. No gradients.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    kept = _kept.get(weight)
    if kept is None or not _unchanged(kept.numbers, weight):
        kept = _kept[weight] = _Kept(weight.clone(), {})
    found = kept.forms.get((dtype, transposed))
    if found is None:
        found = kept.forms[dtype, transposed] = _matrices(weight, dtype, transposed)
    return found


__all__ = ["Matrices", "kept_matrices"]
