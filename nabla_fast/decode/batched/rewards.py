"""Scores and gradients of the rewards for many requests, one batch a reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nabla_fast.decode.batched.pools import RewardSequences
from nabla_fast.decode.batched.requests import Gradient, Score
from nabla_fast.decode.batched.suffixes import suffix_states
from nabla_fast.decode.rewarding import reward_sequence
from nabla_fast.models import Reward, RewardSum, terms_of
from nabla_fast.models.reader import padded_ids
from nabla_fast.models.readers import FrozenSequence, reward_reader
from nabla_fast.models.tables import TokenTable
from nabla_fast.models.whole_reader import OwnForward


class RewardBatches:
    """The terms of the reward, and what reads each.

    Args:
        rm: the reward, or None for none.
        coefficient: λ; 0: no gradient is asked for.
        device: of the LM, where gradients go.
        frozen_prefix: whether gradients leave what is committed to frozen keys and values.

    Attributes:
        readers: one a term.
        tables: of the terms that gradients are taken of, on the LM's device.
    """

    def __init__(
        self, rm: RewardSum | Reward | None, coefficient: float, device: torch.device, frozen_prefix: bool
    ):
        self._terms = terms_of(rm)
        self.readers = [reward_reader(term.reward) for term in self._terms]
        self._coefficient, self._device, self._frozen_prefix = coefficient, device, frozen_prefix
        self._descended = [
            n for n, term in enumerate(self._terms) if coefficient > 0 and term.reward.differentiable
        ]
        self.tables: list[TokenTable] = [self._terms[n].reward.table.to(device) for n in self._descended]

    def device(self, n: int) -> torch.device:
        """Where the model of term ``n`` reads."""
        return self._terms[n].reward.device

    # -- scores ------------------------------------------------------------------------------------

    def score(self, requests: Sequence[Score]) -> None:
        """Rewards of all requests."""
        totals = [0.0] * len(requests)
        forks: list[list[FrozenSequence]] = [[] for _ in requests]
        try:
            for n, term in enumerate(self._terms):
                for r, reward in enumerate(self._scores(n, requests, forks)):
                    totals[r] += term.weight * reward
        except BaseException:
            for fork in forks:
                RewardSequences(fork).free()
            raise
        for request, fork, total in zip(requests, forks, totals, strict=True):
            request.reward, request.sequences = total, RewardSequences(fork)

    def _scores(self, n: int, requests: Sequence[Score], forks: list[list[FrozenSequence]]) -> list[float]:
        """Rewards of term ``n``; each request gets a fork that holds prefix and response, without tail."""
        reward, reader = self._terms[n].reward, self.readers[n]
        sequences = [reward_sequence(r.problem, n, reward, r.response) for r in requests]
        own = isinstance(reader, OwnForward)
        memories = [request.memories[n] for request in requests]
        scored = [] if own else list(map(reward.scored_positions, sequences, memories))
        for i, (request, sequence, fork) in enumerate(zip(requests, sequences, forks, strict=True)):
            held = 0 if request.shared is None else len(sequence.before) + request.shared
            fork.append(request.bases[n].fork(held if own else min(held, scored[i][0])))
        if own:
            for request, sequence in zip(requests, sequences, strict=True):
                if reward.counts_tokens:
                    request.count("rm", len(sequence), len(sequence))
            rewards = [
                float(reward.reward(sequence, memory=memory)[0])
                for sequence, memory in zip(sequences, memories, strict=True)
            ]
        else:
            starts = [fork[n].length for fork in forks]
            unread = [sequence.ids[start:] for sequence, start in zip(sequences, starts, strict=True)]
            lengths, ids = list(map(len, unread)), padded_ids(unread, reward.device)
            for request, length in zip(requests, lengths, strict=True):
                request.count("rm", length, ids.shape[1])
            states = reader.read([fork[n] for fork in forks], lengths, ids=ids, store=True)
            picked = _picked(states, scored, starts)
            rewards = reward.of_states(picked, sequences, scored, memories).double().tolist()
        for fork, sequence in zip(forks, sequences, strict=True):
            fork[n].truncate(sequence.span.stop)
        return rewards

    # -- gradients ---------------------------------------------------------------------------------

    def gradients(
        self, requests: Sequence[Gradient], mixes: Sequence[Sequence[Tensor]]
    ) -> list[list[Tensor]]:
        """−λ ∂reward/∂mix on the LM's device, for each request one a table.

        Args:
            mixes: for each request [L, H_t] of each table of ``tables``.
        """
        found: list[list[Tensor]] = [[] for _ in requests]
        for t, n in enumerate(self._descended):
            of_term = self._gradients(n, requests, [mix[t] for mix in mixes])
            for parts, gradient in zip(found, of_term, strict=True):
                parts.append(gradient.to(self._device))
        return found

    def _gradients(self, n: int, requests: Sequence[Gradient], mixes: Sequence[Tensor]) -> list[Tensor]:
        """Those of term ``n``."""
        term, reader = self._terms[n], self.readers[n]
        reward, factor = term.reward, -(self._coefficient * term.weight)
        sequences = [
            reward_sequence(r.problem, n, reward, [*r.response, *r.relaxed.hard().tolist()])
            for r in requests
        ]
        # As wide as the arithmetic: a half-precision leaf would round its gradient.
        dtype = None if isinstance(reader, OwnForward) else reader.dtype
        read = [mix.detach().to(reward.device, dtype).requires_grad_() for mix in mixes]
        # The tokens before the relaxed positions, and the embeddings from these on.
        before = [
            sequence.ids[: sequence.span.stop - len(mix)]
            for sequence, mix in zip(sequences, mixes, strict=True)
        ]
        with torch.enable_grad():
            suffixes = [
                torch.cat([mix, reward.embed(sequence.after)]) if sequence.after else mix
                for mix, sequence in zip(read, sequences, strict=True)
            ]
            if isinstance(reader, OwnForward):
                gradients = []
                for request, sequence, ids, mix, suffix in zip(
                    requests, sequences, before, read, suffixes, strict=True
                ):
                    value = reward.reward(sequence, torch.cat([reward.embed(ids), suffix]))
                    gradients += torch.autograd.grad(factor * value.sum(), mix)
                    request.count("rm", len(sequence), len(sequence), directions=2)
                return gradients
            scored = [reward.scored_positions(sequence) for sequence in sequences]
            frozen = [
                min(len(ids), positions[0]) if self._frozen_prefix and reader.frozen_gradients else 0
                for ids, positions in zip(before, scored, strict=True)
            ]
            bases = [request.rm_bases[n] for request in requests]
            states, starts = suffix_states(reader, reward.own_table, bases, before, suffixes, frozen)
            loss = factor * reward.of_states(_picked(states, scored, starts)).sum()
        lengths = list(map(len, states))
        for request, length in zip(requests, lengths, strict=True):
            request.count("rm", length, max(lengths), directions=2)
        return list(torch.autograd.grad(loss, read))


def _picked(
    states: Sequence[Tensor] | Tensor, positions: Sequence[Sequence[int]], starts: Sequence[int]
) -> list[Tensor]:
    """Rows [n, H] of states that begin at ``starts``, at ``positions``."""
    picked = []
    for part, wanted, start in zip(states, positions, starts, strict=True):
        first = wanted[0] - start
        # One row is a slice: an index goes to the device first.
        picked.append(part[first : first + 1] if len(wanted) == 1 else part[[p - start for p in wanted]])
    return picked
