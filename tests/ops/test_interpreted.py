"""The interpreter, as it is mended for these tests, against PyTorch."""

from __future__ import annotations

import pytest
import torch

from nabla_fast import _triton
from nabla_fast.ops import backend_status

from .inputs import Draw

if why := backend_status()["triton"]:
    pytest.skip(why, allow_module_level=True)

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _round_kernel(source, cast, stored, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(source + at)
    tl.store(cast + at, value.to(tl.bfloat16).to(tl.float32))
    tl.store(stored + at, value)


@pytest.mark.skipif(not _triton.interpreted(), reason="kernels are compiled")
def test_float32_is_rounded_to_the_nearest_bfloat16(draw: Draw):
    halves = torch.tensor([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-8, 2**-140, 3.4e38])
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan, 0.0, -0.0])
    values = torch.cat([halves, special, draw.normal(BLOCK - len(halves) - len(special))])
    cast, stored = torch.empty(BLOCK), torch.empty(BLOCK, dtype=torch.bfloat16)
    _round_kernel[(1,)](values, cast, stored, BLOCK=BLOCK)
    expected = values.bfloat16()
    torch.testing.assert_close(cast, expected.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(stored, expected, rtol=0, atol=0, equal_nan=True)
