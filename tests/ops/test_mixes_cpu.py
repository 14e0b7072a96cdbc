"""The C++ mixes: every instruction set, sizes around their tiles, threads, alignment, bad rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from nabla_fast import _native, ops
from nabla_fast.errors import RowError
from nabla_fast.ops.registry import Op, all_ops

from . import cases
from .cases import BF16, F32, Case, Draw
from .harness import check, copied, map_tensors, rows_of, run

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))

# Rows around a vector, a register's worth of rows and a group of 64; tokens around a tile of 64 and a
# segment of 2,048; widths around a strip of 64 columns and a chain of 128.
SIZES = [
    (1, 1, 1),
    (1, 4099, 130),
    (5, 63, 31),
    (16, 65, 64),
    (17, 129, 65),
    (33, 2049, 16),
    (48, 100, 257),
    (65, 2112, 33),
    (130, 300, 96),
]
DTYPES = [(F32, F32), (F32, BF16), (BF16, BF16)]  # of the rows and of the tables
OPS = [op for name, op in all_ops().items() if "mix" in name]


def arguments(
    op: Op, draw: Draw, rows: int, vocabulary: int, width: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> dict[str, Any]:
    recipe = cases.mix_backward if "backward" in op.name else cases.embedding_mix
    mode = {} if "backward" in op.name else {"hard": False}
    return recipe(
        draw,
        rows=rows,
        vocabulary=vocabulary,
        tables=((width, dtypes[1]), (7, dtypes[1])),
        dtype=dtypes[0],
        hidden=width if "linear" in op.name else 0,
        direct=True,
        tau=0.8,
        **mode,
    )


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(op: Op, dtypes: tuple, sizes: tuple, draw: Draw, isa: str):
    case = Case(str(sizes), lambda draw: arguments(op, draw, *sizes, dtypes))
    check(op, case, draw, "cpu", partial(run, op, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("tables", [F32, BF16], ids=str)
def test_a_huge_vocabulary(op: Op, tables: torch.dtype, draw: Draw, isa: str):
    case = Case("huge", lambda draw: arguments(op, draw, 3, 300_001, 17, (F32, tables)))
    check(op, case, draw, "cpu", partial(run, op, "cpu"))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_on_any_threads(op: Op, dtypes: tuple, draw: Draw, threads):
    given = arguments(op, draw, 67, 6200, 40, dtypes)
    together = run(op, "cpu", given)
    threads(3)
    again = run(op, "cpu", given)
    for name, value in together.items():
        assert torch.equal(value, again[name])
    for rows in (slice(0, 1), slice(3, 20), slice(66, 67)):
        part = run(op, "cpu", rows_of(given, rows))
        for name, value in part.items():
            assert torch.equal(value, together[name][rows]), f"{name} of rows {rows}"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_noise_and_hard_tokens_on_every_level(op: Op, draw: Draw, isa: str):
    def make(draw: Draw) -> dict[str, Any]:
        given = arguments(op, draw, 5, 2500, 24, (F32, F32))
        hard = {} if "backward" in op.name else {"hard": True}
        return given | hard | {"noise": draw.noise(5)}

    check(op, Case("noise", make), draw, "cpu", partial(run, op, "cpu"))


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers one element off every alignment."""
    memory = tensor.new_empty(tensor.numel() + 1)
    memory[1:] = tensor.flatten()
    return memory[1:].view(tensor.shape)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_alignment_does_not_matter(op: Op, dtypes: tuple, draw: Draw):
    given = arguments(op, draw, 9, 333, 37, dtypes)
    moved = {k: v if k in ("tau", "hard") else map_tensors(shifted, v) for k, v in given.items()}
    with ops.use_backend("cpu"), torch.no_grad():
        for a, b in zip(*(_tensors(op(**map_tensors(copied, x))) for x in (given, moved)), strict=True):
            assert torch.equal(a, b)


