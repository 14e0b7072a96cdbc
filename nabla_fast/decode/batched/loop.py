"""The batched decode loop: the tokens of the sequential loop from far fewer token passes.

Many problems are decoded at once and their requests run as batches; a trajectory's gradient is computed
once and kept; the models read the suffix of a frozen, paged prefix and nothing before it; proposals are
rolled out and scored ahead of their acceptance.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from nabla_fast.config import DTOConfig
from nabla_fast.decode.batched.accelerations import Accelerations
from nabla_fast.decode.batched.executor import Executor
from nabla_fast.decode.batched.pools import Pools, SequenceGroups
from nabla_fast.decode.batched.problem_state import ProblemState, Request
from nabla_fast.decode.batched.requests import Descend, Gradient, Read, RollOut, Sample, Score
from nabla_fast.decode.batched.steps import Capture
from nabla_fast.decode.failures import DecodeFailure, RequestFailure, without_locals
from nabla_fast.decode.problem import Decoded, Problem
from nabla_fast.decode.timing import PeakMemory
from nabla_fast.models import LanguageModel, Reward, RewardSum
from nabla_fast.models.paged_kv import PoolExhausted
from nabla_fast.models.readers import SuffixReader
from nabla_fast.models.whole_reader import OwnForward
from nabla_fast.ops import synchronize
from nabla_fast.results import Stats

# Kinds of requests in the order in which they are served. Rollouts are the most expensive and gain most
# from a full batch: they wait until no problem asks for anything else.
_STAGES = {
    Gradient: "gradient",
    Descend: "descent",
    Score: "reward",
    Read: "rollout",
    Sample: "rollout",
    RollOut: "rollout",
}

Decoding = Iterator[tuple[int, Decoded | Exception]]


@dataclass(eq=False)
class _ActiveProblem:
    """A problem that is being decoded, its sequences, and the requests it is waiting for."""

    index: int
    steps: Generator[list[Request], None, Decoded]
    groups: SequenceGroups
    stats: Stats
    requests: list[Request] = field(default_factory=list)

    def step(self) -> Decoded | Exception | None:
        """Go on after the requests were answered; the response if it is finished, or an error."""
        try:
            self.requests = next(self.steps)
        except StopIteration as done:
            return done.value
        except Exception as error:
            return error
        return None

    def close(self) -> None:
        """Give all blocks back, wherever the decode stands."""
        self.steps.close()
        self.groups.free()


class _Clock:
    """Wall-clock since construction, each moment of it counted once."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        last, self._last = self._last, time.perf_counter()
        return self._last - last

    def share(self, among: Sequence[_ActiveProblem], stage: str | None = None) -> None:
        """Share the seconds since the last call evenly."""
        share = self.lap() / len(among)
        for r in among:
            for name in ("total", stage) if stage else ("total",):
                r.stats.seconds[name] = r.stats.seconds.get(name, 0.0) + share


