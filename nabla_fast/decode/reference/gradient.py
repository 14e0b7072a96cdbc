"""The gradient of a trajectory by one forward+backward of both models over the whole sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.relaxed import Relaxed
from nabla_fast.decode.rewarding import reward_sequence
from nabla_fast.decode.trajectory import TrajectoryGradient
from nabla_fast.models import LanguageModel, Reward, RewardSum, RewardTerm, terms_of
from nabla_fast.models.reward_sequence import RewardSequence
from nabla_fast.models.tables import TokenTable
from nabla_fast.results import Stats


class GradientModel:
    """ℒ = −[ν log-likelihood + λ reward] over an LM and rewards, and its gradient."""

    def __init__(self, lm: LanguageModel, rm: RewardSum | Reward | None, config: DTOConfig):
        self.lm = lm
        self._config = config
        terms = enumerate(terms_of(rm) if config.reward_coeff > 0 else ())
        self._terms = [(n, term) for n, term in terms if term.reward.differentiable]
        # All on the LM's device, where G is asked for; a copy only if a reward model is elsewhere.
        tables = [term.reward.table.to(lm.device) for _, term in self._terms]
        self._tables = [TokenTable(lm.table), *tables]

    def hard(
        self, problem: Problem, committed: list[int], tokens: Tensor, stats: Stats
    ) -> TrajectoryGradient:
        """G at one-hot positions.

        Args:
            committed: tokens c of the response so far.
            tokens: ŷ [L] int64 on the LM's device.
        """
        return self.at(problem, committed, Relaxed(tokens=tokens), stats)

    def soft(
        self, problem: Problem, committed: list[int], logits: Tensor, stats: Stats
    ) -> TrajectoryGradient:
        """G at positions that mix all tokens by softmax(z/τ).

        Args:
            committed: tokens c of the response so far.
            logits: z [L, V] on the LM's device.
        """
        relaxed = Relaxed(logits=logits, tau=self._config.tau)
        return self.at(problem, committed, relaxed, stats)

    def at(
        self, problem: Problem, committed: list[int], relaxed: Relaxed, stats: Stats
    ) -> TrajectoryGradient:
        """G at relaxed positions after the tokens c of the response so far."""
        mixes = relaxed.mixes(self._tables)
        hidden, lm_cotangent = self._lm_pass(problem, committed, relaxed, mixes[0], stats)
        cotangents = [lm_cotangent]
        if self._terms:
            response = [*committed, *relaxed.hard().tolist()]
            for (n, term), mix in zip(self._terms, mixes[1:], strict=True):
                sequence = reward_sequence(problem, n, term.reward, response)
                cotangents.append(self._reward_pass(term, sequence, mix, stats))
        stats.gradient_passes += 1
        return TrajectoryGradient(cotangents, self._tables, hidden, self.lm.head, self._config.nll_coeff)

    def _lm_pass(
        self, problem: Problem, committed: list[int], relaxed: Relaxed, mix: Tensor, stats: Stats
    ) -> tuple[Tensor, Tensor]:
        """Hidden states that predict the positions, and ∂ℒ/∂e of the likelihood.

        The last position predicts nothing that counts, so the model does not read it.
        """
        prefix = self.lm.table[self.lm.tensor([*problem.prompt_ids, *committed])[0]]
        with torch.enable_grad():
            read = mix[:-1].detach().requires_grad_()
            states = self.lm.hidden(embeddings=torch.cat([prefix, read])[None])[0, len(prefix) - 1 :]
        hidden = states.detach()
        cotangent = torch.zeros_like(mix)
        stats.token_passes["lm"] += len(prefix) + len(read)
        if len(read) and self._config.nll_coeff > 0:
            upstream = self._config.nll_coeff * relaxed.likelihood_gradient(hidden, self.lm.head)
            (gradient,) = torch.autograd.grad(states, read, upstream)
            cotangent[:-1] = gradient
            stats.token_passes["lm"] += len(prefix) + len(read)
        return hidden, cotangent

    def _reward_pass(self, term: RewardTerm, sequence: RewardSequence, mix: Tensor, stats: Stats) -> Tensor:
        """∂ℒ/∂r of −λ times a term of the reward, [L, H_r]; the response's last L tokens are relaxed."""
        reward = term.reward
        before = reward.embed(sequence.ids[: sequence.span.stop - len(mix)])
        after = reward.embed(sequence.after)
        with torch.enable_grad():
            read = mix.detach().to(reward.device).requires_grad_()
            value = reward.reward(sequence, torch.cat([before, read, after]))
            factor = -(self._config.reward_coeff * term.weight)
            (gradient,) = torch.autograd.grad(factor * value.sum(), read)
        stats.token_passes["rm"] += 2 * len(sequence)
        return gradient.to(mix.device)
