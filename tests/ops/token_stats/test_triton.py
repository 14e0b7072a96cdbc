"""The Triton token_stats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nabla_fast.ops import backend_status

from ..contract import BackendContract
from ..harness import DEVICES
from ..inputs import BF16, Draw, far_columns
from ..shared.products import unaligned
from .cases import TOKEN_STATS
from .properties import StatisticsOnBackend

DEVICE = torch.device(DEVICES[-1])  # interpreted where there is no GPU


class TestContract(BackendContract):
    tested, backend = TOKEN_STATS, "triton"


class TestStatistics(StatisticsOnBackend):
    backend = "triton"


@pytest.mark.skipif(bool(backend_status()["triton"]), reason="needs Triton or its interpreter")
@pytest.mark.parametrize("vocabulary", [2, 4096, 4098, 9000])
def test_bfloat16_neighbours_are_read_in_pairs_or_alone(vocabulary: int, draw: Draw):
    from nabla_fast.triton_kernels.common.lanes import in_pairs
    from nabla_fast.triton_kernels.token_stats import token_stats

    logits = draw.logits(7, vocabulary, BF16, masked=0.2).to(DEVICE)
    logits[1, 1], logits[2, 0], logits[3], logits[4, -1] = torch.nan, torch.inf, -torch.inf, torch.inf
    logits[5, : vocabulary // 2] = -torch.inf
    alone = unaligned(logits)
    assert in_pairs(logits) is not None
    assert in_pairs(alone) is None
    results = token_stats(logits, None, 0.7)
    assert results[-1].tolist()[1:5] == [1, 2, 3, 2]
    for ours, wanted in zip(token_stats(alone, None, 0.7), results, strict=True):
        assert torch.equal(ours.nan_to_num(-9), wanted.nan_to_num(-9))


@pytest.mark.skipif(bool(backend_status()["triton"]), reason="needs Triton or its interpreter")
@pytest.mark.skipif(torch.cuda.is_available(), reason="files back no memory of a GPU")
def test_columns_of_a_head_2_27_elements_apart(tmp_path: Path, draw: Draw):
    from nabla_fast.triton_kernels.token_stats import token_stats

    hidden, head = draw.normal(2, 40), draw.normal(33, 40)
    far = far_columns(tmp_path / "head", head, 2**27 + 5)
    results = token_stats(hidden, far, 0.7)
    for ours, wanted in zip(results, token_stats(hidden, head, 0.7), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_what_does_not_lie_in_pairs():
    from nabla_fast.triton_kernels.common.lanes import in_pairs

    logits = torch.zeros(4, 8, dtype=BF16)
    pairs = in_pairs(logits[1:, 2:6])
    assert pairs.shape == (3, 2)
    assert pairs.stride() == (4, 1)
    for other in (
        logits.float(),
        logits[:, 1:7],
        logits[:, :5],
        logits[:, ::2],
        logits.view(-1)[:28].view(4, 7),
    ):
        assert in_pairs(other) is None
