"""exp for float32 to the last bits, which the hardware's approximation loses far from 0."""

from __future__ import annotations

import functools
import math
import struct

import triton
import triton.language as tl


@triton.jit
def tempered_exp(difference, base):
    """exp(difference / τ) for differences of at most 0: exactly 1 at 0; 0 below 2⁻¹²⁶, for −inf and NaN.

    Eight instructions: difference / (τ ln 2) in a whole part, which is the exponent's bits, and a rest for
    the hardware's exp2, which errs there by 2 ulp. Products that could be contracted with a sum, or not, as
    the code around them has it, are written as fma: the same bits in every kernel.

    Args:
        difference: float32.
        base: of :func:`exp_base`.
    """
    scale, scale_low, lowest, _inverse = base
    bounded = tl.maximum(difference, lowest)
    # Adding 1.5·2²³ rounds to an integer, which then stands in the low bits of the sum; 127 is the bias.
    shifted = tl.fma(bounded, scale, 12583039.0)
    rest = tl.fma(bounded, scale_low, tl.fma(bounded, scale, 12583039.0 - shifted))
    power = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return tl.exp2(rest) * power


@triton.jit
def inverse_tau(base):
    """1/τ in float64, to 48 bits."""
    scale, scale_low, _lowest, _inverse = base
    return (tl.full((), scale, tl.float64) + tl.full((), scale_low, tl.float64)) * 0.6931471805599453


@functools.lru_cache(maxsize=64)
def exp_base(tau: float) -> tuple[float, float, float, float]:
    """1/(τ ln 2) as a float32 and what it leaves; the difference at which the power of two is 0; 1/τ."""
    scale = 1 / (tau * math.log(2))
    high = _single(scale)
    return high, _single(scale - high), _single(-127 / scale), _single(1 / tau)


def _single(number: float) -> float:
    (rounded,) = struct.unpack("f", struct.pack("f", number))
    return rounded
