"""Powers of two that a row's exponentials are scaled by, so that another scale costs no rounding."""

from __future__ import annotations

import triton
import triton.language as tl

# The exponent of a row without a finite logit so far: below any other, and a number.
NO_EXPONENT = tl.constexpr(-1e300)


@triton.jit
def power_parts(top, some, base):
    """top/(τ ln 2) = k + f with k whole and −1 < f ≤ 0.

    Args:
        top: float32, finite: the largest logit of a row.
        some: whether the row has a finite one.
        base: of :func:`~.exponential.exp_base`.
    Returns:
        k float64, NO_EXPONENT unless ``some``; f float32.
    """
    wide = top.to(tl.float64)
    power = wide * base[0] + wide * base[1]
    exponent = tl.ceil(power)
    return tl.where(some, exponent, NO_EXPONENT), (power - exponent).to(tl.float32)


@triton.jit
def power_of_two(whole):
    """2ⁿ of whole numbers n ≤ 0, float64: float32, 0 below 2⁻¹²⁶."""
    bounded = tl.maximum(whole, -127.0).to(tl.int32)
    return ((bounded + 127) << 23).to(tl.float32, bitcast=True)
