"""Parts that Triton kernels share: sums of softmaxes, scratch memory by parts, chunks of a vocabulary."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.ops import backend_status

from .harness import DEVICES
from .inputs import Draw

if why := backend_status()["triton"]:
    pytest.skip(why, allow_module_level=True)

from nabla_fast.triton_kernels.common import scratch, vocabulary_chunks
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


@pytest.mark.parametrize("vocabulary", [1, 4096, 4097, 151_936, 2**20])
@pytest.mark.parametrize("rows", [1, 8, 64, 512, 5000])
def test_chunks_cover_the_vocabulary_and_fit(rows: int, vocabulary: int):
    row_bytes, token_bytes = 4 * 6144, 6
    cut = vocabulary_chunks.partition(rows, vocabulary, row_bytes=row_bytes, token_bytes=token_bytes)
    assert [part.start for part in cut.rows] == [0, *(part.stop for part in cut.rows[:-1])]
    assert cut.rows[-1].stop == rows
    chunks = list(cut.chunks(vocabulary))
    assert [first for first, _ in chunks] == [0, *(end for _, end in chunks[:-1])]
    assert chunks[-1][1] == vocabulary
    assert all(first % vocabulary_chunks.SLICE == 0 for first, _ in chunks)
    most = max(part.stop - part.start for part in cut.rows)
    width = max(end - first for first, end in chunks)
    assert most * (row_bytes + width * token_bytes) <= scratch.BYTES
    # What a decode asks for takes the whole vocabulary at once: the tables are read once, in few products.
    assert rows > 8 or len(chunks) == 1 or vocabulary > 151_936
