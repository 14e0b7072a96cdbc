"""Runs the requests of many walks as batches over paged keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nabla_fast.config import DTOConfig
from nabla_fast.decode.continuation import Continuation
from nabla_fast.decode.requests import Descend, Gradient, RollOut, Score
from nabla_fast.errors import ModelError
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.models.paged import PagedReader
from nabla_fast.ops import (
    AdamState,
    GumbelNoise,
    cosine_schedule,
    dto_descent,
    dto_descent_latents,
    synchronize,
)
from nabla_fast.ops.rows import report, row_status
from nabla_fast.paged_kv import BlockPool
from nabla_fast.sampling import next_token, seeded
from nabla_fast.trajectory import TrajectoryGradient


class Executor:
    """The models, their pools, and one method a kind of request.

    Raises:
        ModelError: a model cannot read from a paged prefix, or does not score its last token.
    """

    def __init__(self, lm: LanguageModel, rm: RewardModel | None, config: DTOConfig):
        if rm is not None and not rm.scores_last:
            raise ModelError(f"{type(rm.model).__name__} does not score its last token's state")
        self.lm, self.rm, self.config = lm, rm, config
        self.lm_reader = PagedReader(lm.model)
        self.rm_reader = None if rm is None else PagedReader(rm.model)
        self._tables = [lm.table] + ([rm.table.to(lm.device)] if rm and config.reward_coeff > 0 else [])
        self.schedule = cosine_schedule(
            config.iters, config.lr, min_ratio=config.min_lr_ratio, warmup_steps=config.warmup_steps
        ).to(lm.device)
        self.lm_pool: BlockPool | None = None
        self.rm_pool: BlockPool | None = None

    # -- rollouts ----------------------------------------------------------------------------------

    def roll_out(self, requests: Sequence[RollOut]) -> None:
        """Roll out all requests together; each draws from its own generator."""
        sampling = self.config.rollout_sampling
        sequences = [request.base.fork(request.shared) for request in requests]
        generators = [seeded(request.seed) for request in requests]
        tokens: list[list[int]] = [[] for _ in requests]
        states: list[list[Tensor]] = [[] for _ in requests]
        unread = [
            [*request.problem.prompt_ids, *request.response][sequence.length :]
            for request, sequence in zip(requests, sequences, strict=True)
        ]
        alive = list(range(len(requests)))
        while alive:
            lengths = [len(unread[n]) for n in alive]
            ids = pad_sequence([torch.tensor(unread[n]) for n in alive], batch_first=True).to(
                self.lm.device
            )
            hidden = self.lm_reader.read([sequences[n] for n in alive], lengths, ids=ids, store=True)
            last = hidden[torch.arange(len(alive)), torch.tensor(lengths) - 1]
            logits = self.lm.logits(last).cpu()
            report("rollout", row_status(logits))
            going = []
            for row, n in enumerate(alive):
                request = requests[n]
                request.stats.token_passes["lm"] += lengths[row]
                states[n].append(last[row])
                tokens[n].append(next_token(logits[row], sampling, generators[n]))
                unread[n] = tokens[n][-1:]
                if request.problem.finish_reason(request.response + tokens[n]) is None:
                    going.append(n)
            alive = going
        for n, request in enumerate(requests):
            request.continuation = Continuation.of(
                self.lm, self.config, request.problem, request.response, tokens[n], torch.stack(states[n])
            )
            request.sequence = sequences[n]
            request.stats.llm_calls += len(tokens[n])
            request.stats.generated_tokens += len(tokens[n])

    # -- rewards -----------------------------------------------------------------------------------

    def score(self, requests: Sequence[Score]) -> None:
        """Rewards of all requests as one batch."""
        sequences, unread, kept = [], [], []
        for request in requests:
            problem = request.problem
            tokens = [*problem.reward_prefix, *self.rm.read(request.response)]
            sequence = request.base.fork(request.shared)
            sequences.append(sequence)
            unread.append([*tokens, *problem.reward_suffix][sequence.length :])
            kept.append(len(tokens))
            request.stats.token_passes["rm"] += len(unread[-1])
        lengths = list(map(len, unread))
        ids = pad_sequence([torch.tensor(part) for part in unread], batch_first=True).to(self.rm.device)
        hidden = self.rm_reader.read(sequences, lengths, ids=ids, store=True)
        last = hidden[torch.arange(len(requests)), torch.tensor(lengths) - 1]
        rewards = self.rm.model.score(last)[:, 0].double().tolist()
        for request, sequence, length, reward in zip(requests, sequences, kept, rewards, strict=True):
            sequence.truncate(length)
            request.reward, request.sequence = reward, sequence

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
        read = [mixes[n][:-1].detach().requires_grad_() for n in rows]
        prefixes = [
            requests[n].lm_base.fork(len(requests[n].problem.prompt_ids) + len(requests[n].response))
            for n in rows
        ]
        try:
            with torch.enable_grad():
                padded = pad_sequence(read, batch_first=True)
                states = self.lm_reader.read(prefixes, list(map(len, read)), embeddings=padded)
        finally:
            for prefix in prefixes:
                prefix.free()
        upstream = torch.zeros_like(states)
        for row, n in enumerate(rows):
            own = states.detach()[row, : len(read[row])]
            hidden[n] = torch.cat([hidden[n], own])
            requests[n].stats.token_passes["lm"] += len(own)
            if self.config.nll_coeff > 0:
                # The first position's state does not depend on what is relaxed.
                gradient = requests[n].relaxed.likelihood_gradient(own, self.lm.head, start=1)
                upstream[row, : len(own)] = self.config.nll_coeff * gradient
                requests[n].stats.token_passes["lm"] += len(own)
        if self.config.nll_coeff > 0:
            for n, gradient in zip(rows, torch.autograd.grad(states, read, upstream), strict=True):
                cotangents[n][:-1] = gradient
        return cotangents, hidden

    def _rm_gradient(self, requests: Sequence[Gradient], mixes: Sequence[Tensor]) -> list[Tensor]:
        read = [mix.detach().to(self.rm.device).requires_grad_() for mix in mixes]
        prefixes = [r.rm_base.fork(len(r.problem.reward_prefix) + len(r.response)) for r in requests]
        try:
            with torch.enable_grad():
                suffixes = [
                    torch.cat([part, self.rm.embed(r.problem.reward_suffix)])
                    for part, r in zip(read, requests, strict=True)
                ]
                lengths = list(map(len, suffixes))
                hidden = self.rm_reader.read(
                    prefixes, lengths, embeddings=pad_sequence(suffixes, batch_first=True)
                )
                last = hidden[torch.arange(len(requests)), torch.tensor(lengths) - 1]
                loss = -self.config.reward_coeff * self.rm.model.score(last).sum()
        finally:
            for prefix in prefixes:
                prefix.free()
        for request, length in zip(requests, lengths, strict=True):
            request.stats.token_passes["rm"] += 2 * length
        return [gradient.to(self.lm.device) for gradient in torch.autograd.grad(loss, read)]

    # -- descent -----------------------------------------------------------------------------------

    def descend(self, requests: Sequence[Descend]) -> None:
        """Adam steps on the rows of all requests; the rows of one stop together."""
        counts = [len(request.parameter) for request in requests]
        parameter = torch.cat([request.parameter for request in requests])
        state = AdamState(*(torch.cat(parts) for parts in zip(*(r.state for r in requests), strict=True)))
        group = torch.repeat_interleave(torch.arange(len(requests)), torch.tensor(counts)).to(
            parameter.device
        )
        noise = None
        if requests[0].noise is not None:
            noise = GumbelNoise(
                *(torch.cat(parts) for parts in zip(*(r.noise for r in requests), strict=True))
            )
        grad = torch.cat([request.grad for request in requests])
        options = {"group": group, "tau": self.config.tau, "noise": noise}
        if self.config.parameter == "logits":
            done = dto_descent(parameter, grad, state, self.schedule, **options)
        else:
            done = dto_descent_latents(parameter, self.lm.head, grad, state, self.schedule, **options)
        synchronize()
        parts = zip(
            requests,
            parameter.split(counts),
            done.token.split(counts),
            *(tensor.split(counts) for tensor in state),
            strict=True,
        )
        for request, rows, token, *moments in parts:
            request.parameter, request.token, request.state = rows, token, AdamState(*moments)
