"""Rotary embeddings whose frequencies follow how long a text is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from nabla_fast.errors import ModelError

# transformers picks their frequencies by the largest position of all sequences in a pass.
LENGTH_DEPENDENT = {"longrope", "dynamic"}


def length_dependent_kind(model: nn.Module) -> str | None:
    """The type of a model's rotary embeddings whose frequencies depend on a text's length, if any."""
    return next((kind for kind, _ in _kinds(model)), None)


def expect_fixed_frequencies(model: nn.Module) -> None:
    """Expect a model that reads a sequence alike whatever is read beside it.

    Raises:
        ModelError: its rotary embeddings depend on the longest sequence of a batch.
    """
    if kind := length_dependent_kind(model):
        raise ModelError(
            f"{type(model).__name__} has rotary embeddings of type {kind!r}, whose frequencies "
            "depend on the longest sequence of a batch"
        )


def switching_length(model: nn.Module) -> int | None:
    """The length of a text beyond which the frequencies are others; None if there is none."""
    lengths: list[Any] = []
    for _, module in _kinds(model):
        config = getattr(module, "config", None)
        scaling = getattr(config, "rope_parameters", None) or {}
        for holder in (scaling, *(part for part in scaling.values() if isinstance(part, dict))):
            lengths.append(holder.get("original_max_position_embeddings"))
        lengths.append(getattr(config, "original_max_position_embeddings", None))
        lengths.append(getattr(module, "original_max_seq_len", None))
    return min((length for length in lengths if type(length) is int), default=None)


def _kinds(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if isinstance(kind, str) and kind in LENGTH_DEPENDENT:
                yield kind, module
