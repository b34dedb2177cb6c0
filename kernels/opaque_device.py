"""Integers that a compiler cannot see through, for kernels that need every register.

A compiler keeps in registers, for all turns of a loop, what it could compute in each turn anew: the part of
an address that is the same in all of them, and an address that it steps from one to the next. In kernels that
hold a tile of samples in registers there is no room for that, and it spills. So these kernels have an
argument that is 0 at every launch, as the launcher knows and the compiler does not:

    for start in tl.range(...):
        own = anew(parameters, start)              # the same pointers, which end with the zero
        for done in tl.range(...):
            layer = opaque(done, own[-1])          # the same number

and what is computed from `own` and `layer` is computed in this turn. A factor of an address that the compiler
should know, for wide loads, is multiplied in behind it: `opaque(first // 32, zero) * 32`.
"""

from .launch import tl, triton


@triton.jit
def opaque(value, zero):
    """The integer `value`."""
    return value ^ zero


@triton.jit
def anew(parameters, turn):
    """A tuple of pointers that ends with the zero: the same. What comes of another `turn`, an integer, is to
    the compiler another tuple."""
    zero = (opaque(turn, parameters[-1]) * parameters[-1]).to(tl.int32)
    moved = ()
    for k in tl.static_range(len(parameters) - 1):
        moved += (parameters[k] + zero,)
    moved += (zero,)
    return moved


__all__ = ["anew", "opaque"]
