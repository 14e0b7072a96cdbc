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
    """

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
        special = special_ids(tokenizer) if strings else ()
        with_special = tuple(s for s in strings if any(text in s for text in special))
        plain = tuple(s for s in strings if s not in with_special)
        # Strings by whether special tokens are left out of the text they are looked for in.
        self._strings = {skip: group for skip, group in ((True, plain), (False, with_special)) if group}
        self._tokenizer = tokenizer

    def completed_by_last(self, response: Sequence[int]) -> bool:
        """Whether the last token of ``response`` completes a stop string that was not there before."""
        for skip, strings in self._strings.items():
            text, before = self._decode(response, skip), self._decode(response[:-1], skip)
            if any(text.count(string) > before.count(string) for string in strings):
                return True
        return False

    def _decode(self, ids: Sequence[int], skip: bool) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip)
