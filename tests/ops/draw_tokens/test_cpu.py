"""The C++ draw_tokens: the reference's tokens at every level, whatever the rows and the settings are."""

from __future__ import annotations

import pytest
import torch

from nabla_fast import BackendUnavailable, _native
from nabla_fast.ops import DrawKey, draw_tokens, use_backend

from ..contract import BackendContract, EveryInstructionSet
from ..inputs import BF16, F32, WHOLE, Draw
from .cases import DRAW_TOKENS, draw_key, kinds_of_rows

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))


class TestContract(BackendContract):
    tested, backend = DRAW_TOKENS, "cpu"


class TestInstructionSets(EveryInstructionSet):
    tested = DRAW_TOKENS


def by_both(logits: torch.Tensor, key: DrawKey, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's tokens and the kernel's."""
    with use_backend("torch"):
        expected = draw_tokens(logits, key, **options)
    with use_backend("cpu"):
        return expected, draw_tokens(logits, key, **options)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 63, 131, 4099])
def test_the_tokens_of_the_reference(isa: str, dtype: torch.dtype, vocabulary: int, draw: Draw):
    logits = kinds_of_rows(draw, vocabulary, dtype)
    padded = torch.cat([logits, logits], dim=1)[:, :vocabulary]  # rows with a gap after them
    for temperature in (-1.0, 0.3, 1.7):
        for top_k in (0, 1, 20, vocabulary - 1, vocabulary + 1):
            for top_p in (1e-9, 0.1, 0.8, 0.999, 1.0):
                options = {"temperature": temperature, "top_k": max(top_k, 0), "top_p": top_p}
                expected, found = by_both(padded, draw_key(draw, 7), redraw=top_k > 1, **options)
                assert torch.equal(found, expected), options


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.8}], ids=str)
def test_a_whole_vocabulary(isa: str, options: dict, draw: Draw):
    logits = draw.normal(3, WHOLE, scale=4.0)
    logits[1] = 0.25  # what stays and what is dropped are equal
    expected, found = by_both(logits, draw_key(draw, 3), **options)
    assert torch.equal(found, expected)


def test_rows_in_an_order(draw: Draw):
    """Ramps, twice and down again: an order in which a list could be cut off an end at a time."""
    place = torch.arange(WHOLE)
    logits = torch.stack([place, place % (WHOLE // 2), -torch.minimum(place, WHOLE - 1 - place)])
    for top_p in (0.1, 0.9):
        expected, found = by_both(logits * (8 / WHOLE), draw_key(draw, 3), top_p=top_p)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("top_k", [0, 5])
def test_tokens_do_not_depend_on_threads(threads, top_k: int, draw: Draw):
    logits, key = draw.normal(5, 70_001, scale=3.0), draw_key(draw, 5)
    threads(1)
    with use_backend("cpu"):
        alone = draw_tokens(logits, key, top_k=top_k, top_p=0.9)
        for count in (2, 5):
            threads(count)
            assert torch.equal(draw_tokens(logits, key, top_k=top_k, top_p=0.9), alone)


def test_rows_without_an_answer_have_some_token(isa: str, draw: Draw):
    logits = draw.normal(4, 300)
    logits[0, 7], logits[1, 7], logits[2] = torch.nan, torch.inf, -torch.inf
    for options in ({}, {"top_k": 9}, {"top_k": 9, "top_p": 0.5}, {"top_p": 0.5}):
        expected, found = by_both(logits, draw_key(draw, 4), **options)
        assert ((found >= 0) & (found < 300)).all()
        assert found[3] == expected[3]


def test_a_temperature_that_the_kernel_does_not_take(draw: Draw):
    with use_backend("cpu"), pytest.raises(BackendUnavailable, match=r"temperature is 1e-30 .*2\^-64"):
        draw_tokens(torch.zeros(1, 3), draw_key(draw, 1), temperature=1e-30)