class BatchedLoop:
    """Decodes problems together.

    Args:
        lm, rm, config: as of the sequential loop.
        batch_size: problems decoded at once.
        proposals: made at once along a trajectory; None follows the acceptance rate seen and how many
            problems share the batch.
        max_kv_tokens: most tokens whose keys and values are held at once, a model; None for no limit.
        accelerations, turns, capture: as of :class:`Executor`.
    Raises:
        ModelError: no way of reading the LM in batches is right.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rm: RewardSum | Reward | None,
        config: DTOConfig,
        *,
        batch_size: int = 16,
        proposals: int | None = None,
        max_kv_tokens: int | None = None,
        accelerations: Accelerations | None = None,
        turns: int | None = None,
        capture: Capture | None = None,
    ):
        self._executor = Executor(lm, rm, config, accelerations or Accelerations(), turns, capture)
        self._batch_size, self._proposals = batch_size, proposals
        self._max_kv_tokens = max_kv_tokens

    def ways(self) -> list[str]:
        """How the LM and each reward are read, in words: the LM first."""
        return [reader.way for reader in self._readers]

    def slow_ways(self) -> list[str]:
        """Why models are read anew with each pass; empty where none is."""
        return [reason for reader in self._readers if (reason := getattr(reader, "reason", None))]

    @property
    def _readers(self) -> list[SuffixReader | OwnForward]:
        return [self._executor.lm_reader, *self._executor.reward_readers]

    @torch.no_grad()
    def decode(
        self, problems: Sequence[Problem], stats: Sequence[Stats], *, keep: bool = False
    ) -> Decoding:
        """Yield (index, response) as problems finish; ``stats`` receive what each cost.

        Keys and values belong to the iteration: they are gone when it ends, fails or is closed.

        An error in the answer to a batch is traced: each problem's requests are answered alone, and who
        fails alone is at fault.

        Args:
            problems: decoded in this order, ``batch_size`` at once.
            stats: one a problem.
            keep: a problem's error is yielded in place of its response, and the others go on, also after
                an error of a batch that none of its problems has alone.
        Raises:
            DecodeFailure: without ``keep``, an error, with the problem at fault, or those decoded together
                where all of them fail alone, or none. Its cause is a RowError where the LM's logits are
                not finite, a ModelError where a reward is not, PoolExhausted where more keys and values
                are needed than ``max_kv_tokens``.
        """
        if not problems:
            return
        clock, peak = _Clock(), PeakMemory(self._executor.lm.device)
        first = range(min(len(problems), self._batch_size))
        try:
            pools = self._begin([problems[n] for n in first])
        except Exception as error:
            if not keep:
                raise DecodeFailure(first) from error
            yield from ((index, error) for index in range(len(problems)))
            return
        waiting = deque(range(len(problems)))
        active: list[_ActiveProblem] = []

        def stepped(r: _ActiveProblem, outcome: Decoded | Exception | None) -> Decoding:
            """Charge a problem for a step; with an outcome, give back what it holds and yield that."""
            if outcome is None:
                clock.share([r])
                return
            active.remove(r)
            r.close()
            if isinstance(outcome, Exception):
                if not keep:
                    raise DecodeFailure([r.index]) from outcome
                without_locals(outcome)
            r.stats.peak_bytes = peak.bytes()
            clock.share([r])
            yield r.index, outcome
            clock.lap()  # what the caller did meanwhile is nobody's cost

        try:
            while True:
                while waiting and len(active) < self._batch_size:
                    index = waiting.popleft()
                    groups = pools.groups()
                    steps = self._steps(problems[index], groups, stats[index], lambda: len(active))
                    r = _ActiveProblem(index, steps, groups, stats[index])
                    active.append(r)
                    yield from stepped(r, r.step())
                if not active:
                    return
                kind = next(k for k in _STAGES if any(isinstance(r.requests[0], k) for r in active))
                chosen = [r for r in active if isinstance(r.requests[0], kind)]
                failed = self._serve(kind, chosen, keep)
                clock.share(chosen, _STAGES[kind])
                for r in chosen:
                    if r not in failed:
                        yield from stepped(r, r.step())
                for r, error in failed.items():  # last, so that no response of the batch is lost
                    yield from stepped(r, error)
        finally:
            try:
                for r in active:
                    r.close()
            finally:
                self._executor.forget(pools.lm)
                pools.close()

    def _steps(
        self,
        problem: Problem,
        groups: SequenceGroups,
        stats: Stats,
        active_problems: Callable[[], int],
    ) -> Generator[list[Request], None, Decoded]:
        """The decode of one problem: yields requests, and goes on when they are answered."""
        return ProblemState(
            self._executor, groups, problem, stats, self._proposals, active_problems=active_problems
        ).steps()

    def _begin(self, first: Sequence[Problem]) -> Pools:
        for reader in self._readers:
            reader.renew()
        return Pools(self._executor.lm_reader, self._executor.reward_readers, first, self._max_kv_tokens)

    def _serve(
        self, kind: type, chosen: Sequence[_ActiveProblem], keep: bool
    ) -> dict[_ActiveProblem, Exception]:
        """Answer the requests of the chosen problems as one batch; errors of those at fault.

        Raises:
            DecodeFailure: without ``keep``, an error that one request caused, or one of the batch that all
                of its problems have alone, or none of them.
        """
        try:
            self._answer(kind, chosen)
            return {}
        except RequestFailure as failure:
            owner = next(r for r in chosen if failure.request in r.requests)
            if not keep:
                raise DecodeFailure([owner.index]) from failure.__cause__
            others = [r for r in chosen if r is not owner]
            return {owner: failure.__cause__, **(self._serve(kind, others, keep) if others else {})}
        except Exception as caught:
            error = caught
        if isinstance(error, PoolExhausted):
            error = PoolExhausted(f"max_kv_tokens: {error}")
        if len(chosen) == 1:
            return {chosen[0]: error}
        without_locals(error)  # the batch's tensors may be what there is no memory for
        found = {}
        for r in chosen:
            found |= self._serve(kind, [r], keep)
        if not keep and len(found) in (0, len(chosen)):
            raise DecodeFailure([r.index for r in chosen]) from error
        return found

    def _answer(self, kind: type, chosen: Sequence[_ActiveProblem]) -> None:
        """Answer the requests of the chosen problems as one batch.

        Raises:
            RequestFailure: an error that one request is known to have caused.
        """
        executor = self._executor
        serve = {
            Gradient: executor.gradient,
            Descend: executor.descend,
            Score: executor.score,
            Read: executor.read,
            Sample: executor.sample,
            RollOut: executor.roll_out,
        }
        serve[kind]([request for r in chosen for request in r.requests])
        synchronize()  # a bad row found on a device is these problems', not those of the next batch
