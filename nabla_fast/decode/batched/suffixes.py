"""Suffixes of embeddings of many requests, read as one batch behind what is frozen of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nabla_fast.models.readers import FrozenSequence, SuffixReader


def suffix_states(
    reader: SuffixReader,
    table: Tensor,
    bases: Sequence[FrozenSequence],
    before: Sequence[Sequence[int]],
    suffixes: Sequence[Tensor],
    frozen: Sequence[int],
) -> tuple[list[Tensor], list[int]]:
    """Hidden states of embeddings that follow tokens.

    Args:
        table: [V, H], embeddings of the tokens.
        bases: sequences that begin with the tokens.
        before: the model's tokens before each suffix.
        suffixes: [L, H] each.
        frozen: how many tokens of each may be left to its base; as not every reader can begin at any token,
            fewer may be.
    Returns:
        States [n, H] of all that was read of each, which ends with its suffix; and the positions at which
        they begin.
    """
    prefixes = [base.prefix(count) for base, count in zip(bases, frozen, strict=True)]
    missing = [
        torch.tensor(ids[prefix.length :], dtype=torch.int64, device=table.device)
        for prefix, ids in zip(prefixes, before, strict=True)
    ]
    read = [
        torch.cat([table[ids], suffix]) if len(ids) else suffix
        for ids, suffix in zip(missing, suffixes, strict=True)
    ]
    starts, lengths = [prefix.length for prefix in prefixes], list(map(len, read))
    states = reader.read(prefixes, lengths, embeddings=pad_sequence(read, batch_first=True))
    return [part[:length] for part, length in zip(states, lengths, strict=True)], starts
