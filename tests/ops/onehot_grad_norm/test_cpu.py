"""The C++ onehot_grad_norm."""

from __future__ import annotations

import pytest

from nabla_fast import _native
from nabla_fast.ops import onehot_grad_norm
from nabla_fast.ops.onehot_grad_norm import onehot_grad_norm_native

from ..contract import BackendContract, EveryInstructionSet
from ..shared.onehot import OnehotCall, OnehotOnBackend, OnehotPass
from .cases import ONEHOT_GRAD_NORM

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))


class TestContract(BackendContract):
    tested, backend = ONEHOT_GRAD_NORM, "cpu"


class TestInstructionSets(EveryInstructionSet):
    tested = ONEHOT_GRAD_NORM


class TestRowsAndMaps(OnehotOnBackend):
    op, backend = onehot_grad_norm, "cpu"


class NormCall(OnehotCall):
    name = "onehot_grad_norm"


class TestPasses(OnehotPass):
    op, call, native = onehot_grad_norm, NormCall, staticmethod(onehot_grad_norm_native)
