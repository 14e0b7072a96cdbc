"""Prompts of a ``generate`` call, and the arguments of a forward that it prepares beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nabla_fast.errors import InputError


def prompts_of(input_ids: Tensor, model_kwargs: dict[str, Any]) -> list[list[int]]:
    """Token ids of each prompt without its padding.

    Args:
        input_ids: [N, T] int64, padded on the left.
        model_kwargs: what ``generate`` prepares for a forward. ``attention_mask`` is read; what would
            change a forward is refused.
    Raises:
        InputError: the mask has holes or its padding on the right, or an argument is not supported.
    """
    if input_ids.ndim != 2:
        raise InputError(f"input_ids must be [batch, length], got {list(input_ids.shape)}")
    if model_kwargs.get("inputs_embeds") is not None:
        raise InputError("inputs_embeds: a decode reads token ids, pass input_ids")
    mask = _mask(input_ids, model_kwargs.get("attention_mask"))
    for name, value in model_kwargs.items():
        if value is not None and name != "attention_mask":
            _refuse(name, value, mask)
    return [row[keep].tolist() for row, keep in zip(input_ids, mask, strict=True)]


def _mask(input_ids: Tensor, given: Any) -> Tensor:
    """[N, T] bool, False on padding. None, as newer releases pass it, is a mask of ones."""
    if given is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if not isinstance(given, Tensor) or given.shape != input_ids.shape:
        got = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise InputError(f"attention_mask must be a tensor of shape {list(input_ids.shape)}, got {got}")
    mask = given.to(input_ids.device)
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("attention_mask must hold 0 and 1 alone")
    mask = mask.bool()
    for row, keep in enumerate(mask):
        if not bool(keep.any()):
            raise InputError(f"attention_mask: prompt {row} is all padding")
        if bool((keep[:-1] & ~keep[1:]).any()):
            raise InputError(
                f"attention_mask: prompt {row} has padding after its first token: pad on the left"
            )
    return mask


def _refuse(name: str, value: Any, mask: Tensor) -> None:
    """Refuse an argument of a forward, unless it says what a decode does anyway.

    Raises:
        InputError: it names the argument.
    """
    if name in ("use_cache", "output_attentions", "output_hidden_states"):
        return  # fields of the generation config, read there
    if name == "logits_to_keep" and isinstance(value, int) and value == 1:
        return  # generate's own
    if name in ("past_key_values", "cache", "cache_params"):
        if _tokens_held(value):
            raise InputError(
                f"{name} holds tokens already, and a decode keeps its own cache: "
                "pass the whole prompt, without a cache"
            )
        return
    if name in ("position_ids", "cache_position") and isinstance(value, Tensor):
        counted = mask.long().cumsum(dim=1) - 1 if name == "position_ids" else torch.arange(mask.shape[1])
        if _same_where(value.to(mask.device), counted.to(mask.device), mask):
            return
        raise InputError(
            f"{name} must count the tokens of a prompt from 0, as they are without the argument"
        )
    if name == "token_type_ids" and isinstance(value, Tensor) and not bool(value.any()):
        return
    if name == "mm_encoder_outputs" and not value:
        return
    raise InputError(f"generate was given {name}, which a decode does not read: leave it out")


def _same_where(value: Tensor, expected: Tensor, mask: Tensor) -> bool:
    """Whether two tensors that broadcast to the mask agree where it is True."""
    try:
        return not bool(((value != expected) & mask).any())
    except RuntimeError:  # shapes that do not go together
        return False


def _tokens_held(cache: Any) -> bool:
    """Whether a cache has been read into; one that does not tell counts as used."""
    if getattr(cache, "has_previous_state", False) is True:
        return True
    length = getattr(cache, "get_seq_length", None)
    if length is None:
        return not hasattr(cache, "has_previous_state")
    try:
        return int(length()) > 0
    except Exception:  # caches without a layer that counts tokens
        return False
