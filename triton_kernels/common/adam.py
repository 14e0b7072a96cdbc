"""Adam's step, and what a descent's first launch prepares: bias corrections, and teams of rows."""

from __future__ import annotations

import math

import triton
import triton.language as tl

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
_SHARE1, _BETA2, _SHARE2, _EPSILON = (tl.constexpr(x) for x in (1 - BETA1, BETA2, 1 - BETA2, EPSILON))
_LOG_BETA1, _LOG_BETA2 = (tl.constexpr(math.log(x)) for x in (BETA1, BETA2))
_COUNTS = tl.constexpr(64)  # steps whose corrections are computed at a time
_ROWS = tl.constexpr(256)  # whose groups are compared at a time
NEVER = tl.constexpr(1 << 30)  # when a team stops that has not


@triton.jit
def adam_step(parameter, gradient, first, second, rate, scale):
    """Kingma & Ba's step with bias correction; rate = lr/(1 − β₁ᵗ), scale = 1/√(1 − β₂ᵗ)."""
    first = tl.fma(gradient - first, _SHARE1, first)
    second = tl.fma(gradient * gradient, _SHARE2, second * _BETA2)
    # A quotient takes five instructions more, for the smallest and largest of divisors.
    root = tl.rsqrt(tl.fma(tl.sqrt(second), scale, _EPSILON))
    return tl.fma(first * (root * root), -rate, parameter), first, second


@triton.jit
def store_corrections(corrections_ptr, iters):
    """1/(1 − β₁ᵗ) and 1/√(1 − β₂ᵗ) for t = 1..K: [2, K] float64."""
    for start in range(0, iters, _COUNTS):
        at = start + tl.arange(0, _COUNTS)
        count = (at + 1).to(tl.float64)
        there = at < iters
        tl.store(corrections_ptr + at, 1.0 / (1.0 - tl.exp(count * _LOG_BETA1)), mask=there)
        scale = 1.0 / tl.sqrt(1.0 - tl.exp(count * _LOG_BETA2))
        tl.store(corrections_ptr + iters + at, scale, mask=there)


@triton.jit
def load_rates(schedule_ptr, stride, corrections_ptr, step, iters):
    """rate and scale of :func:`adam_step` for the step after ``step`` steps; of none after the last.

    Args:
        schedule_ptr: the row's [K] float64, ``stride`` apart.
    """
    there = (step >= 0) & (step < iters)
    rate = tl.load(schedule_ptr + step * stride, mask=there, other=0.0)
    rate *= tl.load(corrections_ptr + step, mask=there, other=0.0)
    scale = tl.load(corrections_ptr + iters + step, mask=there, other=1.0)
    return rate.to(tl.float32), scale.to(tl.float32)


@triton.jit
def store_team(group_ptr, team_ptr, stopped_ptr, row, rows):
    """A row's team, which is the first row of its group; a team of this number has not stopped."""
    own = tl.load(group_ptr + row)
    first = tl.full((_ROWS,), 1 << 30, tl.int32)
    for start in range(0, rows, _ROWS):
        other = start + tl.arange(0, _ROWS)
        group = tl.load(group_ptr + other, mask=other < rows, other=-1)
        first = tl.minimum(first, tl.where(group == own, other, 1 << 30))
    tl.store(team_ptr + row, tl.min(first, axis=0))
    tl.store(stopped_ptr + row, NEVER)
