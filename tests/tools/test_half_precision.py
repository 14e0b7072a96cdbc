"""The comparison of half-precision decodes: what is counted, and that a copy's tokens are the same."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.config import DTOConfig

half_precision = pytest.importorskip("tools.half_precision", reason="not run from a checkout")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_few_prompts(dtype):
    result = half_precision.measure(dtype, 4, 2, DTOConfig(max_generations=3))
    assert result["prompts"] == 4
    assert 1 <= result["generations"] <= 3
    same = result["same"]
    assert same["batched, float32 copy"] == same["batched, one prompt at a time"] == 4
    assert same["sequential, float32 copy"] >= 3
    assert 0 <= same["sequential, modules"] <= 4
