"""Rollouts of many sequences together over paged keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.decode.batched.drafting import Drafting
from nabla_fast.decode.batched.requests import RollOut, Sample
from nabla_fast.decode.continuation import Continuation
from nabla_fast.decode.draws import Draws
from nabla_fast.decode.failures import attributed_to
from nabla_fast.models import LanguageModel
from nabla_fast.models.heads import Head
from nabla_fast.models.reader import padded_ids
from nabla_fast.models.readers import FrozenSequence, SuffixReader
from nabla_fast.ops import TokenStats, token_stats
from nabla_fast.ops.rows import report, row_status

# Logits that wait for their statistics: many rows of a small vocabulary, few of a large one.
_WAITING = 1 << 20


@dataclass
class RolloutRow:
    """One rollout under way."""

    request: RollOut
    sequence: FrozenSequence
    unread: list[int]
    matched: bool = True
    tokens: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # of its states among all

    @property
    def position(self) -> int:
        """Tokens before the one to be drawn next."""
        request = self.request
        return len(request.problem.prompt_ids) + len(request.response) + len(self.tokens)

    def tokens_after(self, length: int) -> list[int]:
        """All its tokens but the first ``length``."""
        request, drawn = self.request, length - self.position + len(self.tokens)
        if drawn >= 0:
            return self.tokens[drawn:]
        return [*request.problem.prompt_ids, *request.response, *self.tokens][length:]

    def draft(self, width: int) -> list[int]:
        drawn = len(self.tokens)
        return self.request.draft[drawn : drawn + width] if width else []


class _Logits:
    """Logits of the states drawn from, which nobody asks for again."""

    count = 0  # of states that are kept

    def __init__(self) -> None:
        self._product: Callable[[Tensor], Tensor] | None = None

    def of(self, states: Tensor, head: Head) -> Tensor:
        """Logits by the backend that the first step's states got: all steps are alike."""
        if self._product is None:
            self._product = head.chosen(states)
        return self._product(states)


class _Drawn(_Logits):
    """Logits and states of the positions drawn from, in the order of reading."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: list[Tensor] = []
        self.logits: list[Tensor] = []
        self._waiting = 0
        self._stats: list[TokenStats] = []

    def of(self, states: Tensor, head: Head) -> Tensor:
        logits = super().of(states, head)
        self._add(states, logits)
        return logits

    def _add(self, states: Tensor, logits: Tensor) -> None:
        self.hidden.append(states)
        self.logits.append(logits)
        self.count += len(states)
        self._waiting += logits.numel()
        if self._waiting >= _WAITING:
            self._flush()

    def _flush(self) -> None:
        if self.logits:
            self._stats.append(token_stats(torch.cat(self.logits)))
            self.logits, self._waiting = [], 0

    def stats(self) -> TokenStats:
        """Statistics of all positions."""
        self._flush()
        return TokenStats(*(torch.cat(parts) for parts in zip(*self._stats, strict=True)))


def roll_out(
    lm: LanguageModel,
    reader: SuffixReader,
    config: DTOConfig,
    draws: Draws,
    drafting: Drafting,
    requests: Sequence[RollOut],
) -> None:
    """Answer all requests together; each draws from its own stream.

    A step reads the token drawn last and, where drafting pays, the replaced trajectory's tokens after
    it: a draft's token stays if it is the one that the row draws there.

    Raises:
        RequestFailure: a request's logits are not finite; its cause is a RowError.
    """
    with started(requests) as rows:
        drawn = _Drawn()
        alive = rows
        while alive:
            alive = _step(lm, reader, config, draws, drafting, alive, drawn)
        answer(lm, config, rows, torch.cat(drawn.hidden), drawn.stats())


def sample(
    lm: LanguageModel,
    reader: SuffixReader,
    config: DTOConfig,
    draws: Draws,
    requests: Sequence[Sample],
) -> None:
    """Answer all requests together; each draws from its own stream.

    Raises:
        RequestFailure: a request's logits are not finite; its cause is a RowError.
    """
    with started(requests) as rows:
        logits, undrafted = _Logits(), Drafting(enabled=False)
        alive = left(rows, first_tokens(lm, config, draws, rows))
        while alive:
            alive = left(alive, _step(lm, reader, config, draws, undrafted, alive, logits))
        answer_samples(rows)


def first_tokens(
    lm: LanguageModel, config: DTOConfig, draws: Draws, rows: Sequence[RolloutRow]
) -> list[RolloutRow]:
    """Draw the first token of rows whose state before it is known; the rows that go on.

    Raises:
        RequestFailure: as of :func:`sample`.
    """
    hidden = torch.stack([row.request.state for row in rows])
    nothing: list[list[int]] = [[] for _ in rows]
    return _draw(
        lm, config, draws, Drafting(enabled=False), rows, nothing, [0] * len(rows), hidden, _Logits()
    )


def left(rows: Sequence[RolloutRow], going: list[RolloutRow]) -> list[RolloutRow]:
    """The rows that go on, once the others, of which nothing but tokens is asked for, have given back."""
    if len(going) < len(rows):
        kept = set(map(id, going))
        for row in rows:
            if id(row) not in kept:
                row.sequence.free()
    return going


def answer_samples(rows: Sequence[RolloutRow]) -> None:
    """Answer the requests of rows that have ended and given back."""
    for row in rows:
        row.request.tokens = row.tokens
        row.request.stats.generated_tokens += len(row.tokens)


@contextmanager
def started(requests: Sequence[RollOut]) -> Iterator[list[RolloutRow]]:
    """Rows that have drawn nothing, on forks of the requests' bases; an error inside gives these back."""
    rows: list[RolloutRow] = []
    try:
        for request in requests:
            sequence = request.base.fork(request.shared)
            rows.append(RolloutRow(request, sequence, []))
            rows[-1].unread = rows[-1].tokens_after(sequence.length)
        yield rows
    except BaseException:
        for row in rows:
            row.sequence.free()
        raise


