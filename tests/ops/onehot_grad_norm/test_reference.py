"""onehot_grad_norm in plain PyTorch, as a torch.library op, and what it refuses."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.ops import onehot_grad, onehot_grad_norm, use_backend

from ..contract import BackendContract, LibraryContract
from ..inputs import Draw
from ..shared.arguments import ArgumentContract, of_a_onehot_gradient
from ..shared.onehot import VOCABULARY, Loss, OnehotAgainstAutograd, OnehotOnBackend
from .cases import ONEHOT_GRAD_NORM


class TestContract(BackendContract):
    tested, backend = ONEHOT_GRAD_NORM, "torch"


class TestLibrary(LibraryContract):
    tested = ONEHOT_GRAD_NORM


class TestArguments(ArgumentContract):
    op, good = onehot_grad_norm, staticmethod(of_a_onehot_gradient)


class TestRowsAndMaps(OnehotOnBackend):
    op, backend = onehot_grad_norm, "torch"


class TestAgainstAutograd(OnehotAgainstAutograd):
    op = onehot_grad_norm

    @staticmethod
    def of_gradient(grad: Tensor) -> Tensor:
        return grad.norm(dim=-1)


def test_a_masked_token_is_left_out(draw: Draw):
    arguments = Loss(draw, 4).arguments()
    arguments["hidden"] = arguments["hidden"].abs() + 0.1
    arguments["head"] = arguments["head"].index_fill(0, torch.tensor([3, 7]), -torch.inf)
    kept = [v for v in range(VOCABULARY) if v not in (3, 7)]
    with use_backend("torch"):
        grad, norm = onehot_grad(**arguments), onehot_grad_norm(**arguments)
    torch.testing.assert_close(norm, grad[:, kept].norm(dim=-1))
