"""The CUDA kernels compiled for devices, where there is nvcc: none keeps registers in memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TARGETS = ("sm_80", "sm_90a", "sm_100a", "sm_120")
FLAGS = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
FLAGS += [f"-I{ROOT / 'csrc' / folder}" for folder in ("cuda", "cpu", "include")]

# "12 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" of each kernel.
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc"),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_no_kernel_spills(source: Path, target: str, tmp_path: Path):
    command = ["nvcc", f"-arch={target}", *FLAGS, "-c", source, "-o", tmp_path / "kernels.o"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    frames = FRAME.findall(result.stderr)
    assert len(frames) == result.stderr.count("Compiling entry function")
    assert all(frame == ("0", "0", "0") for frame in frames), result.stderr
