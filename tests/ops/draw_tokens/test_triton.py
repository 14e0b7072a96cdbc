"""The Triton draw_tokens: the reference's tokens, whatever the rows and the settings are."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.ops import DrawKey, backend_status, draw_tokens, use_backend

from ..contract import BackendContract
from ..harness import DEVICES
from ..inputs import BF16, F16, F32, Draw
from .cases import DRAW_TOKENS, draw_key, kinds_of_rows

DEVICE = torch.device(DEVICES[-1])  # interpreted where there is no GPU


class TestContract(BackendContract):
    tested, backend = DRAW_TOKENS, "triton"


@pytest.mark.skipif(bool(backend_status()["triton"]), reason="needs Triton or its interpreter")
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("vocabulary", "top_k", "top_p"), [(1, 3, 0.5), (131, 0, 0.8), (600, 7, 0.8)])
def test_the_tokens_of_the_reference(
    dtype: torch.dtype, vocabulary: int, top_k: int, top_p: float, draw: Draw
):
    logits = kinds_of_rows(draw, vocabulary, dtype)
    padded = torch.cat([logits, logits], dim=1).to(DEVICE)[:, :vocabulary]  # rows with a gap after them
    key = draw_key(draw, 7)
    options = {"temperature": 0.7, "top_k": top_k, "top_p": top_p, "redraw": top_k > 0}
    with use_backend("torch"):
        expected = draw_tokens(logits, key, **options)
    with use_backend("triton"):
        tokens = draw_tokens(padded, DrawKey(*(part.to(DEVICE) for part in key)), **options)
    assert torch.equal(tokens.cpu(), expected)
