"""dto_descent by the CUDA kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nabla_fast.ops import dto_descent

from ..contract import BackendContract
from ..shared.descents import DescentOverlaps
from .cases import DTO_DESCENT

pytestmark = pytest.mark.usefixtures("cuda_kernels")


class TestContract(BackendContract):
    # How many blocks share a row follows the number of rows, and sums follow the blocks.
    tested, backend = replace(DTO_DESCENT, rows_alone=False), "cuda"


class TestOverlaps(DescentOverlaps):
    op, backend = dto_descent, "cuda"
