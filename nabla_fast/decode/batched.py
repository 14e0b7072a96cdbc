"""The batched decode loop: the tokens of the sequential loop from far fewer token passes.

Many problems walk at once and their requests run as batches; a trajectory's gradient is computed once
and kept; the models read what follows a frozen, paged prefix and nothing before it; proposals are rolled
out and scored ahead of their acceptance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from nabla_fast.config import DTOConfig
from nabla_fast.decode.accelerations import Accelerations
from nabla_fast.decode.executor import Executor
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.requests import Descend, Gradient, RollOut, Score
from nabla_fast.decode.sequential import Decoded
from nabla_fast.decode.walk import MOST_AHEAD, Request, Walk
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.results import Stats
from nabla_fast.timing import PeakMemory

_BLOCK = 16  # tokens a block of keys and values holds

# Rollouts are the dearest and gain most from company: they wait until nobody asks for anything else.
_STAGES = {Gradient: "gradient", Descend: "descent", Score: "reward", RollOut: "rollout"}


@dataclass
class _Running:
    """A walk and what it is waiting for."""

    index: int
    walk: Generator[list[Request], None, Decoded]
    asked: list[Request]
    started: float


class BatchedLoop:
    """Decodes problems together.

    Args:
        lm, rm, config: as of the sequential loop.
        batch_size: problems that walk at once.
        proposals: made at once along a trajectory; None follows the acceptance rate seen.
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
        accelerations: Accelerations | None = None,
    ):
        self._executor = Executor(lm, rm, config, accelerations or Accelerations())
        self._batch_size, self._proposals = batch_size, proposals

    @torch.no_grad()
    def decode(self, problems: Sequence[Problem], stats: Sequence[Stats]) -> Iterator[tuple[int, Decoded]]:
        """Yield (index, response) as problems finish; ``stats`` receive what each cost.

        Raises:
            RowError: the LM's logits are not finite.
            ModelError: a reward is not finite.
        """
        executor = self._executor
        peak = PeakMemory(executor.lm.device)
        self._make_pools(problems)
        serve: dict[type, Callable[[list], None]] = {
            Gradient: executor.gradient,
            Descend: executor.descend,
            Score: executor.score,
            RollOut: executor.roll_out,
        }
        waiting = iter(range(len(problems)))
        running: list[_Running] = []
        while True:
            for index in islice(waiting, self._batch_size - len(running)):
                walk = Walk(executor, problems[index], stats[index], self._proposals).steps()
                running.append(_Running(index, walk, next(walk), time.perf_counter()))
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
                    seconds["total"] = time.perf_counter() - r.started
                    stats[r.index].peak_bytes = peak.bytes()
                    yield r.index, done.value

    def _make_pools(self, problems: Sequence[Problem]) -> None:
        """Pools that the largest batch of walks cannot exhaust.

        A walk holds its trajectory and as many proposals, each also forked for a gradient at most once
        at a time, in at most one block more than its tokens need.
        """
        most = MOST_AHEAD if self._proposals is None else self._proposals
        walks = min(self._batch_size, len(problems))

        def blocks(lengths: list[int]) -> int:
            return walks * (2 * most + 3) * (max(lengths, default=0) // _BLOCK + 2)

        executor = self._executor
        lengths = [len(p.prompt_ids) + p.max_new_tokens for p in problems]
        executor.lm_pool = executor.lm_reader.pool(blocks(lengths), _BLOCK)
        if executor.rm_reader is not None:
            lengths = [len(p.reward_prefix) + p.max_new_tokens + len(p.reward_suffix) for p in problems]
            executor.rm_pool = executor.rm_reader.pool(blocks(lengths), _BLOCK)
