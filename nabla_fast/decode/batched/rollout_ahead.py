"""Rollouts whose tokens the host sees some steps later, many at a time.

Tokens are drawn on the device, by noise that is a function of a key, and read by the next step there. A
trajectory to be replaced drafts nothing here: whether a draft's token was drawn, the host would have to
ask at each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.decode.batched.requests import RollOut, Sample
from nabla_fast.decode.batched.rollout import (
    RolloutRow,
    answer,
    answer_samples,
    first_tokens,
    left,
    started,
)
from nabla_fast.decode.batched.steps import NOT_FINITE, Bucket, StepRow, Steps
from nabla_fast.decode.draws import Draws
from nabla_fast.decode.failures import attributed_to
from nabla_fast.errors import RowError
from nabla_fast.models import LanguageModel
from nabla_fast.models.paged_kv import PoolExhausted, extend_all
from nabla_fast.models.reader import PagedReader, padded_ids
from nabla_fast.ops import TokenStats
from nabla_fast.ops.rows import report, row_status


@dataclass
class _Log:
    """What all runs drew from, one after another."""

    hidden: list[Tensor] = field(default_factory=list)  # [turns · R, H] each
    stats: list[TokenStats] = field(default_factory=list)
    count: int = 0

    def add(self, bucket: Bucket, turns: int) -> int:
        """Copy a run; the place of its first row."""
        place = self.count
        # A copy: the bucket's next run writes over it.
        self.hidden.append(bucket.hidden[:turns].flatten(0, 1).clone())
        self.stats.append(TokenStats(*(value[:turns].flatten().clone() for value in bucket.stats)))
        self.count += len(self.hidden[-1])
        return place

    def all(self) -> tuple[Tensor, TokenStats]:
        return torch.cat(self.hidden), TokenStats(*map(torch.cat, zip(*self.stats, strict=True)))


def roll_out_ahead(
    lm: LanguageModel, reader: PagedReader, config: DTOConfig, steps: Steps, requests: Sequence[RollOut]
) -> None:
    """Answer all requests together, as :func:`nabla_fast.decode.batched.rollout.roll_out` does.

    Args:
        steps: over the pool in which the requests' sequences lie.
    Raises:
        RequestFailure: a request's logits are not finite; its cause is a RowError.
    """
    with started(requests) as rows:
        _read_all_but_the_last(reader, lm, rows)
        log, going = _Log(), rows
        while going:
            going = _run(lm, steps, going, log)
        answer(lm, config, rows, *log.all())


def sample_ahead(
    lm: LanguageModel, config: DTOConfig, draws: Draws, steps: Steps, requests: Sequence[Sample]
) -> None:
    """Answer all requests together, as :func:`nabla_fast.decode.batched.rollout.sample` does.

    Args:
        draws: of the first tokens, whose states are known.
        steps: over the pool in which the requests' sequences lie.
    Raises:
        RequestFailure: a request's logits are not finite; its cause is a RowError.
    """
    with started(requests) as rows:
        going = left(rows, first_tokens(lm, config, draws, rows))
        while going:
            going = left(going, _run(lm, steps, going, None))
        answer_samples(rows)


def _read_all_but_the_last(reader: PagedReader, lm: LanguageModel, rows: Sequence[RolloutRow]) -> None:
    """Leave each row one token to be read, which is what a step reads."""
    rows = [row for row in rows if len(row.unread) > 1]
    if not rows:
        return
    parts = [row.unread[:-1] for row in rows]
    lengths = list(map(len, parts))
    ids = padded_ids(parts, lm.device)
    reader.read([row.sequence for row in rows], lengths, ids=ids, store=True)
    for row, length in zip(rows, lengths, strict=True):
        row.request.count("lm", length, max(lengths))
        row.unread = row.unread[-1:]


def _run(lm: LanguageModel, steps: Steps, rows: list[RolloutRow], log: _Log | None) -> list[RolloutRow]:
    """Take a run of steps, then look at what was drawn; the rows that go on.

    Args:
        log: receives states and statistics, where they are asked for.
    """
    before = [row.sequence.length for row in rows]
    turns, left = _made_room(rows, steps.turns)
    given = [
        StepRow(
            row.unread[0],
            length,
            remaining,
            row.sequence.blocks,
            sorted(row.request.problem.eos_ids),
            row.request.stream,
        )
        for row, length, remaining in zip(rows, before, left, strict=True)
    ]
    bucket = steps.run(given, turns)
    drawn = bucket.drawn[:turns].tolist()  # here the host waits for the device
    place, width = 0 if log is None else log.add(bucket, turns), bucket.drawn.shape[1]
    going = []
    for n, (row, length) in enumerate(zip(rows, before, strict=True)):
        request, taken, ended = row.request, 0, False
        while not ended and taken < turns:
            if drawn[taken][n] == NOT_FINITE:
                _refuse(lm, request, bucket.hidden[taken, n])
            row.tokens.append(drawn[taken][n])
            row.places.append(place + taken * width + n)
            taken += 1
            ended = request.problem.finish_reason(request.response + row.tokens) is not None
        request.count("lm", taken, turns)
        row.sequence.truncate(length + taken)
        row.unread = row.tokens[-1:]
        if not ended:
            going.append(row)
    return going


def _made_room(rows: Sequence[RolloutRow], turns: int) -> tuple[int, list[int]]:
    """Extend the sequences by what they may draw in a run; its steps, and what each row may draw in all."""
    left = [
        row.request.problem.max_new_tokens - len(row.request.response) - len(row.tokens) for row in rows
    ]
    turns = min(turns, max(left))
    try:
        extend_all([row.sequence for row in rows], [min(turns, count) for count in left])
    except PoolExhausted:
        if turns == 1:
            raise
        # Rows that end early need less.
        turns = 1
        extend_all([row.sequence for row in rows], [1] * len(rows))
    return turns, left


def _refuse(lm: LanguageModel, request: RollOut, state: Tensor) -> None:
    """Raise for a state [H] whose logits are not finite."""
    with attributed_to(request):
        report("rollout", row_status(lm.logits(state[None])).cpu())
        raise RowError("rollout", [(0, "has logits that are not finite beside other rows alone")])
