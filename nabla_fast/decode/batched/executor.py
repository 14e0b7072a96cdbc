"""Runs the requests of many problems as batches over paged keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nabla_fast.config import DTOConfig
from nabla_fast.decode.batched.accelerations import Accelerations
from nabla_fast.decode.batched.drafting import Drafting
from nabla_fast.decode.batched.requests import Descend, Gradient, Read, RollOut, Sample, Score
from nabla_fast.decode.batched.rollout import roll_out, sample
from nabla_fast.decode.batched.rollout_ahead import roll_out_ahead, sample_ahead
from nabla_fast.decode.batched.steps import Capture, Steps
from nabla_fast.decode.descent import hard_descent_, learning_rates
from nabla_fast.decode.draws import PhiloxDraws, draws_of
from nabla_fast.decode.relaxed import Relaxed
from nabla_fast.decode.trajectory import TrajectoryGradient
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.models.paged_kv import BlockPool
from nabla_fast.models.reader import PagedReader, padded_ids
from nabla_fast.models.readers import FrozenSequence, SuffixReader, reward_reader, suffix_reader
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
        rm: RewardModel | None,
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
        self.rm_reader = None if rm is None else reward_reader(rm)
        # Steps on buffers read block tables, and draw by Philox.
        ahead = isinstance(self.draws, PhiloxDraws) and isinstance(self.lm_reader, PagedReader)
        self.turns, self.capture = turns if ahead else 1, capture
        self._steps: dict[BlockPool, Steps] = {}
        # A draft that is not drawn is cut off again.
        self.drafting = Drafting(accelerations.drafting and self.lm_reader.cuts_back)
        self._tables = [TokenTable(lm.table)]
        if rm and config.reward_coeff > 0:
            self._tables.append(rm.table.to(lm.device))
        self.schedule = learning_rates(config, lm.device)

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
        for name, model, reader in (("lm", self.lm, self.lm_reader), ("rm", self.rm, self.rm_reader)):
            asked = [request for request in requests if request.model == name]
            if asked:
                self._read(reader, model.device, asked)

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
            request.count(request.model, length, max(lengths))
            # A copy: a view would keep the states of all tokens.
            request.sequence, request.state = sequence, states[length - 1].clone()

    @property
    def rm_keeps(self) -> bool:
        """Whether the reward model can go on behind what it has read, rather than read it anew."""
        return getattr(self.rm_reader, "reason", None) is None

    def forget(self, pool: BlockPool) -> None:
        """Drop what was made for the LM's pool, which is closed: buffers, and graphs with its addresses."""
        self._steps.pop(pool, None)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to decodes that are under way."""
        return {**self.__dict__, "_steps": {}}

    # -- rewards -----------------------------------------------------------------------------------

    def score(self, requests: Sequence[Score]) -> None:
        """Rewards of all requests as one batch."""
        sequences: list[FrozenSequence] = []
        try:
            rewards, kept = self._score(requests, sequences)
        except BaseException:
            for sequence in sequences:
                sequence.free()
            raise
        for request, sequence, length, reward in zip(requests, sequences, kept, rewards, strict=True):
            sequence.truncate(length)
            request.reward, request.sequence = reward, sequence

    def _score(
        self, requests: Sequence[Score], sequences: list[FrozenSequence]
    ) -> tuple[list[float], list[int]]:
        """Rewards, and the tokens of each sequence before its tail; forks are added to ``sequences``."""
        unread, kept = [], []
        for request in requests:
            problem = request.problem
            tokens = [*problem.reward_prefix, *self.rm.read(request.response)]
            sequences.append(request.base.fork(request.shared))
            unread.append([*tokens, *problem.reward_suffix][sequences[-1].length :])
            kept.append(len(tokens))
        lengths = list(map(len, unread))
        if isinstance(self.rm_reader, OwnForward):
            for request, length in zip(requests, lengths, strict=True):
                request.count("rm", length, length)
            return [float(self.rm.score([ids])[0]) for ids in unread], kept
        ids = padded_ids(unread, self.rm.device)
        for request, length in zip(requests, lengths, strict=True):
            request.count("rm", length, ids.shape[1])
        hidden = self.rm_reader.read(sequences, lengths, ids=ids, store=True)
        last = hidden[torch.arange(len(requests)), torch.tensor(lengths) - 1]
        return self.rm.model.score(last)[:, 0].double().tolist(), kept

    # -- gradients ---------------------------------------------------------------------------------

    def gradient(self, requests: Sequence[Gradient]) -> None:
        """G of all requests from one forward+backward of each model over the suffixes."""
        mixes = [request.relaxed.mixes(self._tables) for request in requests]
        lm_cotangents, hidden = self._lm_gradient(requests, [mix[0] for mix in mixes])
        cotangents = [[gradient] for gradient in lm_cotangents]
        if len(self._tables) > 1:
            for parts, gradient in zip(
                cotangents, self._rm_gradient(requests, [m[1] for m in mixes]), strict=True
            ):
                parts.append(gradient)
        for request, parts, states in zip(requests, cotangents, hidden, strict=True):
            request.stats.gradient_passes += 1
            request.gradient = TrajectoryGradient(
                parts, self._tables, states, self.lm.head, self.config.nll_coeff
            )

    def _lm_gradient(
        self, requests: Sequence[Gradient], mixes: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        cotangents = [torch.zeros_like(mix) for mix in mixes]
        hidden = [request.hidden for request in requests]
        rows = [n for n, mix in enumerate(mixes) if len(mix) > 1]
        if not rows:
            return cotangents, hidden
        asked = [requests[n] for n in rows]
        before = [[*request.problem.prompt_ids, *request.response] for request in asked]
        read = [mixes[n][:-1].detach().requires_grad_() for n in rows]
        with torch.enable_grad():
            states, lengths = self._suffix_states(
                self.lm_reader, self.lm.table, [r.lm_base for r in asked], before, read
            )
        own = [part.detach() for part in states]
        directions = 1  # forward, and backward where the likelihood counts
        if self.config.nll_coeff > 0:
            directions = 2
            upstream = self._likelihood_gradients(asked, own)
            for n, gradient in zip(rows, torch.autograd.grad(states, read, upstream), strict=True):
                cotangents[n][:-1] = gradient
        for n, part in zip(rows, own, strict=True):
            hidden[n] = torch.cat([hidden[n], part])
        self._count("lm", asked, lengths, directions)
        return cotangents, hidden

    def _count(
        self, model: str, requests: Sequence[Gradient], lengths: Sequence[int], directions: int
    ) -> None:
        """Token passes over what was read as one batch."""
        for request, tokens in zip(requests, lengths, strict=True):
            request.count(model, tokens, max(lengths), directions)

    def _suffix_states(
        self,
        reader: SuffixReader,
        table: Tensor,
        bases: Sequence[FrozenSequence],
        before: Sequence[Sequence[int]],
        suffixes: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[int]]:
        """Hidden states [L, H] of suffixes of embeddings [L, H] that follow the tokens ``before`` them.

        Returns:
            The states, and how many tokens were read for each suffix.
        """
        frozen = self.accelerations.frozen_prefix and reader.frozen_gradients
        prefixes = [base.prefix(len(ids) if frozen else 0) for base, ids in zip(bases, before, strict=True)]
        # Not every reader can begin at any token.
        missing = [
            torch.tensor(ids[prefix.length :], dtype=torch.int64, device=table.device)
            for prefix, ids in zip(prefixes, before, strict=True)
        ]
        read = [
            torch.cat([table[ids], suffix]) if len(ids) else suffix
            for ids, suffix in zip(missing, suffixes, strict=True)
        ]
        lengths = list(map(len, read))
        states = reader.read(prefixes, lengths, embeddings=pad_sequence(read, batch_first=True))
        parts = [
            part[len(ids) : length] for part, ids, length in zip(states, missing, lengths, strict=True)
        ]
        return parts, lengths

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

    def _rm_gradient(self, requests: Sequence[Gradient], mixes: Sequence[Tensor]) -> list[Tensor]:
        read = [mix.detach().to(self.rm.device).requires_grad_() for mix in mixes]
        before = [[*r.problem.reward_prefix, *self.rm.read(r.response)] for r in requests]
        with torch.enable_grad():
            suffixes = [
                torch.cat([part, self.rm.embed(r.problem.reward_suffix)])
                if r.problem.reward_suffix
                else part
                for part, r in zip(read, requests, strict=True)
            ]
            if isinstance(self.rm_reader, OwnForward):
                return self._own_rm_gradient(requests, before, read, suffixes)
            states, lengths = self._suffix_states(
                self.rm_reader, self.rm.own_table, [r.rm_base for r in requests], before, suffixes
            )
            last = torch.stack([part[-1] for part in states])
            loss = -self.config.reward_coeff * self.rm.model.score(last).sum()
        self._count("rm", requests, lengths, directions=2)
        return [gradient.to(self.lm.device) for gradient in torch.autograd.grad(loss, read)]

    def _own_rm_gradient(
        self,
        requests: Sequence[Gradient],
        before: Sequence[Sequence[int]],
        read: Sequence[Tensor],
        suffixes: Sequence[Tensor],
    ) -> list[Tensor]:
        """The same by the model's own forward, one sequence after another."""
        gradients = []
        for request, ids, mix, suffix in zip(requests, before, read, suffixes, strict=True):
            sequence = torch.cat([self.rm.embed(ids), suffix])
            loss = -self.config.reward_coeff * self.rm.score_embeddings(sequence[None]).sum()
            gradients += torch.autograd.grad(loss, mix)
            self._count("rm", [request], [len(sequence)], directions=2)
        return [gradient.to(self.lm.device) for gradient in gradients]

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
        grad = self._rows([request.gradient for request in requests], counts)
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

    def _rows(self, gradients: Sequence[TrajectoryGradient], counts: Sequence[int]) -> Tensor:
        """G of the first rows of several trajectories, from one pass over the tables."""
        if not self.accelerations.small_gradients:
            parts = [gradient.rows(len(gradient.hidden)) for gradient in gradients]
            return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return TrajectoryGradient.joined(gradients, counts).rows(sum(counts))
