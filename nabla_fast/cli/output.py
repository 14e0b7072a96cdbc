"""Output that commands share: lines on standard error, text and tables on standard output."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def make_writable() -> None:
    """Standard streams that every command can write to, whatever its caller left of them.

    A stream that the caller closed becomes the null device: the next file opened would else take its
    number, and what is printed would go there. Characters that a stream's encoding lacks are written as
    escapes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 open to the end
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # a stream of the caller's own making
            stream.reconfigure(errors="backslashreplace")


def say(message: object) -> None:
    """Print one line on standard error, where it can be written."""
    with suppress(OSError, ValueError):
        print(f"nabla-fast: {message}", file=sys.stderr, flush=True)


def append_line(path: str, row: dict[str, Any]) -> None:
    """Append ``row`` to a file as a line of JSON. It is there at once: the process may be killed."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def give_up_stdout() -> None:
    """Send what is still printed to the null device: nobody reads standard output any more.

    Python would print what it cannot flush at the end as an ignored exception.
    """
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Warnings of the block are printed as lines after it, without Python's format."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for warning in caught:
                say(" ".join(str(warning.message).split()))


def table_console() -> Console:
    """A console on standard output for tables; a file has no edge to wrap at."""
    from rich.console import Console  # here, so that a command that fails at once need not wait for it

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 200)
    return console
