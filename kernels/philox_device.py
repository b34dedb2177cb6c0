"""Noise in registers: what a kernel calls to draw the numbers of `philox.py` without reading any from memory.

    w0, w1, w2, w3 = philox_words(seed, index, step, STREAM, block)     # columns 4·block..4·block+3
    a, b, c, d = normal4(w0, w1, w2, w3)
    values = interleave4(a, b, c, d)                                    # [rows, blocks] -> [rows, 4·blocks]

Words and uniforms have the bits of the torch reference; normals are within 1e-6 of it, exponentials within a
few units of the last place. Neither depends on the target's approximate functions or on `enable_fp_fusion`.
"""

from .launch import tl, triton

_MULTIPLIER_0, _MULTIPLIER_1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_WEYL_0, _WEYL_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
_SMALL = tl.constexpr(0.25)


@triton.jit
def philox4x32(seed_lo, seed_hi, c0, c1, c2, c3):
    """Ten rounds of Philox4x32 on uint32 words that broadcast together. Returns the four words."""
    k0, k1 = seed_lo, seed_hi
    for _ in tl.static_range(10):
        # One widening multiplication gives both halves.
        p0 = c0.to(tl.uint64) * _MULTIPLIER_0
        p1 = c2.to(tl.uint64) * _MULTIPLIER_1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += _WEYL_0
        k1 += _WEYL_1
    return c0, c1, c2, c3


@triton.jit
def philox_words(seed, index, step, stream, block):
    """The four words of columns 4·block..4·block+3, of the broadcast shape of `index`, `step` and `block`.

    `seed`, `index` and `step` are int64, `block` is int32 or int64, `stream` an int.
    """
    return philox4x32(
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
        block.to(tl.uint32),
        index.to(tl.uint32),
        step.to(tl.uint32),
        (((index >> 32) << 8) | stream).to(tl.uint32),
    )


@triton.jit
def uniform_of(word):
    """(word + 0.5)·2^-32 in float32, the bits of the reference."""
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def _split_float(x):
    """x = (1 + f)·2^e with f in [-1/3, 1/3): f and e, of a positive normal float32."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -8388608
    return (bits - exponent).to(tl.float32, bitcast=True) - 1.0, (exponent >> 23).to(tl.float32)


@triton.jit
def _log_of_split(f, e):
    """e·log 2 + log(1 + f). A minimax fit of the cubic remainder, relative error below 2^-27 before rounding.

    Triton's own logarithm is an approximation that loses the relative accuracy near 1 on some targets and a
    call of some 30 instructions on others; this one is the same everywhere.
    """
    p = tl.fma(f, -0.12891601026058197, 0.13984467089176178)
    p = tl.fma(p, f, -0.12184277921915054)
    p = tl.fma(p, f, 0.14005862176418304)
    p = tl.fma(p, f, -0.16680486500263214)
    p = tl.fma(p, f, 0.20010405778884888)
    p = tl.fma(p, f, -0.24999797344207764)
    p = tl.fma(p, f, 0.3333321511745453)
    square = f * f
    remainder = square * tl.fma(p, f, -0.5)
    return tl.fma(e, 0.6931471805599453, f + remainder)


@triton.jit
def _box_muller(radius_word, angle_word):
    """Two normals from two words: radius sqrt(-2·log u), angle 2π·u'."""
    f, e = _split_float(uniform_of(radius_word))
    radius = tl.sqrt(-2.0 * _log_of_split(f, e))
    # The angle as the reference rounds it, less the nearest quarter turn in two parts; the first is exact.
    u = uniform_of(angle_word)
    quarter = tl.fma(u, 4.0, 12582912.0)
    turn = quarter.to(tl.int32, bitcast=True)
    quarter -= 12582912.0
    r = tl.fma(quarter, -1.5707931518554688, u * 6.283185307179586)
    r = tl.fma(quarter, -3.1749393656355096e-06, r)
    square = r * r
    sine = tl.fma(tl.fma(square, -0.0001951697638844434, 0.008332175836417162), square, -0.16666654908421313)
    sine = tl.fma(sine * square, r, r)
    cosine = tl.fma(
        tl.fma(square, 2.4438089018606606e-05, -0.0013887364466143427), square, 0.04166664680672495
    )
    cosine = tl.fma(tl.fma(cosine, square, -0.5), square, 1.0)
    odd = (turn & 1) != 0
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    # Cosine is negative in quarters 1 and 2, sine in 2 and 3: move the bit to the sign.
    x = (x.to(tl.int32, bitcast=True) ^ (((turn + 1) & 2) << 30)).to(tl.float32, bitcast=True)
    y = (y.to(tl.int32, bitcast=True) ^ ((turn & 2) << 30)).to(tl.float32, bitcast=True)
    return radius * x, radius * y


@triton.jit
def _exponential_of(word):
    """-log(1 - v), accurate relative to its size at both ends."""
    v = uniform_of(word)
    f, e = _split_float(uniform_of(word ^ 0xFFFFFFFF))
    # A small v is exact where 1 - v is not; e is 0 there, because 1 - v is above 2/3.
    return -_log_of_split(tl.where(v < _SMALL, -v, f), e)


@triton.jit
def uniform4(w0, w1, w2, w3):
    """Four uniforms in (0, 1], float32, from the words of a block."""
    return uniform_of(w0), uniform_of(w1), uniform_of(w2), uniform_of(w3)


@triton.jit
def normal4(w0, w1, w2, w3):
    """Four standard normals, float32, from the words of a block."""
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def exponential4(w0, w1, w2, w3):
    """Four standard exponentials, float32, from the words of a block."""
    return _exponential_of(w0), _exponential_of(w1), _exponential_of(w2), _exponential_of(w3)


@triton.jit
def interleave4(a, b, c, d):
    """`[R, B]` four times -> `[R, 4·B]`: column 4j + k is column j of the k-th."""
    joined = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(joined, (a.shape[0], 4 * a.shape[1]))


@triton.jit
def int64_of(value, IN_MEMORY: tl.constexpr):
    """A scalar int64: an int argument, or, where IN_MEMORY, the int64 that `value` points at.

    Launchers name such arguments in `do_not_specialize`, so that their values compile nothing anew.
    """
    if IN_MEMORY:
        return tl.load(value).to(tl.int64)
    else:
        return tl.full((), value, tl.int64)  # in the interpreter it is a Python int, which has no `.to`


__all__ = [
    "exponential4",
    "int64_of",
    "interleave4",
    "normal4",
    "philox4x32",
    "philox_words",
    "uniform4",
    "uniform_of",
]
