"""The batched decode loop: the tokens of the sequential loop from far fewer token passes.

Many problems are decoded at once and their requests run as batches; a trajectory's gradient is computed
once and kept; the models read the suffix of a frozen, paged prefix and nothing before it; proposals are
rolled out and scored ahead of their acceptance.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from nabla_fast.config import DTOConfig
from nabla_fast.decode.batched.accelerations import Accelerations
from nabla_fast.decode.batched.executor import Executor
from nabla_fast.decode.batched.pools import Pools, SequenceGroups
from nabla_fast.decode.batched.problem_state import ProblemState, Request
from nabla_fast.decode.batched.requests import Descend, Gradient, RollOut, Score
from nabla_fast.decode.failures import DecodeFailure, RequestFailure
from nabla_fast.decode.problem import Decoded, Problem
from nabla_fast.decode.timing import PeakMemory
from nabla_fast.errors import RowError
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.models.paged_kv import PoolExhausted
from nabla_fast.ops import synchronize
from nabla_fast.results import Stats

# Kinds of requests in the order in which they are served. Rollouts are the most expensive and gain most
# from a full batch: they wait until no problem asks for anything else.
_STAGES = {Gradient: "gradient", Descend: "descent", Score: "reward", RollOut: "rollout"}


@dataclass(eq=False)
class _ActiveProblem:
    """A problem that is being decoded, its sequences, and the requests it is waiting for."""

    index: int
    steps: Generator[list[Request], None, Decoded]
    groups: SequenceGroups
    started: float
    requests: list[Request] = field(default_factory=list)

    def step(self) -> Decoded | None:
        """Go on after the requests were answered; the response, if it is finished."""
        try:
            self.requests = next(self.steps)
        except StopIteration as done:
            return done.value
        except Exception as error:
            raise DecodeFailure([self.index]) from error
        return None

    def close(self) -> None:
        """Give all blocks back, wherever the decode stands."""
        self.steps.close()
        self.groups.free()


class BatchedLoop:
    """Decodes problems together.

    Args:
        lm, rm, config: as of the sequential loop.
        batch_size: problems decoded at once.
        proposals: made at once along a trajectory; None follows the acceptance rate seen and how many
            problems share the batch.
        max_kv_tokens: most tokens whose keys and values are held at once, a model; None for no limit.
    Raises:
        ModelError: a model's attention cannot read from a paged prefix.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rm: RewardModel | None,
        config: DTOConfig,
        *,
        batch_size: int = 16,
        proposals: int | None = None,
        max_kv_tokens: int | None = None,
        accelerations: Accelerations | None = None,
    ):
        self._executor = Executor(lm, rm, config, accelerations or Accelerations())
        self._batch_size, self._proposals = batch_size, proposals
        self._max_kv_tokens = max_kv_tokens

    @torch.no_grad()
    def decode(self, problems: Sequence[Problem], stats: Sequence[Stats]) -> Iterator[tuple[int, Decoded]]:
        """Yield (index, response) as problems finish; ``stats`` receive what each cost.

        Keys and values belong to the iteration: they are gone when it ends, fails or is closed.

        Raises:
            DecodeFailure: an error, with the problems it concerns. Its cause is a RowError where the
                LM's logits are not finite, a ModelError where a reward is not, PoolExhausted where more
                keys and values are needed than ``max_kv_tokens``.
        """
        if not problems:
            return
        peak = PeakMemory(self._executor.lm.device)
        pools = self._begin(problems[: self._batch_size])
        waiting = iter(range(len(problems)))
        active: list[_ActiveProblem] = []
        try:
            while True:
                for index in islice(waiting, self._batch_size - len(active)):
                    groups = pools.groups()
                    state = ProblemState(
                        self._executor,
                        groups,
                        problems[index],
                        stats[index],
                        self._proposals,
                        active_problems=lambda: len(active),
                    )
                    active.append(_ActiveProblem(index, state.steps(), groups, time.perf_counter()))
                    active[-1].step()
                if not active:
                    return
                kind = next(k for k in _STAGES if any(isinstance(r.requests[0], k) for r in active))
                chosen = [r for r in active if isinstance(r.requests[0], kind)]
                start = time.perf_counter()
                self._serve(kind, chosen)
                share = (time.perf_counter() - start) / len(chosen)
                for r in chosen:
                    seconds = stats[r.index].seconds
                    seconds[_STAGES[kind]] = seconds.get(_STAGES[kind], 0.0) + share
                    decoded = r.step()
                    if decoded is not None:
                        active.remove(r)
                        r.close()
                        seconds["total"] = time.perf_counter() - r.started
                        stats[r.index].peak_bytes = peak.bytes()
                        left = time.perf_counter()
                        yield r.index, decoded
                        # Time that the caller took meanwhile is no part of the others' cost.
                        away = time.perf_counter() - left
                        for other in active:
                            other.started += away
        finally:
            for r in active:
                r.close()
            pools.close()

    def _begin(self, first: Sequence[Problem]) -> Pools:
        readers = self._executor.lm_reader, self._executor.rm_reader
        try:
            for reader in readers:
                if reader is not None:
                    reader.renew()
            return Pools(*readers, first, self._max_kv_tokens)
        except Exception as error:
            raise DecodeFailure(range(len(first))) from error

    def _serve(self, kind: type, chosen: Sequence[_ActiveProblem]) -> None:
        """Answer the requests of the chosen problems as one batch."""
        together = [r.index for r in chosen]
        try:
            self._answer(kind, chosen)
        except RequestFailure as failure:
            owner = next(r.index for r in chosen if failure.request in r.requests)
            raise DecodeFailure([owner]) from failure.__cause__
        except RowError as error:
            raise DecodeFailure(self._refused_alone(kind, chosen) or together) from error
        except PoolExhausted as error:
            raise DecodeFailure(together) from PoolExhausted(f"max_kv_tokens: {error}")
        except Exception as error:
            raise DecodeFailure(together) from error

    def _answer(self, kind: type, chosen: Sequence[_ActiveProblem]) -> None:
        executor = self._executor
        serve = {
            Gradient: executor.gradient,
            Descend: executor.descend,
            Score: executor.score,
            RollOut: executor.roll_out,
        }
        serve[kind]([request for r in chosen for request in r.requests])

    def _refused_alone(self, kind: type, chosen: Sequence[_ActiveProblem]) -> list[int]:
        """The first problem whose own requests meet a bad row when they are asked for alone, if any.

        A row of a batch does not say whose it is. Rollouts, expensive to repeat, tell by themselves.
        """
        for r in chosen if kind is not RollOut else ():
            try:
                self._answer(kind, [r])
                synchronize()
            except RowError:
                return [r.index]
            except Exception:
                break
        return []
