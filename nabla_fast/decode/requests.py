"""What a problem's walk asks for, so that the same asks of many problems run as one batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nabla_fast.decode.continuation import Continuation
from nabla_fast.decode.problem import Problem
from nabla_fast.ops import AdamState, GumbelNoise
from nabla_fast.paged_kv import PagedSequence
from nabla_fast.relaxed import Relaxed
from nabla_fast.results import Stats
from nabla_fast.trajectory import TrajectoryGradient


@dataclass
class RollOut:
    """Roll out behind ``response``.

    Attributes:
        base: what has been read of prompt and response; a fork of it is extended.
        shared: tokens of ``base`` that hold for this rollout.
        response: tokens of the response before the first free one.
        seed: of the rollout's generator.
        continuation: the answer.
        sequence: the answer: the LM's keys and values of all but the last token.
    """

    problem: Problem
    stats: Stats
    base: PagedSequence
    shared: int
    response: list[int]
    seed: int
    continuation: Continuation | None = None
    sequence: PagedSequence | None = None


@dataclass
class Score:
    """Reward of a response.

    Attributes:
        base: what the reward model has read of prefix and response; a fork of it is extended.
        shared: tokens of ``base`` that hold for this response.
        response: all its tokens.
        reward: the answer.
        sequence: the answer: the reward model's keys and values of prefix and response, without tail.
    """

    problem: Problem
    stats: Stats
    base: PagedSequence
    shared: int
    response: list[int]
    reward: float | None = None
    sequence: PagedSequence | None = None


@dataclass
class Gradient:
    """G of the positions of a relaxed continuation of ``response``.

    Attributes:
        response: tokens before the first relaxed position.
        hidden: [1, H], the LM's state that predicts the first position.
        lm_base, rm_base: what the models have read; prefixes of them are read as constants.
        relaxed: y of the L positions.
        gradient: the answer.
    """

    problem: Problem
    stats: Stats
    response: list[int]
    hidden: Tensor
    lm_base: PagedSequence
    rm_base: PagedSequence | None
    relaxed: Relaxed
    gradient: TrajectoryGradient | None = None


@dataclass
class Descend:
    """Adam steps on rows until one of them flips; changes ``parameter`` and ``state``.

    Attributes:
        parameter: [n, V or H].
        grad: G [n, V].
        noise: keys of the n rows, or None.
        token: the answer: hard tokens [n] now.
    """

    stats: Stats
    parameter: Tensor
    grad: Tensor
    state: AdamState
    noise: GumbelNoise | None
    token: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
