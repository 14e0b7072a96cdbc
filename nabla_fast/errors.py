"""The errors a caller may want to catch, each a subclass of the builtin it refines."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nabla_fast.results import Result


def one_line(error: BaseException) -> str:
    """An error's message without line breaks; its kind where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


class InputError(ValueError):
    """An argument is wrong: the message says what was given, what was expected, and where."""


class ModelError(ValueError):
    """A model or tokenizer cannot be used: the message names the feature that stands in the way."""


class BackendUnavailable(RuntimeError):
    """A backend was asked for that this installation or this input does not have."""


class RowError(ValueError):
    """Some rows given to an op hold NaN or +inf, or nothing but -inf.

    Attributes:
        op: the op's name.
        rows: ``(row, reason)`` for every bad row.
    """

    def __init__(self, op: str, rows: list[tuple[int, str]]):
        self.op = op
        self.rows = rows
        shown = ", ".join(f"row {row} {reason}" for row, reason in rows[:4])
        more = f" and {len(rows) - 4} more rows" if len(rows) > 4 else ""
        super().__init__(f"{op}: {shown}{more}")

    def __reduce__(self) -> tuple:
        return type(self), (self.op, self.rows)


class DecodingInterrupted(KeyboardInterrupt):
    """Ctrl-C during a decode.

    Attributes:
        results: one entry a prompt, in order: its result, or None where it was not finished.
    """

    def __init__(self, results: list[Result | None]):
        self.results = results
        finished = sum(result is not None for result in results)
        super().__init__(f"interrupted: {finished} of {len(results)} prompts finished")

    def __reduce__(self) -> tuple:
        return type(self), (self.results,)


class DecodingFailed(RuntimeError):
    """An error during a decode; the error itself is ``__cause__``.

    Attributes:
        prompt: index of the first prompt that was not finished.
        results: one entry a prompt, in order: its result, or None where it was not finished.
    """

    def __init__(self, prompt: int, results: list[Result | None], cause: Exception):
        self.prompt = prompt
        self.results = results
        self._cause = cause
        finished = sum(result is not None for result in results)
        super().__init__(
            f"prompt {prompt}: {one_line(cause)} ({finished} of {len(results)} prompts finished)"
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.prompt, self.results, self._cause)
