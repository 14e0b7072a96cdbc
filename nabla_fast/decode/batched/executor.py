"""Runs the requests of many problems as batches over paged keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.decode.batched.accelerations import Accelerations
from nabla_fast.decode.batched.drafting import Drafting
from nabla_fast.decode.batched.requests import Descend, Gradient, Read, RollOut, Sample, Score
from nabla_fast.decode.batched.rewards import RewardBatches
from nabla_fast.decode.batched.rollout import roll_out, sample
from nabla_fast.decode.batched.rollout_ahead import roll_out_ahead, sample_ahead
from nabla_fast.decode.batched.steps import Capture, Steps
from nabla_fast.decode.batched.suffixes import suffix_states
from nabla_fast.decode.descent import hard_descent_, moving_rows
from nabla_fast.decode.draws import PhiloxDraws, draws_of
from nabla_fast.decode.relaxed import Relaxed
from nabla_fast.decode.schedule import learning_rates
from nabla_fast.decode.trajectory import TrajectoryGradient
from nabla_fast.models import LanguageModel, Reward, RewardSum
from nabla_fast.models.paged_kv import BlockPool
from nabla_fast.models.reader import PagedReader, padded_ids
from nabla_fast.models.readers import FrozenSequence, SuffixReader, suffix_reader
from nabla_fast.models.tables import TokenTable
from nabla_fast.models.whole_reader import OwnForward
from nabla_fast.ops import AdamState, GumbelNoise, synchronize

TURNS = 8


class Executor:
    """The models, and one method a kind of request.

    Args:
        lm, rm, config, accelerations: of the loop.
        turns: steps of rollouts that are taken before the host looks at what they drew, where draws are
            Philox's; None: ``TURNS`` on a device, 1 on the CPU, where nothing is gained by it.
        capture: as of :class:`Steps`.
    Raises:
        ValueError: ``turns`` is below 1.
        ModelError: no way of reading the LM in batches is right.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rm: RewardSum | Reward | None,
        config: DTOConfig,
        accelerations: Accelerations,
        turns: int | None = None,
        capture: Capture | None = None,
    ):
        self.lm, self.rm, self.config, self.accelerations = lm, rm, config, accelerations
        self.draws = draws_of(config, lm.device)
        if turns is not None and turns < 1:
            raise ValueError(f"turns must be at least 1, got {turns}")
        if turns is None:
            turns = 1 if lm.device.type == "cpu" else TURNS
        self.lm_reader = suffix_reader(lm.model)
        self._rewards = RewardBatches(rm, config.reward_coeff, lm.device, accelerations.frozen_prefix)
        # Steps on buffers read block tables, and draw by Philox.
        ahead = isinstance(self.draws, PhiloxDraws) and isinstance(self.lm_reader, PagedReader)
        self.turns, self.capture = turns if ahead else 1, capture
        self._steps: dict[BlockPool, Steps] = {}
        # A draft that is not drawn is cut off again.
        self.drafting = Drafting(accelerations.drafting and self.lm_reader.cuts_back)
        self._tables = [TokenTable(lm.table), *self._rewards.tables]
        self.schedule = learning_rates(config, lm.device)

    @property
    def reward_readers(self) -> list[SuffixReader | OwnForward]:
        """What reads each of the rewards."""
        return self._rewards.readers

    def roll_out(self, requests: Sequence[RollOut]) -> None:
        """Roll out all requests together; each draws from its own stream."""
        if self.turns == 1:
            roll_out(self.lm, self.lm_reader, self.config, self.draws, self.drafting, requests)
            return
        steps = self._steps_in(requests[0].base.pool)
        roll_out_ahead(self.lm, self.lm_reader, self.config, steps, requests)

    def sample(self, requests: Sequence[Sample]) -> None:
        """Roll out all requests together, of whose rollouts the tokens alone are asked for."""
        if self.turns == 1:
            sample(self.lm, self.lm_reader, self.config, self.draws, requests)
        else:
            sample_ahead(self.lm, self.config, self.draws, self._steps_in(requests[0].base.pool), requests)

    def _steps_in(self, pool: BlockPool) -> Steps:
        if pool not in self._steps:
            sampling = self.config.rollout_sampling
            self._steps[pool] = Steps(self.lm, self.lm_reader, sampling, pool, self.turns, self.capture)
        return self._steps[pool]

    def read(self, requests: Sequence[Read]) -> None:
        """Read the tokens of all requests, those of one model as one batch."""
        for n in dict.fromkeys(request.reward for request in requests):
            asked = [request for request in requests if request.reward == n]
            if n is None:
                self._read(self.lm_reader, self.lm.device, asked)
            else:
                self._read(self.reward_readers[n], self._rewards.device(n), asked)

    @staticmethod
    def _read(reader: SuffixReader, device: torch.device, requests: Sequence[Read]) -> None:
        lengths = [len(request.tokens) for request in requests]
        sequences: list[FrozenSequence] = []
        try:
            for request in requests:
                sequences.append(request.base.fork(0))
            ids = padded_ids([request.tokens for request in requests], device)
            hidden = reader.read(sequences, lengths, ids=ids, store=True)
        except BaseException:
            for sequence in sequences:
                sequence.free()
            raise
        for request, sequence, length, states in zip(requests, sequences, lengths, hidden, strict=True):
            request.count("lm" if request.reward is None else "rm", length, max(lengths))
            # A copy: a view would keep the states of all tokens.
            request.sequence, request.state = sequence, states[length - 1].clone()

    def forget(self, pool: BlockPool) -> None:
        """Drop what was made for the LM's pool, which is closed: buffers, and graphs with its addresses."""
        self._steps.pop(pool, None)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to decodes that are under way."""
        return {**self.__dict__, "_steps": {}}

    # -- rewards -----------------------------------------------------------------------------------

    def score(self, requests: Sequence[Score]) -> None:
        """Rewards of all requests, as one batch a reward."""
        self._rewards.score(requests)

    # -- gradients ---------------------------------------------------------------------------------

    def gradient(self, requests: Sequence[Gradient]) -> None:
        """G of all requests from one forward+backward of each model over the suffixes."""
        mixes = [request.relaxed.mixes(self._tables) for request in requests]
        cotangents, hidden = self._lm_gradient(requests, [mix[0] for mix in mixes])
        of_rewards = self._rewards.gradients(requests, [mix[1:] for mix in mixes])
        for request, own, rest, states in zip(requests, cotangents, of_rewards, hidden, strict=True):
            request.stats.gradient_passes += 1
            request.gradient = TrajectoryGradient(
                [own, *rest], self._tables, states, self.lm.head, self.config.nll_coeff
            )

    def _lm_gradient(
        self, requests: Sequence[Gradient], mixes: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        # Leaves as wide as the arithmetic: a half-precision one would round its gradient.
        dtype = self.lm_reader.dtype
        cotangents = [torch.zeros_like(mix, dtype=dtype) for mix in mixes]
        hidden = [request.hidden for request in requests]
        rows = [n for n, mix in enumerate(mixes) if len(mix) > 1]
        if not rows:
            return cotangents, hidden
        asked = [requests[n] for n in rows]
        before = [[*request.problem.prompt_ids, *request.response] for request in asked]
        read = [mixes[n][:-1].detach().to(dtype).requires_grad_() for n in rows]
        with torch.enable_grad():
            frozen = self.accelerations.frozen_prefix and self.lm_reader.frozen_gradients
            whole, starts = suffix_states(
                self.lm_reader,
                self.lm.table,
                [r.lm_base for r in asked],
                before,
                read,
                [len(ids) if frozen else 0 for ids in before],
            )
            states = [
                part[len(ids) - start :] for part, ids, start in zip(whole, before, starts, strict=True)
            ]
        own = [part.detach() for part in states]
        directions = 1  # forward, and backward where the likelihood counts
        if self.config.nll_coeff > 0:
            directions = 2
            upstream = self._likelihood_gradients(asked, own)
            for n, gradient in zip(rows, torch.autograd.grad(states, read, upstream), strict=True):
                cotangents[n][:-1] = gradient
        for n, part in zip(rows, own, strict=True):
            hidden[n] = torch.cat([hidden[n], part])
        lengths = list(map(len, whole))
        for request, tokens in zip(asked, lengths, strict=True):
            request.count("lm", tokens, max(lengths), directions)
        return cotangents, hidden

    def _likelihood_gradients(self, requests: Sequence[Gradient], states: Sequence[Tensor]) -> list[Tensor]:
        """∂ℒ/∂states of the likelihood of all positions but the first, which nothing relaxed precedes."""
        head, lengths = self.lm.head, list(map(len, states))
        if all(request.relaxed.tokens is not None for request in requests):
            relaxed = Relaxed(tokens=torch.cat([request.relaxed.tokens[1:] for request in requests]))
            gradients = relaxed.likelihood_gradient(torch.cat(list(states)), head).split(lengths)
        else:
            gradients = [
                request.relaxed.likelihood_gradient(part, head, start=1)
                for request, part in zip(requests, states, strict=True)
            ]
        return [self.config.nll_coeff * gradient for gradient in gradients]

    def norms(self, gradient: TrajectoryGradient) -> Tensor:
        """‖G_i‖₂ of all positions, [L]."""
        if self.accelerations.small_gradients:
            return gradient.norms()
        rows = gradient.rows(len(gradient.hidden))
        return rows.masked_fill(rows.isinf(), 0).norm(dim=-1)

    # -- descent -----------------------------------------------------------------------------------

    def descend(self, requests: Sequence[Descend]) -> None:
        """Adam steps on the rows of all requests; the rows of one stop together."""
        counts = [len(request.parameter) for request in requests]
        parameter = torch.cat([request.parameter for request in requests])
        state = AdamState(*(torch.cat(parts) for parts in zip(*(r.state for r in requests), strict=True)))
        device = parameter.device
        group = noise = None
        if max(counts) > 1:
            group = torch.repeat_interleave(torch.arange(len(requests)), torch.tensor(counts)).to(device)
        if requests[0].noise is not None:
            noise = GumbelNoise(
                *(torch.cat(parts) for parts in zip(*(r.noise for r in requests), strict=True))
            )
        until = torch.tensor(
            [r.until for r, count in zip(requests, counts, strict=True) for _ in range(count)]
        )
        grad = self.moving_rows([request.gradient for request in requests], counts)
        done = hard_descent_(
            self.config,
            parameter,
            grad,
            state,
            self.schedule,
            self.lm.head,
            until=until.to(device),
            group=group,
            noise=noise,
        )
        synchronize()
        parts = zip(
            requests,
            parameter.split(counts),
            done.token.split(counts),
            *(tensor.split(counts) for tensor in state),
            state.step.cpu().split(counts),
            strict=True,
        )
        for request, rows, token, *moments, steps in parts:
            request.parameter, request.token, request.state = rows, token, AdamState(*moments)
            request.steps = int(steps[0])

    def moving_rows(self, gradients: Sequence[TrajectoryGradient], counts: Sequence[int]) -> Tensor:
        """G [Σ n, V] of the first n rows of several trajectories, as they are descended along."""
        firsts = [1] * len(counts) if self.config.update == "first" else counts
        return moving_rows(self.config, self._rows(gradients, firsts), counts)

    def _rows(self, gradients: Sequence[TrajectoryGradient], counts: Sequence[int]) -> Tensor:
        """G of the first rows of several trajectories, from one pass over the tables."""
        if not self.accelerations.small_gradients:
            parts = [gradient.rows(len(gradient.hidden)) for gradient in gradients]
            return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return TrajectoryGradient.joined(gradients, counts).rows(sum(counts))
