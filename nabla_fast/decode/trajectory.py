"""The gradient of a whole trajectory, as a few small tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_fast.models.heads import Head
from nabla_fast.models.tables import TokenTable


@dataclass(frozen=True)
class TrajectoryGradient:
    """G of all positions of one relaxed trajectory, from which any of its rows follows.

    Attributes:
        cotangents: ∂ℒ/∂e [L, H] and, with a reward model, ∂ℒ/∂r [L, H_r].
        tables: E [V, H] and R [V, H_r].
        hidden: final hidden states [L, H] over the relaxed trajectory, which predict its positions.
        head: of the LM.
        nll_coeff: ν.
    """

    cotangents: list[Tensor]
    tables: list[TokenTable]
    hidden: Tensor
    head: Head
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
        return self.head.onehot_grad(
            **self._arguments() | {"cotangents": cotangents, "hidden": self.hidden[:count]}
        )

    def after(self, count: int) -> TrajectoryGradient:
        """G of the positions after the first ``count``."""
        cotangents = [part[count:] for part in self.cotangents]
        return TrajectoryGradient(cotangents, self.tables, self.hidden[count:], self.head, self.nll_coeff)

    def norms(self) -> Tensor:
        """‖G_i‖₂ of all positions, [L]."""
        return self.head.onehot_grad_norm(**self._arguments())

    def _arguments(self) -> dict[str, Any]:
        return {
            "cotangents": self.cotangents,
            "tables": [table.rows for table in self.tables],
            "hidden": self.hidden,
            "nll_coeff": self.nll_coeff,
            "token_maps": [table.token_map for table in self.tables],
        }
