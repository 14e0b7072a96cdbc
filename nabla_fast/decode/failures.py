"""Errors of a decode with the prompts they concern."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class DecodeFailure(Exception):
    """An error in a decode; the error itself is ``__cause__``.

    Attributes:
        problems: indices of the problem it concerns or, where nobody can tell, of those decoded together.
    """

    def __init__(self, problems: Sequence[int]):
        self.problems = list(problems)
        super().__init__(f"problems {self.problems}")


class RequestFailure(Exception):
    """An error in the answer to one request of a batch; the error itself is ``__cause__``."""

    def __init__(self, request: object):
        self.request = request
        super().__init__(type(request).__name__)


def without_locals(error: Exception) -> Exception:
    """The error, without what its frames hold: tensors. The frame that caught it is left alone."""
    caught = error.__traceback__
    traceback.clear_frames(caught and caught.tb_next)
    return error


@contextmanager
def attributed_to(request: object) -> Iterator[None]:
    """Errors inside concern this request and no other of its batch."""
    try:
        yield
    except Exception as error:
        raise RequestFailure(request) from error
