"""The Triton embedding_mix and its backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_fast.errors import RowError
from nabla_fast.ops import backend_status, embedding_mix, use_backend
from nabla_fast.ops.embedding_mix import embedding_mix_backward

from ..contract import BackendContract
from ..harness import DEVICES, check, interpreted, run
from ..inputs import BF16, F16, F32, Case, Draw
from ..shared import scratch
from ..shared.mixes import backward_arguments
from ..shared.mixes_triton import (
    VOCABULARY,
    check_chunks,
    check_parts,
    chunk_cases,
    part_cases,
    short_chunks,
)
from .cases import EMBEDDING_MIX, EMBEDDING_MIX_BACKWARD
from .golden import GoldenNumbers

if why := backend_status()["triton"]:
    pytest.skip(why, allow_module_level=True)

from nabla_fast.triton_kernels import embedding_mix as kernels

DEVICE = torch.device(DEVICES[-1])  # interpreted where there is no GPU


class TestContract(BackendContract):
    tested, backend = EMBEDDING_MIX, "triton"


class TestBackwardContract(BackendContract):
    tested, backend = EMBEDDING_MIX_BACKWARD, "triton"


class TestGolden(GoldenNumbers):
    backend = "triton"


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


def scratch_calls(draw: Draw, rows: int, vocabulary: int) -> dict[str, Callable[[], list[Tensor]]]:
    """Calls of the launchers by name; each returns its results."""
    problem = scratch.Problem(draw, rows, vocabulary)

    def soft(z: Tensor, key: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        mixes, tokens = kernels.embedding_mix(z, problem.tables, tau=0.7, hard=False, noise=key)
        return [*mixes, tokens]

    def backward(z: Tensor, key: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        options = {"tau": 0.7, "direct": None, "noise": key}
        return [kernels.embedding_mix_backward(problem.cotangents, z, problem.tables, **options)]

    return {
        "soft": lambda: soft(problem.logits, None),
        "soft, noise": lambda: soft(problem.half, problem.noise),
        "backward": lambda: backward(problem.logits, None),
        "backward, half precision": lambda: backward(problem.half, problem.noise),
    }


@scratch.SIZES
@pytest.mark.parametrize("name", scratch_calls(Draw(0), 1, 2))
def test_scratch_is_bounded(
    name: str, rows: int, vocabulary: int, limit: int, draw: Draw, monkeypatch: pytest.MonkeyPatch
):
    scratch.is_bounded(scratch_calls(draw, rows, vocabulary)[name], rows, limit, monkeypatch)


@pytest.mark.parametrize("case", part_cases(backward=False), ids=lambda case: case.name)
def test_parts_of_rows(case: Case, draw: Draw, monkeypatch: pytest.MonkeyPatch):
    check_parts(embedding_mix, case, draw, DEVICE.type, monkeypatch)


@pytest.mark.parametrize("case", part_cases(backward=True), ids=lambda case: case.name)
def test_parts_of_rows_backward(case: Case, draw: Draw, monkeypatch: pytest.MonkeyPatch):
    check_parts(embedding_mix_backward, case, draw, DEVICE.type, monkeypatch)


def test_a_half_precision_result_holds_gradients_past_its_range(draw: Draw):
    logits, tables = draw.logits(3, 300, F16), draw.tables(300, [(6, F32)])
    arguments = {"logits": logits, "tables": tables, "tau": 4096.0, "noise": None, "direct": None}
    cotangents = [1e6 * draw.normal(3, 6)]
    ours = run(embedding_mix_backward, "triton", {"cotangents": cotangents} | arguments)["result"]
    exact = cotangents[0].double() @ tables[0].double().T
    assert (exact.abs().amax(dim=1) > 2**17).all()
    p = torch.softmax(logits.double() / 4096.0, dim=1)
    # Past float16's range G − G[ŷ] is a bfloat16, to which the interpreter does not round but cuts off.
    centred = exact - exact.gather(1, logits.argmax(dim=1, keepdim=True))
    cut = (2**-7 if interpreted("triton") else 2**-8) * centred.abs()
    wanted = p * (centred - (p * centred).sum(dim=1, keepdim=True)) / 4096.0
    allowed = p * (cut + (p * cut).sum(dim=1, keepdim=True)) / 4096.0 + 2**-10 * wanted.abs()
    assert ((ours.double() - wanted).abs() <= allowed).all()


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


@pytest.mark.parametrize("case", chunk_cases(backward=False), ids=lambda case: case.name)
def test_chunks(case: Case, draw: Draw, monkeypatch: pytest.MonkeyPatch):
    check_chunks(embedding_mix, case, draw, DEVICE.type, monkeypatch)


@pytest.mark.parametrize("case", chunk_cases(backward=True), ids=lambda case: case.name)
def test_chunks_backward(case: Case, draw: Draw, monkeypatch: pytest.MonkeyPatch):
    check_chunks(embedding_mix_backward, case, draw, DEVICE.type, monkeypatch)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000], ids=["GPU", "CPU"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_nan_gradient_is_no_number_in_its_row(bits: int, dtype: torch.dtype, draw: Draw):
    direct = torch.zeros(2, 64)
    direct[0, 5] = torch.tensor([bits], dtype=torch.int32).view(F32)
    options = {"tau": 1.0, "noise": None, "direct": direct}
    with use_backend("triton"):
        grad = embedding_mix_backward(
            [draw.normal(2, 4)], draw.logits(2, 64, dtype), draw.tables(64, [(4, F32)]), **options
        )
    assert grad.isnan().sum(dim=1).tolist() == [64, 0]


def test_large_tables_have_finite_mixes(monkeypatch: pytest.MonkeyPatch):
    short_chunks(monkeypatch)
    for dtype in (F32, BF16):
        table = torch.full((VOCABULARY, 2), 3e38, dtype=dtype)
        with use_backend("triton"):
            (mix,) = embedding_mix(torch.zeros(1, VOCABULARY), [table], hard=False)
        torch.testing.assert_close(mix, table[:1], rtol=2**-7 if dtype == BF16 else 1e-3, atol=0.0)


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_a_constant_in_the_gradient_changes_no_bit_that_half_precision_keeps(offset: float, draw: Draw):
    case = Case("offset", lambda draw: backward_arguments(draw, 5, vocabulary=515, dtype=BF16))

    def shifted(draw: Draw) -> dict[str, Any]:
        return case.make(draw) | {"direct": torch.full((5, 515), offset)}

    check(
        embedding_mix_backward,
        replace(case, make=shifted),
        draw,
        DEVICE.type,
        lambda arguments: run(embedding_mix_backward, "triton", arguments),
    )