def _tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bad_rows_are_named(hard: bool, dtype: torch.dtype, isa: str):
    z, table = torch.randn(70, 300).to(dtype), torch.randn(300, 8)
    z[2, 299] = torch.inf
    z[66, 17] = torch.nan
    z[66, 18] = torch.inf
    z[69] = -torch.inf
    with ops.use_backend("cpu"), pytest.raises(RowError) as error:
        ops.embedding_mix(z, [table], hard=hard)
    reasons = dict(error.value.rows)
    assert reasons == {2: "has a +inf logit", 66: "has a NaN logit", 69: "has no finite logit"}
    head = torch.eye(300)
    with ops.use_backend("cpu"), pytest.raises(RowError) as error:
        ops.linear_embedding_mix(torch.where(z.isfinite(), z, torch.nan).float(), head, [table], hard=hard)
    assert set(dict(error.value.rows).values()) == {"has a NaN logit"}


def test_masked_tokens_take_no_part_though_their_gradient_is_infinite():
    z, table = torch.randn(3, 200), torch.randn(200, 5)
    z[:, ::3] = -torch.inf
    direct = torch.randn(3, 200)
    direct[:, ::3] = torch.inf
    cotangent = torch.randn(3, 5)

    def gradient(backend: str, direct: torch.Tensor) -> torch.Tensor:
        leaf = z.clone().requires_grad_()
        with ops.use_backend(backend):
            (mix,) = ops.embedding_mix(leaf, [table], direct=direct)
            return torch.autograd.grad(mix, leaf, cotangent)[0]

    ours = gradient("cpu", direct)
    assert (ours[:, ::3] == 0).all()
    torch.testing.assert_close(ours, gradient("torch", direct.where(direct.isfinite(), 0.0)))


def test_infinite_entries_of_a_half_precision_head_mask_tokens(isa: str):
    # A float32 is several bf16 terms on some levels: infinity times one that is 0 is no number.
    hidden = torch.tensor([[1.0, 0.5], [2.0, 1 / 3]])
    head = torch.randn(40, 2).to(BF16)
    head[7, 0] = -torch.inf
    table = torch.randn(40, 3)
    with ops.use_backend("cpu"):
        (ours,) = ops.linear_embedding_mix(hidden, head, [table], hard=False)
    z = hidden @ head.float().T
    torch.testing.assert_close(ours, z.softmax(dim=-1) @ table)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_infinite_entry_of_a_half_precision_table_spoils_its_column_alone(value: float, isa: str):
    # The weight 1/2 is one bf16 term; those that are left of it are 0.
    z = torch.full((18, 130), -torch.inf)
    z[:, [5, 70]] = 0.0
    table = torch.randn(130, 70).to(BF16)
    table[70, 33] = value
    with ops.use_backend("cpu"):
        (ours,) = ops.embedding_mix(z, [table], hard=False)
    expected = ((table[5].float() + table[70].float()) / 2).to(BF16).expand(18, -1)
    torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_gradient_of_a_flat_softmax_over_a_large_vocabulary(dtype: torch.dtype, draw: Draw):
    # G has a mean that is large beside what is left of it: sums of G itself would lose four digits.
    def gradient(backend: str, wide: torch.dtype | None) -> torch.Tensor:
        hidden, head, table, cotangent = (x if wide is None else x.to(wide) for x in given)
        hidden = hidden.clone().requires_grad_()
        with ops.use_backend(backend):
            (mix,) = ops.linear_embedding_mix(hidden, head, [table], hard=False)
            return torch.autograd.grad(mix, hidden, cotangent)[0].double()

    def error(backend: str) -> float:
        difference = (gradient(backend, None) - exact).abs().amax(dim=1)
        return float((difference / exact.abs().amax(dim=1)).max())

    errors: dict[str, list[float]] = {"cpu": [], "torch": []}
    for _ in range(4):
        head, table = draw.normal(151_936, 8).to(dtype), draw.normal(151_936, 3).to(dtype)
        given = draw.normal(2, 8, scale=8**-0.5), head, table, draw.normal(2, 3).to(dtype)
        exact = gradient("torch", torch.float64)
        for backend, found in errors.items():
            found.append(error(backend))
    assert max(errors["cpu"]) <= 2 * max(errors["torch"]) + 1e-7
