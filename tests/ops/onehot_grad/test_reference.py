"""onehot_grad in plain PyTorch, as a torch.library op, and what it refuses."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.ops import onehot_grad, use_backend

from ..contract import BackendContract, LibraryContract
from ..inputs import Draw
from ..shared.arguments import ArgumentContract, of_a_onehot_gradient
from ..shared.onehot import VOCABULARY, Loss, OnehotAgainstAutograd, OnehotOnBackend
from .cases import ONEHOT_GRAD


class TestContract(BackendContract):
    tested, backend = ONEHOT_GRAD, "torch"


class TestLibrary(LibraryContract):
    tested = ONEHOT_GRAD


class TestArguments(ArgumentContract):
    op, good = onehot_grad, staticmethod(of_a_onehot_gradient)


class TestRowsAndMaps(OnehotOnBackend):
    op, backend = onehot_grad, "torch"


class TestAgainstAutograd(OnehotAgainstAutograd):
    op = onehot_grad

    @staticmethod
    def of_gradient(grad: Tensor) -> Tensor:
        return grad


def test_a_masked_token_is_left_out(draw: Draw):
    arguments = Loss(draw, 4).arguments()
    arguments["hidden"] = arguments["hidden"].abs() + 0.1
    without = onehot_grad(**arguments)
    arguments["head"] = arguments["head"].index_fill(0, torch.tensor([3, 7]), -torch.inf)
    with use_backend("torch"):
        grad = onehot_grad(**arguments)
    assert (grad[:, [3, 7]] == 0).all()
    kept = [v for v in range(VOCABULARY) if v not in (3, 7)]
    # Only π is spread over the tokens that are left: one number a row.
    shift = grad[:, kept] - without[:, kept]
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift))
    assert (shift < 0).all()
