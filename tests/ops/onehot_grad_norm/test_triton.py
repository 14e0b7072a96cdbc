"""The Triton onehot_grad_norm."""

from __future__ import annotations

import pytest

from nabla_fast.ops import backend_status, onehot_grad_norm

from ..contract import BackendContract
from ..inputs import BF16, F32, Draw
from ..shared import scratch
from ..shared.onehot import OnehotOnBackend
from .cases import ONEHOT_GRAD_NORM

if why := backend_status()["triton"]:
    pytest.skip(why, allow_module_level=True)

from nabla_fast.triton_kernels import onehot_grad as kernels


class TestContract(BackendContract):
    tested, backend = ONEHOT_GRAD_NORM, "triton"


class TestRowsAndMaps(OnehotOnBackend):
    op, backend = onehot_grad_norm, "triton"


def test_rows_in_parts_are_the_same_rows(draw: Draw, monkeypatch: pytest.MonkeyPatch):
    tables = draw.tables(515, [(8, BF16), (5, F32)])
    arguments = {
        "cotangents": [draw.normal(5, table.shape[1], dtype=table.dtype) for table in tables],
        "hidden": draw.normal(5, 12),
        "head": draw.normal(515, 12, dtype=BF16),
        "tables": tables,
        "nll_coeff": 1e-3,
    }
    scratch.in_parts(onehot_grad_norm, arguments, monkeypatch)


@scratch.SIZES
def test_scratch_is_bounded(
    rows: int, vocabulary: int, limit: int, draw: Draw, monkeypatch: pytest.MonkeyPatch
):
    problem = scratch.Problem(draw, rows, vocabulary)
    given = problem.cotangents, problem.tables, problem.hidden, problem.head
    scratch.is_bounded(lambda: list(kernels.onehot_grad_norm(*given, 1e-3, [])), rows, limit, monkeypatch)
