"""The gradient of a whole trajectory, as a few small tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.decode.problem import Problem
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.ops import embedding_mix, lm_logits, logits_backward, onehot_grad, onehot_grad_norm
from nabla_fast.results import Stats

_ROWS = 8  # rows of [V] logits that exist at a time in the likelihood's backward


@dataclass(frozen=True)
class TrajectoryGradient:
    """G of all positions of one relaxed trajectory, from which any of its rows follows.

    Attributes:
        cotangents: ∂ℒ/∂e [L, H] and, with a reward model, ∂ℒ/∂r [L, H_r].
        tables: E [V, H] and R [V, H_r].
        hidden: final hidden states [L, H] over the relaxed trajectory, which predict its positions.
        head: W [V, H].
        nll_coeff: ν.
    """

    cotangents: list[Tensor]
    tables: list[Tensor]
    hidden: Tensor
    head: Tensor
    nll_coeff: float

    def rows(self, count: int) -> Tensor:
        """G of the first ``count`` positions, [count, V]."""
        return onehot_grad(
            [g[:count] for g in self.cotangents],
            self.tables,
            self.hidden[:count],
            self.head,
            nll_coeff=self.nll_coeff,
        )

    def norms(self) -> Tensor:
        """‖G_i‖₂ of all positions, [L]."""
        return onehot_grad_norm(
            self.cotangents, self.tables, self.hidden, self.head, nll_coeff=self.nll_coeff
        )


class GradientModel:
    """ℒ = −[ν log-likelihood + λ reward] over an LM and a reward model, and its gradient."""

    def __init__(self, lm: LanguageModel, rm: RewardModel | None, config: DTOConfig):
        self.lm = lm
        self.rm = rm if config.reward_coeff > 0 else None
        self._config = config
        # All on the LM's device, where G is asked for; a copy only if the reward model is elsewhere.
        self._tables = [lm.table] + ([self.rm.table.to(lm.device)] if self.rm else [])

    def hard(
        self, problem: Problem, committed: list[int], tokens: Tensor, stats: Stats
    ) -> TrajectoryGradient:
        """G at one-hot positions.

        Args:
            committed: tokens c of the response so far.
            tokens: ŷ [L] int64 on the LM's device.
        """

        def relaxed(rows: slice, pi: Tensor) -> Tensor:
            pi[torch.arange(pi.shape[0], device=pi.device), tokens[rows]] -= 1
            return pi

        mixes = [table[tokens] for table in self._tables]
        return self._gradient(problem, committed, mixes, relaxed, stats)

    def soft(
        self, problem: Problem, committed: list[int], logits: Tensor, stats: Stats
    ) -> TrajectoryGradient:
        """G at positions that mix all tokens by softmax(z/τ).

        Args:
            committed: tokens c of the response so far.
            logits: z [L, V] on the LM's device.
        """

        def relaxed(rows: slice, pi: Tensor) -> Tensor:
            return pi - torch.softmax(logits[rows] / self._config.tau, dim=-1)

        mixes = embedding_mix(logits, self._tables, tau=self._config.tau, hard=False)
        return self._gradient(problem, committed, mixes, relaxed, stats)

    def _gradient(
        self,
        problem: Problem,
        committed: list[int],
        mixes: list[Tensor],
        pi_minus_y: Callable[[slice, Tensor], Tensor],
        stats: Stats,
    ) -> TrajectoryGradient:
        hidden, lm_cotangent = self._lm_pass(problem, committed, mixes[0], pi_minus_y, stats)
        cotangents = [lm_cotangent]
        if self.rm:
            cotangents.append(self._rm_pass(problem, committed, mixes[1], stats))
        stats.gradient_passes += 1
        return TrajectoryGradient(cotangents, self._tables, hidden, self.lm.head, self._config.nll_coeff)

    def _lm_pass(
        self,
        problem: Problem,
        committed: list[int],
        mix: Tensor,
        pi_minus_y: Callable[[slice, Tensor], Tensor],
        stats: Stats,
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
            blocks = [slice(start, start + _ROWS) for start in range(0, len(hidden), _ROWS)]
            # d(−ν Σ y log π)/dz = ν (π − y), taken to hidden space here: autograd would keep
            # [L, V] logits and a float32 copy of a half-precision head.
            upstream = [
                logits_backward(
                    pi_minus_y(rows, lm_logits(hidden[rows], self.lm.head).softmax(dim=-1)),
                    self.lm.head,
                )
                for rows in blocks
            ]
            (gradient,) = torch.autograd.grad(
                states, read, (self._config.nll_coeff * torch.cat(upstream)).to(states.dtype)
            )
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