def answer(
    lm: LanguageModel, config: DTOConfig, rows: Sequence[RolloutRow], hidden: Tensor, stats: TokenStats
) -> None:
    """Answer the requests of rows that have ended.

    Args:
        hidden: [P, H], states of all places.
        stats: of their logits, [P] each.
    Raises:
        RowError: the LM's logits are not finite.
    """
    for row in rows:
        request, places = row.request, torch.tensor(row.places, device=lm.device)
        request.continuation = Continuation.of(
            lm,
            config,
            request.problem,
            request.response,
            row.tokens,
            hidden[places],
            TokenStats(*(value[places] for value in stats)),
        )
        request.stats.generated_tokens += len(row.tokens)
    for row in rows:
        row.request.sequence = row.sequence


def _step(
    lm: LanguageModel,
    reader: SuffixReader,
    config: DTOConfig,
    draws: Draws,
    drafting: Drafting,
    rows: list[RolloutRow],
    logits: _Logits,
) -> list[RolloutRow]:
    """Read and draw once in every row; the rows that go on."""
    # Rows of a large vocabulary's logits are few at a time.
    most = _WAITING * 16 // (lm.vocabulary * len(rows)) - 1
    drafts = [
        row.draft(max(0, min(most, drafting.width(row.matched)))) if row.request.draft else []
        for row in rows
    ]
    parts = [row.unread + draft for row, draft in zip(rows, drafts, strict=True)]
    lengths = list(map(len, parts))
    ids = padded_ids(parts, lm.device)
    hidden = reader.read([row.sequence for row in rows], lengths, ids=ids, store=True)
    if max(lengths) == 1:
        hidden = hidden[:, 0]
    else:
        # The last unread token and the draft after it predict.
        wanted = [
            (n, position)
            for n, (row, length) in enumerate(zip(rows, lengths, strict=True))
            for position in range(len(row.unread) - 1, length)
        ]
        n, position = torch.tensor(wanted, device=lm.device).T
        hidden = hidden[n, position]
    return _draw(lm, config, draws, drafting, rows, drafts, lengths, hidden, logits)


def _draw(
    lm: LanguageModel,
    config: DTOConfig,
    draws: Draws,
    drafting: Drafting,
    rows: Sequence[RolloutRow],
    drafts: Sequence[list[int]],
    lengths: Sequence[int],
    hidden: Tensor,
    kept_logits: _Logits,
) -> list[RolloutRow]:
    """Draw in every row, as far as its draft is what it draws; the rows that go on.

    Args:
        drafts: tokens of each row that have been read ahead.
        lengths: tokens of each row that have just been read, its draft among them.
        hidden: [N, H], row by row the states that predict the draft's tokens and one more.
        kept_logits: keeps of the states and their logits what is asked for in the end.
    """
    start, place = 0, kept_logits.count
    logits = kept_logits.of(hidden, lm.head)
    bad = not bool(logits.amax(dim=-1).isfinite().all())
    drawn_rows = [(row, n) for row, draft in zip(rows, drafts, strict=True) for n in range(len(draft) + 1)]
    draw = draws.rollout(
        logits,
        config.rollout_sampling,
        [row.request.stream for row, _ in drawn_rows],
        [row.position + n for row, n in drawn_rows],
    )
    going, width = [], max(lengths)
    for row, draft, length in zip(rows, drafts, lengths, strict=True):
        request, former = row.request, row.sequence.length - length
        request.count("lm", length, width)
        kept = 0
        while True:
            if bad:
                with attributed_to(request):
                    report("rollout", row_status(logits[start + kept : start + kept + 1]))
            token = draw(start + kept)
            if len(row.tokens) < len(request.draft):
                matches = token == request.draft[len(row.tokens)]
                drafting.saw(row.matched, matches)
                row.matched = matches
            row.tokens.append(token)
            row.places.append(place + start + kept)
            ended = request.problem.finish_reason(request.response + row.tokens) is not None
            if ended or kept == len(draft) or token != draft[kept]:
                break
            kept += 1
        request.stats.drafted += len(draft)
        request.stats.draft_hits += kept
        if kept < len(draft):
            row.sequence.truncate(former + len(row.unread) + kept)
        row.unread = row.tokens_after(row.sequence.length)
        start += len(draft) + 1
        if not ended:
            going.append(row)
    return going
