"""Types of the public face, as mypy sees them in a program that uses the package."""

from __future__ import annotations

import importlib.resources
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "typed"


def checked(name: str, cache: Path) -> list[str]:
    """mypy's lines on a program, under --strict."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", cache]
    found = subprocess.run(
        [*command, PROGRAMS / name], capture_output=True, text=True, timeout=600, check=False
    )
    assert not found.stderr, found.stderr
    return found.stdout.splitlines()


def test_types_are_shipped():
    assert (importlib.resources.files("nabla_fast") / "py.typed").is_file()


def test_programs_that_are_right_and_wrong(tmp_path: Path):
    assert checked("right.py", tmp_path)[-1].startswith("Success"), checked("right.py", tmp_path)
    errors = [line for line in checked("wrong.py", tmp_path) if ": error: " in line]
    said = [
        'Unexpected keyword argument "temperature" for "__call__" of "Op"',
        'Unexpected keyword argument "iterations" for "DTOConfig"',
        'Argument "parameter" to "DTOConfig" has incompatible type',
        'Unexpected keyword argument "max_tokens" for "generate" of "NablaDecoder"',
    ]
    assert len(errors) == len(said)
    assert all(text in line for text, line in zip(said, errors, strict=True)), errors
