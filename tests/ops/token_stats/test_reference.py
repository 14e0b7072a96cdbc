"""token_stats in plain PyTorch, as a torch.library op, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nabla_fast.errors import RowError
from nabla_fast.ops import token_stats

from ..contract import BackendContract, LibraryContract
from ..inputs import BF16, F16, F32, F64, Draw
from ..shared.arguments import ArgumentContract, wide
from .cases import TOKEN_STATS, good, good_of_hidden_states
from .properties import StatisticsOnBackend


class TestContract(BackendContract):
    tested, backend = TOKEN_STATS, "torch"


class TestLibrary(LibraryContract):
    tested = TOKEN_STATS


class TestArguments(ArgumentContract):
    op, good = token_stats, staticmethod(good)


class TestArgumentsOfHiddenStates(ArgumentContract):
    op, good = token_stats, staticmethod(good_of_hidden_states)


class TestStatistics(StatisticsOnBackend):
    backend = "torch"


@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
def test_against_logsumexp(tau: float, draw: Draw):
    logits = draw.logits(5, 301, F64, masked=0.3)
    stats = token_stats(logits, tau=tau)
    p = torch.exp(logits / tau - torch.logsumexp(logits / tau, dim=-1, keepdim=True))
    entropy = -torch.special.xlogy(p, p).sum(dim=-1)
    torch.testing.assert_close(stats.logsumexp, torch.logsumexp(logits / tau, dim=-1))
    torch.testing.assert_close(stats.confidence, p.max(dim=-1).values)
    torch.testing.assert_close(stats.entropy, entropy, rtol=1e-9, atol=1e-12)
    assert torch.equal(stats.argmax, logits.argmax(dim=-1))


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_temperature_divides_the_logits(data: st.DataObject):
    vocabulary = data.draw(st.integers(1, 20))
    tau = data.draw(st.floats(0.1, 10))
    finite = st.floats(-1e4, 1e4, width=32) | st.just(-math.inf)
    row = data.draw(
        st.lists(finite, min_size=vocabulary, max_size=vocabulary).filter(lambda r: max(r) > -math.inf)
    )
    logits = torch.tensor([row], dtype=F64)
    stats, divided = token_stats(logits, tau=tau), token_stats(logits / tau)
    for name in ("logsumexp", "confidence", "entropy"):
        torch.testing.assert_close(getattr(stats, name), getattr(divided, name), rtol=1e-9, atol=1e-9)
    assert 0 <= float(stats.entropy) <= math.log(vocabulary) + 1e-9
    assert 1 / vocabulary - 1e-9 <= float(stats.confidence) <= 1


@pytest.mark.parametrize("hidden_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("head_dtype", [F32, BF16, F16])
def test_with_head_the_logits_are_not_rounded(
    hidden_dtype: torch.dtype, head_dtype: torch.dtype, draw: Draw
):
    hidden, head = draw.normal(3, 16, dtype=hidden_dtype), draw.normal(257, 16, dtype=head_dtype)
    stats, exact = token_stats(hidden, head), token_stats(hidden.double() @ head.double().T)
    assert stats.logsumexp.dtype == F32
    torch.testing.assert_close(stats.logsumexp.double(), exact.logsumexp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.entropy.double(), exact.entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "result"), [(F32, F32), (BF16, F32), (F16, F32), (F64, F64)])
def test_result_dtypes(dtype: torch.dtype, result: torch.dtype, draw: Draw):
    stats = token_stats(draw.logits(2, 5, dtype))
    assert [tensor.dtype for tensor in stats] == [result] * 3 + [torch.int64]


def test_a_nan_outweighs_the_rest():
    row = torch.tensor([[torch.nan, torch.inf, -torch.inf], [torch.inf, -torch.inf, 0.0]])
    with pytest.raises(RowError) as error:
        token_stats(row)
    assert error.value.rows == [(0, "has a NaN logit"), (1, "has a +inf logit")]


def test_many_bad_rows_make_one_short_line():
    with pytest.raises(RowError) as error:
        token_stats(torch.full((1000, 2), torch.nan))
    assert len(error.value.rows) == 1000
    assert len(str(error.value)) < 200
    assert str(error.value).endswith("and 996 more rows")


def test_the_largest_vocabulary_there_may_be():
    stats = token_stats(wide(2**20))
    assert float(stats.entropy) == pytest.approx(20 * math.log(2), rel=1e-5)
