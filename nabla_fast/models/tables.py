"""Embedding tables and heads, read through the modules' own output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nabla_fast.errors import ModelError

_BLOCK = 16384


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
