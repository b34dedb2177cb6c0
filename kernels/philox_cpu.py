"""The noise of `philox.py` on the CPU: tiles that stay in the cache, and after a while compiled loops.

All that is done to a float32 here is a sum, a product, a root, a comparison or a move of bits. These round
alike everywhere, where logarithms and sines of libraries do not: so numpy (whose calls cost a quarter of
torch's, which decides the price of a small batch), torch, and the loops that Inductor makes of the same lines
give the same bits, and a sample does not depend on which of them drew it. The polynomials are those of
`philox_device.py`, without its fused products and sums.
"""

import enum
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .checks import compiling
from .launch import cdiv, compiled_later
from .processor import keep_freed_memory

_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF
_UNIT = 2.0**-32
# Below this uniform an exponential is -log1p(-v), above it -log of the complementary word's uniform.
_SMALL = 0.25
# Blocks of four numbers that are drawn at a time: by numpy in int64 arrays of 128 KiB, by a compiled loop,
# whose call costs more, in arrays of 1 MiB.
_NUMPY_BLOCKS = 1 << 14
_LOOP_BLOCKS = 1 << 17

Words: TypeAlias = tuple[Any, ...]


class Kind(enum.IntEnum):
    """What is made of the words. The kernel reads the value."""

    WORDS = 0
    UNIFORM = 1
    NORMAL = 2
    EXPONENTIAL = 3
    FINE_UNIFORM = 4  # of two words, and on the CPU only: see `fine_uniform`


# --- words and what is made of them, of int64 torch tensors or numpy arrays ---------------------------------


def philox_rounds(c0: Any, c1: Any, c2: Any, c3: Any, keys: Sequence[tuple[Any, Any]]) -> Words:
    """Philox4x32 with one round for each pair of keys, of counters that broadcast together."""
    for k0, k1 in keys:
        # The product wraps in int64; its 64 bits are the right ones. Its low word is masked only at the end,
        # because until then it is used in nothing but the exclusive or that is masked.
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c2 = (p1 >> 32) ^ c1, (p0 >> 32) ^ c3
        c0 ^= k0
        c0 &= MASK
        c2 ^= k1
        c2 &= MASK
        c1, c3 = p1, p0
    return c0, c1 & MASK, c2, c3 & MASK


def round_keys(low: Any, high: Any) -> list[tuple[Any, Any]]:
    """The key of each round, from the two words of the seed."""
    return [((low + r * _WEYL_0) & MASK, (high + r * _WEYL_1) & MASK) for r in range(_ROUNDS)]


def _namespace(array: Any) -> Any:
    return np if isinstance(array, np.ndarray) else torch


def _uniform(word: Any) -> Any:
    """(word + 0.5)·2^-32 in float32."""
    single = word.astype(np.float32) if isinstance(word, np.ndarray) else word.to(torch.float32)
    single += 0.5
    single *= _UNIT
    return single


def _polynomial(x: Any, *coefficients: float) -> Any:
    """By Horner's rule, the highest power first; in place, which in a cache takes two thirds of the time."""
    p = x * coefficients[0]
    for coefficient in coefficients[1:-1]:
        p += coefficient
        p *= x
    p += coefficients[-1]
    return p


def _split_float(x: Any) -> tuple[Any, Any]:
    """x = (1 + f)·2^e with f in [-1/3, 1/3): f and e, of a positive normal float32."""
    xp = _namespace(x)
    bits = x.view(xp.int32)
    exponent = (bits - 0x3F2AAAAB) & -0x800000
    power = exponent >> 23
    power = power.astype(np.float32) if xp is np else power.to(torch.float32)
    return (bits - exponent).view(xp.float32) - 1.0, power


def _select(mask: Any, x: Any, y: Any) -> Any:
    """The bits of float32 x where the int32 mask is -1, of y where it is 0: numpy's `where` takes a branch
    for each number, which the processor guesses wrong every other time."""
    xp = _namespace(x)
    x, y = x.view(xp.int32), y.view(xp.int32)
    return ((x ^ y) & mask) ^ y


def _log_of_split(f: Any, e: Any) -> Any:
    """e·log 2 + log(1 + f): `philox_device.py` says of which fit."""
    p = _polynomial(
        f,
        -0.12891601026058197,
        0.13984467089176178,
        -0.12184277921915054,
        0.14005862176418304,
        -0.16680486500263214,
        0.20010405778884888,
        -0.24999797344207764,
        0.3333321511745453,
        -0.5,
    )
    p *= f * f
    p += f
    p += e * 0.6931471805599453
    return p


def _root(x: Any) -> Any:
    """The square root, rounded once, which torch's own in float32, where it is a library's, may not be."""
    return np.sqrt(x) if isinstance(x, np.ndarray) else torch.sqrt(x.to(torch.float64)).to(torch.float32)


