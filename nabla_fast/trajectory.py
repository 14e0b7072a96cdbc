"""The gradient of a whole trajectory, as a few small tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.decode.problem import Problem
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.models.tables import TokenTable
from nabla_fast.ops import onehot_grad, onehot_grad_norm
from nabla_fast.relaxed import Relaxed
from nabla_fast.results import Stats


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
    tables: list[TokenTable]
    hidden: Tensor
    head: Tensor
    nll_coeff: float

    @classmethod
    def joined(cls, gradients: Sequence[TrajectoryGradient], counts: Sequence[int]) -> TrajectoryGradient:
        """The first positions of several trajectories of the same models, one after another."""
        first = gradients[0]
        firsts = [
            [part[:count] for part in (*g.cotangents, g.hidden)]
            for g, count in zip(gradients, counts, strict=True)
        ]
        *cotangents, hidden = (torch.cat(parts) for parts in zip(*firsts, strict=True))
        return cls(cotangents, first.tables, hidden, first.head, first.nll_coeff)

    def rows(self, count: int) -> Tensor:
        """G of the first ``count`` positions, [count, V]."""
        cotangents = [g[:count] for g in self.cotangents]
        return onehot_grad(**self._arguments() | {"cotangents": cotangents, "hidden": self.hidden[:count]})

    def after(self, count: int) -> TrajectoryGradient:
        """G of what is left behind the first ``count`` positions."""
        cotangents = [part[count:] for part in self.cotangents]
        return TrajectoryGradient(cotangents, self.tables, self.hidden[count:], self.head, self.nll_coeff)

    def norms(self) -> Tensor:
        """‖G_i‖₂ of all positions, [L]."""
        return onehot_grad_norm(**self._arguments())

    def _arguments(self) -> dict[str, Any]:
        return {
            "cotangents": self.cotangents,
            "tables": [table.rows for table in self.tables],
            "hidden": self.hidden,
            "head": self.head,
            "nll_coeff": self.nll_coeff,
            "token_maps": [table.token_map for table in self.tables],
        }


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
        """G at relaxed positions behind the tokens c of the response so far."""
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
