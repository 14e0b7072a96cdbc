"""The Triton mixes and one-hot gradients beyond what every backend is put through: statuses, rows in
parts, offsets past 2³¹, splits of the vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nabla_fast.errors import RowError
from nabla_fast.ops import embedding_mix, linear_embedding_mix, onehot_grad_norm, use_backend
from nabla_fast.ops.embedding_mix import embedding_mix_backward
from nabla_fast.ops.linear_embedding_mix import linear_embedding_mix_backward
from nabla_fast.ops.registry import backend_status

from .cases import BF16, F32, Draw
from .harness import run

if why := backend_status()["triton"]:
    pytest.skip(why, allow_module_level=True)

from nabla_fast.triton_kernels import embedding_mix as kernels
from nabla_fast.triton_kernels import presets, weighted_rows
from nabla_fast.triton_kernels.softmax_sums import softmax_sums

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
@pytest.mark.parametrize(
    ("value", "reason"), [(torch.nan, "NaN"), (torch.inf, r"\+inf"), (-torch.inf, "no finite")]
)
def test_bad_rows_are_named(value: float, reason: str, hard: bool, draw: Draw):
    logits = draw.logits(3, 4099)
    logits[1, slice(None) if value == -torch.inf else 4098] = value
    with use_backend("triton"), pytest.raises(RowError, match=reason) as error:
        embedding_mix(logits, draw.tables(4099, [(3, F32)]), hard=hard)
    assert "row 1" in str(error.value)


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


def test_rows_in_parts_are_the_same_rows(draw: Draw, monkeypatch: pytest.MonkeyPatch):
    tables = draw.tables(515, [(8, BF16), (5, F32)])
    head, hidden = draw.normal(515, 12, dtype=BF16), draw.normal(5, 12)
    cotangents = [draw.normal(5, table.shape[1], dtype=table.dtype) for table in tables]
    options = {"tau": 0.7, "noise": draw.noise(5), "direct": draw.normal(5, 515)}
    forward = {"hidden": hidden, "head": head, "tables": tables, "hard": False} | options
    backward = {"cotangents": cotangents, "hidden": hidden, "head": head, "tables": tables} | options
    half = {
        "cotangents": cotangents,
        "logits": draw.logits(5, 515, BF16),
        "tables": tables,
    } | options
    norms = {k: v for k, v in backward.items() if k not in options} | {"nll_coeff": 1e-3}
    calls = [
        (linear_embedding_mix, forward),
        (linear_embedding_mix_backward, backward),
        (embedding_mix_backward, half),
        (onehot_grad_norm, norms),
    ]
    whole = [run(op, "triton", arguments) for op, arguments in calls]
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", 2 * 4 * 515)
    assert list(kernels.row_blocks(5, 515)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    for (op, arguments), wanted in zip(calls, whole, strict=True):
        for name, value in run(op, "triton", arguments).items():
            assert torch.equal(value, wanted[name]), f"{op.name}: {name}"


def far_apart(path: Path, rows: int, vocabulary: int, stride: int, draw: Draw) -> Tensor:
    """[N, V] float32 in a file that is empty between the rows."""
    storage = torch.UntypedStorage.from_file(str(path), True, 4 * ((rows - 1) * stride + vocabulary))
    logits = torch.empty(0, dtype=F32).set_(storage, 0, (rows, vocabulary), (stride, 1))
    return logits.copy_(draw.logits(rows, vocabulary))


def test_offsets_past_two_to_the_31(tmp_path: Path, draw: Draw):
    # The last row begins at element 2³¹ + 6; no memory is used for what lies between the rows.
    stride = 2**30 + 3
    logits = far_apart(tmp_path / "logits", 3, 130, stride, draw)
    tables = draw.tables(130, [(6, F32)])
    cotangents = [draw.normal(3, 6)]
    near = logits.clone(memory_format=torch.contiguous_format)
    options = {"tau": 0.7, "noise": None, "direct": None}
    with use_backend("triton"):
        for hard in (True, False):
            far, wanted = (embedding_mix(z, tables, tau=0.7, hard=hard)[0] for z in (logits, near))
            assert torch.equal(far, wanted)
        far, wanted = (embedding_mix_backward(cotangents, z, tables, **options) for z in (logits, near))
        assert torch.equal(far, wanted)
        table = far_apart(tmp_path / "table", 3, 6, stride, draw)
        far, wanted = (embedding_mix(near[:, :3], [t], hard=False)[0] for t in (table, table.clone()))
        assert torch.equal(far, wanted)


@pytest.mark.parametrize(("vocabulary", "columns"), [(1, 64), (64, 64), (151_936, 64), (2**20, 16)])
@pytest.mark.parametrize("tiles", [1, 2, 96, 1000])
def test_splits_cover_the_vocabulary(vocabulary: int, columns: int, tiles: int):
    splits, size = weighted_rows._splits(vocabulary, tiles, columns, 132)
    assert size % columns == 0
    assert (splits - 1) * size < vocabulary <= splits * size
    assert splits == 1 or size >= 8 * columns


def test_soft_mix_joins_splits(draw: Draw, monkeypatch: pytest.MonkeyPatch):
    kinds = presets.config("weighted_rows", "float32", DEVICE) | {"PROGRAMS": 3, "COLUMNS": 64}
    logits, tables = draw.logits(3, 2100), draw.tables(2100, [(9, F32)])
    with presets.forced("weighted_rows", "float32", kinds):
        assert weighted_rows._splits(2100, 1, 64, 3)[0] == 3
        ours = run(embedding_mix, "triton", {"logits": logits, "tables": tables, "hard": False})
    exact = torch.softmax(logits.double(), dim=1) @ tables[0].double()
    torch.testing.assert_close(ours["result[0]"].double(), exact, rtol=1e-5, atol=1e-6)
