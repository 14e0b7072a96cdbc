"""Relaxed positions: what the models read in place of tokens, and what the likelihood says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_fast.models.heads import Head
from nabla_fast.models.tables import TokenTable
from nabla_fast.ops import embedding_mix
from nabla_fast.ops.rows import row_slices


@dataclass(frozen=True)
class Relaxed:
    """y of L positions: one-hot at hard tokens, or softmax(z/τ). Exactly one of the two is given.

    Attributes:
        tokens: ŷ [L] int64.
        logits: z [L, V].
        tau: τ of the soft ones.
    """

    tokens: Tensor | None = None
    logits: Tensor | None = None
    tau: float = 1.0

    def __len__(self) -> int:
        return len(self.tokens if self.tokens is not None else self.logits)

    def hard(self) -> Tensor:
        """ŷ [L] int64: the tokens, or those of the largest logits."""
        return self.tokens if self.tokens is not None else self.logits.argmax(dim=-1)

    def mixes(self, tables: Sequence[TokenTable]) -> list[Tensor]:
        """Σ_v y[v] T[v] for each table T [V, H_t]: [L, H_t] each."""
        if self.tokens is not None:
            return [table.of(self.tokens) for table in tables]
        aligned = [table.aligned for table in tables]
        return embedding_mix(self.logits, aligned, tau=self.tau, hard=False)

    def likelihood_gradient(self, states: Tensor, head: Head, start: int = 0) -> Tensor:
        """∂/∂states of −Σ_i Σ_v y_i[v] log π(v | states_i), over positions from ``start`` on.

        d(−Σ y log π)/dz = π − y, taken to hidden space here: autograd would keep [L, V] logits and a
        float32 copy of a half-precision head.

        Args:
            states: [n, H], final hidden states that predict positions start..start+n−1.
            head: of the LM.
        Returns:
            [n, H] in the dtype of ``states``.
        """
        if self.tokens is not None:
            tokens = self.tokens[start : start + len(states)]
            return head.nll_grad(states, tokens).to(states.dtype)
        gradients = []
        for block in row_slices(len(states), head.vocabulary):
            part, rows = states[block], slice(start + block.start, start + block.stop)
            z = head.logits(part)
            dz = z.softmax(dim=-1) - torch.softmax(self.logits[rows] / self.tau, dim=-1)
            gradients.append(head.backward(dz, z))
        return torch.cat(gradients).to(states.dtype)
