"""A response between what stands around it, as a reward reads it, and scores that are remembered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What a reward remembers of a problem while it is decoded: scores of steps by the tokens up to their ends.
ScoreMemory = dict[tuple[int, ...], float]


@dataclass(frozen=True)
class RewardSequence:
    """Token ids of a reward's own vocabulary.

    Attributes:
        before: what precedes the response.
        response: where the response is relaxed, its hard tokens.
        after: what its template puts behind it.
    """

    before: Sequence[int]
    response: Sequence[int]
    after: Sequence[int]

    @property
    def ids(self) -> list[int]:
        """All of them."""
        return [*self.before, *self.response, *self.after]

    @property
    def span(self) -> slice:
        """Where the response stands."""
        return slice(len(self.before), len(self.before) + len(self.response))

    def __len__(self) -> int:
        return len(self.before) + len(self.response) + len(self.after)
