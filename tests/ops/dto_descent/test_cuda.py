"""dto_descent by the CUDA kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nabla_fast.ops import dto_descent

from ..contract import BackendContract
from ..shared.descents import DescentOverlaps
from ..shared.golden_descents import check_golden_descent
from .cases import DTO_DESCENT

pytestmark = pytest.mark.usefixtures("cuda_kernels")


class TestContract(BackendContract):
    # How many blocks share a row follows the number of rows, and sums follow the blocks.
    tested, backend = replace(DTO_DESCENT, rows_alone=False), "cuda"


class TestOverlaps(DescentOverlaps):
    op, backend = dto_descent, "cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the golden models are on the CPU")
@pytest.mark.parametrize("n", [0, 1, 4, 6])
def test_golden_descent(n: int, golden_models, golden_models_64, monkeypatch: pytest.MonkeyPatch):
    check_golden_descent(dto_descent, "cuda", n, golden_models, golden_models_64, monkeypatch)
