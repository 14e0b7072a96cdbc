"""Which prompts an error in a decode concerns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Struck(Exception):
    """An error in a decode; the error itself is ``__cause__``.

    Attributes:
        problems: indices of the problem it concerns or, where nobody can tell, of those decoded together.
    """

    def __init__(self, problems: Sequence[int]):
        self.problems = list(problems)
        super().__init__(f"problems {self.problems}")


class RequestFailed(Exception):
    """An error in the answer to one request of a batch; the error itself is ``__cause__``."""

    def __init__(self, request: object):
        self.request = request
        super().__init__(type(request).__name__)


@contextmanager
def concerning(request: object) -> Iterator[None]:
    """What goes wrong inside concerns this request and no other of its batch."""
    try:
        yield
    except Exception as error:
        raise RequestFailed(request) from error
