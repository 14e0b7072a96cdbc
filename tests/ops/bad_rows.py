"""Rows that an op must refuse, and what its error says of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from nabla_fast.errors import BackendUnavailable, RowError
from nabla_fast.ops import synchronize, use_backend
from nabla_fast.ops.registry import Op

ROWS, VOCABULARY, HIDDEN = 6, 37, 4
REASONS = {
    "has a NaN logit": torch.nan,
    "has a +inf logit": torch.inf,
    "has no finite logit": -torch.inf,
}
BAD_ROWS = st.dictionaries(st.integers(0, ROWS - 1), st.sampled_from(list(REASONS)), max_size=ROWS)


def logits_with(bad: dict[int, str]) -> Tensor:
    """[N, V] logits with the given rows spoilt: one token of a row, or all for the last reason."""
    logits = torch.randn(ROWS, VOCABULARY)
    for row, reason in bad.items():
        where = slice(None) if REASONS[reason] == -torch.inf else VOCABULARY - 1 - row
        logits[row, where] = REASONS[reason]
    return logits


def hidden_with(bad: dict[int, str]) -> tuple[Tensor, Tensor]:
    """Hidden states and a positive head whose product has the given bad rows; it overflows for ±inf."""
    hidden, head = torch.randn(ROWS, HIDDEN), torch.rand(VOCABULARY, HIDDEN) + 5
    for row, reason in bad.items():
        value = REASONS[reason]
        hidden[row] = value if math.isnan(value) else math.copysign(3e38, value)
    return hidden, head


def rows_refused(op: Op, backend: str, call: Callable[[], Any]) -> list[tuple[int, str]]:
    """The rows that a call on a backend names, none if it passes; skips where it has no such kernel."""
    try:
        with use_backend(backend):
            call()
            synchronize()
        return []
    except BackendUnavailable as unavailable:
        pytest.skip(str(unavailable))
    except RowError as raised:
        error = raised
    assert error.op == op.name
    assert str(error).startswith(f"{op.name}: row {error.rows[0][0]} {error.rows[0][1]}")
    assert "\n" not in str(error)
    return error.rows
