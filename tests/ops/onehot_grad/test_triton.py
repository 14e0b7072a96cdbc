"""The Triton onehot_grad."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from nabla_fast.ops import backend_status, onehot_grad

from ..contract import BackendContract
from ..harness import DEVICES
from ..inputs import Draw
from ..shared.onehot import OnehotOnBackend
from .cases import ONEHOT_GRAD

if why := backend_status()["triton"]:
    pytest.skip(why, allow_module_level=True)

from nabla_fast.triton_kernels import onehot_grad as kernels

DEVICE = torch.device(DEVICES[-1])  # interpreted where there is no GPU


class TestContract(BackendContract):
    tested, backend = ONEHOT_GRAD, "triton"


class TestRowsAndMaps(OnehotOnBackend):
    op, backend = onehot_grad, "triton"


def test_a_map_that_names_no_row_reads_none(draw: Draw):
    # On a device nobody waits for a map to be checked; what is past the table is its last row.
    table, cotangent = draw.normal(9, 4), draw.normal(2, 4)
    hidden, head = draw.normal(2, 3), draw.normal(21, 3)
    token_map = draw.integers(0, 9, 21)
    token_map[3], token_map[20] = -(2**40), 2**40
    within = token_map.clamp(0, 8)
    inputs = [tensor.to(DEVICE) for tensor in (cotangent, table, hidden, head, token_map, within)]
    cotangent, table, hidden, head, token_map, within = inputs
    call = partial(kernels.onehot_grad, [cotangent], [table], hidden, head, 0.1)
    assert torch.equal(call([token_map])[0], call([within])[0])
