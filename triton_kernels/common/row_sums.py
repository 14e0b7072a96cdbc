"""The sums over a row of logits that a step of descent needs: from slices, joined in a fixed order.

A step along (1/τ) p ⊙ (G − ⟨p, G⟩) needs the largest y = z + g with its token ŷ, S = Σ exp((y − max)/τ)
and T = Σ exp((y − max)/τ) (G − G[ŷ]). A slice takes its sums relative to its own largest y and to the
G found there; both move to the row's by arithmetic on a few numbers, and a row's own slice adds
nothing to what it measured.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .exponential import exp, scaled

# Sums of a slice: largest y; its token, less NAN if y is NaN there; S; T; G of the token; largest y at
# which G is not finite.
FIELDS = tl.constexpr(6)
TOP, TOKEN, SUM, TILT, GRAD, LOST = (tl.constexpr(n) for n in range(6))
NAN = tl.constexpr(1 << 21)  # more than any token; float32 holds the differences


@triton.jit
def store_sums(
    sums_ptr,  # [FIELDS, slices] of this row
    slices,
    slice,
    y,  # [TILE], −inf past the end
    grad,  # [TILE], finite past the end
    grad_ptr,  # the row's G
    columns,  # [TILE] int32, tokens
    inverse,
    inverse_low,
):
    """Measure a slice."""
    nan = y != y
    clean = tl.where(nan, -float("inf"), y)
    top = tl.max(clean, axis=0)
    key = tl.min(tl.where(nan, columns - NAN, tl.where(clean == top, columns, NAN)), axis=0)
    finite = tl.abs(grad) < float("inf")
    lost = tl.max(tl.where(finite, -float("inf"), clean), axis=0)
    here = tl.load(grad_ptr + tl.where(key < 0, key + NAN, key)).to(tl.float32)
    here = tl.where(tl.abs(here) < float("inf"), here, 0.0)
    # A slice that holds no finite y has no sums, whatever they are taken relative to.
    e = exp(scaled(clean - tl.where(tl.abs(top) < float("inf"), top, 0.0), inverse, inverse_low))
    e *= tl.where(top < float("inf"), 1.0, 0.0)  # a row of +inf is refused: its sums only must not overflow
    centred = tl.where(finite & (e > 0), grad, here) - here
    at = sums_ptr + slice
    tl.store(at + TOP * slices, top)
    tl.store(at + TOKEN * slices, key.to(tl.float32))
    tl.store(at + SUM * slices, tl.sum(e, axis=0))
    tl.store(at + TILT * slices, tl.sum(e * centred, axis=0))
    tl.store(at + GRAD * slices, here)
    tl.store(at + LOST * slices, lost)


@triton.jit
def _row_status(top, key):
    """The code of a row: 0 good, 1 NaN, 2 +inf, 3 nothing finite."""
    infinite = tl.where(top == float("inf"), 2, tl.where(top == -float("inf"), 3, 0))
    return tl.where(key < 0, 1, infinite).to(tl.int32)


@triton.jit
def joined_sums(
    sums_ptr,  # [FIELDS, slices] of a row
    slices,
    inverse,
    inverse_low,
    SLICES: tl.constexpr,  # a power of two ≥ slices
):
    """Join the slices of a row.

    Returns:
        token int32: the argmax as torch takes it, the first NaN or else the first of the largest;
        top float32: the largest y;
        grad float32: G[token];
        weight float32: 1/(S τ);
        mean float32: T/S = ⟨p, G⟩ − G[token]; NaN if the row has no softmax or a token of probability
        above 0 has no finite G;
        status int32: 0 good, 1 NaN, 2 +inf, 3 nothing finite.
    """
    slice = tl.arange(0, SLICES)
    there = slice < slices
    at = sums_ptr + slice
    tops = tl.load(at + TOP * slices, mask=there, other=-float("inf"))
    keys = tl.load(at + TOKEN * slices, mask=there, other=NAN * 1.0)
    sums = tl.load(at + SUM * slices, mask=there, other=0.0)
    tilts = tl.load(at + TILT * slices, mask=there, other=0.0)
    grads = tl.load(at + GRAD * slices, mask=there, other=0.0)
    lost = tl.max(tl.load(at + LOST * slices, mask=there, other=-float("inf")), axis=0)

    top = tl.max(tops, axis=0)
    key = tl.min(tl.where((keys < 0) | (tops == top), keys, NAN * 1.0), axis=0)
    status = _row_status(top, key)
    token = tl.where(key < 0, key + NAN, key)
    grad = tl.sum(tl.where(there & (keys == key), grads, 0.0), axis=0)
    reference = tl.where(status == 0, top, 0.0)
    share = exp(scaled(tops - reference, inverse, inverse_low))
    share = tl.where(share > 0, share, 0.0)
    tilts = tl.where(share > 0, tilts + sums * (grads - grad), 0.0)
    wide = share.to(tl.float64)
    total = tl.sum(wide * sums.to(tl.float64), axis=0)
    tilt = tl.sum(wide * tilts.to(tl.float64), axis=0)
    total = tl.where(status == 0, total, 1.0)
    spoiled = (status != 0) | (scaled(lost - reference, inverse, inverse_low) >= -87.0)
    weight = inverse / total + inverse_low / total
    mean = (tl.where(spoiled, 0.0, tilt) / total).to(tl.float32)
    mean = tl.where(spoiled, float("nan"), mean)
    mean = tl.where(tl.abs(mean) < float("inf"), mean, float("nan"))
    return token.to(tl.int32), top, grad, weight.to(tl.float32), mean, status
