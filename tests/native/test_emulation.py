"""The arithmetic units in software that `make emulate` and `make sanitize` compute with."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{TESTS}"]
NO_UNIT = 77  # exit status of compare

# What each misuse of the matrix unit is told; the names are misuse.cpp's.
LINES = {
    "load before a configuration": "loadd: tile used while no configuration is loaded (0)",
    "store after a release": "stored: tile used while no configuration is loaded (0)",
    "product after a release": "dpbf16ps: tile used while no configuration is loaded (0)",
    "no release": "loadconfig: the last user has not released the unit (1)",
    "palette": "loadconfig: the palette is not 1 (2)",
    "start row": "loadconfig: the first row is not 0 (1)",
    "reserved byte": "loadconfig: a reserved byte is set (1)",
    "ninth tile": "loadconfig: a reserved byte is set (1)",
    "rows": "loadconfig: a tile has more than 16 rows (17)",
    "row bytes": "loadconfig: a row of a tile has more than 64 bytes (65)",
    "rows of no bytes": "loadconfig: a tile has rows of no bytes, or no rows (0)",
    "tile left out": "loadd: tile used that the configuration leaves out (7)",
    "no such tile": "loadd: there is no such tile (8)",
    "same tile twice": "dpbf16ps: two of the three tiles are the same (0)",
    "rows of the left factor": "dpbf16ps: the left factor has other rows than the sum (5)",
    "rows of the right factor": "dpbf16ps: the right factor has other rows than the left has pairs (2)",
    "columns": "dpbf16ps: the right factor has other columns than the sum (2)",
}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory):
    """Path of a program of tests/emulation/, by name."""
    compiler = shutil.which("g++") or pytest.skip("needs g++")

    def build(name: str) -> Path:
        program = tmp_path_factory.mktemp("emulation") / name
        sources = [TESTS / "emulation" / f"{part}.cpp" for part in ("units", name)]
        subprocess.run([compiler, *FLAGS, *sources, "-o", program], check=True)
        return program

    return build


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


def test_units_have_the_bits_of_the_cpu(build):
    program = build("compare")
    for seed in (1, 2):
        result = run(program, seed, 300)
        if result.returncode == NO_UNIT:
            pytest.skip(result.stdout.strip())
        assert result.returncode == 0, result.stdout


def test_misuse_ends_the_process_with_one_line(build):
    program = build("misuse")
    assert run(program).stdout.splitlines() == list(LINES)
    for name, line in LINES.items():
        result = run(program, name)
        assert result.returncode == -signal.SIGABRT, name
        assert result.stderr == f"emulated matrix unit: {line}\n"
