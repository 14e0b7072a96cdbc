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

    Seven instructions: the hardware's exp2, which errs by 2 ulp wherever it is asked, of
    difference / (τ ln 2) as rounded, and what the rounding left out, r: 2ʳ = 1 + r ln 2 to the last bit,
    since |r| < 2⁻¹⁵. Products that could be contracted with a sum, or not, as the code around them has it,
    are written as fma: the same bits in every kernel.

    Args:
        difference: float32.
        base: of :func:`exp_base`.
    """
    scale, scale_low, lowest, _inverse = base
    bounded = tl.maximum(difference, lowest)
    power = bounded * scale
    # A product with −1 is the sign of an operand; Triton's negation is an instruction of its own.
    rest = tl.fma(bounded, scale_low, tl.fma(bounded, scale, power * -1.0))
    e = tl.exp2(power)
    return tl.fma(e, rest * 0.6931471805599453, e)


@triton.jit
def inverse_tau(base):
    """1/τ in float64, to 48 bits."""
    scale, scale_low, _lowest, _inverse = base
    return (tl.full((), scale, tl.float64) + tl.full((), scale_low, tl.float64)) * 0.6931471805599453


@functools.lru_cache(maxsize=64)
def exp_base(tau: float) -> tuple[float, float, float, float]:
    """1/(τ ln 2) as a float32 and what it leaves; a difference whose power of two is 0; 1/τ."""
    scale = 1 / (tau * math.log(2))
    high = _single(scale)
    return high, _single(scale - high), _single(-200 / scale), _single(1 / tau)


def _single(number: float) -> float:
    (rounded,) = struct.unpack("f", struct.pack("f", number))
    return rounded