def _box_muller(radius_word: Any, angle_word: Any, root: Any = _root) -> tuple[Any, Any]:
    """Two normals from two words: radius sqrt(-2·log u), angle 2π·u'."""
    xp = _namespace(radius_word)
    radius = root(_log_of_split(*_split_float(_uniform(radius_word))) * -2.0)
    # The angle less the nearest quarter turn, in two parts, of which the first is exact.
    u = _uniform(angle_word)
    quarter = u * 4.0 + 12582912.0
    turn = quarter.view(xp.int32)
    quarter = quarter - 12582912.0
    r = (u * (2.0 * math.pi) - quarter * 1.5707931518554688) - quarter * 3.1749393656355096e-06
    square = r * r
    sine = _polynomial(square, -0.0001951697638844434, 0.008332175836417162, -0.16666654908421313)
    sine *= square
    sine *= r
    sine += r
    cosine = _polynomial(
        square, 2.4438089018606606e-05, -0.0013887364466143427, 0.04166664680672495, -0.5, 1.0
    )
    odd = -(turn & 1)
    # Cosine is negative in quarters 1 and 2, sine in 2 and 3: move the bit to the sign.
    x = _select(odd, sine, cosine) ^ (((turn + 1) & 2) << 30)
    y = _select(odd, cosine, sine) ^ ((turn & 2) << 30)
    return radius * x.view(xp.float32), radius * y.view(xp.float32)


def _exponential(word: Any) -> Any:
    """-log(1 - v), accurate relative to its size at both ends."""
    v = _uniform(word)
    f, e = _split_float(_uniform(MASK - word))
    # A small v is exact where 1 - v is not; e is 0 there, because 1 - v is above 2/3.
    xp = _namespace(word)
    small = (v - _SMALL).view(xp.int32) >> 31
    return -_log_of_split(_select(small, -v, f).view(xp.float32), e)


def fine_uniform(first: Any, second: Any) -> Any:
    """(k + 1/2)·2^-52 with the 52 leading bits k of two words: float64, strictly between 0 and 1."""
    bits = (first << 20) | (second >> 12)
    return (
        (bits.astype(np.float64) if isinstance(bits, np.ndarray) else bits.to(torch.float64)) + 0.5
    ) * 2.0**-52


def numbers(kind: int, words: Words, root: Any = _root) -> tuple[Any, ...]:
    """The columns of each block from its four words: float32, or the words themselves.

    `root` is a square root that rounds once.
    """
    w0, w1, w2, w3 = words
    if kind == Kind.WORDS:
        return words
    if kind == Kind.UNIFORM:
        return _uniform(w0), _uniform(w1), _uniform(w2), _uniform(w3)
    if kind == Kind.NORMAL:
        return (*_box_muller(w0, w1, root), *_box_muller(w2, w3, root))
    if kind == Kind.FINE_UNIFORM:
        return fine_uniform(w0, w1), fine_uniform(w2, w3)
    return _exponential(w0), _exponential(w1), _exponential(w2), _exponential(w3)


def double_numbers(kind: int, words: Words) -> tuple[Tensor, ...]:
    """The same in float64, by the textbook's formulas: what `numbers` approximates."""
    if kind == Kind.WORDS:
        return words
    u = [(word.to(torch.float64) + 0.5) * _UNIT for word in words]
    if kind == Kind.UNIFORM:
        return tuple(u)
    if kind == Kind.NORMAL:
        turns = [(torch.sqrt(-2.0 * torch.log(u[k])), (2.0 * math.pi) * u[k + 1]) for k in (0, 2)]
        return tuple(radius * of(angle) for radius, angle in turns for of in (torch.cos, torch.sin))
    # A small uniform is exact where 1 - u is not.
    rest = [(MASK - word).to(torch.float64) + 0.5 for word in words]
    return tuple(
        torch.where(v < _SMALL, -torch.log1p(-v), -torch.log(r * _UNIT)) for v, r in zip(u, rest, strict=True)
    )


# --- tiles --------------------------------------------------------------------------------------------------


def _planes(kind: int, words: Words) -> tuple[Any, ...]:
    """`numbers` of numpy's words, of several at a time: half the calls."""
    if kind in (Kind.WORDS, Kind.FINE_UNIFORM):
        return numbers(kind, words)
    if kind == Kind.NORMAL:
        x, y = _box_muller(np.stack(words[::2]), np.stack(words[1::2]))
        return x[0], y[0], x[1], y[1]
    return tuple((_uniform if kind == Kind.UNIFORM else _exponential)(np.stack(words)))


# Columns of a block and their type, where not four of float32.
_LAYOUT: dict[int, tuple[int, Any]] = {Kind.WORDS: (4, np.int64), Kind.FINE_UNIFORM: (2, np.float64)}


