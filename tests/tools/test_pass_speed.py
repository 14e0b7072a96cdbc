"""The measurement of passes: every dtype has its times."""

from __future__ import annotations

import pytest

from nabla_fast.bench.shape_speed import _TINY

pass_speed = pytest.importorskip("tools.pass_speed", reason="not run from a checkout")


def test_tiny_passes():
    result = pass_speed.measure(_TINY, [1, 3], [16], 1)
    dtypes = {"float32", "bfloat16", "float16"}
    assert [set(row) for row in result["step_ms"].values()] == [dtypes, dtypes]
    (row,) = result["pass_gflop_s"].values()
    assert set(row) == dtypes | {"torch's products, float32"}
    assert min(row.values()) > 0
    assert result["read_gb_s"] > 0
