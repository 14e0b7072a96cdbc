"""What the rewards read of a problem's response, and the checks of their scores, for both loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nabla_fast.decode.problem import Problem
from nabla_fast.errors import ModelError
from nabla_fast.models import Reward
from nabla_fast.models.reward_sequence import RewardSequence


def reward_sequence(problem: Problem, n: int, reward: Reward, response: Sequence[int]) -> RewardSequence:
    """A response as term ``n`` of the rewards reads it.

    Args:
        response: the LM's tokens.
    """
    before, after = problem.reward_context(n)
    return RewardSequence(before, reward.read(response), after)


def expect_finite(reward: float, response: Sequence[int]) -> float:
    """The reward.

    Raises:
        ModelError: it is not finite.
    """
    if not math.isfinite(reward):
        raise ModelError(f"the reward model scores a response of {len(response)} tokens as {reward}")
    return reward
