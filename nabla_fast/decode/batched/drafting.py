"""How far a rollout reads ahead along the trajectory it is to replace."""

from __future__ import annotations

import math

# A draft token is read if it is at least this likely to be drawn.
_LIKELY = 0.6
_FURTHEST = 16


class Drafting:
    """Follows how often a draw gives the draft's token.

    Whether it does is seen without reading the draft ahead, so that drafting is tried where it pays
    and nowhere else.
    """

    def __init__(self, enabled: bool = True):
        self._enabled = enabled
        # Draws, and those of the draft's token: after a token that was not the draft's, and one that was.
        self._seen = {False: [2, 0], True: [2, 0]}

    def saw(self, matched: bool, matches: bool) -> None:
        """Record a draw: whether the token before it matched the draft, and whether this one does."""
        self._seen[matched][0] += 1
        self._seen[matched][1] += matches

    def width(self, matched: bool) -> int:
        """How many draft tokens to read with the token drawn last."""
        if not self._enabled:
            return 0
        first, further = (hits / draws for draws, hits in (self._seen[matched], self._seen[True]))
        if first < _LIKELY:
            return 0
        if further >= 1:
            return _FURTHEST
        if further <= 0:
            return 1
        return max(1, min(_FURTHEST, 1 + math.floor(math.log(_LIKELY / first) / math.log(further))))
