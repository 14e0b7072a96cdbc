"""One prompt, ready to be decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nabla_fast.decode.stop import StopStrings


@dataclass(frozen=True)
class Problem:
    """What a decode of one prompt starts from.

    Attributes:
        prompt_ids: the LM's tokens of the prompt.
        reward_prefix, reward_suffix: the reward model's own tokens before and after a response.
        seed: of all the prompt's draws.
        max_new_tokens: most tokens of the response.
        eos_ids: tokens that end the response.
        stop: stop strings.
    """

    prompt_ids: tuple[int, ...]
    reward_prefix: tuple[int, ...]
    reward_suffix: tuple[int, ...]
    seed: int
    max_new_tokens: int
    eos_ids: frozenset[int]
    stop: StopStrings

    def finish_reason(self, response: Sequence[int]) -> str | None:
        """Why a response ends with its last token: "eos", "stop" or "length"; None if it goes on."""
        if response and response[-1] in self.eos_ids:
            return "eos"
        if response and self.stop.completed_by_last(response):
            return "stop"
        return "length" if len(response) >= self.max_new_tokens else None
