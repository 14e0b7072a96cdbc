"""linear_embedding_mix and its backward in plain PyTorch, and as torch.library ops."""

from __future__ import annotations

from nabla_fast.ops import linear_embedding_mix

from ..contract import BackendContract, LibraryContract
from ..shared.arguments import ArgumentContract
from ..shared.mixes import MixAgainstAutograd
from .cases import LINEAR_EMBEDDING_MIX, LINEAR_EMBEDDING_MIX_BACKWARD, good


class TestContract(BackendContract):
    tested, backend = LINEAR_EMBEDDING_MIX, "torch"


class TestBackwardContract(BackendContract):
    tested, backend = LINEAR_EMBEDDING_MIX_BACKWARD, "torch"


class TestLibrary(LibraryContract):
    tested = LINEAR_EMBEDDING_MIX


class TestBackwardLibrary(LibraryContract):
    tested = LINEAR_EMBEDDING_MIX_BACKWARD


class TestArguments(ArgumentContract):
    op, good = linear_embedding_mix, staticmethod(good)


class TestAgainstAutograd(MixAgainstAutograd):
    kind = "linear"
