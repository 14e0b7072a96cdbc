"""Requests of one problem, so that requests of the same kind of many problems run as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nabla_fast.decode.batched.pools import RewardSequences
from nabla_fast.decode.continuation import Continuation
from nabla_fast.decode.draws import Stream
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.relaxed import Relaxed
from nabla_fast.decode.trajectory import TrajectoryGradient
from nabla_fast.models.readers import FrozenSequence
from nabla_fast.models.reward_sequence import ScoreMemory
from nabla_fast.ops import AdamState, GumbelNoise
from nabla_fast.results import Stats


@dataclass(eq=False)
class _Request:
    problem: Problem
    stats: Stats

    purpose = ""  # in Stats.passes_for
    passes = 0  # token passes it took

    def count(self, model: str, tokens: int, width: int, directions: int = 1) -> None:
        """Token passes of a model for this request: of a forward, or of a forward and a backward.

        Args:
            model: "lm" or "rm".
            tokens: of this request's row.
            width: of the batch; the rest of the row is padding.
            directions: 1 for a forward, 2 with a backward.
        """
        self.stats.padding_passes[model] += directions * (width - tokens)
        tokens *= directions
        self.passes += tokens
        self.stats.token_passes[model] += tokens
        self.stats.passes_for[self.purpose] = self.stats.passes_for.get(self.purpose, 0) + tokens

    def discard(self) -> None:
        """Count the token passes that it took as discarded."""
        counts = self.stats.passes_for
        counts[self.purpose] = counts.get(self.purpose, 0) - self.passes
        counts["discarded"] = counts.get("discarded", 0) + self.passes


@dataclass(eq=False)
class Read(_Request):
    """Tokens that several rollouts, or several scores, begin with.

    Attributes:
        reward: number of the reward that reads them; None: the LM does.
        base: an empty sequence of that model; a fork of it is extended.
        tokens: at least one.
        purpose: "rollout" or "score".
        sequence: the answer: keys and values of these tokens.
        state: the answer: [H], the model's state after the last of them.
    """

    reward: int | None
    base: FrozenSequence
    tokens: Sequence[int]
    purpose: str = "rollout"
    sequence: FrozenSequence | None = None
    state: Tensor | None = None


@dataclass(eq=False)
class RollOut(_Request):
    """A rollout after ``response``.

    Attributes:
        base: the LM's sequence over prompt and response; a fork of it is extended.
        shared: tokens of ``base`` that hold for this rollout.
        response: tokens of the response before the first free one.
        stream: what its tokens are drawn with.
        draft: likely tokens, position by position: those of the trajectory to be replaced.
        continuation: the answer.
        sequence: the answer: the LM's keys and values of all but the last token.
    """

    base: FrozenSequence
    shared: int
    response: list[int]
    stream: Stream
    draft: list[int]
    purpose = "rollout"
    continuation: Continuation | None = None
    sequence: FrozenSequence | None = None


@dataclass(eq=False)
class Sample(RollOut):
    """A rollout of which its tokens alone are asked for.

    Attributes:
        state: [H], the LM's state after the last token of ``base``, which predicts the first one drawn.
        tokens: the answer: those drawn, an EOS among them.
    """

    state: Tensor | None = None
    tokens: list[int] | None = None


@dataclass(eq=False)
class Score(_Request):
    """A response to be scored.

    Attributes:
        bases: the rewards' sequences over prefix and response; forks of them are extended.
        shared: tokens of the response that the bases hold, behind their prefixes; None: they hold nothing.
        response: all its tokens.
        memories: of the problem, one a reward.
        reward: the answer.
        sequences: the answer: the rewards' keys and values of prefix and response, without tail.
    """

    bases: RewardSequences
    shared: int | None
    response: list[int]
    memories: Sequence[ScoreMemory]
    purpose = "score"
    reward: float | None = None
    sequences: RewardSequences | None = None


@dataclass(eq=False)
class Gradient(_Request):
    """G of the positions of a relaxed continuation of ``response``.

    Attributes:
        response: tokens before the first relaxed position.
        hidden: [1, H], the LM's state that predicts the first position.
        lm_base, rm_bases: the models' sequences; their first tokens are the frozen prefix.
        relaxed: y of the L positions.
        purpose: "gradient" or "flip".
        gradient: the answer.
    """

    response: list[int]
    hidden: Tensor
    lm_base: FrozenSequence
    rm_bases: RewardSequences | None
    relaxed: Relaxed
    purpose: str = "gradient"
    gradient: TrajectoryGradient | None = None


@dataclass(eq=False)
class Descend:
    """Adam steps on rows until one of them flips; changes ``parameter`` and ``state``.

    Attributes:
        parameter: [n, V or H].
        gradient: G; its first n rows are descended along.
        noise: keys of the n rows, or None.
        until: the step to stop at without a flip.
        token: the answer: hard tokens [n] now.
        steps: the answer: steps taken in all.
    """

    parameter: Tensor
    gradient: TrajectoryGradient
    state: AdamState
    noise: GumbelNoise | None
    until: int
    token: Tensor | None = None
    steps: int = 0
