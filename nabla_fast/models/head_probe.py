"""What a model does to the product of head and hidden states, found by comparing with its own logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nabla_fast.models.heads import Head, HeadMap
from nabla_fast.ops.head_map import SOFTCAP_RANGE, logits_of_product

# The largest product of a probe: a cap far above it is none.
_LARGE = 1000.0
# What the model's own rounding of one product explains, relative by norm.
_BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
_WIDE_BOUND = 1e-4


def found_map(
    head: Head,
    config: Any,
    hidden: Tensor,
    theirs: Tensor,
    logits_of: Callable[[Tensor], Tensor | None],
) -> HeadMap | None:
    """The map, with the head's bias, that explains a model's logits best; None if none does.

    Scales and caps are numbers of the config that are called so, since what is measured in half precision
    is no exact number. States of two sizes are compared: a cap changes small logits hardly at all.

    Args:
        head: whose map has the bias alone.
        config: of the model's text part.
        hidden: [N, H], states.
        theirs: [N, V], the model's logits of them.
        logits_of: the model's logits [N, V] of other states [N, H]; None where they do not get there.
    """
    plain = head.with_map(HeadMap())
    product = plain.logits(hidden)
    pairs = [(product, theirs)]
    if (largest := float(product.abs().amax())) > 0:
        states = hidden * (_LARGE / largest)
        large = logits_of(states)
        if large is None:
            return None
        pairs.append((plain.logits(states), large))
    best = min(_candidates(head.map, config), key=lambda candidate: _error(candidate, pairs))
    return best if _error(best, pairs) <= _BOUNDS.get(head.dtype, _WIDE_BOUND) else None


def _logits(head_map: HeadMap, product: Tensor) -> Tensor:
    return logits_of_product(product, head_map.bias, head_map.scale, head_map.softcap)


def _error(head_map: HeadMap, pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The largest error among sizes, relative by norm."""
    errors = []
    for product, theirs in pairs:
        ours = _logits(head_map, product).double()
        if ours.shape != theirs.shape:
            return float("inf")
        errors.append(float((ours - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-300)))
    return max(errors)


def _candidates(plain: HeadMap, config: Any) -> Iterator[HeadMap]:
    """Maps that a config's numbers may stand for, the plain one first."""
    scales, caps = {1.0: None}, {None: None}  # in order
    low, high = SOFTCAP_RANGE
    for name in dir(config):
        is_cap, is_scale = "cap" in name, "scal" in name or "multiplier" in name
        if name.startswith("_") or not (is_cap or is_scale):
            continue
        value = None
        with suppress(Exception):  # some fields have a value for each layer alone
            value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        number = float(value)
        if is_cap and low <= number <= high:
            caps[number] = None
        if is_scale and low <= abs(number) <= high:
            scales |= {number: None, 1 / number: None}
    for scale in scales:
        for cap in caps:
            yield replace(plain, scale=scale, softcap=cap)
