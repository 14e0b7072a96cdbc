"""The library of the CUDA kernels as programs see it: the header, the example, the build."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import nabla_fast

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "csrc" / "include" / "nabla_fast_cuda.h"


def run(*command: str | Path, **options) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
    return result.stdout


@pytest.mark.parametrize(
    ("compiler", "language", "standard"), [("cc", "c", "c99"), ("c++", "c++", "c++11")]
)
def test_the_header_compiles_without_a_warning(compiler: str, language: str, standard: str):
    tool = shutil.which(compiler) or pytest.skip(f"needs {compiler}")
    flags = [f"-std={standard}", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    run(tool, *flags, f"-I{nabla_fast.get_include()}", "-x", language, HEADER)


def test_the_example_runs_on_the_host(built, tmp_path: Path):
    library, program = built("kernels.so"), tmp_path / "mix"
    folders = [ROOT / "tests" / "cuda" / "runtime", ROOT / "csrc" / "cuda", ROOT / "csrc" / "include"]
    flags = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", *(f"-I{folder}" for folder in folders)]
    example = ROOT / "examples" / "c" / "mix_on_device.c"
    run("gcc", *flags, example, library, f"-Wl,-rpath,{library.parent}", "-lm", "-o", program)
    assert run(program).startswith("3 rows of 1000 logits, largest error ")


def test_a_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from nabla_fast._native import library

    monkeypatch.setattr(library, "CUDA_LIBRARY", tmp_path / "libnabla_fast_cuda.so")
    with pytest.raises(RuntimeError, match=r"^libnabla_fast_cuda.so is not built: `make cuda` [^\n]+$"):
        nabla_fast.get_cuda_library()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_the_library_for_one_target(tmp_path: Path):
    """It shows its functions and nothing else, loads without a driver and answers in one line there."""
    path = tmp_path / "libnabla_fast_cuda.so"
    make = ["make", "-s", "-j2", "-f", "csrc/cuda/library.mk", "TARGETS=90"]
    run(*make, f"LIBRARY={path}", f"BUILD={tmp_path}/objects", cwd=ROOT)
    shown = {line.split()[-1] for line in run("nm", "-D", "--defined-only", path).splitlines()}
    declared = set(re.findall(r"\b(nabla_fast_cuda_\w+)\(", HEADER.read_text()))
    assert shown == declared | {"nabla_fast_abi_version", "nabla_fast_status_string"}
    library = ctypes.CDLL(str(path))
    assert library.nabla_fast_abi_version() == nabla_fast._native.ABI_VERSION
    library.nabla_fast_status_string.restype = ctypes.c_char_p
    library.nabla_fast_cuda_why_no_device.restype = ctypes.c_char_p
    reason = library.nabla_fast_cuda_why_no_device()
    assert reason is None or b"\n" not in reason
    refused = 64  # NABLA_FAST_DEVICE_REFUSED
    assert b"device" in library.nabla_fast_status_string(refused)
