"""Intervals of a measured share."""

from __future__ import annotations

import math

_Z = 1.959963984540054  # two-sided 95%


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95% score interval of a binomial share (Wilson 1927).

    Args:
        successes, trials: 0 ≤ successes ≤ trials, trials ≥ 1.
    Returns:
        Lower and upper end, both in [0, 1].
    """
    share, z2 = successes / trials, _Z * _Z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)
