"""Stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nabla_fast.decode.special_tokens import special_ids
from nabla_fast.errors import InputError


class StopStrings:
    """Strings that end a response once its decoded text contains one.

    Text is decoded without special tokens, as results are; for a string that has a special token's text in
    it ("<|im_end|>", say), with them.

    Attributes:
        trim: whether a result ends before the stop string.
    """

    def __init__(self, strings: Sequence[str] = (), tokenizer: Any = None, *, trim: bool = False):
        """
        Raises:
            InputError: a stop string is empty, or there is no tokenizer to decode with.
        """
        if not isinstance(trim, bool):
            raise InputError(f"trim_stop must be True or False, got {trim!r}")
        self.trim = trim
        if isinstance(strings, str):
            strings = (strings,)
        if not isinstance(strings, Sequence) or any(not isinstance(s, str) or not s for s in strings):
            raise InputError(f"stop must be a list of strings that are not empty, got {strings!r}")
        if strings and tokenizer is None:
            raise InputError("stop strings need a tokenizer")
        special = special_ids(tokenizer) if strings else ()
        with_special = tuple(s for s in strings if any(text in s for text in special))
        plain = tuple(s for s in strings if s not in with_special)
        # Strings by whether special tokens are left out of the text they are looked for in.
        self._strings = {skip: group for skip, group in ((True, plain), (False, with_special)) if group}
        self._tokenizer = tokenizer

    def completed_by_last(self, response: Sequence[int]) -> bool:
        """Whether the last token of ``response`` completes a stop string that was not there before."""
        return bool(self._completed(response))

    def _completed(self, response: Sequence[int]) -> dict[bool, int]:
        """Where the first string begins that the last token completes, in characters of either text.

        Returns:
            The places by whether special tokens are left out of the text; no entry where none is completed.
        """
        found: dict[bool, int] = {}
        for skip, strings in self._strings.items():
            text, before = self._decode(response, skip), self._decode(response[:-1], skip)
            counts = {string: before.count(string) for string in strings}
            places = [_place(text, s, n) for s, n in counts.items() if text.count(s) > n]
            if places:
                found[skip] = min(places)
        return found

    def trimmed(self, response: Sequence[int]) -> tuple[list[int], str]:
        """A response without the stop string that its last token completes.

        Returns:
            The first tokens, as many as end before the string begins. And the text up to the string, which
            goes on where that begins inside a token; for a string with a special token's text in it the
            text of these tokens.
        """
        kept, completed = len(response), self._completed(response)
        for skip, place in completed.items():
            while kept and len(self._decode(response[:kept], skip)) > place:
                kept -= 1
        tokens = list(response[:kept])
        if False in completed:
            return tokens, self._decode(tokens, True)
        return tokens, self._decode(response, True)[: completed[True]]

    def _decode(self, ids: Sequence[int], skip: bool) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip)


def _place(text: str, string: str, count: int) -> int:
    """Where a string begins for the first time after ``count`` times."""
    place = text.find(string)
    for _ in range(count):
        place = text.find(string, place + len(string))
    return place
