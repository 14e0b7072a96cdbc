"""dto_descent in plain PyTorch, against torch.optim.Adam, and as a torch.library op."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.errors import RowError
from nabla_fast.ops import AdamState, cosine_schedule, dto_descent

from ..bad_rows import logits_with
from ..contract import BackendContract, LibraryContract
from ..inputs import BF16, F32, F64, Draw
from ..shared.arguments import ArgumentContract
from ..shared.descents import EXACT, VOCABULARY, DescentAgainstAdam, DescentOverlaps, Problem, stops
from .cases import DTO_DESCENT, good


class TestContract(BackendContract):
    tested, backend = DTO_DESCENT, "torch"


class TestOverlaps(DescentOverlaps):
    op, backend = dto_descent, "torch"


class TestLibrary(LibraryContract):
    tested = DTO_DESCENT


class TestArguments(ArgumentContract):
    op, good = dto_descent, staticmethod(good)


class TestAgainstAdam(DescentAgainstAdam):
    kind = "logits"


def test_flips_at_the_first_step_at_the_last_and_never(draw: Draw):
    # Two equally likely tokens pushed apart by 2·lr a step, from gaps that reach from 0 past the end.
    iters, lr, rows = 20, 0.01, 400
    gap = torch.linspace(1e-4, 0.5, rows, dtype=F64)
    z = torch.stack([gap, torch.zeros_like(gap)], dim=1)
    grad = torch.tensor([[1.0, -1.0]], dtype=F64).expand(rows, 2).contiguous()
    problem = Problem(z, grad, torch.full((iters,), lr, dtype=F64))
    taken, where, flipped = stops(problem, iters)
    assert {1, iters} <= set(taken[flipped].tolist())
    assert not flipped.all()
    descent = problem.descend()
    assert torch.equal(problem.state.step, taken)
    assert torch.equal(descent.flipped, flipped)
    assert torch.equal(descent.token, flipped.long())
    torch.testing.assert_close(problem.parameter, where, **EXACT)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_masked_logits_stay_masked_and_take_no_step(dtype: torch.dtype, draw: Draw):
    z = draw.logits(6, VOCABULARY, dtype, masked=0.5)
    masked = z == -torch.inf
    grad = draw.normal(6, VOCABULARY, dtype=dtype).masked_fill(masked, torch.inf)
    state, before = AdamState.zeros(z), z.clone()
    dto_descent(z, grad, state, cosine_schedule(10, 0.01))
    assert masked.any()
    assert torch.equal(z == -torch.inf, masked)
    assert (state.exp_avg[masked] == 0).all()
    assert (state.exp_avg_sq[masked] == 0).all()
    assert z[~masked].isfinite().all()
    assert (z[~masked] != before[~masked]).any()


def test_a_small_step_on_a_large_logit():
    # Adam's first step is lr whatever the gradient; bfloat16 has 1/8 between neighbours at 20.
    z = torch.tensor([[20.0, 19.0]])
    dto_descent(z, torch.tensor([[1.0, -1.0]]), AdamState.zeros(z), torch.tensor([0.01], dtype=F64))
    assert float(z[0, 0]) == pytest.approx(19.99, abs=1e-5)
    assert float(torch.tensor(20.0, dtype=BF16) - 0.01) == 20.0


def test_a_descent_that_is_refused_has_moved_nothing():
    z = logits_with({1: "has a NaN logit"})
    before, state = z.clone(), AdamState.zeros(z)
    with pytest.raises(RowError):
        dto_descent(z, torch.randn_like(z), state, cosine_schedule(2, 0.01))
    assert torch.equal(z.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))
    assert not any(tensor.any() for tensor in state)
