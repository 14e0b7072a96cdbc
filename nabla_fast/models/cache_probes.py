"""Whether a model reads behind its cache what it reads in one pass over everything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nabla_fast.models.backbone import Forward, backbone
from nabla_fast.models.cache_reading import CacheReading
from nabla_fast.models.probes import close
from nabla_fast.models.reader import padded_ids


@torch.no_grad()
def whole_states(model: nn.Module, ids: Sequence[list[int]], device: torch.device) -> list[Tensor]:
    """States [S, H] of sequences that are read at once and alone."""
    forward = Forward(backbone(model))
    return [forward.states(input_ids=torch.tensor([row], device=device), use_cache=False)[0] for row in ids]


@torch.no_grad()
def reads_right(reading: CacheReading, ids: Sequence[list[int]], expected: Sequence[Tensor]) -> bool:
    """Whether sequences that are read together, in pieces, along forks and after cuts have these states.

    Args:
        ids: three sequences; the last one may be shorter.
        expected: [S, H] each.
    """
    found = _in_pieces(reading, ids)
    return all(close(ours, theirs, theirs.dtype) for ours, theirs in zip(found, expected, strict=True))


def _in_pieces(reading: CacheReading, ids: Sequence[list[int]]) -> list[Tensor]:
    pool = reading.pool(spacing=4)
    sequences, unread = [pool.sequence() for _ in ids], [list(row) for row in ids]
    found: list[list[Tensor]] = [[] for _ in ids]

    def read(counts: Sequence[int]) -> None:
        parts = [row[:count] for row, count in zip(unread, counts, strict=True)]
        states = reading.read(sequences, counts, ids=padded_ids(parts, reading.device), store=True)
        for n, count in enumerate(counts):
            found[n].append(states[n, :count])
            unread[n] = unread[n][count:]

    read([max(1, len(row) // 3) for row in ids])
    read([1] * len(ids))
    for _ in range(2):
        counts = [1, 2, 1] if min(map(len, unread)) > 2 else [min(1, len(row)) for row in unread]
        if any(counts):
            read(counts)
    # A fork reads other tokens first: the sequence that it comes from must not notice.
    fork = sequences[0].fork(sequences[0].length - 1)
    others = torch.tensor([ids[1][fork.length :]], dtype=torch.int64, device=reading.device)
    reading.read([fork], [others.shape[1]], ids=others, store=True)
    sequences[0].truncate(sequences[0].length - 1)
    sequences[1] = sequences[1].fork(sequences[1].length - 1)
    for n in (0, 1):
        length = sequences[n].length
        found[n], unread[n] = [torch.cat(found[n])[:length]], list(ids[n][length:])
    read([len(row) for row in unread])
    return [torch.cat(parts) for parts in found]


def gives_gradients(reading: CacheReading, model: nn.Module, ids: Sequence[list[int]]) -> bool:
    """Whether gradients of suffixes behind a cache are those of a pass over everything.

    Args:
        model: the one that is read.
        ids: three sequences.
    """
    if not reading.manner.several:
        return False
    try:
        found, expected = _gradients(reading, model, ids)
    except Exception:  # whatever a cache does to autograd: passes over everything are left
        return False
    return all(close(*pair, pair[1].dtype) for pair in zip(found, expected, strict=True))


@torch.no_grad()
def _gradients(
    reading: CacheReading, model: nn.Module, ids: Sequence[list[int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of suffixes, read together behind their prefixes; and by passes over everything."""
    table, pool = model.get_input_embeddings(), reading.pool(spacing=4)
    rows = [torch.tensor(row, dtype=torch.int64, device=reading.device) for row in ids]
    # Of one length, of another, and a suffix of one token.
    cuts = [len(rows[0]) // 2, len(rows[1]) // 2 + 1, len(rows[2]) - 1]
    sequences = [pool.sequence() for _ in ids]
    for sequence, row, cut in zip(sequences, rows, cuts, strict=True):
        reading.read([sequence], [cut], ids=row[None, :cut], store=True)
    generator, whole = torch.Generator().manual_seed(0), Forward(backbone(model))
    found, expected = [], []
    for several in ([0, 1], [2]):
        suffixes = [table(rows[n][cuts[n] :]).detach().requires_grad_() for n in several]
        lengths = list(map(len, suffixes))
        with torch.enable_grad():
            batch = nn.utils.rnn.pad_sequence(suffixes, batch_first=True)
            states = reading.read([sequences[n] for n in several], lengths, embeddings=batch)
            parts = [part[:count] for part, count in zip(states, lengths, strict=True)]
        weights = [
            torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part) for part in parts
        ]
        found += torch.autograd.grad(parts, suffixes, weights)
        for n, suffix, weight in zip(several, suffixes, weights, strict=True):
            with torch.enable_grad():
                own = suffix.detach().requires_grad_()
                everything = torch.cat([table(rows[n][: cuts[n]]).detach(), own])[None]
                full = whole.states(inputs_embeds=everything, use_cache=False)[0, cuts[n] :]
            expected += torch.autograd.grad(full, own, weight)
    return found, expected
