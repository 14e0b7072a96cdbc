"""embedding_mix and its backward in plain PyTorch, and as torch.library ops."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.ops import embedding_mix

from ..contract import BackendContract, LibraryContract
from ..inputs import F32, Draw
from ..shared.arguments import ArgumentContract
from ..shared.mixes import HARD, MixAgainstAutograd
from .cases import EMBEDDING_MIX, EMBEDDING_MIX_BACKWARD, good
from .golden import GoldenNumbers


class TestContract(BackendContract):
    tested, backend = EMBEDDING_MIX, "torch"


class TestBackwardContract(BackendContract):
    tested, backend = EMBEDDING_MIX_BACKWARD, "torch"


class TestLibrary(LibraryContract):
    tested = EMBEDDING_MIX


class TestBackwardLibrary(LibraryContract):
    tested = EMBEDDING_MIX_BACKWARD


class TestArguments(ArgumentContract):
    op, good = embedding_mix, staticmethod(good)


class TestGolden(GoldenNumbers):
    backend = "torch"


class TestAgainstAutograd(MixAgainstAutograd):
    kind = "logits"


@HARD
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_masked_tokens_have_gradient_zero_whatever_direct_is(hard: bool, value: float, draw: Draw):
    logits = draw.logits(4, 33, masked=0.6).requires_grad_()
    masked = logits.detach() == -torch.inf
    assert masked.any()
    direct = draw.normal(4, 33).masked_fill(masked, value)
    tables = draw.tables(33, [(5, F32)])
    embedding_mix(logits, tables, hard=hard, direct=direct)[0].sum().backward()
    assert (logits.grad[masked] == 0).all()
    assert logits.grad.isfinite().all()
    assert (logits.grad[~masked] != 0).any()


@pytest.mark.parametrize("vocabulary", [1, 2])
def test_equal_logits_take_the_first(vocabulary: int, draw: Draw):
    tables = draw.tables(vocabulary, [(3, F32)])
    (mix,) = embedding_mix(torch.zeros(2, vocabulary), tables)
    assert torch.equal(mix, tables[0][:1].expand(2, 3))
