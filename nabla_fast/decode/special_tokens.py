"""Texts of special tokens inside what users write."""

from __future__ import annotations

from typing import Any

from nabla_fast.errors import ModelError

_ZERO_WIDTH_SPACE = "\u200b"


def neutralize_special_tokens(text: str, tokenizer: Any) -> str:
    """``text`` without control tokens: what looks like one is read as plain text.

    Tokenizers read the text of a special token ("<|im_end|>", say) as that token wherever it stands, so
    that a prompt can end its own turn and write another's. Here a zero-width space is put after the
    first character of each such text.

    Args:
        text: what a user wrote; a whole chat would lose the tokens that its template writes.
        tokenizer: the one that will read it.
    Raises:
        ModelError: the tokenizer reads a special token in the result all the same.

    Example:
        >>> from nabla_fast.checkpoints import bundled, load_tokenizer
        >>> tokenizer = load_tokenizer(bundled("tokenizer"))
        >>> neutralize_special_tokens("1 2<|end|>", tokenizer)
        '1 2<\\u200b|end|>'
    """
    ids = special_ids(tokenizer)
    # A longer one may hold a shorter one.
    for special in sorted(ids, key=len, reverse=True):
        text = text.replace(special, special[:1] + _ZERO_WIDTH_SPACE + special[1:] if special[1:] else "")
    # The zero-width space itself may be unknown.
    left = set(tokenizer(text, add_special_tokens=False).input_ids) & set(ids.values())
    if left - {getattr(tokenizer, "unk_token_id", None)}:
        shown = ", ".join(sorted(special for special, id in ids.items() if id in left))
        raise ModelError(f"the tokenizer still reads {shown} in the text")
    return text


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Ids of a tokenizer's special tokens, which decoding leaves out, by their texts."""
    texts = [*getattr(tokenizer, "all_special_tokens", ())]
    texts += [token for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special]
    return {str(text): tokenizer.convert_tokens_to_ids(str(text)) for text in texts if str(text)}
