"""One problem's walk through the decode loop, with proposals made ahead of their acceptance.

The walk yields lists of requests and goes on when they are answered. Along one trajectory neither a
position's descent nor its draw depends on anything later, and a rejection changes nothing for the next
position: so several proposals are rolled out and scored together, and the first accepted in order wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator

import torch

from nabla_fast.decode.batched.executor import Executor
from nabla_fast.decode.batched.pools import Held
from nabla_fast.decode.batched.requests import Descend, Gradient, RollOut, Score
from nabla_fast.decode.continuation import Continuation
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.reference.loop import Decoded
from nabla_fast.decode.relaxed import Relaxed
from nabla_fast.decode.sampling import TokenRows, seeded
from nabla_fast.decode.trajectory import TrajectoryGradient
from nabla_fast.errors import ModelError
from nabla_fast.models.paged_kv import PagedSequence
from nabla_fast.ops import AdamState, GumbelNoise, logits_backward
from nabla_fast.ops.adam import adam_step_
from nabla_fast.ops.softmax import softmax_gradient
from nabla_fast.results import Revision, Stats

Request = RollOut | Score | Gradient | Descend
Ask = Generator[list[Request], None, None]

MOST_AHEAD = 8


class Walk:
    """The state of one problem; its sequences are of the groups in ``held``, whose owner frees them.

    Args:
        ahead: proposals to make at once; None follows the acceptance rate seen, and
        company: how many walks there are just now: many fill a batch without guesses.
    """

    def __init__(
        self,
        executor: Executor,
        held: Held,
        problem: Problem,
        stats: Stats,
        ahead: int | None = None,
        company: Callable[[], int] = lambda: 1,
    ):
        self._run, self._config, self._held = executor, executor.config, held
        self._problem, self._stats = problem, stats
        self._ahead, self._company = ahead, company
        self._has_reward = executor.rm is not None
        self._rejection = self._config.rejection and self._has_reward
        self._response: list[int] = []  # committed tokens
        self._current: Continuation | None = None
        self._sequence: PagedSequence | None = None  # the LM's, of prompt, response and continuation
        self._reward: float | None = None
        self._rm_sequence: PagedSequence | None = None
        self._store: dict[tuple[int, ...], tuple[int, TrajectoryGradient]] = {}
        self._proposed = self._accepted = 0
        self.revisions: list[Revision] = []

    def steps(self) -> Generator[list[Request], None, Decoded]:
        """Yield requests until the response is decoded."""
        config, stats, problem = self._config, self._stats, self._problem
        lm = self._held.lm.sequence()
        first = RollOut(problem, stats, lm, 0, [], problem.seed, [])
        stats.generations = stats.rounds = 1
        yield [first]
        lm.free()
        self._current, self._sequence = first.continuation, first.sequence
        while self._current.tokens and stats.generations < config.max_generations:
            proposals, examined = yield from self._propose()
            if not proposals:
                break
            yield from self._judge(proposals, examined)
            if problem.finish_reason(self._response):
                break
        response = self._response + self._current.tokens
        if self._has_reward and self._reward is None:
            yield from self._score_current()
        for sequence in (self._sequence, self._rm_sequence):
            if sequence is not None:
                sequence.free()
        return Decoded(response, self._reward, self.revisions)

    # -- proposals ---------------------------------------------------------------------------------

    def _width(self) -> int:
        """How many proposals to make at once: one more as long as it is as likely needed as not."""
        left = self._config.max_generations - self._stats.generations
        if not self._rejection:
            return 1
        if not self._run.accelerations.speculation:
            return 1
        if self._ahead is not None:
            return min(self._ahead, left)
        rate = (self._accepted + 1) / (self._proposed + 3)
        most = MOST_AHEAD // self._company()
        return max(1, min(left, most, 1 + int(math.log(0.5) / math.log1p(-rate))))

    def _propose(self) -> Generator[list[Request], None, tuple[list[tuple[int, int]], int]]:
        """The next (offset, token) pairs along the current trajectory that would change a token.

        And the offset up to which every other position keeps its token if all of them are rejected.
        """
        wanted = self._width()
        proposals: list[tuple[int, int]] = []
        start = 0
        while len(proposals) < wanted:
            offsets = []
            while len(offsets) < wanted - len(proposals):
                offset = yield from self._next_selected(start)
                if offset is None:
                    break
                offsets.append(offset)
                start = offset + 1
                if self._config.update == "all":
                    break
            if not offsets:
                break
            if self._reward is None and self._has_reward:
                yield from self._score_current()
            tokens = yield from self._resample(offsets)
            for offset, token in zip(offsets, tokens, strict=True):
                if token != self._current.tokens[offset]:
                    proposals.append((offset, token))
        return proposals, start

    def _next_selected(self, start: int) -> Generator[list[Request], None, int | None]:
        """The first offset from ``start`` on that meets every condition set."""
        config, current = self._config, self._current
        if start >= len(current.tokens):
            return None
        selected = torch.ones(len(current.tokens) - start, dtype=torch.bool, device=current.hard.device)
        if config.confidence_threshold is not None:
            selected &= current.stats.confidence[start:] <= config.confidence_threshold
        if config.entropy_threshold is not None:
            selected &= current.stats.entropy[start:] >= config.entropy_threshold
        if config.grad_threshold is not None and bool(selected.any()):
            if self._reward is None and self._has_reward:
                yield from self._score_current()
            gradient = (yield from self._gradients([(start, self._relaxed(start))]))[0]
            selected &= self._run.norms(gradient) >= config.grad_threshold
        offsets = selected.nonzero()
        return start + int(offsets[0]) if len(offsets) else None

    def _relaxed(self, offset: int) -> Relaxed:
        """What is relaxed from an offset on, before any step."""
        if self._config.relaxation == "soft":
            return Relaxed(logits=self._run.lm.logits(self._current.hidden[offset:]), tau=self._config.tau)
        return Relaxed(tokens=self._current.hard[offset:])

    def _gradients(
        self, asked: list[tuple[int, Relaxed]], purpose: str = "gradient"
    ) -> Generator[list[Request], None, list[TrajectoryGradient]]:
        """G of what is relaxed from each offset on, from the store where it is there.

        With hard tokens ℒ depends on the sequence alone, and what stands before a position does not
        depend on it: one gradient serves every position behind the one it was computed from.
        """
        found: list[TrajectoryGradient | None] = [None] * len(asked)
        needed: list[tuple[int, tuple[int, ...], Gradient]] = []
        for n, (offset, relaxed) in enumerate(asked):
            before = self._response + self._current.tokens[:offset]
            key = ()
            if relaxed.tokens is not None and self._run.accelerations.gradient_store:
                key = (*before, *relaxed.tokens.tolist())
            if key and key in self._store and self._store[key][0] <= len(before):
                start, gradient = self._store[key]
                found[n] = gradient.after(len(before) - start)
                continue
            hidden = self._current.hidden[offset : offset + 1]
            request = Gradient(
                self._problem,
                self._stats,
                before,
                hidden,
                self._sequence,
                self._rm_sequence,
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
        config, current, lm = self._config, self._current, self._run.lm
        counts = [1 if config.update == "first" else len(current.tokens) - offset for offset in offsets]
        hidden = torch.cat(
            [current.hidden[offset : offset + count] for offset, count in zip(offsets, counts, strict=True)]
        )
        if config.parameter == "logits":
            parameter = lm.logits(hidden)
        else:
            parameter = hidden.to(torch.promote_types(hidden.dtype, torch.float32), copy=True)
        parameters = list(parameter.split(counts))
        if config.relaxation == "soft":
            yield from self._descend_soft(offsets, parameters)
        else:
            yield from self._descend_hard(offsets, parameters)
        rows = torch.cat([parameter[:1] for parameter in parameters])
        if config.parameter == "latents":
            rows = lm.logits(rows)
        drawn_from = TokenRows(rows.cpu(), config.resample_sampling)
        start = self._problem.seed + len(self._response)
        return [drawn_from.draw(n, seeded(start + offset)) for n, offset in enumerate(offsets)]

    def _descend_hard(self, offsets: list[int], parameters: list[torch.Tensor]) -> Ask:
        """K steps of every parameter; those whose tokens flip ask for a new gradient, together."""
        iters, whole = self._config.iters, self._run.accelerations.whole_descents
        tokens = [self._current.hard[offset:].clone() for offset in offsets]
        requests = []
        for offset, parameter in zip(offsets, parameters, strict=True):
            noise = self._current.noise
            if noise is not None:
                noise = GumbelNoise(*(key[offset : offset + len(parameter)] for key in noise))
            state = AdamState.zeros(parameter)
            requests.append(Descend(parameter, None, state, noise, iters if whole else 1))
        moved, purpose = list(range(len(offsets))), "gradient"
        while True:
            asked = [(offsets[n], Relaxed(tokens=tokens[n].clone())) for n in moved]
            gradients = yield from self._gradients(asked, purpose)
            self._stats.llm_calls += 4 * len(moved)
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
        config, run = self._config, self._run
        logits = [self._relaxed(offset).logits.clone() for offset in offsets]
        states = [AdamState.zeros(parameter) for parameter in parameters]
        for step in range(config.iters):
            asked = [(o, Relaxed(logits=z, tau=config.tau)) for o, z in zip(offsets, logits, strict=True)]
            gradients = yield from self._gradients(asked)
            self._stats.llm_calls += 4 * len(offsets)
            for n, gradient in enumerate(gradients):
                count = len(parameters[n])
                z = logits[n][:count]
                dz = softmax_gradient(
                    torch.softmax(z / config.tau, dim=-1),
                    gradient.rows(count),
                    z.argmax(dim=-1),
                    config.tau,
                )
                if config.parameter == "latents":
                    dz = logits_backward(dz, run.lm.head)
                adam_step_(parameters[n], dz, states[n], run.schedule[step].expand(count))
                moved = parameters[n] if config.parameter == "logits" else run.lm.logits(parameters[n])
                logits[n][:count] = moved

    # -- judgement ---------------------------------------------------------------------------------

    def _score_current(self) -> Ask:
        base = self._rm_sequence or self._held.rm.sequence()
        request = Score(self._problem, self._stats, base, 0, self._response + self._current.tokens)
        yield [request]
        base.free()
        self._reward, self._rm_sequence = self._finite(request), request.sequence

    def _finite(self, request: Score) -> float:
        if not math.isfinite(request.reward):
            raise ModelError(
                f"the reward model scores a response of {len(request.response)} tokens as {request.reward}"
            )
        return request.reward

    def _judge(self, proposals: list[tuple[int, int]], examined: int) -> Ask:
        """Roll out and score proposals; commit up to the first accepted, or all that was examined."""
        problem, stats, current = self._problem, self._stats, self._current
        frozen = self._run.accelerations.frozen_prefix
        befores = [self._response + current.tokens[:offset] for offset, _ in proposals]
        responses = [[*before, token] for before, (_, token) in zip(befores, proposals, strict=True)]
        rolls = [
            RollOut(
                problem,
                stats,
                self._sequence,
                len(problem.prompt_ids) + len(before) if frozen else 0,
                response,
                problem.seed + len(before),
                current.tokens[offset + 1 :],
            )
            for (offset, _), before, response in zip(proposals, befores, responses, strict=True)
        ]
        going = [roll for roll in rolls if problem.finish_reason(roll.response) is None]
        if going:
            yield going
        for roll in rolls:
            if roll.continuation is None:
                roll.continuation = Continuation.empty(self._run.lm)
        stats.rounds += 1
        scores: list[Score | None] = [None] * len(rolls)
        if self._rejection:
            if not self._run.accelerations.company:
                yield from self._score_current()
            scores = [
                Score(
                    problem,
                    stats,
                    self._rm_sequence,
                    len(problem.reward_prefix) + len(before) if frozen else 0,
                    roll.response + roll.continuation.tokens,
                )
                for before, roll in zip(befores, rolls, strict=True)
            ]
            yield scores
            stats.llm_calls += 2 * len(scores)
        winner = None
        for n, ((offset, token), score) in enumerate(zip(proposals, scores, strict=True)):
            stats.generations += 1
            self._proposed += 1
            after = None if score is None else self._finite(score)
            accepted = score is None or after > self._reward
            before = self._reward if score is not None else None
            old = current.tokens[offset]
            self.revisions.append(Revision(len(befores[n]), old, token, before, after, accepted))
            if accepted:
                winner = n
                self._accepted += 1
                break
            stats.rejections += 1
        self._commit(rolls, scores, winner, examined)

    def _commit(
        self, rolls: list[RollOut], scores: list[Score | None], winner: int | None, examined: int
    ) -> None:
        stats, current = self._stats, self._current
        for n, (roll, score) in enumerate(zip(rolls, scores, strict=True)):
            if n != winner:
                for sequence in (roll.sequence, None if score is None else score.sequence):
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
        for sequence in (self._sequence, self._rm_sequence):
            if sequence is not None:
                sequence.free()
        self._response, self._current = rolls[winner].response, rolls[winner].continuation
        self._sequence = rolls[winner].sequence
        score = scores[winner]
        self._reward = None if score is None else score.reward
        self._rm_sequence = None if score is None else score.sequence
        # What was computed along the old trajectory is not asked for again.
        self._store.clear()
