"""Embedding tables and heads, read through the modules' own output."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nabla_fast.errors import ModelError

_BLOCK = 16384


@dataclass(frozen=True)
class TokenTable:
    """Embeddings of the LM's tokens, kept as the rows of the model that reads them.

    Attributes:
        rows: [V_t, H_t], the model's own.
        token_map: [V] int64 on their device, the row of each token of the LM; None: its own.
    """

    rows: Tensor
    token_map: Tensor | None = None

    def of(self, tokens: Tensor) -> Tensor:
        """Embeddings [L, H_t] of tokens [L] int64 of the LM."""
        return self.rows[tokens if self.token_map is None else self.token_map[tokens]]

    @functools.cached_property
    def aligned(self) -> Tensor:
        """Embeddings [V, H_t] of all tokens of the LM: with a map a copy, made when first asked for."""
        return self.rows if self.token_map is None else self.rows[self.token_map]

    def to(self, device: torch.device) -> TokenTable:
        """The table on a device; itself where it is there."""
        if self.rows.device == device:
            return self
        return TokenTable(
            self.rows.to(device), None if self.token_map is None else self.token_map.to(device)
        )


@torch.no_grad()
def embedding_table(model: nn.Module) -> Tensor:
    """The input table of a transformers model: row v is what the model reads for token v.

    A plain ``nn.Embedding`` is its weight, shared and not copied; any other module (a scaled
    embedding, say) is asked for all its rows.

    Returns:
        [V, H], detached.
    """
    module = model.get_input_embeddings()
    if type(module) is nn.Embedding and module.max_norm is None:
        return module.weight.detach()
    tokens = torch.arange(module.weight.shape[0], device=module.weight.device)
    return torch.cat([module(block) for block in tokens.split(_BLOCK)])


def output_head(model: nn.Module) -> Tensor:
    """The weight of a causal LM's head, [V, H], detached.

    Raises:
        ModelError: there is no linear head, or it has a bias.
    """
    head = model.get_output_embeddings()
    name = type(model).__name__
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise ModelError(f"{name} has no linear output head")
    if getattr(head, "bias", None) is not None:
        raise ModelError(f"{name} has a bias on its output head, which is not supported")
    return head.weight.detach()
