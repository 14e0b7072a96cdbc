"""The state of rows, which the ops share."""

from __future__ import annotations

import torch

from nabla_fast.ops.rows import row_status


def test_row_status_of_all_kinds():
    rows = torch.tensor([[0.0, -torch.inf], [torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf] * 2])
    assert row_status(rows).tolist() == [0, 1, 2, 3]
    assert row_status(rows).dtype == torch.int32
