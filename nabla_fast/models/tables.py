"""Embedding tables and heads, read through the modules' own output."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nabla_fast.errors import ModelError
from nabla_fast.models.head_rows import head_rows, is_plain
from nabla_fast.models.heads import DenseHead, Head, HeadMap, TiledHead

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
    Raises:
        ModelError: the input embeddings are no table of floating-point numbers.
    """
    module = model.get_input_embeddings()
    weight = _weight(model)
    plain = type(module) is nn.Embedding and module.max_norm is None and is_plain(weight)
    if plain and not _hooked(module):
        return weight.detach().as_subclass(Tensor)
    tokens = torch.arange(table_rows(model), device=weight.device)
    table = torch.cat([module(block) for block in tokens.split(_BLOCK)])
    if not table.is_floating_point() or table.dim() != 2:
        raise ModelError(
            f"{type(model).__name__} has input embeddings of {table.dtype} {list(table.shape)}, "
            "which are no table of floating-point numbers [V, H]"
        )
    return table


def table_rows(model: nn.Module) -> int:
    """V, how many tokens a model's input table has.

    Raises:
        ModelError: nobody says.
    """
    module = model.get_input_embeddings()
    rows = getattr(module, "num_embeddings", None)
    if type(rows) is int:
        return rows
    return _weight(model).shape[0]


def _weight(model: nn.Module) -> Tensor:
    """The weight of the input embeddings."""
    module = model.get_input_embeddings()
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        kind = type(module).__name__
        raise ModelError(f"{type(model).__name__} has no table of input embeddings ({kind} has no weight)")
    return weight


def output_head(model: nn.Module) -> Head:
    """The head of a causal LM, with its bias; a scale and a cap are for its user to find.

    Raises:
        ModelError: there is no linear head of floating-point numbers, or its packing is not known.
    """
    head = model.get_output_embeddings()
    name, kind = type(model).__name__, type(head).__name__
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        raise ModelError(f"{name} has no linear output head")
    if not weight.is_floating_point() or weight.dim() != 2:
        raise ModelError(
            f"{name} has an output head ({kind}) of {weight.dtype} {list(weight.shape)}: "
            "load it without quantization"
        )
    bias = getattr(head, "bias", None)
    head_map = HeadMap(bias.detach() if isinstance(bias, Tensor) else None)
    rows = head_rows(head, name)
    if rows is not None:
        return TiledHead(rows, head_map)
    return DenseHead(weight.detach().as_subclass(Tensor), head_map)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
