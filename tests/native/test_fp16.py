"""Widening of fp16: every number, at every level of instructions."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NO_LEVEL = 77  # exit status


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / "csrc").is_dir():
        pytest.skip("not run from a checkout")
    compiler = shutil.which("g++") or pytest.skip("needs g++")
    built = tmp_path_factory.mktemp("fp16") / "fp16"
    sources = [ROOT / "tests" / "native" / "fp16.cpp", ROOT / "csrc" / "cpu" / "base" / "isa.cpp"]
    flags = ["-std=c++17", "-O2", "-Wno-psabi", f"-I{ROOT}/csrc/cpu", f"-I{ROOT}/csrc/include"]
    subprocess.run([compiler, *flags, *sources, "-o", built], check=True)
    return built


@pytest.mark.parametrize("level", range(3))
def test_all_numbers_are_widened_exactly(program, level):
    result = subprocess.run([program, str(level)], capture_output=True, check=False)
    if result.returncode == NO_LEVEL:
        pytest.skip(f"this CPU has no level {level}")
    assert result.returncode == 0
    found = torch.frombuffer(bytearray(result.stdout), dtype=torch.float32)
    expected = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(found[number].view(torch.int32), expected[number].view(torch.int32))
    assert int(number.sum()) == (1 << 16) - 2 * 1023
