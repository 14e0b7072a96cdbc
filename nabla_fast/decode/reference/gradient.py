"""The gradient of a trajectory by one forward+backward of both models over the whole sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.relaxed import Relaxed
from nabla_fast.decode.trajectory import TrajectoryGradient
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.models.tables import TokenTable
from nabla_fast.results import Stats


class GradientModel:
    """ℒ = −[ν log-likelihood + λ reward] over an LM and a reward model, and its gradient."""

    def __init__(self, lm: LanguageModel, rm: RewardModel | None, config: DTOConfig):
        self.lm = lm
        self.rm = rm if config.reward_coeff > 0 else None
        self._config = config
        # All on the LM's device, where G is asked for; a copy only if the reward model is elsewhere.
        self._tables = [TokenTable(lm.table)] + ([self.rm.table.to(lm.device)] if self.rm else [])

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
        if self.rm:
            cotangents.append(self._rm_pass(problem, committed, mixes[1], stats))
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

    def _rm_pass(self, problem: Problem, committed: list[int], mix: Tensor, stats: Stats) -> Tensor:
        """∂ℒ/∂r of −λ reward, [L, H_r]."""
        before = self.rm.embed([*problem.reward_prefix, *self.rm.read(committed)])
        after = self.rm.embed(problem.reward_suffix)
        with torch.enable_grad():
            read = mix.detach().to(self.rm.device).requires_grad_()
            sequence = torch.cat([before, read, after])
            reward = self.rm.score_embeddings(sequence[None])
            (gradient,) = torch.autograd.grad(-self._config.reward_coeff * reward.sum(), read)
        stats.token_passes["rm"] += 2 * len(sequence)
        return gradient.to(mix.device)
