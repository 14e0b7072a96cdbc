"""Prompts from a file of JSON lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from nabla_fast.errors import InputError, one_line


def read_prompts(name: str) -> list[Any]:
    """The prompts of a file: a JSON value a line, or an object with one as "prompt".

    Args:
        name: of a file in UTF-8, with or without a byte order mark, or "-" for standard input. Empty
            lines do not count.
    Raises:
        InputError: the file cannot be read, a line is not JSON or has no prompt, or there is none.
    """
    shown = "standard input" if name == "-" else name
    prompts = []
    for number, line in enumerate(_text(name, shown).split("\n"), start=1):
        # Not splitlines: JSON strings may hold the other line separators of Unicode.
        if not line.strip():
            continue
        value = _json(line, f"{shown}, line {number}")
        if isinstance(value, dict):
            if "prompt" not in value:
                raise InputError(f"{shown}, line {number}: the object has no 'prompt'")
            value = value["prompt"]
        prompts.append(value)
    if not prompts:
        raise InputError(f"{shown}: no prompts")
    return prompts


def _text(name: str, shown: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{shown}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise InputError(f"{shown}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown}: not UTF-8: {error}") from error


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    except RecursionError as error:
        raise InputError(f"{where}: the JSON is nested too deeply") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise InputError(f"{where}: {one_line(error)}") from error
