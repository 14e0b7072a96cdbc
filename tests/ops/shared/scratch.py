"""The memory that Triton launchers use beside their results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nabla_fast.ops.registry import Op

from ..harness import Arguments, run
from ..inputs import BF16, Draw


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside had at a time."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {key: s for key, s in self._storages.items() if not s[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return result


class Problem:
    """Tensors for launchers of mixes and of one-hot gradients; the latter have no noise."""

    def __init__(self, draw: Draw, rows: int, vocabulary: int):
        self.tables = [draw.normal(vocabulary, 24, dtype=BF16), draw.normal(vocabulary, 40)]
        self.head, self.hidden = draw.normal(vocabulary, 32, dtype=BF16), draw.normal(rows, 32)
        self.cotangents = [draw.normal(rows, table.shape[1]) for table in self.tables]
        self.logits, self.half = draw.normal(rows, vocabulary), draw.normal(rows, vocabulary, dtype=BF16)
        self.noise = draw.noise(rows)


# With the smaller vocabulary, rows of partial sums take more than rows of logits.
SIZES = pytest.mark.parametrize(
    ("rows", "vocabulary", "limit"),
    [
        (9, 1061, 26_000),
        (18, 21, 5_300),
        pytest.param(9, 4133, 65_000, marks=pytest.mark.slow),
        pytest.param(34, 21, 10_000, marks=pytest.mark.slow),
    ],
)


def is_bounded(call: Callable[[], list[Tensor]], rows: int, limit: int, monkeypatch) -> None:
    """Memory beside the results stays within a limit that makes the call go by parts."""
    from nabla_fast.triton_kernels.common import scratch

    monkeypatch.setattr(scratch, "BYTES", limit)
    with torch.no_grad(), LiveBytes() as live:
        results = call()
    beside = live.peak - sum(result.untyped_storage().nbytes() for result in results)
    # Top, sum, token and status of a row, and its G[ŷ] and ⟨p, G⟩.
    assert 0 < beside <= limit + 32 * rows


def in_parts(op: Op, arguments: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows over 515 tokens, which do not fit the scratch memory at once, have the same bits."""
    from nabla_fast.triton_kernels.common import scratch

    whole = run(op, "triton", arguments)
    monkeypatch.setattr(scratch, "BYTES", 6000)
    parts = list(scratch.row_blocks(5, 4 * 515, scratch.share(11)))
    assert parts == [slice(0, 2), slice(2, 4), slice(4, 5)]
    for name, value in run(op, "triton", arguments).items():
        assert torch.equal(value, whole[name]), name