def _by_numpy(kind: int) -> Any:
    """The uncompiled form of a tile."""

    def tile(*arguments: Tensor) -> Tensor:
        keep_freed_memory()
        c0, c1, c2, c3, keys = (argument.numpy() for argument in arguments)
        columns, dtype = _LAYOUT.get(kind, (4, np.float32))
        out = np.empty((len(c1), len(c0), columns), dtype)
        width = max(min(len(c0), _NUMPY_BLOCKS), 1)
        height = max(_NUMPY_BLOCKS // width, 1)
        pairs = keys.tolist()
        for top in range(0, len(c1), height):
            down = slice(top, top + height)
            counters = c1[down, None], c2[down, None], c3[down, None]
            for left in range(0, len(c0), width):
                across = slice(left, left + width)
                words = philox_rounds(c0[None, across], *counters, pairs)
                for k, plane in enumerate(_planes(kind, words)):
                    out[down, across, k] = plane
        return torch.from_numpy(out)

    return tile


def _by_torch(kind: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, keys: Tensor) -> Tensor:
    """What is compiled; run as it is, past the compiler's limit of variants, it would round otherwise."""
    if not compiling():
        return _by_numpy(kind)(c0, c1, c2, c3, keys)
    pairs = [(keys[r, 0], keys[r, 1]) for r in range(_ROUNDS)]
    words = philox_rounds(c0[None, :], c1[:, None], c2[:, None], c3[:, None], pairs)
    # Inductor's root is the processor's, and twice as fast as one in float64.
    return torch.stack(numbers(kind, words, torch.sqrt), dim=-1)


# A function for each kind: the compiler counts how often it has compiled one.
def _tile_of_words(*arguments: Tensor) -> Tensor:
    return _by_torch(Kind.WORDS, *arguments)


def _tile_of_uniforms(*arguments: Tensor) -> Tensor:
    return _by_torch(Kind.UNIFORM, *arguments)


def _tile_of_normals(*arguments: Tensor) -> Tensor:
    return _by_torch(Kind.NORMAL, *arguments)


def _tile_of_exponentials(*arguments: Tensor) -> Tensor:
    return _by_torch(Kind.EXPONENTIAL, *arguments)


def _tile_of_fine_uniforms(*arguments: Tensor) -> Tensor:
    return _by_torch(Kind.FINE_UNIFORM, *arguments)


# A user's settings of Inductor must not change a bit.
_EXACT = {"cpp.enable_floating_point_contract_flag": "off", "cpp.enable_unsafe_math_opt_flag": False}
_TILES = {
    kind: compiled_later(tile, _by_numpy(kind), dynamic=True, options=_EXACT)
    for kind, tile in (
        (Kind.WORDS, _tile_of_words),
        (Kind.UNIFORM, _tile_of_uniforms),
        (Kind.NORMAL, _tile_of_normals),
        (Kind.EXPONENTIAL, _tile_of_exponentials),
        (Kind.FINE_UNIFORM, _tile_of_fine_uniforms),
    )
}


def draw_on_cpu(
    index: Tensor,
    rows: int | None,
    seed_tensor: Tensor | None,
    seed: int,
    step_tensor: Tensor | None,
    step: int,
    kind: int,
    stream: int,
    width: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """What `philox.draw_reference` computes, tile by tile: elementwise, so that tiles change no bit."""
    per_block = 2 if kind == Kind.FINE_UNIFORM else 4
    count, blocks = index.shape[0] if rows is None else rows, cdiv(width, per_block)
    double = dtype == torch.float64 and kind != Kind.FINE_UNIFORM
    if out is None and (double or count * blocks > _LOOP_BLOCKS):
        out = torch.empty((count, width), dtype=dtype, device=index.device)
    seed = seed if seed_tensor is None else int(seed_tensor.item())
    keys = torch.tensor(round_keys(seed & MASK, (seed >> 32) & MASK), device=index.device)
    if rows is not None:
        index = torch.arange(int(index), int(index) + rows, device=index.device)
    if step_tensor is None:
        step_tensor = torch.full((1,), step, device=index.device)
    steps = step_tensor.reshape(-1) & MASK
    counters = index & MASK, steps.expand(count).contiguous(), ((index >> 32) << 8) | stream
    column = torch.arange(blocks, device=index.device)
    draw = _TILES[Kind.WORDS if double else Kind(kind)]
    if out is None:
        return draw(column, *counters, keys).flatten(1)[:, :width].to(dtype).contiguous()
    across = max(min(blocks, _LOOP_BLOCKS), 1)
    down = max(_LOOP_BLOCKS // across, 1)
    for top in range(0, count, down):
        # Copies: a view is compiled anew.
        rest = [counter[top : top + down].clone() for counter in counters]
        for left in range(0, blocks, across):
            tile = draw(column[left : left + across].clone(), *rest, keys)
            if double:
                tile = torch.stack(double_numbers(kind, tile.unbind(-1)), dim=-1)
            target = out[top : top + down, per_block * left : per_block * (left + across)]
            target.copy_(tile.flatten(1)[:, : target.shape[1]])
    return out


__all__ = [
    "MASK",
    "Kind",
    "double_numbers",
    "draw_on_cpu",
    "fine_uniform",
    "numbers",
    "philox_rounds",
    "round_keys",
]
