"""What tests of the CUDA kernels are built from: their sources, compiled for the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cuda_build import build
from cuda_kernels import Kernels
from ops.conftest import draw, seed

__all__ = ["draw", "seed"]  # fixtures


@pytest.fixture(scope="session")
def built() -> Callable[[str], Path]:
    """Path of a target of host.mk, by name, brought up to date."""
    return build


@pytest.fixture(scope="session", params=["kernels.so", "kernels-small.so"])
def kernels(request: pytest.FixtureRequest, built: Callable[[str], Path]) -> Kernels:
    """Both builds of the library: a problem in one chunk, and in many."""
    return Kernels(built(request.param))
