"""Stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nabla_fast.errors import InputError


class StopStrings:
    """Strings that end a response once its decoded text contains one."""

    def __init__(self, strings: Sequence[str] = (), tokenizer: Any = None):
        """
        Raises:
            InputError: a stop string is empty, or there is no tokenizer to decode with.
        """
        if isinstance(strings, str):
            strings = (strings,)
        if not isinstance(strings, Sequence) or any(not isinstance(s, str) or not s for s in strings):
            raise InputError(f"stop must be a list of strings that are not empty, got {strings!r}")
        if strings and tokenizer is None:
            raise InputError("stop strings need a tokenizer")
        self._strings = tuple(strings)
        self._tokenizer = tokenizer

    def completed_by_last(self, response: Sequence[int]) -> bool:
        """Whether the last token of ``response`` completes a stop string that was not there before."""
        if not self._strings:
            return False
        text, before = self._decode(response), self._decode(response[:-1])
        return any(text.count(string) > before.count(string) for string in self._strings)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)
