"""Reading one vocabulary through another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_fast.errors import InputError
from nabla_fast.models.tables import TokenTable

_WORD = "x"
_ROLES = ("eos_token_id", "bos_token_id", "pad_token_id", "unk_token_id")


@dataclass(frozen=True)
class VocabularyAlignment:
    """Which token of a reward model stands for each token of the LM.

    Attributes:
        token_map: [V] int64 on the CPU, the reward model's id of LM token v; None is the identity.
        coverage: share of the LM's tokens that have a counterpart of their own; the others are read
            as one fallback token.
    """

    token_map: Tensor | None
    coverage: float = 1.0

    @classmethod
    def identity(cls) -> VocabularyAlignment:
        """One vocabulary shared by both models."""
        return cls(None)

    @classmethod
    def truncated(cls, vocabulary: int) -> VocabularyAlignment:
        """One vocabulary of V tokens, where the reward model's table has more rows (padding, say)."""
        return cls(torch.arange(vocabulary, device="cpu"))

    @classmethod
    def from_tokenizers(
        cls,
        tokenizer: Any,
        reward_tokenizer: Any,
        *,
        vocabulary: int | None = None,
        fallback_id: int | None = None,
        minimum_coverage: float = 0.95,
    ) -> VocabularyAlignment:
        """Match tokens by role (EOS, BOS, padding, unknown), then by decoded text, then by spelling.

        The text of a token is what it adds after a word: a leading space counts.

        Args:
            tokenizer: the LM's.
            reward_tokenizer: the reward model's.
            vocabulary: V of the LM, where its tables have more rows than the tokenizer has tokens;
                those rows count neither for nor against the coverage.
            fallback_id: what the reward model reads for a token without a counterpart; by default
                its unknown token.
            minimum_coverage: refuse below this share.
        Raises:
            InputError: one is no tokenizer, the coverage is too low, or tokens are left over and there is
                no fallback.
        """
        expect_tokenizer("tokenizer", tokenizer, "get_vocab")
        expect_tokenizer("reward_tokenizer", reward_tokenizer, "get_vocab")
        own, theirs = tokenizer.get_vocab(), reward_tokenizer.get_vocab()
        by_text = _unambiguous_texts(reward_tokenizer, theirs)
        size = max(vocabulary or 0, max(own.values()) + 1)
        mapped = torch.full((size,), -1, dtype=torch.int64, device="cpu")
        for token, index in own.items():
            mapped[index] = by_text.get(_text(tokenizer, token), theirs.get(token, -1))
        by_role: set[int] = set()
        for role in _ROLES:
            left, right = getattr(tokenizer, role, None), getattr(reward_tokenizer, role, None)
            # One token may have several roles (padding is often EOS): the first one named counts.
            if left is not None and right is not None and left not in by_role:
                by_role.add(left)
                mapped[left] = right
        covered = int((mapped[list(own.values())] >= 0).sum())
        coverage = covered / len(own)
        if coverage < minimum_coverage:
            raise InputError(
                f"the reward model's vocabulary covers {covered} of the LM's {len(own)} tokens "
                f"({coverage:.1%}), below the minimum of {minimum_coverage:.1%}"
            )
        fallback = fallback_id if fallback_id is not None else reward_tokenizer.unk_token_id
        missing = mapped < 0
        if bool(missing.any()):
            if fallback is None:
                raise InputError(
                    f"{int(missing.sum())} tokens of the LM have no counterpart and the reward tokenizer "
                    "has no unknown token: pass fallback_id"
                )
            mapped[missing] = fallback
        return cls(mapped, coverage)

    def through(self, table: Tensor) -> TokenTable:
        """The reward model's table [V_r, H_r] read through the LM's vocabulary; no copy of it.

        Raises:
            InputError: the map names rows that the table does not have.
        """
        if self.token_map is None:
            return TokenTable(table)
        low, high = int(self.token_map.min()), int(self.token_map.max())
        if low < 0 or high >= table.shape[0]:
            raise InputError(
                f"the alignment names token {high if low >= 0 else low}, "
                f"but the reward model has {table.shape[0]} tokens"
            )
        if bool((self.token_map == torch.arange(len(self.token_map), device=self.token_map.device)).all()):
            return TokenTable(table[: self.token_map.shape[0]])
        return TokenTable(table, self.token_map.to(table.device))


def expect_tokenizer(name: str, tokenizer: Any, method: str) -> None:
    """Raise InputError unless there is a method of tokenizers that will be used."""
    if not callable(getattr(tokenizer, method, None)):
        raise InputError(
            f"{name} must be a transformers tokenizer, got {type(tokenizer).__name__}, "
            f"which has no {method}()"
        )


def _text(tokenizer: Any, token: str) -> str:
    """The text that a token adds after a word; alone, it might lose a leading space."""
    before = tokenizer.convert_tokens_to_string([_WORD])
    text = tokenizer.convert_tokens_to_string([_WORD, token])
    return text.removeprefix(before) if text.startswith(before) else ""


def _unambiguous_texts(tokenizer: Any, vocabulary: dict[str, int]) -> dict[str, int]:
    """Decoded text → id, for texts that one token alone has and that are not broken bytes."""
    found: dict[str, int] = {}
    for token, index in vocabulary.items():
        text = _text(tokenizer, token)
        found[text] = -1 if text in found or "\N{REPLACEMENT CHARACTER}" in text or not text else index
    return {text: index for text, index in found.items() if index >= 0}
