"""The Triton store_keys_values on every kind of input."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.ops import backend_status

from ..contract import BackendContract
from ..harness import DEVICES
from ..inputs import Draw
from .cases import STORE_KEYS_VALUES, store_arguments


class TestContract(BackendContract):
    tested, backend = STORE_KEYS_VALUES, "triton"


@pytest.mark.skipif(bool(backend_status()["triton"]), reason="needs Triton or its interpreter")
def test_a_slot_outside_the_pool_is_named_and_nothing_written(draw: Draw):
    from nabla_fast.triton_kernels import store_keys_values as kernels

    given = {
        name: value.to(DEVICES[-1])
        for name, value in store_arguments(draw, batch=2, suffix=3, missing=0.0).items()
    }
    given["slots"][1, 0], given["slots"][0, 1] = 28, -7
    before = given["key_pool"].clone()
    stored, status = kernels.store_keys_values(**given)
    assert status.tolist() == [0, 5, 0, 5, 0, 0]
    assert stored.tolist() == [[True, False, True], [False, True, True]]
    changed = (given["key_pool"] != before).any(dim=(2, 3)).flatten().nonzero().flatten()
    good = given["slots"].flatten()[torch.tensor(status.tolist()) == 0]
    assert changed.tolist() == good.sort().values.tolist()
