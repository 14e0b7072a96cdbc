"""Bias, scale and soft cap of logits: what is refused."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.errors import InputError
from nabla_fast.ops import linear_embedding_mix, lm_logits, nll_grad, token_stats

HIDDEN, HEAD = torch.randn(2, 3), torch.randn(5, 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scale": 0.0}, "scale must be a float32 number other than 0, got 0.0"),
        ({"scale": 1e39}, "scale must be a float32 number"),
        ({"scale": float("nan")}, "scale must be a float32 number"),
        ({"softcap": 0.0}, "softcap must be None or from"),
        ({"softcap": -30.0}, "softcap must be None or from"),
        ({"bias": torch.zeros(4)}, "bias must be floating-point"),
        ({"bias": torch.zeros(5, requires_grad=True)}, "bias is a constant and must not require grad"),
    ],
)
def test_what_no_head_does(given, said):
    for call in (
        lambda: lm_logits(HIDDEN, HEAD, **given),
        lambda: token_stats(HIDDEN, HEAD, **given),
        lambda: nll_grad(HIDDEN, HEAD, torch.zeros(2, dtype=torch.int64), **given),
        lambda: linear_embedding_mix(HIDDEN.clone().requires_grad_(), HEAD, [HEAD], **given),
    ):
        with pytest.raises(InputError, match=said):
            call()


def test_a_map_without_a_head():
    with pytest.raises(InputError, match="token_stats: bias, scale and softcap are of a head"):
        token_stats(HEAD, softcap=3.0)
