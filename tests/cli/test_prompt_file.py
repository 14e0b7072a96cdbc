"""Files of prompts: encodings, what is not JSON, and files that are not there."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nabla_fast.cli.prompt_file import read_prompts
from nabla_fast.errors import InputError


def written(folder: Path, content: bytes) -> str:
    path = folder / "prompts.jsonl"
    path.write_bytes(content)
    return str(path)


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path):
    assert read_prompts(written(tmp_path, '"a"\n"b"\n'.encode("utf-8-sig"))) == ["a", "b"]


def test_lines_end_as_on_windows_too(tmp_path: Path):
    assert read_prompts(written(tmp_path, b'"a"\r\n\r\n{"prompt": [1, 2]}\r\n')) == ["a", [1, 2]]


def test_standard_input_is_a_file_too(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'"a"\n{bad\n')))
    with pytest.raises(InputError, match="standard input, line 2: not JSON"):
        read_prompts("-")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "line 1: the JSON is nested too deeply"),
        (b'{"prompt": ' + b'{"a": ' * 100_000, "line 1: the JSON is nested too deeply"),
        (b'"a"\n[' + b"9" * 5000 + b"]", "line 2: Exceeds the limit"),
        (b"\xff\xfe", "not UTF-8"),
        (b'"a', "line 1: not JSON"),
        (b"", "no prompts"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_line(tmp_path: Path, content: bytes, message: str):
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(written(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for name, message in {
        str(loop): "Too many levels of symbolic links",
        str(tmp_path): "Is a directory",
        str(tmp_path / "none"): "no such file",
        "a\0b": "null",
    }.items():
        with pytest.raises(InputError, match=message):
            read_prompts(name)


def test_half_a_surrogate_pair_is_refused_with_its_prompt(run, tmp_path: Path):
    content = json.dumps("fine") + "\n" + '"half \\ud83c"\n'
    status, out, err = run("generate", "--prompts", written(tmp_path, content.encode()))
    assert (status, out) == (2, "")
    assert err == "nabla-fast: prompt 1: the prompt has '\\ud83c' at character 5, half a surrogate pair\n"
