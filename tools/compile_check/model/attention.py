"""Attention over a paged prefix: a gradient pass over suffixes, forward and backward, and a decode step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nabla_fast.triton_kernels.prefix_attention import prefix_attention
from nabla_fast.triton_kernels.prefix_attention_backward import prefix_attention_backward
from tools.compile_check.launches.prefix_attention import (
    HEADS,
    KV_HEADS,
    PREFIX,
    SUFFIX,
    arguments,
    backward_arguments,
)
from tools.compile_check.model.cases import Case

_DIM, _BATCH, _DECODED = 128, 8, 16
_BYTES = 2.0
_OPTIONS = {"scale": 0.1, "window": None}


def _flops(batch: int, suffix: int, prefix_products: int, own_products: int) -> float:
    """Of products with each key of the prefix, and with each token of the suffix that a query sees."""
    positions = prefix_products * PREFIX + own_products * (suffix + 1) / 2
    return 2.0 * batch * HEADS * suffix * _DIM * positions


def _bytes(batch: int, suffix: int, of_queries: int, of_tokens: int) -> float:
    """Of the prefix's keys and values, and of arrays of the queries' and of the suffix's keys' shape."""
    prefix = 2 * PREFIX * KV_HEADS
    return _BYTES * _DIM * batch * (prefix + suffix * (of_queries * HEADS + of_tokens * KV_HEADS))


def cases() -> Iterator[Case]:
    yield from _gradient_pass()
    yield from _decode()


def _gradient_pass() -> Iterator[Case]:
    given = arguments(torch.bfloat16, SUFFIX, _DIM, _BATCH)
    of = f"{_BATCH} × {SUFFIX} tokens behind {PREFIX:,}, bfloat16"
    rows = _BATCH * SUFFIX
    yield Case(
        "prefix_attention",
        of,
        rows,
        lambda: prefix_attention(**given, **_OPTIONS),
        _flops(_BATCH, SUFFIX, 2, 2),
        _bytes(_BATCH, SUFFIX, 2, 2),
        goal=0.75,
    )
    yield Case(
        "prefix_attention_backward",
        of,
        rows,
        lambda: prefix_attention_backward(**backward_arguments(given), **_OPTIONS),
        # Scores, ∂ℒ/∂p and ∂ℒ/∂q of all keys; of the suffix's ∂ℒ/∂k and ∂ℒ/∂v too.
        _flops(_BATCH, SUFFIX, 3, 5),
        _bytes(_BATCH, SUFFIX, 4, 4),
        goal=0.60,
    )


def _decode() -> Iterator[Case]:
    given = arguments(torch.bfloat16, 1, _DIM, _DECODED)
    yield Case(
        "prefix_attention",
        f"{_DECODED} × 1 token behind {PREFIX:,}, bfloat16",
        _DECODED,
        lambda: prefix_attention(**given, **_OPTIONS),
        _flops(_DECODED, 1, 2, 2),
        _bytes(_DECODED, 1, 2, 2),
        goal=0.80,
    )
