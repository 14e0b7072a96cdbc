"""The sums over a row of logits that a step of descent needs: from slices, joined in a fixed order.

A step along (1/τ) p ⊙ (G − ⟨p, G⟩) needs the largest y = z + g with its token ŷ, S = Σ exp((y − max)/τ)
and T = Σ exp((y − max)/τ) (G − G[ŷ]). A slice takes its sums relative to its own largest y and to the
G found there; both move to the row's by arithmetic on a few numbers, and a row's own slice adds
nothing to what it measured.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .exponential import tempered_exp
from .lanes import first_place, lane_sums, top_of
from .sizes import cdiv

# Sums of a slice: largest y, +inf if y is NaN somewhere; its token, less NAN if y is NaN there; S; T; G of
# the token; largest y at which G is not finite: −inf where it is finite everywhere, else at least −3.4e38.
FIELDS = tl.constexpr(6)
TOP, TOKEN, SUM, TILT, GRAD, LOST = (tl.constexpr(n) for n in range(6))
NAN = tl.constexpr(1 << 21)  # more than any token; float32 holds the differences
_NEARLY = tl.constexpr(-3.4e38)
_SLICES = tl.constexpr(32)  # that are joined at a time, by each warp for itself


def joined_slices(slices: int) -> int:
    """SLICES of :func:`joined_sums`."""
    return cdiv(slices, _SLICES.value) * _SLICES.value


@triton.jit
def finite_or_0(x):
    """x, and 0 for what is not finite."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def store_sums(
    sums_ptr,  # [FIELDS, slices] of this row
    slices,
    slice,
    ys,  # [LANES] each, −inf past the end
    grads,  # [LANES] each, finite past the end
    grad_ptr,  # the row's G
    base,
    VECTOR: tl.constexpr,
):
    """Measure a slice."""
    lanes: tl.constexpr = ys[0].shape[0]
    start = slice * (lanes * len(ys))
    top = top_of(ys)
    key = start + first_place(ys, top)
    token = key
    if top != top:
        first = tl.full((lanes,), NAN, tl.int32)
        for t in tl.static_range(len(ys)):
            place = t * lanes + tl.arange(0, lanes)
            first = tl.minimum(first, tl.where(ys[t] != ys[t], place, NAN))
        token = start + tl.min(first, axis=0)
        key = token - NAN
        top = float("inf")
    here = finite_or_0(tl.load(grad_ptr + token).to(tl.float32))
    # A slice that holds no finite y has no sums, whatever they are taken relative to.
    reference = finite_or_0(top)
    total = tl.zeros((lanes,), tl.float32)
    tilt = total
    for t in tl.static_range(len(ys)):
        e = tempered_exp(ys[t] - reference, base)
        total += e
        tilt = tl.fma(e, grads[t] - here, tilt)
    total, tilt = lane_sums(total, tilt, VECTOR)
    lost = -float("inf")
    if (tl.abs(tilt) < float("inf")) == 0:
        # G may be anything where p is 0; elsewhere it spoils the row, by the y at which it stands.
        worst = tl.full((lanes,), -float("inf"), tl.float32)
        kept = tl.zeros((lanes,), tl.float32)
        for t in tl.static_range(len(ys)):
            finite = tl.abs(grads[t]) < float("inf")
            worst = tl.maximum(worst, tl.where(finite, -float("inf"), ys[t]))
            e = tempered_exp(ys[t] - reference, base)
            kept = tl.fma(e, tl.where(finite & (e > 0), grads[t], here) - here, kept)
        lost = tl.maximum(tl.max(worst, axis=0), _NEARLY)
        _kept, tilt = lane_sums(kept, kept, VECTOR)
    at = sums_ptr + slice
    tl.store(at + TOP * slices, top)
    tl.store(at + TOKEN * slices, key.to(tl.float32))
    tl.store(at + SUM * slices, total)
    tl.store(at + TILT * slices, tilt)
    tl.store(at + GRAD * slices, here)
    tl.store(at + LOST * slices, lost)


@triton.jit
def finite_grads(
    sums_ptr,  # [FIELDS, slices] of this row
    slices,
    slice,
):
    """Whether G is finite all over a slice that has been measured."""
    return tl.load(sums_ptr + LOST * slices + slice) == -float("inf")


@triton.jit
def first_of_larger(top, key, grad, other_top, other_key, other_grad):
    """The larger of two tops with what belongs to it, of equals that of the smaller key."""
    other = (other_top > top) | ((other_top == top) & (other_key < key))
    return (
        tl.where(other, other_top, top),
        tl.where(other, other_key, key),
        tl.where(other, other_grad, grad),
    )


@triton.jit
def _sums_and_largest(total, tilt, lost, other_total, other_tilt, other_lost):
    return total + other_total, tilt + other_tilt, tl.maximum(lost, other_lost)


@triton.jit
def joined_sums(
    sums_ptr,  # [FIELDS, slices] of a row
    slices,
    base,
    SLICES: tl.constexpr,
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
    lane = tl.arange(0, _SLICES)
    all_tops, all_grads, all_sums, all_tilts = (), (), (), ()
    top = tl.full((_SLICES,), -float("inf"), tl.float32)
    key = tl.full((_SLICES,), NAN, tl.float32)
    grad = tl.zeros((_SLICES,), tl.float32)
    lost = tl.full((_SLICES,), -float("inf"), tl.float32)
    for t in tl.static_range(SLICES // _SLICES):
        there = lane < slices - t * _SLICES
        at = sums_ptr + t * _SLICES + lane
        tops = tl.load(at + TOP * slices, mask=there, other=-float("inf"))
        keys = tl.load(at + TOKEN * slices, mask=there, other=NAN * 1.0)
        grads = tl.load(at + GRAD * slices, mask=there, other=0.0)
        sums = tl.load(at + SUM * slices, mask=there, other=0.0)
        tilts = tl.load(at + TILT * slices, mask=there, other=0.0)
        lost = tl.maximum(lost, tl.load(at + LOST * slices, mask=there, other=-float("inf")))
        top, key, grad = first_of_larger(top, key, grad, tops, keys, grads)
        all_tops += (tops,)
        all_grads += (grads,)
        all_sums += (sums,)
        all_tilts += (tilts,)
    top, key, grad = tl.reduce((top, key, grad), 0, first_of_larger)
    infinite = tl.where(top == float("inf"), 2, tl.where(top == -float("inf"), 3, 0))
    status = tl.where(key < 0, 1, infinite).to(tl.int32)
    token = tl.where(key < 0, key + NAN, key).to(tl.int32)

    reference = tl.where(status == 0, top, 0.0)
    total = tl.zeros((_SLICES,), tl.float32)
    tilt = total
    for t in tl.static_range(SLICES // _SLICES):
        share = tempered_exp(all_tops[t] - reference, base)
        moved = tl.fma(all_sums[t], all_grads[t] - grad, all_tilts[t])
        total = tl.fma(share, all_sums[t], total)
        tilt = tl.fma(share, tl.where(share > 0, moved, 0.0), tilt)
    total, tilt, lost = tl.reduce((total, tilt, lost), 0, _sums_and_largest)
    total = tl.where(status == 0, total, 1.0)
    spoiled = (status != 0) | (tempered_exp(lost - reference, base) > 0)
    mean = tl.where(spoiled, float("nan"), tilt / total)
    mean = tl.where(tl.abs(mean) < float("inf"), mean, float("nan"))
    return token, top, grad, base[3] / total, mean, status
