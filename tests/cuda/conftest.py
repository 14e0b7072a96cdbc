"""What tests of the CUDA kernels are built from: their sources, compiled for the CPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cuda_kernels import Kernels
from ops.conftest import draw, seed

__all__ = ["draw", "seed"]  # fixtures

ROOT = Path(__file__).resolve().parents[2]
BUILD = "build/cuda"  # below it, which make is given as it is in host.mk


@pytest.fixture(scope="session")
def built() -> Callable[[str], Path]:
    """Path of a target of host.mk, by name, brought up to date."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the host of device code needs Linux")
    for tool in ("make", "g++"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}")

    def build(name: str) -> Path:
        import fcntl

        folder = ROOT / BUILD
        folder.mkdir(parents=True, exist_ok=True)
        command = ["make", "-s", "-f", "tests/cuda/host.mk", "CXX=g++", f"BUILD={BUILD}", f"{BUILD}/{name}"]
        # Several test processes may build at once.
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return folder / name

    return build


@pytest.fixture(scope="session", params=["kernels.so", "kernels-small.so"])
def kernels(request: pytest.FixtureRequest, built: Callable[[str], Path]) -> Kernels:
    """Both builds of the library: a problem in one chunk, and in many."""
    return Kernels(built(request.param))
