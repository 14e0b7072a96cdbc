"""Steps of rollouts on buffers that stay where they are, so that nothing waits for the host between them.

A step reads the token that each row drew last, puts its keys and values into the pool, draws the next
token and moves the row on. All that it reads and writes, tables of blocks and ends of rows among it, lies
in the buffers of a :class:`Bucket`: the host fills these before a run of steps and looks at what was drawn
after it. On a CUDA device a step is captured once for a bucket and then replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import is_

import torch
from torch import Tensor

from nabla_fast.config import SamplingConfig
from nabla_fast.decode.draws import PhiloxStream
from nabla_fast.models import LanguageModel
from nabla_fast.models.paged_kv import BlockPool
from nabla_fast.models.reader import PagedReader
from nabla_fast.ops import DrawKey, TokenStats, draw_tokens, token_stats

# What stands for a token where none was drawn: the row had ended, or its logits were not finite.
ENDED, NOT_FINITE = -1, -2

# A function that launches something, made into one that launches it again.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


@dataclass(frozen=True)
class StepRow:
    """What the host knows of a row before a run of steps.

    Attributes:
        token: the one to be read next.
        length: tokens whose keys and values are in the pool.
        remaining: tokens that it may draw, at least 1.
        blocks: its block table, with room for as many tokens as it draws in the run.
        ends: tokens that end it.
        stream: what its tokens are drawn with.
    """

    token: int
    length: int
    remaining: int
    blocks: Sequence[int]
    ends: Sequence[int]
    stream: PhiloxStream


class Bucket:
    """Buffers of R rows whose block tables have M entries, for runs of at most ``turns`` steps.

    Attributes:
        token, length, remaining: [R] int64, as of :class:`StepRow`; a row has ended where ``remaining``
            is 0, and its token and length stay as they were when it drew its last token.
        seed, start, visit: [R] int64, of the streams.
        ends: [R, E] int64, filled up with −1.
        tables: [R, M] int64.
        turn: [1] int64, steps of this run so far.
        drawn: [turns, R] int64, the tokens; ENDED or NOT_FINITE where there is none. This and the two that
            follow are made by the first step.
        hidden: [turns, R, H], the states that they were drawn from.
        stats: of their logits, [turns, R] each.
        replay: the captured step; None where there is none.
    """

    drawn: Tensor
    hidden: Tensor
    stats: TokenStats

    def __init__(self, rows: int, ends: int, entries: int, turns: int, device: torch.device):
        sizes = [rows] * 6 + [rows * ends, rows * entries, 1]
        # One after another in one tensor, so that the host fills them with one copy.
        self._numbers = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        *columns, ended_by, tables, self.turn = self._numbers.split(sizes)
        self.token, self.length, self.remaining, self.seed, self.start, self.visit = columns
        self.ends, self.tables = ended_by.view(rows, ends), tables.view(rows, entries)
        self.turns = turns
        self._logs: tuple[Tensor, ...] = ()
        self.replay: Callable[[], None] | None = None

    def fill(self, rows: Sequence[StepRow]) -> None:
        """Write these rows, at least one; those left over copy the first, and have ended."""
        count, width = self.ends.shape
        rows = [*rows, *[replace(rows[0], remaining=0)] * (count - len(rows))]
        numbers = [row.token for row in rows] + [row.length for row in rows]
        numbers += [row.remaining for row in rows]
        numbers += [number for part in zip(*(row.stream for row in rows), strict=True) for number in part]
        for row in rows:
            numbers += [*row.ends, *[-1] * (width - len(row.ends))]
        for row in rows:
            numbers += [*row.blocks, *[0] * (self.tables.shape[1] - len(row.blocks))]
        self._numbers.copy_(torch.tensor([*numbers, 0], dtype=torch.int64))

    def log(self, drawn: Tensor, hidden: Tensor, stats: TokenStats) -> None:
        """Write what this turn gave, [R, …] each."""
        values = (drawn, hidden, *stats)
        if not self._logs:
            self._logs = tuple(value.new_zeros(self.turns, *value.shape) for value in values)
            self.drawn, self.hidden, *rest = self._logs
            self.stats = TokenStats(*rest)
        for log, value in zip(self._logs, values, strict=True):
            log.index_copy_(0, self.turn, value[None])


def step(
    lm: LanguageModel, reader: PagedReader, pool: BlockPool, sampling: SamplingConfig, bucket: Bucket
) -> None:
    """One token more in every row of a bucket that has not ended. Nothing waits for the device."""
    size, going = pool.block_size, bucket.remaining > 0
    entry = (bucket.length // size).clamp(max=bucket.tables.shape[1] - 1)
    slot = bucket.tables.gather(1, entry[:, None])[:, 0] * size + bucket.length % size
    hidden = reader.read_next(
        pool, bucket.token, bucket.length, bucket.tables, torch.where(going, slot, -1)
    )
    logits = lm.logits(hidden)
    # Whether it matters is seen by the host: a row may have ended before by a stop string.
    finite = logits.amax(dim=-1).isfinite()
    logits = logits.masked_fill(~finite[:, None], 0.0)
    stats = token_stats(logits)
    if sampling.temperature <= 0:
        token = logits.argmax(dim=-1)
    else:
        token = draw_tokens(
            logits,
            DrawKey(bucket.seed, bucket.start, bucket.visit, bucket.length + 1),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
    drawn = torch.where(going, torch.where(finite, token, NOT_FINITE), ENDED)
    bucket.log(drawn, hidden, stats)
    # A row that has ended stands still: what it reads again has been read before.
    goes_on = going & (bucket.remaining > 1) & (token[:, None] != bucket.ends).all(dim=1)
    bucket.token.copy_(torch.where(goes_on, token, bucket.token))
    bucket.length.add_(goes_on)
    bucket.remaining.sub_(1).mul_(goes_on)
    bucket.turn.add_(1)


class Steps:
    """Runs of steps over the sequences of one pool, with a bucket for each size that comes up.

    Args:
        lm: the model whose head and table are read.
        reader: reads it.
        sampling: of the rollouts.
        pool: where the sequences lie.
        turns: most steps of a run.
        capture: makes a launch of what is captured; None: a CUDA graph where the device and the reader's
            passes allow it, else steps are launched one by one.
    """

    def __init__(
        self,
        lm: LanguageModel,
        reader: PagedReader,
        sampling: SamplingConfig,
        pool: BlockPool,
        turns: int,
        capture: Capture | None = None,
    ):
        self._lm, self._reader, self._sampling, self._pool = lm, reader, sampling, pool
        self.turns = turns
        self._buckets: dict[tuple[int, int, int], Bucket] = {}
        self._given_capture, self._capture = capture, capture
        self._captured_for: tuple[object, ...] = ()

    def run(self, rows: Sequence[StepRow], turns: int) -> Bucket:
        """Take ``turns`` steps from these rows; the bucket that holds what they drew, in its first rows."""
        sizes = len(rows), max(len(row.ends) for row in rows), max(len(row.blocks) for row in rows)
        key = tuple(1 << (max(1, size) - 1).bit_length() for size in sizes)
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(*key, self.turns, self._lm.device)
        self._forget_what_moved()
        bucket.fill(rows)
        for turn in range(turns):
            if bucket.replay is not None:
                bucket.replay()
                continue
            self._step(bucket)
            # After a step that compiled what there is to compile, and where there is a use of it.
            if self._capture is not None and self._reader.capturable and turn + 1 < turns:
                bucket.replay = self._capture(lambda: self._step(bucket))
        return bucket

    def _step(self, bucket: Bucket) -> None:
        step(self._lm, self._reader, self._pool, self._sampling, bucket)

    def _forget_what_moved(self) -> None:
        """Captured steps hold addresses: of what the reader reads, and of the pool."""
        holds = (*self._reader.held, self._pool.keys, self._pool.values)
        if len(holds) == len(self._captured_for) and all(map(is_, holds, self._captured_for)):
            return
        self._captured_for = holds
        for bucket in self._buckets.values():
            bucket.replay = None
        if self._given_capture is None and self._lm.device.type == "cuda":
            self._capture = graphs(self._lm.device)


def graphs(device: torch.device) -> Capture:
    """Captures CUDA graphs on a stream of their own.

    They share their memory, as no two of them run at the same time. Once all of them are dropped, take a
    new one of these: memory that no graph holds can still be in use by a library.
    """
    stream, memory = torch.cuda.Stream(device), None

    def captured(function: Callable[[], None]) -> Callable[[], None]:
        nonlocal memory
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"),
        ):
            function()
        memory = graph.pool()
        return graph.replay

    return captured
