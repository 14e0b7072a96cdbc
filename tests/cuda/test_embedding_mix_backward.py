"""The CUDA kernels of embedding_mix's backward, on the host that runs device code."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from bad_logits import BAD_STATUS, bad_logits
from cuda_kernels import OK, Kernels, Refused
from ops.harness import Arguments, Results, check
from ops.inputs import BF16, F16, F32, Case, Draw
from ops.shared.mixes import backward_arguments, mix_cases

from nabla_fast.ops.embedding_mix import embedding_mix_backward

ORDERS = 20

# The cases of all backends but for float64, which devices have no kernels for, and others.
SIZES: dict[str, dict[str, Any]] = {
    "31 tokens": {"rows": 3, "vocabulary": 31, "tables": ((5, F32), (70, BF16), (64, F16))},
    "bf16 logits": {"rows": 3, "vocabulary": 4099, "dtype": BF16, "noise": True, "direct": True},
    "fp16 masked": {"rows": 3, "vocabulary": 257, "dtype": F16, "masked": 0.9, "tables": ((9, F16),)},
    "no columns": {"rows": 3, "vocabulary": 257, "tables": ((0, F32), (2, F32))},
    "direct alone": {"rows": 3, "vocabulary": 257, "tables": (), "direct": True},
}
CASES = [case for case in mix_cases(backward=True) if not case.large and "float64" not in case.name]
CASES += [Case(name, partial(backward_arguments, **sizes)) for name, sizes in SIZES.items()]


def graded(kernels: Kernels, arguments: Arguments) -> Results:
    grad, status = kernels.embedding_mix_backward(**arguments)
    assert (status == OK).all()
    return {"result": grad}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_as_exact_as_pytorch(case: Case, kernels: Kernels, draw: Draw):
    check(embedding_mix_backward, case, draw, "cpu", partial(graded, kernels))


@pytest.mark.parametrize("given", [F32, BF16, F16], ids=str)
def test_cotangents_and_direct_may_have_other_dtypes(given: torch.dtype, kernels: Kernels, draw: Draw):
    def make(draw: Draw) -> Arguments:
        tables = ((7, F32), (8, BF16), (9, F16))
        arguments = backward_arguments(draw, rows=3, vocabulary=131, tables=tables, direct=True)
        cotangents = [cotangent.to(given) for cotangent in arguments["cotangents"]]
        return arguments | {"cotangents": cotangents, "direct": arguments["direct"].to(given)}

    check(embedding_mix_backward, Case(str(given), make), draw, "cpu", partial(graded, kernels))


def test_every_order_of_threads_gives_the_same_bits(kernels: Kernels, draw: Draw):
    options = {"tables": ((4, F32), (3, BF16)), "dtype": BF16, "noise": True, "direct": True}
    arguments = backward_arguments(draw, 2, vocabulary=4099, **options)
    runs = [graded(Kernels(kernels.path, seed), arguments)["result"] for seed in range(ORDERS)]
    assert all(torch.equal(grad, runs[0]) for grad in runs)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_a_bad_row_has_a_status_and_spoils_no_other(dtype: torch.dtype, kernels: Kernels, draw: Draw):
    z, (table,) = bad_logits(draw, dtype), draw.tables(4500, [(3, dtype)])
    cotangent = draw.normal(len(z), 3)
    grad, status = kernels.embedding_mix_backward([cotangent], z, [table])
    assert status.tolist() == BAD_STATUS
    assert grad[1:6].isnan().all()
    for row in (0, 6):
        alone, _ = kernels.embedding_mix_backward([cotangent[[row]]], z[[row]], [table])
        assert torch.equal(grad[[row]], alone)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_masked_tokens_take_no_part_though_their_gradient_is_not_finite(
    value: float, kernels: Kernels, draw: Draw
):
    z, (table,) = draw.logits(3, 4200), draw.tables(4200, [(5, F32)])
    z[:, ::3] = -torch.inf
    direct, cotangent = draw.normal(3, 4200), draw.normal(3, 5)
    finite, _ = kernels.embedding_mix_backward([cotangent], z, [table], direct=direct)
    direct[:, ::3] = value
    grad, _ = kernels.embedding_mix_backward([cotangent], z, [table], direct=direct)
    assert (grad[:, ::3] == 0).all()
    torch.testing.assert_close(grad, finite)


def test_a_gradient_that_is_not_finite_where_there_is_probability_spoils_its_row(
    kernels: Kernels, draw: Draw
):
    z, direct = draw.logits(3, 4200), draw.normal(3, 4200)
    direct[1, 4150] = torch.inf
    grad, status = kernels.embedding_mix_backward([], z, [], direct=direct)
    assert (status == OK).all()
    assert grad[1].isnan().all()
    assert grad[[0, 2]].isfinite().all()


def test_without_tables_and_direct_the_gradient_is_zero(kernels: Kernels, draw: Draw):
    grad, status = kernels.embedding_mix_backward([], draw.logits(3, 4200), [])
    assert (status == OK).all()
    assert (grad == 0).all()


def test_what_makes_no_sense_is_refused(kernels: Kernels):
    z, table = torch.zeros(2, 9), torch.zeros(9, 4)
    for tau, cotangent, status in (
        (0.0, torch.zeros(2, 4), 17),  # NABLA_FAST_INVALID_TAU
        (1.0, torch.zeros(2, 3), 16),  # NABLA_FAST_INVALID_SHAPE
    ):
        with pytest.raises(Refused) as refused:
            kernels.embedding_mix_backward([cotangent], z, [table], tau=tau)
        assert refused.value.status == status


def test_no_rows_are_fine(kernels: Kernels):
    grad, _ = kernels.embedding_mix_backward([torch.zeros(0, 4)], torch.zeros(0, 9), [torch.zeros(9, 4)])
    assert grad.shape == (0, 9)
