"""One run of a way of decoding, with what it cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from nabla_fast.decode.batched.loop import BatchedLoop
from nabla_fast.decode.batched.sample_loop import SampleLoop
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.reference.loop import SequentialLoop
from nabla_fast.results import Stats


@dataclass
class Run:
    """One run.

    Attributes:
        seconds: wall-clock.
        stats: one a problem.
        tokens: responses by problem; None for Best-of-N.
        trajectories: continuations that were followed: the first of each problem, and the accepted.
        steps: of descents, where the loop counts them.
    """

    seconds: float
    stats: list[Stats]
    tokens: dict[int, list[int]] | None = None
    trajectories: int = 0
    steps: int = 0

    def has_tokens_of(self, other: Run) -> bool:
        """Whether there is nothing to compare, or it is equal."""
        return self.tokens is None or self.tokens == other.tokens

    def total(self, name: str) -> int:
        """A count of Stats, of all problems."""
        return sum(getattr(s, name) for s in self.stats)

    def token_passes(self) -> int:
        """Token passes of both models, of all problems."""
        return sum(sum(s.token_passes.values()) for s in self.stats)

    def shares(self) -> dict[str, float]:
        """Shares of the token passes, by what they served."""
        counts: dict[str, int] = {}
        for s in self.stats:
            for purpose, count in s.passes_for.items():
                counts[purpose] = counts.get(purpose, 0) + count
        return {purpose: count / self.token_passes() for purpose, count in counts.items()}

    def stages(self) -> dict[str, float]:
        """Seconds a stage, of all problems."""
        seconds: dict[str, float] = {}
        for s in self.stats:
            for stage, value in s.seconds.items():
                if stage != "total":
                    seconds[stage] = seconds.get(stage, 0.0) + value
        return seconds


class CountingLoop(SequentialLoop):
    """The sequential loop, which also counts what becomes of the positions it looks at.

    Attributes:
        left_out: positions that do not meet the conditions.
        optimized: positions that do.
        kept: of these, those whose token was drawn again.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.left_out = self.optimized = self.kept = 0

    def _first_selected(self, problem, committed, current, stats) -> int | None:
        position = super()._first_selected(problem, committed, current, stats)
        self.left_out += len(current.tokens) if position is None else position
        return position

    def _resample(self, problem, committed, current, stats) -> int:
        token = super()._resample(problem, committed, current, stats)
        self.optimized += 1
        self.kept += token == current.tokens[0]
        return token

    def positions(self) -> dict[str, float]:
        """How many were optimized, and the shares left out of all and drawn again of the optimized."""
        return {
            "optimized": self.optimized,
            "left_out": self.left_out / max(1, self.left_out + self.optimized),
            "drawn_again": self.kept / max(1, self.optimized),
        }


def decode(loop: SequentialLoop | BatchedLoop, problems: list[Problem]) -> Run:
    """Decode all problems."""
    stats = [Stats() for _ in problems]
    steps = getattr(loop, "steps", 0)
    start = time.perf_counter()
    decoded = dict(loop.decode(problems, stats))
    seconds = time.perf_counter() - start
    accepted = sum(revision.accepted for d in decoded.values() for revision in d.revisions)
    tokens = {n: d.tokens for n, d in decoded.items()}
    return Run(seconds, stats, tokens, len(problems) + accepted, getattr(loop, "steps", 0) - steps)


def best_of_n(loop: SampleLoop, problems: list[Problem]) -> Run:
    """Draw and score the loop's count of responses to each problem."""
    stats = [Stats() for _ in problems]
    start = time.perf_counter()
    for _ in loop.decode(problems, stats):
        pass
    return Run(time.perf_counter() - start, stats)
