"""The Triton mixes and one-hot gradients beyond what every backend is put through: statuses, rows in
parts, offsets past 2³¹, splits of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nabla_fast.errors import RowError
from nabla_fast.ops import embedding_mix, linear_embedding_mix, onehot_grad_norm, use_backend
from nabla_fast.ops.embedding_mix import embedding_mix_backward
from nabla_fast.ops.linear_embedding_mix import linear_embedding_mix_backward
from nabla_fast.ops.registry import backend_status

from .cases import BF16, F16, F32, Draw
from .harness import run

if why := backend_status()["triton"]:
    pytest.skip(why, allow_module_level=True)

from nabla_fast.triton_kernels import embedding_mix as embedding_kernels
from nabla_fast.triton_kernels import linear_embedding_mix as linear_kernels
from nabla_fast.triton_kernels import onehot_grad as onehot_kernels
from nabla_fast.triton_kernels.common import presets, scratch, weighted_rows
from nabla_fast.triton_kernels.common.softmax_sums import softmax_sums

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
    monkeypatch.setattr(scratch, "BYTES", 6000)
    assert list(scratch.row_blocks(5, 4 * 515, scratch.share(11))) == [
        slice(0, 2),
        slice(2, 4),
        slice(4, 5),
    ]
    for (op, arguments), wanted in zip(calls, whole, strict=True):
        for name, value in run(op, "triton", arguments).items():
            assert torch.equal(value, wanted[name]), f"{op.name}: {name}"


def test_parts_of_rows_are_whole_tiles_and_nearly_equal():
    assert list(scratch.row_blocks(0, 8, 64)) == []
    assert list(scratch.row_blocks(2, 100, 64)) == [slice(0, 1), slice(1, 2)]
    assert list(scratch.row_blocks(100, 1, 90)) == [slice(0, 64), slice(64, 100)]
    sizes = [part.stop - part.start for part in scratch.row_blocks(512, 2 * 151_936, scratch.share(15))]
    assert sizes == [176, 176, 160]


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


def scratch_calls(draw: Draw, rows: int, vocabulary: int) -> dict[str, Callable[[], list[Tensor]]]:
    """Calls of the launchers by name; each returns its results."""
    tables = [draw.normal(vocabulary, 24, dtype=BF16), draw.normal(vocabulary, 40)]
    head, hidden = draw.normal(vocabulary, 32, dtype=BF16), draw.normal(rows, 32)
    cotangents = [draw.normal(rows, table.shape[1]) for table in tables]
    logits, half = draw.normal(rows, vocabulary), draw.normal(rows, vocabulary, dtype=BF16)
    noise, options = draw.noise(rows), {"tau": 0.7, "hard": False}
    backward = {"tau": 0.7, "direct": None}

    def mixed(result: tuple[list[Tensor], Tensor]) -> list[Tensor]:
        return [*result[0], result[1]]

    def soft(z: Tensor, key: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        return mixed(embedding_kernels.embedding_mix(z, tables, noise=key, **options))

    def linear(key: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        return mixed(linear_kernels.linear_embedding_mix(hidden, head, tables, noise=key, **options))

    def to_logits(z: Tensor, key: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        return [
            embedding_kernels.embedding_mix_backward(cotangents, z, tables, noise=key, **backward),
        ]

    def to_hidden() -> list[Tensor]:
        return [
            linear_kernels.linear_embedding_mix_backward(
                cotangents, hidden, head, tables, noise=noise, **backward
            )
        ]

    return {
        "soft": lambda: soft(logits, None),
        "soft, noise": lambda: soft(half, noise),
        "linear": lambda: linear(None),
        "linear, noise": lambda: linear(noise),
        "backward": lambda: to_logits(logits, None),
        "backward, half precision": lambda: to_logits(half, noise),
        "linear backward": to_hidden,
        "norms": lambda: list(onehot_kernels.onehot_grad_norm(cotangents, tables, hidden, head, 1e-3, [])),
    }


@pytest.mark.parametrize("name", scratch_calls(Draw(0), 1, 2))
@pytest.mark.parametrize(("rows", "vocabulary"), [(9, 4133), (34, 21)])
def test_scratch_is_bounded(
    name: str, rows: int, vocabulary: int, draw: Draw, monkeypatch: pytest.MonkeyPatch
):
    call = scratch_calls(draw, rows, vocabulary)[name]
    # Of the smaller vocabulary, rows of partial sums are the larger ones.
    monkeypatch.setattr(scratch, "BYTES", 65_000 if vocabulary > 4000 else 10_000)
    with torch.no_grad(), LiveBytes() as live:
        results = call()
    beside = live.peak - sum(result.untyped_storage().nbytes() for result in results)
    # Top, sum, token and status of a row, and its G[ŷ] and ⟨p, G⟩.
    assert 0 < beside <= scratch.BYTES + 32 * rows


def test_a_half_precision_result_holds_gradients_past_its_range(draw: Draw):
    logits, tables = draw.logits(3, 300, F16), draw.tables(300, [(6, F32)])
    arguments = {"logits": logits, "tables": tables, "tau": 4096.0, "noise": None, "direct": None}
    cotangents = [1e6 * draw.normal(3, 6)]
    ours = run(embedding_mix_backward, "triton", {"cotangents": cotangents} | arguments)["result"]
    z, exact = logits.double(), (cotangents[0].double() @ tables[0].double().T)
    assert (exact.abs().amax(dim=1) > 2**17).all()
    p = torch.softmax(z / 4096.0, dim=1)
    wanted = p * (exact - (p * exact).sum(dim=1, keepdim=True)) / 4096.0
    torch.testing.assert_close(ours.double(), wanted, rtol=2**-8, atol=2**-8 * float(wanted.abs().max()))


def test_a_map_that_names_no_row_reads_none(draw: Draw):
    # On a device nobody waits for a map to be checked; what is past the table is its last row.
    table, cotangent = draw.normal(9, 4), draw.normal(2, 4)
    hidden, head = draw.normal(2, 3), draw.normal(21, 3)
    token_map = draw.integers(0, 9, 21)
    token_map[3], token_map[20] = -(2**40), 2**40
    within = token_map.clamp(0, 8)
    inputs = [tensor.to(DEVICE) for tensor in (cotangent, table, hidden, head, token_map, within)]
    cotangent, table, hidden, head, token_map, within = inputs
    call = partial(onehot_kernels.onehot_grad, [cotangent], [table], hidden, head, 0.1)
    assert torch.equal(call([token_map])[0], call([within])[0])


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
    splits, size = weighted_rows._splits(vocabulary, tiles, columns, 132, 1000)
    assert size % columns == 0
    assert (splits - 1) * size < vocabulary <= splits * size
    assert splits == 1 or size >= 8 * columns


def test_soft_mix_joins_splits(draw: Draw, monkeypatch: pytest.MonkeyPatch):
    kinds = presets.config("weighted_rows", "float32", DEVICE) | {"PROGRAMS": 3, "COLUMNS": 64}
    logits, tables = draw.logits(3, 2100), draw.tables(2100, [(9, F32)])
    with presets.forced("weighted_rows", "float32", kinds):
        assert weighted_rows._splits(2100, 1, 64, 3, 1000)[0] == 3
        ours = run(embedding_mix, "triton", {"logits": logits, "tables": tables, "hard": False})
    exact = torch.softmax(logits.double(), dim=1) @ tables[0].double()
    torch.testing.assert_close(ours["result[0]"].double(), exact, rtol=1e-5, atol=1e-6)
