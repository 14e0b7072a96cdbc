"""What an installation holds, and what is said where it holds no machine code."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# setuptools has had a command for wheels of its own since release 70.1.
try:
    CAN_BUILD = bool(importlib.util.find_spec("setuptools.command.bdist_wheel"))
except ModuleNotFoundError:
    CAN_BUILD = False
ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "nabla_fast", "csrc", "triton_kernels"]

# What the C++ kernels would have served: once in a process, and not where PyTorch is asked for.
CALLS = """
import sys, warnings, torch
sys.modules["nabla_fast._C"] = None
import nabla_fast
from nabla_fast import ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with nabla_fast.use_backend("torch"):
        ops.token_stats(torch.randn(2, 5))
    ops.token_stats(torch.randn(2, 5, device="meta"))
    assert not caught, caught
    ops.token_stats(torch.randn(2, 5))
    ops.token_stats(torch.randn(2, 5))
(warning,) = caught
print(warning.message)
"""


def test_ops_without_the_kernels_say_so_once():
    run = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, check=True)
    (line,) = run.stdout.splitlines()
    assert line.startswith("ops on the CPU run in plain PyTorch, several times slower, as the C++ kernels")
    assert "no working C++ compiler was found" in line


@pytest.mark.skipif(not CAN_BUILD, reason="no setuptools of pyproject.toml's kind to build with")
def test_a_wheel_without_machine_code_is_for_any_machine(tmp_path: Path):
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = {"ignore": shutil.ignore_patterns("*.so")} if copy is shutil.copytree else {}
        copy(ROOT / name, tmp_path / name, **options)
    no_compiler = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        "dist",
        ".",
    ]
    subprocess.run(build, cwd=tmp_path, env=no_compiler, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
