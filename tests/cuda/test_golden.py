"""Stored mixes and gradients, computed in float64 by another program."""

from __future__ import annotations

import pytest
import torch
from cuda_kernels import OK, Kernels
from ops.embedding_mix.golden import CASES, GOLDEN, assert_close
from safetensors.torch import load_file


@pytest.mark.parametrize("index", range(len(CASES)))
def test_golden(index: int, kernels: Kernels):
    stored = load_file(GOLDEN / "embedding_mix.safetensors")
    prefix = f"case{index}."
    case = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    tables, tau = [case["lm_table"], case["rm_table"]], CASES[index]["tau"]
    mixes, status = kernels.embedding_mix(case["logits"], tables, tau=tau, hard=CASES[index]["hard"])
    assert (status == OK).all()
    assert_close(mixes[0], case["lm_mix"])
    assert_close(mixes[1], case["rm_mix"])
    grad, _ = kernels.embedding_mix_backward(
        [case["grad_lm"], case["grad_rm"]], case["logits"], tables, tau=tau, direct=case["grad_direct"]
    )
    assert_close(grad, case["grad_logits"])
    assert grad.dtype == torch.float32
