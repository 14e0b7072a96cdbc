"""Lines on standard error: errors and warnings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


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
