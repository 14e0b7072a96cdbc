"""The errors a caller may want to catch, each a subclass of the builtin it refines."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
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
        super().__init__(f"interrupted: {_finished(results)}")

    def __reduce__(self) -> tuple:
        return type(self), (self.results,)


class DecodingFailed(RuntimeError):
    """An error during a decode; the error itself is ``__cause__``.

    Attributes:
        prompts: indices of the prompts that it struck: the one whose decode failed or, where none of those
            decoded together fails alone, or each of them (memory that ran out, say), all of these.
        results: one entry a prompt, in order: its result, or None where it was not finished. Empty for the
            ``error`` of a :class:`Result`, which is among the results itself.
    """

    def __init__(self, prompts: Sequence[int], results: list[Result | None], cause: Exception):
        self.prompts = tuple(prompts)
        self.results = results
        self._cause = cause
        where = f"prompt {self.prompt}" if self.prompt is not None else _decoded_together(self.prompts)
        count = f" ({_finished(results)})" if results else ""
        super().__init__(f"{where}: {_said(cause)}{count}")

    @property
    def prompt(self) -> int | None:
        """Index of the prompt whose decode failed; None where the error struck several."""
        return self.prompts[0] if len(self.prompts) == 1 else None

    def __reduce__(self) -> tuple:
        return type(self), (self.prompts, self.results, _copied(self._cause))


def _finished(results: Sequence[Result | None]) -> str:
    """As in "2 of 4 prompts finished"; those whose error was kept have not."""
    count = sum(result is not None and result.error is None for result in results)
    return f"{count} of {len(results)} prompts finished"


def _copied(error: Exception) -> Exception:
    """An error to send to another process: itself, or its line where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its own methods, or its arguments', raise
        return RuntimeError(one_line(error))
    return error


def _said(cause: Exception) -> str:
    """An error's line; rows of a batch, which mean nothing to whoever gave prompts, are left out."""
    if isinstance(cause, RowError):
        return f"{cause.op} {' and '.join(dict.fromkeys(reason for _, reason in cause.rows))}"
    return one_line(cause)


def _decoded_together(prompts: Sequence[int]) -> str:
    """As in "prompts 0 to 3, 7 and 9, decoded together"."""
    runs: list[list[int]] = []
    for prompt in sorted(prompts):
        if runs and runs[-1][-1] == prompt - 1:
            runs[-1].append(prompt)
        else:
            runs.append([prompt])
    parts = []
    for run in runs:
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run)
    *some, last = parts
    return f"prompts {', '.join(some) + ' and ' if some else ''}{last}, decoded together"
