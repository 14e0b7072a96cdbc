"""Calls on the CPU like one before: checked again wherever a check reads data."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nabla_fast.errors import InputError, RowError
from nabla_fast.ops import (
    AdamState,
    cosine_schedule,
    dto_descent,
    embedding_mix,
    nll_grad,
    onehot_grad,
    registry,
    token_stats,
)
from nabla_fast.ops.registry import dispatch

X, INDEX = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("reads", "index", "checks"),
    [(None, None, 3), ((), None, 1), ((), INDEX, 1), (("index",), INDEX, 3), (("index",), None, 1)],
)
def test_a_call_is_checked_again_where_data_may_be_read(
    reads: Sequence[str] | None, index: Tensor | None, checks: int
):
    seen = []

    @registry.op(arguments={"x": registry.floats("N", "M"), "index": registry.integers("N")}, reads=reads)
    def toy_reads(x: Tensor, *, index: Tensor | None = None) -> Tensor:
        return x.clone()

    @toy_reads.check
    def check(x: Tensor, *, index: Tensor | None) -> None:
        seen.append(x)

    try:
        for _ in range(3):
            toy_reads(X, index=index)
    finally:
        del dispatch._ops["toy_reads"]
    assert len(seen) == checks


def test_data_that_a_check_reads_is_read_every_time():
    hidden, head = torch.zeros(2, 3), torch.eye(5, 3)
    tokens = torch.tensor([0, 4])
    nll_grad(hidden, head, tokens)
    tokens[1] = 5
    with pytest.raises(InputError, match=r"tokens must be in 0\.\.4"):
        nll_grad(hidden, head, tokens)

    token_map = torch.arange(5)
    grad = [torch.zeros(2, 3)], [head], hidden, head
    onehot_grad(*grad, nll_coeff=1.0, token_maps=[token_map])
    token_map[2] = 7
    with pytest.raises(InputError, match="gives token 2 row 7"):
        onehot_grad(*grad, nll_coeff=1.0, token_maps=[token_map])

    z, schedule = torch.zeros(2, 5), cosine_schedule(2, 0.1)
    state = AdamState.zeros(z)
    dto_descent(z, torch.ones(2, 5), state, schedule)
    state.step[0] = -1
    with pytest.raises(InputError, match=r"state\.step must not be negative"):
        dto_descent(z, torch.ones(2, 5), state, schedule)


def test_bad_rows_are_found_every_time():
    logits = torch.zeros(2, 5)
    for _ in range(2):
        token_stats(logits)
    logits[1, 2] = torch.nan
    with pytest.raises(RowError, match="row 1"):
        token_stats(logits)


def test_a_traced_call_stays_a_call():
    table = torch.randn(5, 3)
    traced = torch.jit.trace(lambda z: embedding_mix(z, [table], hard=False)[0], (torch.randn(2, 5),))
    logits = torch.randn(2, 5)
    torch.testing.assert_close(traced(logits), embedding_mix(logits, [table], hard=False)[0])
