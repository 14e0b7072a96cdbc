"""Parts that Triton kernels share: sums of softmaxes, scratch memory by parts, splits of a vocabulary."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.ops import backend_status

from .harness import DEVICES
from .inputs import Draw

if why := backend_status()["triton"]:
    pytest.skip(why, allow_module_level=True)

from nabla_fast.triton_kernels.common import scratch, weighted_rows
from nabla_fast.triton_kernels.common.softmax_sums import softmax_sums

DEVICE = torch.device(DEVICES[-1])  # interpreted where there is no GPU


def test_every_status_and_what_bad_rows_leave(draw: Draw):
    logits = draw.logits(5, 4100)
    logits[1, 7], logits[2, 4097], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, 5], logits[4, 4099] = torch.inf, torch.nan
    sums = softmax_sums(logits.to(DEVICE), 1.0)
    assert sums.status.tolist() == [0, 1, 2, 3, 1]
    assert ((sums.token >= 0) & (sums.token < 4100)).all()  # a look-up that follows stays in bounds
    assert sums.top.isnan().tolist() == [False, True, True, True, True]


def test_equal_logits_take_the_first_of_any_slice():
    logits = torch.zeros(3, 9000)
    logits[1, 5000:], logits[2, 8999] = 1.0, 1.0
    assert softmax_sums(logits.to(DEVICE), 1.0).token.tolist() == [0, 5000, 8999]


def test_parts_of_rows_are_whole_tiles_and_nearly_equal():
    assert list(scratch.row_blocks(0, 8, 64)) == []
    assert list(scratch.row_blocks(2, 100, 64)) == [slice(0, 1), slice(1, 2)]
    assert list(scratch.row_blocks(100, 1, 90)) == [slice(0, 64), slice(64, 100)]
    sizes = [part.stop - part.start for part in scratch.row_blocks(512, 2 * 151_936, scratch.share(15))]
    assert sizes == [176, 176, 160]


@pytest.mark.parametrize(("vocabulary", "columns"), [(1, 64), (64, 64), (151_936, 64), (2**20, 16)])
@pytest.mark.parametrize("tiles", [1, 2, 96, 1000])
def test_splits_cover_the_vocabulary(vocabulary: int, columns: int, tiles: int):
    splits, size = weighted_rows._splits(vocabulary, tiles, columns, 132, 1000)
    assert size % columns == 0
    assert (splits - 1) * size < vocabulary <= splits * size
    assert splits == 1 or size >= 8 * columns
