"""A prompt that is ready to be decoded, and its finished response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nabla_fast.decode.stop import StopStrings
from nabla_fast.results import Revision


@dataclass(frozen=True)
class Problem:
    """One prompt as both loops take it.

    Attributes:
        prompt_ids: the LM's tokens of the prompt.
        reward_prefix, reward_suffix: the reward model's own tokens before and after a response; of the
            first reward where there are several.
        seed: of all the prompt's draws.
        max_new_tokens: most tokens of the response.
        eos_ids: tokens that end the response.
        stop: stop strings.
        other_rewards: (prefix, suffix) of the rewards after the first.
    """

    prompt_ids: tuple[int, ...]
    reward_prefix: tuple[int, ...]
    reward_suffix: tuple[int, ...]
    seed: int
    max_new_tokens: int
    eos_ids: frozenset[int]
    stop: StopStrings
    other_rewards: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

    def reward_context(self, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Own tokens of reward ``n`` before and after a response."""
        return self.other_rewards[n - 1] if n else (self.reward_prefix, self.reward_suffix)

    def finish_reason(self, response: Sequence[int]) -> str | None:
        """Why a response ends with its last token: "eos", "stop" or "length"; None if it goes on."""
        if response and response[-1] in self.eos_ids:
            return "eos"
        if response and self.stop.completed_by_last(response):
            return "stop"
        return "length" if len(response) >= self.max_new_tokens else None


@dataclass(frozen=True)
class Decoded:
    """A finished response.

    Attributes:
        tokens: with an EOS where it ended in one.
        reward: of prompt and response, or None without a reward model.
        revisions: every proposal, in order.
    """

    tokens: list[int]
    reward: float | None
    revisions: list[Revision]
