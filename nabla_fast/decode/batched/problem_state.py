"""The decode of one problem, with proposals made ahead of their acceptance.

It yields lists of requests and goes on when they are answered. Along one trajectory neither a
position's descent nor its draw depends on anything later, and a rejection changes nothing for the next
position: so several proposals are rolled out and scored together, and the first accepted in order wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple

import torch

from nabla_fast.decode.batched.executor import Executor
from nabla_fast.decode.batched.pools import RewardSequences, SequenceGroups
from nabla_fast.decode.batched.requests import Descend, Gradient, Read, RollOut, Score
from nabla_fast.decode.continuation import Continuation
from nabla_fast.decode.descent import moves_all_rows, soft_step_
from nabla_fast.decode.parameter import initial_parameter, parameter_logits
from nabla_fast.decode.problem import Decoded, Problem
from nabla_fast.decode.relaxed import Relaxed
from nabla_fast.decode.rewarding import expect_finite
from nabla_fast.decode.selection import (
    first_position,
    needs_gradient,
    selected_by_norm,
    selected_by_statistics,
)
from nabla_fast.decode.trajectory import TrajectoryGradient
from nabla_fast.models.readers import FrozenSequence
from nabla_fast.models.reward_sequence import ScoreMemory
from nabla_fast.ops import AdamState, GumbelNoise, TokenStats
from nabla_fast.results import Revision, Stats

Request = Read | RollOut | Score | Gradient | Descend
Ask = Generator[list[Request], None, None]

MOST_PROPOSALS = 8  # at once along one trajectory


class Proposal(NamedTuple):
    """A token that would change the current trajectory."""

    offset: int  # in the current continuation
    token: int


class ProblemState:
    """The state of one problem.

    Args:
        groups: where its sequences come from; the caller frees them.
        proposals: how many to make at once; None follows the acceptance rate seen.
        active_problems: how many problems are decoded just now: many fill a batch without guesses.
    """

    def __init__(
        self,
        executor: Executor,
        groups: SequenceGroups,
        problem: Problem,
        stats: Stats,
        proposals: int | None = None,
        active_problems: Callable[[], int] = lambda: 1,
    ):
        self._executor, self._config, self._groups = executor, executor.config, groups
        self._problem, self._stats = problem, stats
        self._proposals, self._active_problems = proposals, active_problems
        self._has_reward = executor.rm is not None
        self._rejection = self._config.rejection and self._has_reward
        self._frozen_prefix = executor.accelerations.frozen_prefix
        self._response: list[int] = []  # committed tokens
        self._current: Continuation | None = None
        self._sequence: FrozenSequence | None = None  # the LM's, of prompt, response and continuation
        self._reward: float | None = None
        self._rm_sequences: RewardSequences | None = None
        self._memories: list[ScoreMemory] = [{} for _ in groups.rewards]
        self._store: dict[tuple[int, ...], tuple[int, TrajectoryGradient]] = {}
        self._proposed = self._accepted = 0
        self._descent_calls: dict[int, int] = {}  # by the offset that a descent is for
        self.revisions: list[Revision] = []

    def steps(self) -> Generator[list[Request], None, Decoded]:
        """Yield requests until the response is decoded."""
        config, stats, problem = self._config, self._stats, self._problem
        empty = self._groups.lm.sequence()
        stream = self._executor.draws.stream(problem, 0, 0)
        first = RollOut(problem, stats, empty, 0, [], stream, [])
        stats.generations = stats.rounds = 1
        yield [first]
        empty.free()
        self._current, self._sequence = first.continuation, first.sequence
        stats.llm_calls += len(self._current.tokens)
        while self._current.tokens and stats.generations < config.max_generations:
            self._descent_calls.clear()
            proposals, unchanged, examined = yield from self._propose()
            if not proposals:
                stats.unchanged += len(unchanged)
                stats.llm_calls += sum(self._descent_calls.values())
                break
            yield from self._judge(proposals, unchanged, examined)
            if problem.finish_reason(self._response):
                break
        response = self._response + self._current.tokens
        if self._has_reward and self._reward is None:
            yield from self._score_current()
        for sequence in (self._sequence, self._rm_sequences):
            if sequence is not None:
                sequence.free()
        return Decoded(response, self._reward, self.revisions)

    # -- proposals ---------------------------------------------------------------------------------

    def _width(self) -> int:
        """How many proposals to make at once: one more as long as it is as likely needed as not."""
        left = self._config.max_generations - self._stats.generations
        if not self._rejection:
            return 1
        if not self._executor.accelerations.speculation:
            return 1
        if self._proposals is not None:
            return min(self._proposals, left)
        rate = (self._accepted + 1) / (self._proposed + 3)
        most = MOST_PROPOSALS // self._active_problems()
        return max(1, min(left, most, 1 + int(math.log(0.5) / math.log1p(-rate))))

    def _propose(self) -> Generator[list[Request], None, tuple[list[Proposal], list[int], int]]:
        """The next proposals along the current trajectory.

        Returns:
            The proposals; the offsets whose redraw gave the token already there; and the offset up to
            which the current trajectory stays if all proposals are rejected.
        """
        wanted = self._width()
        proposals: list[Proposal] = []
        unchanged: list[int] = []
        start = 0
        while len(proposals) < wanted:
            offsets = []
            while len(offsets) < wanted - len(proposals):
                offset = yield from self._next_selected(start)
                if offset is None:
                    break
                offsets.append(offset)
                start = offset + 1
                if moves_all_rows(self._config):
                    break  # its descent has all later rows: one offset fills it
            if not offsets:
                break
            if self._reward is None and self._has_reward:
                yield from self._score_current()
            tokens = yield from self._resample(offsets)
            for offset, token in zip(offsets, tokens, strict=True):
                if token != self._current.tokens[offset]:
                    proposals.append(Proposal(offset, token))
                else:
                    unchanged.append(offset)
        return proposals, unchanged, start

    def _next_selected(self, start: int) -> Generator[list[Request], None, int | None]:
        """The first offset from ``start`` on that meets every condition set."""
        config, current = self._config, self._current
        if start >= len(current.tokens):
            return None
        part = TokenStats(*(values[start:] for values in current.stats))
        selected = selected_by_statistics(config, part)
        if needs_gradient(config, selected):
            if self._reward is None and self._has_reward:
                yield from self._score_current()
            gradient = (yield from self._gradients([(start, self._relaxed(start))]))[0]
            selected = selected_by_norm(config, selected, self._executor.norms(gradient))
        offset = first_position(selected)
        return None if offset is None else start + offset

    def _relaxed(self, offset: int) -> Relaxed:
        """y of the positions from an offset on, before any step."""
        if self._config.relaxation == "soft":
            return Relaxed(
                logits=self._executor.lm.logits(self._current.hidden[offset:]), tau=self._config.tau
            )
        return Relaxed(tokens=self._current.hard[offset:])

    def _gradients(
        self, asked: list[tuple[int, Relaxed]], purpose: str = "gradient"
    ) -> Generator[list[Request], None, list[TrajectoryGradient]]:
        """G of the relaxed positions from each offset on, from the store where it is there.

        With hard tokens ℒ depends on the sequence alone, and the terms before a position do not
        depend on it: one gradient serves every position after the one it was computed from.
        """
        found: list[TrajectoryGradient | None] = [None] * len(asked)
        needed: list[tuple[int, tuple[int, ...], Gradient]] = []
        for n, (offset, relaxed) in enumerate(asked):
            before = self._response + self._current.tokens[:offset]
            key = ()
            if relaxed.tokens is not None and self._executor.accelerations.gradient_store:
                key = (*before, *relaxed.tokens.tolist())
            if key and key in self._store and self._store[key][0] <= len(before):
                computed_from, gradient = self._store[key]
                found[n] = gradient.after(len(before) - computed_from)
                continue
            hidden = self._current.hidden[offset : offset + 1]
            request = Gradient(
                self._problem,
                self._stats,
                before,
                hidden,
                self._sequence,
                self._rm_sequences,
                relaxed,
                purpose,
            )
            needed.append((n, key, request))
        # Offsets ascend, so the first request of a key covers the positions of the others.
        leaders: dict[tuple[int, ...], Gradient] = {}
        for _, key, request in needed:
            if key:
                leaders.setdefault(key, request)
        requests = [*leaders.values(), *(request for _, key, request in needed if not key)]
        if requests:
            yield requests
        for key, request in leaders.items():
            self._store[key] = (len(request.response), request.gradient)
        for n, key, request in needed:
            leader = leaders.get(key, request)
            found[n] = leader.gradient.after(len(request.response) - len(leader.response))
        return found

    def _resample(self, offsets: list[int]) -> Generator[list[Request], None, list[int]]:
        """The optimized and redrawn token at each offset."""
        config, current, lm = self._config, self._current, self._executor.lm
        whole = moves_all_rows(config)
        counts = [len(current.tokens) - offset if whole else 1 for offset in offsets]
        hidden = torch.cat(
            [current.hidden[offset : offset + count] for offset, count in zip(offsets, counts, strict=True)]
        )
        parameter = initial_parameter(config, hidden, lm.head)
        parameters = list(parameter.split(counts))
        if config.relaxation == "soft":
            yield from self._descend_soft(offsets, parameters)
        else:
            yield from self._descend_hard(offsets, parameters)
        rows = torch.cat([parameter[:1] for parameter in parameters])
        logits = parameter_logits(config, rows, lm.head)
        draws, problem = self._executor.draws, self._problem
        committed = [len(self._response) + offset for offset in offsets]
        draw = draws.redraw(
            logits,
            config.resample_sampling,
            [draws.stream(problem, count, count) for count in committed],
            [len(problem.prompt_ids) + count for count in committed],
        )
        return [draw(n) for n in range(len(offsets))]

    def _descend_hard(self, offsets: list[int], parameters: list[torch.Tensor]) -> Ask:
        """K steps of every parameter; those whose tokens flip ask for a new gradient, together."""
        iters, whole = self._config.iters, self._executor.accelerations.whole_descents
        tokens = [self._current.hard[offset:].clone() for offset in offsets]
        requests = []
        for offset, parameter in zip(offsets, parameters, strict=True):
            noise = self._current.noise
            if noise is not None:
                noise = GumbelNoise(*(part[offset : offset + len(parameter)] for part in noise))
            state = AdamState.zeros(parameter)
            requests.append(Descend(parameter, None, state, noise, iters if whole else 1))
        moved, purpose = list(range(len(offsets))), "gradient"
        while True:
            asked = [(offsets[n], Relaxed(tokens=tokens[n].clone())) for n in moved]
            gradients = yield from self._gradients(asked, purpose)
            self._count_calls(offsets[n] for n in moved)
            for n, gradient in zip(moved, gradients, strict=True):
                requests[n].gradient = gradient
            active = [n for n, request in enumerate(requests) if request.steps < iters]
            if not active:
                break
            yield [requests[n] for n in active]
            moved, purpose = [], "flip"
            for n in active:
                request, part = requests[n], tokens[n][: len(parameters[n])]
                if not whole:
                    request.until = min(iters, request.steps + 1)
                if not torch.equal(part, request.token):
                    part.copy_(request.token)
                    if request.steps < iters:
                        moved.append(n)
        for n, request in enumerate(requests):
            parameters[n] = request.parameter

    def _descend_soft(self, offsets: list[int], parameters: list[torch.Tensor]) -> Ask:
        """K steps of every parameter, each with a forward+backward of its own."""
        config, executor = self._config, self._executor
        logits = [self._relaxed(offset).logits.clone() for offset in offsets]
        states = [AdamState.zeros(parameter) for parameter in parameters]
        for rate in executor.schedule:
            asked = [(o, Relaxed(logits=z, tau=config.tau)) for o, z in zip(offsets, logits, strict=True)]
            gradients = yield from self._gradients(asked)
            self._count_calls(offsets)
            for parameter, z, state, gradient in zip(parameters, logits, states, gradients, strict=True):
                count = len(parameter)
                rows = executor.moving_rows([gradient], [count])
                soft_step_(config, parameter, z[:count], rows, state, rate, executor.lm.head)

    def _count_calls(self, offsets: Iterable[int]) -> None:
        """A forward+backward of both models for the descent at each offset."""
        for offset in offsets:
            self._descent_calls[offset] = self._descent_calls.get(offset, 0) + 4

    # -- judgement ---------------------------------------------------------------------------------

    def _score_current(self) -> Ask:
        bases = self._rm_sequences or self._groups.reward_sequences()
        response = self._response + self._current.tokens
        request = Score(self._problem, self._stats, bases, None, response, self._memories)
        yield [request]
        bases.free()
        self._reward = expect_finite(request.reward, request.response)
        self._rm_sequences = request.sequences

    def _judge(self, proposals: list[Proposal], unchanged: list[int], examined: int) -> Ask:
        """Roll out and score proposals; commit up to the first accepted, or all that was examined."""
        stats, committed = self._stats, len(self._response)
        rolls = yield from self._roll_out(proposals)
        scores = yield from self._score(rolls)
        winner = None
        for n, (proposal, roll, score) in enumerate(zip(proposals, rolls, scores, strict=True)):
            stats.generations += 1
            stats.llm_calls += len(roll.continuation.tokens) + (0 if score is None else 2)
            self._proposed += 1
            rewards = (
                (None, None)
                if score is None
                else (self._reward, expect_finite(score.reward, score.response))
            )
            old = self._current.tokens[proposal.offset]
            revision = Revision.judged(committed + proposal.offset, old, proposal.token, *rewards)
            self.revisions.append(revision)
            if revision.accepted:
                winner = n
                self._accepted += 1
                break
            stats.rejections += 1
        # Positions after the accepted proposal are such that the sequential loop never optimizes.
        end = examined if winner is None else proposals[winner].offset + 1
        stats.unchanged += sum(offset < end for offset in unchanged)
        stats.llm_calls += sum(calls for offset, calls in self._descent_calls.items() if offset < end)
        self._commit(rolls, scores, winner, examined)

    def _roll_out(self, proposals: list[Proposal]) -> Generator[list[Request], None, list[RollOut]]:
        """Rollouts of the proposals, each from the prefix that it shares with the current trajectory."""
        problem, current = self._problem, self._current
        rolls = []
        for offset, token in proposals:
            before = self._response + current.tokens[:offset]
            frozen = len(problem.prompt_ids) + len(before) if self._frozen_prefix else 0
            rolls.append(
                RollOut(
                    problem,
                    self._stats,
                    self._sequence,
                    frozen,
                    [*before, token],
                    self._executor.draws.stream(problem, len(before) + 1, len(before)),
                    current.tokens[offset + 1 :],
                )
            )
        unfinished = [roll for roll in rolls if problem.finish_reason(roll.response) is None]
        if unfinished:
            yield unfinished
        for roll in rolls:
            if roll.continuation is None:
                roll.continuation = Continuation.empty(self._executor.lm)
        self._stats.rounds += 1
        return rolls

    def _score(self, rolls: list[RollOut]) -> Generator[list[Request], None, list[Score | None]]:
        """Scores of the rollouts; None without a rejection step."""
        if not self._rejection:
            return [None] * len(rolls)
        if not self._executor.accelerations.batching:
            yield from self._score_current()
        problem = self._problem
        scores = [
            Score(
                problem,
                self._stats,
                self._rm_sequences,
                len(roll.response) - 1 if self._frozen_prefix else None,
                roll.response + roll.continuation.tokens,
                self._memories,
            )
            for roll in rolls
        ]
        yield scores
        return scores

    def _commit(
        self, rolls: list[RollOut], scores: list[Score | None], winner: int | None, examined: int
    ) -> None:
        stats, current = self._stats, self._current
        for n, (roll, score) in enumerate(zip(rolls, scores, strict=True)):
            if n != winner:
                for sequence in (roll.sequence, None if score is None else score.sequences):
                    if sequence is not None:
                        sequence.free()
        if winner is None:
            self._response = self._response + current.tokens[:examined]
            self._current = current.after(examined)
            return
        for roll, score in zip(rolls[winner + 1 :], scores[winner + 1 :], strict=True):
            stats.speculated += 1
            stats.wasted_tokens += len(roll.continuation.tokens)
            roll.discard()
            if score is not None:
                score.discard()
        for sequence in (self._sequence, self._rm_sequences):
            if sequence is not None:
                sequence.free()
        self._response, self._current = rolls[winner].response, rolls[winner].continuation
        self._sequence = rolls[winner].sequence
        score = scores[winner]
        self._reward = None if score is None else score.reward
        self._rm_sequences = None if score is None else score.sequences
        # Gradients along the old trajectory are not asked for again.
        self._store.clear()
