"""embedding_mix on stored inputs whose results were computed in float64 by another program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nabla_fast.errors import BackendUnavailable
from nabla_fast.ops import embedding_mix, use_backend

from ..contract import OnBackend
from ..harness import DEVICES, device_parameter

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = json.loads((GOLDEN / "embedding_mix.json").read_text())
ROUNDING = 1e-5  # of the largest number of the row


def assert_close(ours: Tensor, wanted: Tensor) -> None:
    bound = ROUNDING * wanted.abs().amax(dim=1, keepdim=True)
    assert ((ours.cpu() - wanted).abs() <= bound).all()


class GoldenNumbers(OnBackend):
    """Mix and gradient on one backend."""

    @pytest.fixture(scope="class")
    def tensors(self) -> dict[str, Tensor]:
        return load_file(GOLDEN / "embedding_mix.safetensors")

    @pytest.mark.parametrize("device", [device_parameter(device) for device in DEVICES])
    @pytest.mark.parametrize("index", range(len(CASES)))
    def test_golden(self, device: str, index: int, tensors: dict[str, Tensor]):
        case = {
            key.split(".")[1]: tensor.to(device)
            for key, tensor in tensors.items()
            if key.startswith(f"case{index}.")
        }
        logits = case["logits"].clone().requires_grad_()
        assert list(logits.shape) == [CASES[index]["rows"], CASES[index]["vocab"]]
        try:
            # Plain PyTorch stands in where only one of mix and gradient has a kernel.
            with use_backend(self.backend, "torch"):
                lm_mix, rm_mix = embedding_mix(
                    logits,
                    [case["lm_table"], case["rm_table"]],
                    tau=CASES[index]["tau"],
                    hard=CASES[index]["hard"],
                    direct=case["grad_direct"],
                )
                torch.autograd.backward([lm_mix, rm_mix], [case["grad_lm"], case["grad_rm"]])
        except BackendUnavailable as error:
            pytest.skip(str(error))
        assert_close(lm_mix.detach(), case["lm_mix"].cpu())
        assert_close(rm_mix.detach(), case["rm_mix"].cpu())
        assert_close(logits.grad, case["grad_logits"].cpu())
