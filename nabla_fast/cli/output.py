"""Output that commands share: lines on standard error, tables on standard output."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def say(message: object) -> None:
    """Print one line on standard error."""
    print(f"nabla-fast: {message}", file=sys.stderr, flush=True)


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
