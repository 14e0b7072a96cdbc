"""Where draws come from: torch's generators, as the official release has them, or Philox noise.

Both loops draw through the same two classes. A stream is what the tokens of one rollout, or of one redraw,
are drawn with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig, SamplingConfig
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.sampling import Generator, TokenRows, seeded
from nabla_fast.ops import DrawKey, draw_tokens


class PhiloxStream(NamedTuple):
    """What the noise of one rollout, or of one redraw, is a function of, beside position and token."""

    seed: int  # of the prompt
    start: int  # tokens before the first one drawn
    visit: int = 0


Stream = Generator | PhiloxStream
Draw = Callable[[int], int]


class TorchDraws:
    """A generator of torch's on the CPU for each rollout and each redraw.

    It is seeded by the prompt's seed and the number of tokens committed when the proposal was made.
    """

    def stream(self, problem: Problem, response: int, committed: int) -> Generator:
        """What tokens after ``response`` tokens are drawn with.

        Args:
            committed: tokens of the response before the position at work.
        """
        return seeded(problem.seed + committed)

    def rollout(
        self, logits: Tensor, sampling: SamplingConfig, streams: Sequence[Stream], positions: Sequence[int]
    ) -> Draw:
        """A function that draws the token of a row; the argmax if T ≤ 0.

        Args:
            logits: [N, V].
            streams: of the rows; a row's draw advances its generator.
            positions: tokens before the one to be drawn, of each row.
        """
        rows = TokenRows(logits.cpu(), sampling, greedy=sampling.temperature <= 0)
        return lambda row: rows.draw(row, streams[row])

    def redraw(
        self, logits: Tensor, sampling: SamplingConfig, streams: Sequence[Stream], positions: Sequence[int]
    ) -> Draw:
        """As :meth:`rollout`, of optimized logits; T ≤ 0 counts as 1."""
        rows = TokenRows(logits.cpu(), sampling)
        return lambda row: rows.draw(row, streams[row])


class PhiloxDraws:
    """:func:`nabla_fast.ops.draw_tokens` where the logits are: no generator, no logits on the host."""

    def stream(self, problem: Problem, response: int, committed: int) -> PhiloxStream:
        """What tokens after ``response`` tokens are drawn with."""
        return PhiloxStream(problem.seed, len(problem.prompt_ids) + response)

    def rollout(
        self, logits: Tensor, sampling: SamplingConfig, streams: Sequence[Stream], positions: Sequence[int]
    ) -> Draw:
        """As :meth:`TorchDraws.rollout`; a row that is drawn again gives the same token."""
        if sampling.temperature <= 0:
            return logits.argmax(dim=-1).tolist().__getitem__
        return _drawn(logits, sampling, streams, positions, redraw=False)

    def redraw(
        self, logits: Tensor, sampling: SamplingConfig, streams: Sequence[Stream], positions: Sequence[int]
    ) -> Draw:
        """As :meth:`rollout`, of optimized logits; T ≤ 0 counts as 1."""
        return _drawn(logits, sampling, streams, positions, redraw=True)


Draws = TorchDraws | PhiloxDraws


def draws_of(config: DTOConfig, device: torch.device) -> Draws:
    """Those of ``config.draws``; "auto" is torch's on the CPU."""
    if config.draws == "torch" or (config.draws == "auto" and device.type == "cpu"):
        return TorchDraws()
    return PhiloxDraws()


def _drawn(
    logits: Tensor,
    sampling: SamplingConfig,
    streams: Sequence[PhiloxStream],
    positions: Sequence[int],
    redraw: bool,
) -> Draw:
    numbers = [(s.seed, s.start, s.visit, at) for s, at in zip(streams, positions, strict=True)]
    key = DrawKey(*torch.tensor(numbers, dtype=torch.int64, device=logits.device).T)
    tokens = draw_tokens(
        logits,
        key,
        redraw=redraw,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )
    return tokens.tolist().__getitem__
