"""dto_descent_latents in plain PyTorch, against torch.optim.Adam, and as a torch.library op."""

from __future__ import annotations

from nabla_fast.ops import dto_descent_latents

from ..contract import BackendContract, LibraryContract
from ..shared.arguments import ArgumentContract
from ..shared.descents import DescentAgainstAdam, DescentOverlaps
from .cases import DTO_DESCENT_LATENTS, good


class TestContract(BackendContract):
    tested, backend = DTO_DESCENT_LATENTS, "torch"


class TestOverlaps(DescentOverlaps):
    op, backend, hidden = dto_descent_latents, "torch", 5


class TestLibrary(LibraryContract):
    tested = DTO_DESCENT_LATENTS


class TestArguments(ArgumentContract):
    op, good = dto_descent_latents, staticmethod(good)


class TestAgainstAdam(DescentAgainstAdam):
    kind = "latents"
