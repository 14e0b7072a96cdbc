"""Logits that the C++ linear_embedding_mix keeps from its forward for its backward."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_fast import _native
from nabla_fast.ops import GumbelNoise, linear_embedding_mix, use_backend
from nabla_fast.ops.linear_embedding_mix import linear_embedding_mix_backward

from ..inputs import BF16, F32, Draw

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))


def problem(draw: Draw, rows: int, dtype: torch.dtype, *, noise: bool = False) -> dict[str, Any]:
    vocabulary, width = 2_113, 37
    keys = torch.arange(rows)
    return {
        "hidden": draw.normal(rows, width).to(dtype),
        "head": draw.normal(vocabulary, width).to(dtype),
        "tables": [draw.normal(vocabulary, 19).to(dtype), draw.normal(vocabulary, 5).to(dtype)],
        "tau": 0.7,
        "noise": GumbelNoise(seed=keys + 3, position=keys) if noise else None,
        "direct": draw.normal(rows, vocabulary),
    }


def recorded(given: dict[str, Any], *, hard: bool) -> tuple[Tensor, list[Tensor]]:
    """Hidden states that a gradient goes to, and the mixes."""
    hidden = given["hidden"].clone().requires_grad_()
    return hidden, linear_embedding_mix(**{**given, "hidden": hidden}, hard=hard)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("rows", [1, 17, 70])
def test_the_gradient_has_the_bits_of_logits_computed_anew(
    rows: int, dtype: torch.dtype, noise: bool, hard: bool, draw: Draw, isa: str
):
    given = problem(draw, rows, dtype, noise=noise)
    cotangents = [draw.normal(rows, table.shape[1]).to(dtype) for table in given["tables"]]
    with use_backend("cpu"):
        hidden, mixes = recorded(given, hard=hard)
        once = torch.autograd.grad(mixes, hidden, cotangents, retain_graph=True)[0]
        again = torch.autograd.grad(mixes, hidden, cotangents)[0]
        anew = linear_embedding_mix_backward(cotangents, **given)
    assert torch.equal(once, anew)
    assert torch.equal(again, anew)


def saved_elements(given: dict[str, Any]) -> list[int]:
    """Sizes of the tensors that a forward saves."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with use_backend("cpu"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        recorded(given, hard=True)
    return sizes


def test_what_is_kept_has_a_limit(draw: Draw, monkeypatch: pytest.MonkeyPatch):
    given = problem(draw, 17, F32)
    kept = 2_113 * 32
    assert saved_elements(given).count(kept) == 1
    # The package has the op under the module's name.
    module = sys.modules["nabla_fast.ops.linear_embedding_mix"]
    monkeypatch.setattr(module, "MOST_KEPT_BYTES", 4 * kept - 1)
    assert kept not in saved_elements(given)


def test_a_forward_without_a_gradient_keeps_nothing_for_others(draw: Draw):
    # Between a recorded forward and its backward come other calls of both.
    given, other = problem(draw, 3, F32), problem(draw, 3, F32)
    cotangents = [draw.normal(3, table.shape[1]) for table in given["tables"]]
    with use_backend("cpu"):
        expected = linear_embedding_mix_backward(cotangents, **given)
        expected_other = linear_embedding_mix_backward(cotangents, **other)
        hidden, mixes = recorded(given, hard=True)
        assert torch.equal(linear_embedding_mix_backward(cotangents, **other), expected_other)
        linear_embedding_mix(**other)
        second, mixes_of_second = recorded(other, hard=True)
        assert torch.equal(torch.autograd.grad(mixes, hidden, cotangents)[0], expected)
        assert torch.equal(torch.autograd.grad(mixes_of_second, second, cotangents)[0], expected_other)
