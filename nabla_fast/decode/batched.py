"""The batched decode loop: the tokens of the sequential loop from far fewer token passes.

Many problems walk at once and their requests run as batches; a trajectory's gradient is computed once
and kept; the models read what follows a frozen, paged prefix and nothing before it; proposals are rolled
out and scored ahead of their acceptance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from nabla_fast.config import DTOConfig
from nabla_fast.decode.accelerations import Accelerations
from nabla_fast.decode.executor import Executor
from nabla_fast.decode.pools import Held, Pools
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.requests import Descend, Gradient, RollOut, Score
from nabla_fast.decode.sequential import Decoded
from nabla_fast.decode.walk import Request, Walk
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.paged_kv import PoolExhausted
from nabla_fast.results import Stats
from nabla_fast.timing import PeakMemory

# Rollouts are the dearest and gain most from company: they wait until nobody asks for anything else.
_STAGES = {Gradient: "gradient", Descend: "descent", Score: "reward", RollOut: "rollout"}


@dataclass(eq=False)
class _Running:
    """A walk, what it holds, and what it is waiting for."""

    index: int
    walk: Generator[list[Request], None, Decoded]
    held: Held
    started: float
    asked: list[Request] = field(default_factory=list)

    def close(self) -> None:
        """Give everything back, wherever the walk stands."""
        self.walk.close()
        self.held.free()


class BatchedLoop:
    """Decodes problems together.

    Args:
        lm, rm, config: as of the sequential loop.
        batch_size: problems that walk at once.
        proposals: made at once along a trajectory; None follows the acceptance rate seen.
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
            RowError: the LM's logits are not finite.
            ModelError: a reward is not finite.
            PoolExhausted: more keys and values are needed than ``max_kv_tokens``.
        """
        if not problems:
            return
        executor = self._executor
        peak = PeakMemory(executor.lm.device)
        for reader in (executor.lm_reader, executor.rm_reader):
            if reader is not None:
                reader.renew()
        first = problems[: self._batch_size]
        pools = Pools(executor.lm_reader, executor.rm_reader, first, self._max_kv_tokens)
        serve: dict[type, Callable[[list], None]] = {
            Gradient: executor.gradient,
            Descend: executor.descend,
            Score: executor.score,
            RollOut: executor.roll_out,
        }
        waiting = iter(range(len(problems)))
        running: list[_Running] = []
        try:
            while True:
                for index in islice(waiting, self._batch_size - len(running)):
                    held = pools.hold()
                    walk = Walk(executor, held, problems[index], stats[index], self._proposals).steps()
                    running.append(_Running(index, walk, held, time.perf_counter()))
                    running[-1].asked = next(walk)
                if not running:
                    return
                kind = next(k for k in serve if any(isinstance(r.asked[0], k) for r in running))
                chosen = [r for r in running if isinstance(r.asked[0], kind)]
                start = time.perf_counter()
                serve[kind]([request for r in chosen for request in r.asked])
                share = (time.perf_counter() - start) / len(chosen)
                for r in chosen:
                    seconds = stats[r.index].seconds
                    seconds[_STAGES[kind]] = seconds.get(_STAGES[kind], 0.0) + share
                    try:
                        r.asked = next(r.walk)
                    except StopIteration as done:
                        running.remove(r)
                        r.close()
                        seconds["total"] = time.perf_counter() - r.started
                        stats[r.index].peak_bytes = peak.bytes()
                        left = time.perf_counter()
                        yield r.index, done.value
                        # What the caller did meanwhile is no part of what the others cost.
                        away = time.perf_counter() - left
                        for other in running:
                            other.started += away
        except PoolExhausted as error:
            raise PoolExhausted(f"max_kv_tokens: {error}") from None
        finally:
            for r in running:
                r.close()
            pools.close()
