"""Sums over a row of logits z and its one-hot gradient G, from slices: what softmax's Jacobian needs.

∂ℒ/∂z = (1/τ) p ⊙ (G − ⟨p, G⟩) needs the largest z with its token ŷ, S = Σ exp((z − max)/τ) and
T = Σ exp((z − max)/τ) (G − G[ŷ]). A slice takes its sums relative to its own largest z and to the G found
there; both move to the row's by arithmetic on a few numbers, so that z and G are read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .exponential import tempered_exp

# Sums of a slice: the largest z, NaN if a logit is; its token; S; T; G of the token; the largest z at which
# G is not finite.
FIELDS = tl.constexpr(6)
_TOP, _TOKEN, _SUM, _TILT, GRAD, _LOST = (tl.constexpr(n) for n in range(6))


@triton.jit
def _cut(grad):
    """The nearest numbers with 24 bits of float32's 32, and their bits; infinite and NaN as they are."""
    bits = grad.to(tl.int32, bitcast=True)
    bits = tl.where(tl.abs(grad) < 3.4e38, bits + 0x80, bits) & -256
    return bits.to(tl.float32, bitcast=True), bits


@triton.jit
def store_slice(
    sums_ptr,  # [FIELDS, slices] of this row
    slices,
    slice,
    z,  # [COLUMNS], −inf past the end
    grad,  # [COLUMNS], finite past the end
    start,  # the slice's first token
    base,
    CUT: tl.constexpr,
):
    """Measure a slice.

    Returns:
        if CUT, the bits of G − G[token of the slice], of which the lower 8 are 0 and in no sum: [COLUMNS].
    """
    token = start + tl.arange(0, z.shape[0])
    nan = tl.max((z != z).to(tl.int32), axis=0)
    z = tl.where(z != z, -float("inf"), z)
    top = tl.max(z, axis=0)
    key = tl.min(tl.where(z == top, token, 1 << 30), axis=0)
    # G may be infinite where p is 0.
    finite = tl.abs(grad) < float("inf")
    lost = tl.max(tl.where(finite, -float("inf"), z), axis=0)
    here = tl.sum(tl.where((token == key) & finite, grad, 0.0), axis=0)
    centred = grad - here
    bits = key
    if CUT:
        centred, bits = _cut(centred)
    e = tempered_exp(z - tl.where(tl.abs(top) < float("inf"), top, 0.0), base)
    at = sums_ptr + slice
    tl.store(at + _TOP * slices, tl.where(nan > 0, float("nan"), top))
    tl.store(at + _TOKEN * slices, key.to(tl.float32))  # below 2²⁰
    tl.store(at + _SUM * slices, tl.sum(e, axis=0))
    tl.store(at + _TILT * slices, tl.sum(e * tl.where(finite, centred, 0.0), axis=0))
    tl.store(at + GRAD * slices, here)
    tl.store(at + _LOST * slices, lost)
    return bits


@triton.jit
def joined_slices(
    sums_ptr,  # [FIELDS, slices] of a row
    slices,
    count,  # of the slices that are joined, the first ones
    base,
    SLICES: tl.constexpr,  # a power of two ≥ slices
):
    """Join slices of a row.

    Returns:
        top float32: the largest z; 0 if none is finite;
        some: whether one is;
        grad float32: G[ŷ];
        total float32: S, 1 if no logit is finite;
        mean float32: T/S = ⟨p, G⟩ − G[ŷ], where G is finite;
        spoiled: whether a token of probability above 0 has no finite G.
    """
    slice = tl.arange(0, SLICES)
    there = slice < count
    at = sums_ptr + slice
    tops = tl.load(at + _TOP * slices, mask=there, other=-float("inf"))
    tokens = tl.load(at + _TOKEN * slices, mask=there, other=1 << 30)
    sums = tl.load(at + _SUM * slices, mask=there, other=0.0)
    tilts = tl.load(at + _TILT * slices, mask=there, other=0.0)
    grads = tl.load(at + GRAD * slices, mask=there, other=0.0)
    lost = tl.load(at + _LOST * slices, mask=there, other=-float("inf"))

    top = tl.max(tl.where(tops == tops, tops, -float("inf")), axis=0)
    some = tl.abs(top) < float("inf")
    token = tl.min(tl.where(tops == top, tokens, 1 << 30), axis=0)
    grad = tl.sum(tl.where(there & (tokens == token), grads, 0.0), axis=0)
    reference = tl.where(some, top, 0.0)
    share = tempered_exp(tops - reference, base)
    tilts = tl.where(share > 0, tilts + sums * (grads - grad), 0.0)
    wide = share.to(tl.float64)
    total = tl.sum(wide * sums.to(tl.float64), axis=0)
    tilt = tl.sum(wide * tilts.to(tl.float64), axis=0)
    total = tl.where(some, total, 1.0)
    spoiled = tl.max(tl.where(tempered_exp(lost - reference, base) > 0, 1, 0), axis=0) > 0
    return reference, some, grad, total.to(tl.float32), (tilt / total).to(tl.float32), spoiled
