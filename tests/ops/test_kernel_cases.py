"""What the kernel benchmark compares is the same computation."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.bench.kernel_cases import Case, dto_descent, prefix_attention

CPU = torch.device("cpu")

CASES = {
    "dto_descent": lambda: dto_descent(3, 257, 6, CPU),
    "decode step": lambda: prefix_attention(2, 20, 1, 4, 2, 16, backward=False, device=CPU),
    "gradient": lambda: prefix_attention(2, 21, 5, 4, 2, 16, backward=True, device=CPU),
}


@pytest.mark.parametrize("name", CASES)
def test_every_version_computes_the_same(name: str):
    case: Case = CASES[name]()
    truth = case.in_float64()
    for version in (case.ours, case.naive, case.eager or case.naive):
        outputs = version()
        assert len(outputs) == len(truth)
        for output, exact in zip(outputs, truth, strict=True):
            assert not output.requires_grad
            torch.testing.assert_close(output.double(), exact, rtol=1e-4, atol=1e-4)
    assert case.bytes > 0
