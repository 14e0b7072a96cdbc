"""The sequential decode loop: the definition of the result.

One position after another, one rollout after another, one forward+backward of both models over the
whole sequence each time a gradient is asked for. It has the accelerations of the published algorithm
(one gradient serves until a hard token moves, a rollout is reused until it is replaced, positions are
selected, rollouts keep their keys and values) and no other: every faster path must return its tokens,
and every speed-up is measured against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.decode.continuation import Continuation
from nabla_fast.decode.descent import moves_all_rows
from nabla_fast.decode.draws import draws_of
from nabla_fast.decode.failures import without_locals
from nabla_fast.decode.problem import Decoded, Problem
from nabla_fast.decode.reference.gradient import GradientModel
from nabla_fast.decode.reference.optimizer import TextualOptimizer
from nabla_fast.decode.reference.rollout import Roller
from nabla_fast.decode.rewarding import expect_finite, reward_sequence
from nabla_fast.decode.selection import (
    first_position,
    needs_gradient,
    selected_by_norm,
    selected_by_statistics,
)
from nabla_fast.decode.timing import PeakMemory, timed
from nabla_fast.models import LanguageModel, Reward, RewardSum, terms_of
from nabla_fast.models.reward_sequence import ScoreMemory
from nabla_fast.ops import synchronize
from nabla_fast.results import Revision, Stats


class SequentialLoop:
    """Decodes one problem at a time."""

    def __init__(self, lm: LanguageModel, rm: RewardSum | Reward | None, config: DTOConfig):
        self._lm, self._rewards, self._config = lm, terms_of(rm), config
        self._gradients = GradientModel(lm, rm, config)
        self._optimizer = TextualOptimizer(self._gradients, config)
        self._rejection = config.rejection and bool(self._rewards)
        self._draws = draws_of(config, lm.device)

    def ways(self) -> list[str]:
        """How the LM and each reward are read, in words: the LM first."""
        cached = "behind a transformers cache" if self._lm.reads_cached else "anew with each token"
        rewards = [term.reward.way or "anew with each pass" for term in self._rewards]
        return [f"{cached}; gradients by passes over everything", *rewards]

    def decode(
        self, problems: Sequence[Problem], stats: Sequence[Stats], *, keep: bool = False
    ) -> Iterator[tuple[int, Decoded | Exception]]:
        """Yield (index, response) of one problem after another; ``stats`` receive what each cost.

        Args:
            problems: decoded in this order.
            stats: one a problem.
            keep: a problem's error is yielded in place of its response, and the others go on.
        Raises:
            RowError: the LM's logits are not finite.
            ModelError: a reward is not finite.
        """
        for index, (problem, own) in enumerate(zip(problems, stats, strict=True)):
            peak = PeakMemory(self._lm.device)
            outcome: Decoded | Exception
            try:
                with timed(own, "total"):
                    outcome = self._decode(problem, own)
            except Exception as error:
                if not keep:
                    raise
                outcome = without_locals(error)
            own.peak_bytes = peak.bytes()
            yield index, outcome

    @torch.no_grad()
    def _decode(self, problem: Problem, stats: Stats) -> Decoded:
        config, roller = self._config, Roller(self._lm)
        committed: list[int] = []
        revisions: list[Revision] = []
        reward: float | None = None
        memories: list[ScoreMemory] = [{} for _ in self._rewards]
        current = self._roll_out(roller, problem, committed, stats)
        while current.tokens and stats.generations < config.max_generations:
            with timed(stats, "selection"):
                position = self._first_selected(problem, committed, current, stats)
            if position is None:
                break
            committed += current.tokens[:position]
            current = current.after(position)
            old, new = current.tokens[0], self._resample(problem, committed, current, stats)
            accepted = False
            if new != old:
                proposed = self._propose(roller, problem, committed, new, stats)
                reward_after = None
                if self._rejection:
                    if reward is None:
                        reward = self._reward(problem, committed + current.tokens, stats, memories)
                    reward_after = self._reward(
                        problem, [*committed, new, *proposed.tokens], stats, memories
                    )
                    stats.llm_calls += 2
                revisions.append(Revision.judged(len(committed), old, new, reward, reward_after))
                accepted = revisions[-1].accepted
                stats.rejections += not accepted
            else:
                stats.unchanged += 1
            if accepted:
                committed.append(new)
                current, reward = proposed, reward_after
            else:
                committed.append(old)
                current = current.after(1)
            if problem.finish_reason(committed):
                break
        committed += current.tokens
        if reward is None and self._rewards:
            reward = self._reward(problem, committed, stats, memories)
        return Decoded(committed, reward, revisions)

    def _roll_out(
        self, roller: Roller, problem: Problem, committed: list[int], stats: Stats
    ) -> Continuation:
        """A new rollout after ``committed``, seeded by what precedes its first free token."""
        return self._continuation(roller, problem, committed, len(committed), stats)

    def _propose(
        self, roller: Roller, problem: Problem, committed: list[int], token: int, stats: Stats
    ) -> Continuation:
        """The rollout that a new token starts; empty if the token ends the response."""
        return self._continuation(roller, problem, [*committed, token], len(committed), stats)

    def _continuation(
        self, roller: Roller, problem: Problem, response: list[int], offset: int, stats: Stats
    ) -> Continuation:
        stats.generations += 1
        stats.rounds += 1
        if response and problem.finish_reason(response):
            return Continuation.empty(self._lm)
        with timed(stats, "rollout"):
            rollout = roller.roll(
                [*problem.prompt_ids, *response],
                self._config.rollout_sampling,
                self._draws,
                self._draws.stream(problem, len(response), offset),
                lambda tokens: problem.finish_reason(response + tokens) is not None,
                stats,
            )
        with timed(stats, "selection"):
            return Continuation.of(
                self._lm, self._config, problem, response, rollout.tokens, rollout.hidden
            )

    def _first_selected(
        self, problem: Problem, committed: list[int], current: Continuation, stats: Stats
    ) -> int | None:
        """Index of the first position that meets every condition set, or None."""
        config = self._config
        selected = selected_by_statistics(config, current.stats)
        if needs_gradient(config, selected):
            if config.relaxation == "soft":
                gradient = self._gradients.soft(problem, committed, self._lm.logits(current.hidden), stats)
            else:
                gradient = self._gradients.hard(problem, committed, current.hard, stats)
            selected = selected_by_norm(config, selected, gradient.norms())
        return first_position(selected)

    def _resample(self, problem: Problem, committed: list[int], current: Continuation, stats: Stats) -> int:
        """Optimize the trajectory from its first position on, and draw that position's token."""
        count = len(current.tokens) if moves_all_rows(self._config) else 1
        parameter = self._optimizer.initial(current.hidden[:count])
        if self._config.relaxation == "soft":
            logits = self._lm.logits(current.hidden)
            self._optimizer.optimize_soft_(problem, committed, parameter, logits, stats)
        else:
            self._optimizer.optimize_hard_(
                problem, committed, parameter, current.hard.clone(), current.noise, stats
            )
        synchronize()
        return self._redraw(problem, committed, self._optimizer.logits(parameter[:1]))

    def _redraw(self, problem: Problem, committed: list[int], logits: Tensor) -> int:
        """The token after ``committed`` from its optimized logits [1, V]."""
        position = len(problem.prompt_ids) + len(committed)
        stream = self._draws.stream(problem, len(committed), len(committed))
        return self._draws.redraw(logits, self._config.resample_sampling, [stream], [position])(0)

    def _reward(
        self, problem: Problem, response: list[int], stats: Stats, memories: Sequence[ScoreMemory]
    ) -> float:
        total = 0.0
        for n, term in enumerate(self._rewards):
            sequence = reward_sequence(problem, n, term.reward, response)
            if term.reward.counts_tokens:
                stats.token_passes["rm"] += len(sequence)
            with timed(stats, "reward"):
                total += term.weight * float(term.reward.reward(sequence, memory=memories[n])[0])
        return expect_finite(total, response)
