"""The C++ onehot_grad."""

from __future__ import annotations

import pytest
import torch

from nabla_fast import _native
from nabla_fast.ops import onehot_grad, use_backend
from nabla_fast.ops.onehot_grad import onehot_grad_native

from ..contract import BackendContract, EveryInstructionSet
from ..inputs import BF16, F32, Draw
from ..shared.onehot import HIDDEN, NLL, OnehotCall, OnehotOnBackend, OnehotPass, exact, made
from ..shared.passes import forced
from .cases import ONEHOT_GRAD

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))


class TestContract(BackendContract):
    tested, backend = ONEHOT_GRAD, "cpu"


class TestInstructionSets(EveryInstructionSet):
    tested = ONEHOT_GRAD


class TestRowsAndMaps(OnehotOnBackend):
    op, backend = onehot_grad, "cpu"


class GradCall(OnehotCall):
    name = "onehot_grad"
    matrix_result = True


class TestPasses(OnehotPass):
    op, call, native = onehot_grad, GradCall, staticmethod(onehot_grad_native)


def test_subnormal_gradients(isa: str, draw: Draw):
    arguments = made(draw, rows=9, vocabulary=300, widths=(16,), nll_coeff=0.0)
    arguments["cotangents"] = [g * 1e-40 for g in arguments["cotangents"]]
    wanted = exact(onehot_grad, arguments)
    assert float(wanted.abs().max()) < 2**-126
    got = forced(onehot_grad, arguments)[0].double()
    assert ((got - wanted).abs() <= 16 * 2**-149).all()


def test_no_tables(draw: Draw):
    call = GradCall(draw, made)
    call.table_change = {"cotangents": [], "tables": []}
    memory = torch.empty(call.workspace(), dtype=torch.uint8)
    assert call(memory.data_ptr(), len(memory)) == "ok"
    zeros = [torch.zeros_like(t) for t in call.arguments["cotangents"]]
    wanted = exact(onehot_grad, call.arguments | {"cotangents": zeros})
    got = call.results[0][: call.rows * call.stride].view(call.rows, call.stride)[:, : call.vocabulary]
    # A token that is all but sure has a log π near 0, the difference of two numbers of the logits' size.
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-8)


def test_a_row_too_long_for_a_near_copy(draw: Draw):
    # On the CPU mapped rows are copied some at a time: two of these at most, and none of the wider.
    for width, dtype in ((16_000, F32), (33_000, F32), (65_537, BF16)):
        arguments = {
            "cotangents": [draw.normal(2, width)],
            "tables": [draw.normal(9, width, dtype=dtype)],
            "hidden": draw.normal(2, HIDDEN),
            "head": draw.normal(21, HIDDEN),
            "nll_coeff": NLL,
        }
        token_map = draw.integers(0, 9, 21)
        aligned = arguments | {"tables": [arguments["tables"][0][token_map]]}
        with use_backend("cpu"):
            assert torch.equal(onehot_grad(**arguments, token_maps=[token_map]), onehot_grad(**aligned))
