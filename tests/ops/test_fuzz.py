"""Random calls of every op, valid and not; see ``fuzz``."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.ops.registry import all_ops

from .fuzz import run


@pytest.mark.parametrize("name", sorted(all_ops()))
def test_every_call_is_computed_or_refused_alike(name: str):
    seen = run(40, seed=1, ops=[name])
    assert {said for _, said in seen} >= {"computed", "InputError"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_thousand_calls(seed: int):
    run(1000, seed)


@pytest.mark.parametrize("name", sorted(all_ops()))
def test_calls_through_torchs_dispatcher_are_answered_alike(name: str):
    with torch.device("cpu"):  # a mode in which no call goes past it
        run(40, seed=2, ops=[name])
