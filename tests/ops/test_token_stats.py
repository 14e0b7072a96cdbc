"""token_stats: what its numbers mean, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nabla_fast.errors import BackendUnavailable
from nabla_fast.ops import TokenStats, token_stats, use_backend
from nabla_fast.ops.registry import Op

from .cases import BF16, F16, F32, F64, Draw
from .harness import backend_parameters

BACKENDS = pytest.mark.parametrize(("op", "backend"), backend_parameters("token_stats"))


def stats_on(backend: str, *args: Tensor, tau: float = 1.0) -> TokenStats:
    """The statistics by one backend, on the CPU; skips where it does not take the input."""
    try:
        with use_backend(backend):
            return token_stats(*args, tau=tau)
    except BackendUnavailable as error:
        pytest.skip(str(error))


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


@BACKENDS
@pytest.mark.parametrize("vocabulary", [1, 2, 257, 4099])
def test_equal_logits(op: Op, backend: str, vocabulary: int):
    stats = stats_on(backend, torch.full((2, vocabulary), 3.0), tau=0.5)
    assert stats.argmax.tolist() == [0, 0]
    assert stats.entropy.tolist() == pytest.approx([math.log(vocabulary)] * 2, rel=1e-6, abs=1e-6)
    assert stats.confidence.tolist() == pytest.approx([1 / vocabulary] * 2, rel=1e-5)
    assert stats.logsumexp.tolist() == pytest.approx([6 + math.log(vocabulary)] * 2, rel=1e-6)


@BACKENDS
def test_the_first_of_equal_logits_is_the_argmax(op: Op, backend: str, draw: Draw):
    logits = draw.integers(-3, 4, 6, 4099).float()
    first = [row.index(max(row)) for row in logits.tolist()]
    assert stats_on(backend, logits).argmax.tolist() == first


@BACKENDS
def test_the_only_token_left_is_certain(op: Op, backend: str):
    logits = torch.full((2, 33), -torch.inf)
    logits[0, 7], logits[1, 32] = 2.5, -1e30
    stats = stats_on(backend, logits)
    assert stats.argmax.tolist() == [7, 32]
    assert stats.confidence.tolist() == [1, 1]
    assert stats.entropy.tolist() == [0, 0]
    assert stats.logsumexp.tolist() == [2.5, torch.tensor(-1e30).item()]


@BACKENDS
def test_masked_tokens_do_not_count(op: Op, backend: str, draw: Draw):
    logits = draw.logits(1, 1021, masked=0.7)
    kept = logits[0] > -torch.inf
    with_masks, without = stats_on(backend, logits), stats_on(backend, logits[:, kept])
    for name in ("logsumexp", "confidence", "entropy"):
        torch.testing.assert_close(getattr(with_masks, name), getattr(without, name))
    assert int(with_masks.argmax) == int(kept.nonzero()[int(without.argmax)])


@BACKENDS
def test_a_shift_moves_the_logsumexp_alone(op: Op, backend: str, draw: Draw):
    # Powers of two, so that the shifted logits are exact.
    logits = draw.integers(-64, 64, 4, 517).float() / 8
    stats, shifted = stats_on(backend, logits), stats_on(backend, logits + 1024)
    torch.testing.assert_close(shifted.logsumexp, stats.logsumexp + 1024)
    torch.testing.assert_close(shifted.entropy, stats.entropy, rtol=1e-4, atol=1e-4)
    assert torch.equal(shifted.argmax, stats.argmax)


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


@BACKENDS
def test_no_rows(op: Op, backend: str):
    assert all(tensor.shape == (0,) for tensor in stats_on(backend, torch.empty(0, 5)))
