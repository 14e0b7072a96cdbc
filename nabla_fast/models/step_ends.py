"""Where the steps of a response end: at separators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nabla_fast.errors import InputError


@dataclass(frozen=True)
class StepEnds:
    """Tokens that end a step.

    Attributes:
        tokens: ids each of which ends one.
        spelled: ids that do so one after another; empty: none.
    """

    tokens: frozenset[int]
    spelled: tuple[int, ...] = ()

    @classmethod
    def of_separator(cls, separator: int | str, tokenizer: Any, vocabulary: int) -> StepEnds:
        """The ends that a separator makes.

        Args:
            separator: a token id, or a text: tokens whose text ends with it, and the tokens that spell it.
            tokenizer: of the reward; needed for a text alone.
            vocabulary: tokens of the reward model.
        Raises:
            InputError: the separator is no token or text of that vocabulary.
        """
        if isinstance(separator, int):
            if not 0 <= separator < vocabulary:
                raise InputError(
                    f"separator {separator} is outside the reward model's vocabulary of {vocabulary}"
                )
            return cls(frozenset([separator]))
        if tokenizer is None:
            raise InputError(
                f"separator {separator!r} is text: pass a tokenizer, or the separator's token id"
            )
        ids = [n for n in sorted(set(tokenizer.get_vocab().values())) if n < vocabulary]
        special = set(getattr(tokenizer, "all_special_ids", ()))
        texts = (tokenizer.decode([n]) for n in ids)
        ending = frozenset(
            n
            for n, text in zip(ids, texts, strict=True)
            if text == separator or (n not in special and text.endswith(separator))
        )
        spelled = tuple(tokenizer(separator, add_special_tokens=False).input_ids)
        unknown = getattr(tokenizer, "unk_token_id", None)
        if unknown in spelled or any(n >= vocabulary for n in spelled):
            spelled = ()
        if not ending and not spelled:
            raise InputError(f"the reward tokenizer has no tokens for the separator {separator!r}")
        return cls(ending, spelled)

    def of(self, response: Sequence[int]) -> list[int]:
        """Positions in a response of at least one token, ascending; its own end is one.

        The last token ends a step too, as the last step may have no separator, unless it alone (an EOS,
        say) follows one.
        """
        ends = [n for n in range(len(response)) if self._ends(response, n)]
        if not ends or len(response) - 1 - ends[-1] > 1:
            ends.append(len(response) - 1)
        return ends

    def _ends(self, response: Sequence[int], n: int) -> bool:
        if response[n] in self.tokens:
            return True
        start = n + 1 - len(self.spelled)
        return bool(self.spelled) and start >= 0 and tuple(response[start : n + 1]) == self.spelled
