"""The CUDA kernels of mixes of hidden states and their backward, on the host that runs device code."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cuda_kernels import ALL_MASKED, NAN, OK, Kernels, Refused
from ops.harness import Arguments, Results, check
from ops.inputs import BF16, F16, F32, Case, Draw
from ops.shared.mixes import backward_arguments, mix_arguments, mix_cases

from nabla_fast.ops import linear_embedding_mix
from nabla_fast.ops.linear_embedding_mix import linear_embedding_mix_backward

ORDERS = 20

# The cases of all backends but for float64, which devices have no kernels for, and others.
SIZES: dict[str, dict[str, Any]] = {
    "31 tokens": {"rows": 3, "vocabulary": 31, "hidden": 24, "tables": ((5, F32), (70, BF16))},
    "bf16": {"rows": 3, "vocabulary": 4099, "hidden": 40, "dtype": BF16, "tables": ((9, BF16),)},
    "fp16": {"rows": 3, "vocabulary": 257, "hidden": 24, "dtype": F16, "tables": ((9, F16),)},
    "fp16 under bf16": {"rows": 3, "vocabulary": 515, "hidden": 24, "dtype": F16, "tables": ((9, BF16),)},
}


def drawn(backward: bool) -> list[Case]:
    given = mix_cases(backward=backward, hidden=24)
    made = [case for case in given if not case.large and "float64" not in case.name]
    if backward:
        return made + [Case(name, partial(backward_arguments, **sizes)) for name, sizes in SIZES.items()]
    return made + [
        Case(f"{name}, {'hard' if hard else 'soft'}", partial(mix_arguments, **sizes, hard=hard))
        for name, sizes in SIZES.items()
        for hard in (True, False)
    ]


def growing(draw: Draw, dtype: torch.dtype, step: float) -> Arguments:
    """Logits of which each slice has larger ones than the last, by ``step``; the first has tiny ones."""
    arguments = backward_arguments(draw, 3, vocabulary=3 * 4096 + 77, hidden=9, tables=((5, dtype),))
    hidden, head = arguments["hidden"], arguments["head"]
    hidden[:, :2] = torch.tensor([1.0, 1.0])
    head[:, 0] = (torch.arange(len(head)) // 4096) * step
    head[:, 1] = torch.where(torch.arange(len(head)) < 4096, -1e30, 0.0)
    return arguments


def mixed(kernels: Kernels, arguments: Arguments) -> Results:
    mixes, status = kernels.linear_embedding_mix(**arguments)
    assert (status == OK).all()
    return {f"result[{t}]": mix for t, mix in enumerate(mixes)}


def graded(kernels: Kernels, arguments: Arguments) -> Results:
    grad, status = kernels.linear_embedding_mix_backward(**arguments)
    assert (status == OK).all()
    return {"result": grad.to(arguments["hidden"].dtype)}


@pytest.mark.parametrize("case", drawn(False), ids=lambda case: case.name)
def test_mixes_are_as_exact_as_pytorch(case: Case, kernels: Kernels, draw: Draw):
    check(linear_embedding_mix, case, draw, "cpu", partial(mixed, kernels))


@pytest.mark.parametrize("case", drawn(True), ids=lambda case: case.name)
def test_gradients_are_as_exact_as_pytorch(case: Case, kernels: Kernels, draw: Draw):
    check(linear_embedding_mix_backward, case, draw, "cpu", partial(graded, kernels))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("step", [0.0, 5.0, -5.0, 120.0])
def test_gradients_of_maxima_that_grow(step: float, dtype: torch.dtype, kernels: Kernels, draw: Draw):
    case = Case(f"growing by {step}", partial(growing, dtype=dtype, step=step))
    check(linear_embedding_mix_backward, case, draw, "cpu", partial(graded, kernels))


def test_a_gradient_that_is_infinite_where_no_token_counts(kernels: Kernels, draw: Draw):
    """Before the row's maximum is known, the token counted."""
    arguments = growing(draw, F32, 120.0)
    direct = draw.normal(3, len(arguments["head"]))
    direct[0, 4097] = direct[1, 5000] = 0.0
    expected, _ = kernels.linear_embedding_mix_backward(**arguments | {"direct": direct})
    direct[0, 4097], direct[1, 5000] = torch.inf, torch.nan
    grad, status = kernels.linear_embedding_mix_backward(**arguments | {"direct": direct})
    assert (status == OK).all()
    torch.testing.assert_close(grad, expected)
    direct[2, -1] = torch.inf
    grad, _ = kernels.linear_embedding_mix_backward(**arguments | {"direct": direct})
    assert grad[2].isnan().all()
    assert torch.equal(grad[:2].isfinite(), torch.ones(2, grad.shape[1], dtype=torch.bool))


def test_every_order_of_threads_gives_the_same_bits(kernels: Kernels, draw: Draw):
    sizes = {"rows": 2, "vocabulary": 4099, "hidden": 8, "tables": ((4, F32), (3, BF16)), "noise": True}
    forward = mix_arguments(draw, **sizes, hard=False)
    backward = backward_arguments(draw, **sizes, dtype=BF16, direct=True)
    runs = [Kernels(kernels.path, seed) for seed in range(ORDERS)]
    for compute, arguments in ((mixed, forward), (graded, backward)):
        results = [compute(run, arguments) for run in runs]
        for other in results[1:]:
            assert all(torch.equal(value, results[0][name]) for name, value in other.items())


def test_a_bad_row_has_a_status_and_spoils_no_other(kernels: Kernels, draw: Draw):
    hidden, head = draw.normal(4, 8), draw.normal(4500, 8)
    (table,), cotangent = draw.tables(4500, [(3, F32)]), draw.normal(4, 3)
    hidden[1, 3] = torch.nan
    hidden[2], head[:, 0] = 0.0, head[:, 0].abs() + 0.1
    hidden[2, 0] = -torch.inf
    expected = [OK, NAN, ALL_MASKED, OK]
    for hard in (True, False):
        (mix,), status = kernels.linear_embedding_mix(hidden, head, [table], hard=hard)
        assert status.tolist() == expected
        assert mix[1:3].isnan().all()
        assert mix[[0, 3]].isfinite().all()
    grad, status = kernels.linear_embedding_mix_backward([cotangent], hidden, head, [table])
    assert status.tolist() == expected
    assert grad[1:3].isnan().all()
    assert grad[[0, 3]].isfinite().all()


def test_what_makes_no_sense_is_refused(kernels: Kernels):
    hidden, head, table = torch.zeros(2, 8), torch.zeros(9, 8), torch.zeros(9, 4)
    for changes, status in (
        ({"head": torch.zeros(9, 7)}, 16),  # NABLA_FAST_INVALID_SHAPE
        ({"tau": 0.0}, 17),  # NABLA_FAST_INVALID_TAU
    ):
        given = {"hidden": hidden, "head": head, "tables": [table]} | changes
        with pytest.raises(Refused) as refused:
            kernels.linear_embedding_mix(**given)
        assert refused.value.status == status
