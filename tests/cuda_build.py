"""The CUDA kernels compiled for the CPU: targets of tests/cuda/host.mk, brought up to date."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = "build/cuda"  # below it, which make is given as it is in host.mk


def build(name: str) -> Path:
    """Path of a target by name; the test is skipped where there are no tools."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the host of device code needs Linux")
    for tool in ("make", "g++"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}")
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
