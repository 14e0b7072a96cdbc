"""What a model does to the product of head and hidden states, found by comparing with its own logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from nabla_fast.models.heads import Head, HeadMap
from nabla_fast.models.probes import close
from nabla_fast.ops.head_map import SOFTCAP_RANGE, mapped

# The largest product of a probe: a cap far above it is none.
_LARGE = 1000.0


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
    explains = all(close(_logits(best, u), z, head.dtype) for u, z in pairs)
    return best if explains else None


def _logits(head_map: HeadMap, product: Tensor) -> Tensor:
    return mapped(product, head_map.bias, head_map.scale, head_map.softcap)


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
        value = None if name.startswith("_") else getattr(config, name, None)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        number = float(value)
        if "cap" in name and low <= number <= high:
            caps[number] = None
        if any(part in name for part in ("scal", "multiplier")) and low <= abs(number) <= high:
            scales |= {number: None, 1 / number: None}
    for scale in scales:
        for cap in caps:
            yield replace(plain, scale=scale, softcap=cap)
