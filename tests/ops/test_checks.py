"""The state of rows, which the ops share."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.errors import RowError
from nabla_fast.ops import synchronize, token_stats
from nabla_fast.ops.rows import row_status


def test_row_status_of_all_kinds():
    rows = torch.tensor([[0.0, -torch.inf], [torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf] * 2])
    assert row_status(rows).tolist() == [0, 1, 2, 3]
    assert row_status(rows).dtype == torch.int32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bad_rows_on_a_device_are_named_at_the_next_synchronization():
    logits = torch.zeros(3, 5, device="cuda")
    logits[1, 2] = torch.nan
    token_stats(logits)
    with pytest.raises(RowError, match="row 1 has a NaN logit"):
        synchronize()
    synchronize()
