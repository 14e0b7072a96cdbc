"""nll_grad in plain PyTorch, and as a torch.library op."""

from __future__ import annotations

from ..contract import BackendContract, LibraryContract
from .cases import NLL_GRAD


class TestContract(BackendContract):
    tested, backend = NLL_GRAD, "torch"


class TestLibrary(LibraryContract):
    tested = NLL_GRAD
