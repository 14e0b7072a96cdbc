"""Kinds of inputs whose logits are not the product of head and hidden states alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..inputs import BF16, F32, Case, Draw

_MAPS: dict[str, dict[str, Any]] = {
    "biased": {"bias": F32},
    "masked by the bias": {"bias": BF16, "masked": 0.8},
    "scaled": {"scale": -0.3},
    # Caps under which the largest logits do not come to be equal: float32 has few numbers near a cap.
    "capped": {"softcap": 6.0},
    "biased, scaled and capped": {"bias": F32, "scale": 1.7, "softcap": 12.0},
}


def head_map_arguments(
    draw: Draw,
    recipe: Callable[..., dict[str, Any]],
    vocabulary: int,
    bias: torch.dtype | None = None,
    masked: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    **sizes: Any,
) -> dict[str, Any]:
    """A recipe's arguments with a bias, a scale and a cap; ``masked``: the share of −inf in the bias."""
    arguments = recipe(draw, vocabulary=vocabulary, **sizes)
    given = None
    if bias is not None:
        given = draw.normal(vocabulary, dtype=bias)
        mask = draw.uniform(vocabulary) < masked
        mask[draw.integers(0, vocabulary, 1)] = False
        given[mask] = -torch.inf
    return arguments | {"bias": given, "scale": scale, "softcap": softcap}


def head_map_cases(recipe: Callable[..., dict[str, Any]], half: dict[str, Any], **sizes: Any) -> list[Case]:
    """A case of each kind, on arguments of these sizes; ``half``: what makes them half precision."""
    kinds = [(name, {**sizes, **kind}) for name, kind in _MAPS.items()]
    kinds.append(("capped, bf16", {**sizes, **_MAPS["biased, scaled and capped"], **half}))
    return [Case(name, partial(head_map_arguments, recipe=recipe, **kind)) for name, kind in kinds]
