"""The CUDA kernels of embedding_mix, on the host that runs device code."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from bad_logits import BAD_STATUS, bad_logits
from cuda_kernels import OK, Kernels, Refused
from ops.harness import Arguments, Results, check
from ops.inputs import BF16, F16, F32, Case, Draw
from ops.shared.mixes import mix_arguments, mix_cases
from torch import Tensor

from nabla_fast.ops import embedding_mix

ORDERS = 20
WHOLE = 151_936

# The cases of all backends but for float64, which devices have no kernels for, and others.
SIZES: dict[str, dict[str, Any]] = {
    "31 tokens": {"rows": 3, "vocabulary": 31, "tables": ((5, F32), (70, BF16), (64, F16))},
    "bf16 logits": {"rows": 3, "vocabulary": 4099, "dtype": BF16, "tables": ((9, BF16),)},
    "fp16 masked": {"rows": 3, "vocabulary": 257, "dtype": F16, "masked": 0.9, "tables": ((9, F16),)},
    "no columns": {"rows": 3, "vocabulary": 257, "tables": ((0, F32), (2, F32))},
}
CASES = [case for case in mix_cases(backward=False) if not case.large and "float64" not in case.name]
CASES += [
    Case(f"{name}, {'hard' if hard else 'soft'}", partial(mix_arguments, **sizes, hard=hard))
    for name, sizes in SIZES.items()
    for hard in (True, False)
]
CASES += [Case("whole vocabulary, hard", partial(mix_arguments, rows=1, vocabulary=WHOLE, hard=True))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_as_exact_as_pytorch(case: Case, kernels: Kernels, draw: Draw):
    def mixed(arguments: Arguments) -> Results:
        mixes, status = kernels.embedding_mix(**arguments)
        assert (status == OK).all()
        return {f"result[{t}]": mix for t, mix in enumerate(mixes)}

    check(embedding_mix, case, draw, "cpu", mixed)


@pytest.mark.parametrize("hard", [True, False])
def test_every_order_of_threads_gives_the_same_bits(hard: bool, kernels: Kernels, draw: Draw):
    tables = ((4, F32), (3, BF16), (2, F16))
    arguments = mix_arguments(draw, 2, 4099, tables, noise=True, hard=hard)
    runs = [Kernels(kernels.path, seed).embedding_mix(**arguments)[0] for seed in range(ORDERS)]
    for mixes in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(mixes, runs[0], strict=True))


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_a_bad_row_has_a_status_and_spoils_no_other(
    dtype: torch.dtype, hard: bool, kernels: Kernels, draw: Draw
):
    z, tables = bad_logits(draw, dtype), draw.tables(4500, [(5, F32), (3, dtype)])
    mixes, status = kernels.embedding_mix(z, tables, hard=hard)
    assert status.tolist() == BAD_STATUS
    alone = [kernels.embedding_mix(z[[row]], tables, hard=hard)[0] for row in (0, 6)]
    for t, mix in enumerate(mixes):
        assert mix[1:6].isnan().all()
        for row, of_row in zip((0, 6), alone, strict=True):
            torch.testing.assert_close(mix[[row]], of_row[t])


def test_rows_without_tables_have_a_status(kernels: Kernels, draw: Draw):
    for hard in (True, False):
        _, status = kernels.embedding_mix(bad_logits(draw), [], hard=hard)
        assert status.tolist() == BAD_STATUS


def test_the_first_of_equal_logits_is_the_token(kernels: Kernels):
    z, table = torch.zeros(3, 9000), torch.arange(9000.0)[:, None]
    z[1, [4097, 8999]] = 1
    z[2, [5000, 4999, 8192]] = 2
    (mix,), _ = kernels.embedding_mix(z, [table])
    assert mix[:, 0].tolist() == [0, 4097, 4999]


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_a_mix_may_have_another_dtype_than_its_table(
    dtype: torch.dtype, hard: bool, kernels: Kernels, draw: Draw
):
    z, tables = draw.logits(2, 300), draw.tables(300, [(5, F32), (5, BF16), (5, F16)])
    wide, _ = kernels.embedding_mix(z, tables, hard=hard, dtype=F32)
    mixes, _ = kernels.embedding_mix(z, tables, hard=hard, dtype=dtype)
    assert all(torch.equal(mix, exact.to(dtype)) for mix, exact in zip(mixes, wide, strict=True))


def expect_soft_mix(kernels: Kernels, z: Tensor, table: Tensor) -> None:
    (mix,), status = kernels.embedding_mix(z, [table], hard=False)
    assert (status == OK).all()
    exact = torch.softmax(z.double(), dim=1) @ table.double()
    assert (mix - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_sums_follow_a_maximum_that_grows_from_chunk_to_chunk(kernels: Kernels, draw: Draw):
    """From logits whose exponentials no float32 holds, and from none at all."""
    growth = torch.tensor([8, 8, 200])[:, None]
    growing = draw.logits(3, 4 * 4096) + torch.arange(4).repeat_interleave(4096) * growth
    growing[1, :4096] = -torch.inf
    growing[2] -= 3e4
    (table,) = draw.tables(4 * 4096, [(4, F32)])
    expect_soft_mix(kernels, growing, table)
    # A row by itself has larger chunks, whose blocks share what is to be rescaled.
    (wide,) = draw.tables(4 * 4096, [(260, F32)])
    expect_soft_mix(kernels, growing[:1], wide)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_large_entries_do_not_overflow(dtype: torch.dtype, kernels: Kernels):
    z, table = torch.zeros(1, 5000), torch.full((5000, 3), 3e38).to(dtype)
    (mix,), _ = kernels.embedding_mix(z, [table], hard=False, dtype=F32)
    torch.testing.assert_close(mix, table[:1].float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (17, 65), (65, 9)])
def test_products_of_half_precision_fill_their_tiles(
    rows: int, width: int, dtype: torch.dtype, kernels: Kernels, draw: Draw
):
    """Sizes around those of the matrix units and of a block's tile."""
    z, (table,) = draw.logits(rows, 131), draw.tables(131, [(width, dtype)])
    (mix,), status = kernels.embedding_mix(z, [table], hard=False, dtype=F32)
    assert (status == OK).all()
    p, exact_table = torch.softmax(z.double(), dim=1), table.double()
    # Weights and their sum are rounded, by half an eps each, and added in float32: of terms that
    # cancel, this much is left.
    most = (torch.finfo(dtype).eps + 1e-6) * (p @ exact_table.abs())
    assert ((mix - p @ exact_table).abs() <= most).all()


# -- refusals ----------------------------------------------------------------------------------------


def refusal(kernels: Kernels, *arguments: Any, **options: Any) -> int:
    with pytest.raises(Refused) as refused:
        kernels.embedding_mix(*arguments, **options)
    return refused.value.status


def test_what_makes_no_sense_is_refused(kernels: Kernels):
    z, table = torch.zeros(2, 9), torch.zeros(9, 4)
    for tau in (0.0, -1.0, 2.0**65, float("nan")):
        assert refusal(kernels, z, [table], tau=tau) == 17  # NABLA_FAST_INVALID_TAU
    assert refusal(kernels, z[:, :0], [table[:0]]) == 16  # NABLA_FAST_INVALID_SHAPE


def test_no_rows_are_fine(kernels: Kernels):
    (mix,), status = kernels.embedding_mix(torch.zeros(0, 9), [torch.zeros(9, 4)])
    assert mix.shape == (0, 4)
    assert len(status) == 0
