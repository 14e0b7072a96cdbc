"""Reading suffixes behind copies of a model's own caches, in batches that the model allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nabla_fast.models.backbone import Forward, backbone
from nabla_fast.models.cache_layout import CacheLayout
from nabla_fast.models.cache_passes import CachePasses, Manner
from nabla_fast.models.cache_sequences import SPACING, CachedRows, CachedSequence, CachePool

# Rows of any lengths can be one batch; rows of one length; none but each alone.
Rows = Literal["any", "alike", "alone"]


class CacheReading:
    """Reads suffixes of sequences of one model.

    Args:
        model: a transformers model with a backbone.
        manner: how it reads behind a cache.
        rows: which of them can be one batch.
        layout: of its caches; None: it is found by reading ``ids``.
        ids: token ids.
    Raises:
        TypeError: the model's forward does not take what is passed.
        UnreadableCache: the caches have a layout that is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        manner: Manner,
        rows: Rows,
        layout: CacheLayout | None = None,
        ids: Sequence[int] = (),
    ):
        self.manner, self.rows = manner, rows
        self._passes, self._whole = CachePasses(model, manner), Forward(backbone(model))
        self.device = model.get_input_embeddings().weight.device
        if layout is None:
            with torch.no_grad():
                layout = self._passes.layout(ids, self.device)
        self.layout = layout
        self._passes.masks = layout.grows
        if rows == "any" and (layout.counts or (layout.grows and not self._passes.takes_mask)):
            raise TypeError("rows of several lengths cannot be told apart")

    def pool(self, limit: int | None = None, spacing: int = SPACING) -> CachePool:
        """A pool for sequences; arguments as of :class:`CachePool`."""
        return CachePool(self.layout, limit, spacing)

    def read(
        self,
        sequences: Sequence[CachedSequence],
        lengths: Sequence[int],
        *,
        ids: Tensor | None = None,
        embeddings: Tensor | None = None,
        store: bool = False,
    ) -> Tensor:
        """As of :meth:`nabla_fast.models.cache_reader.CacheReader.read`."""
        given = ids if ids is not None else embeddings
        if store:
            needed = sum(
                sequence.length + count for sequence, count in zip(sequences, lengths, strict=True)
            )
            sequences[0].pool.expect_room(needed)
        found: list[Tensor | None] = [None] * len(sequences)
        for rows in self._batches(sequences, lengths, store):
            width = max(lengths[n] for n in rows)
            part = given[:, :width] if len(rows) == len(sequences) else given[rows, :width]
            states = self._read_batch(
                [sequences[n] for n in rows],
                [lengths[n] for n in rows],
                ids=None if ids is None else part,
                embeddings=None if ids is not None else part,
                store=store,
            )
            if len(rows) == len(sequences) and width == given.shape[1]:
                return states
            for n, row in zip(rows, states, strict=True):
                found[n] = F.pad(row, (0, 0, 0, given.shape[1] - width))
        nothing = torch.zeros_like(next(row for row in found if row is not None))
        return torch.stack([nothing if row is None else row for row in found])

    def _batches(
        self, sequences: Sequence[CachedSequence], lengths: Sequence[int], store: bool
    ) -> Iterator[list[int]]:
        """Rows that can be read as one batch."""
        batches: dict[tuple, list[int]] = {}
        for n, (sequence, count) in enumerate(zip(sequences, lengths, strict=True)):
            if not count:
                continue
            # What stands right of a row's tokens would become part of a state.
            key = (count,) if store and not self.layout.croppable else ()
            if self.rows == "alone":
                key += (n,)
            else:
                key += (sequence.length if self.rows == "alike" else sequence.length > 0,)
            batches.setdefault(key, []).append(n)
        yield from batches.values()

    def _read_batch(
        self,
        sequences: Sequence[CachedSequence],
        lengths: Sequence[int],
        *,
        ids: Tensor | None,
        embeddings: Tensor | None,
        store: bool,
    ) -> Tensor:
        starts, width = [sequence.length for sequence in sequences], max(lengths)
        if not store and not max(starts):
            return self._whole.states(input_ids=ids, inputs_embeds=embeddings, use_cache=False)
        cache = self.layout.joined([sequence.part for sequence in sequences]) if max(starts) else None
        if not store:
            if width == 1 and embeddings is not None and embeddings.requires_grad:
                # A pass over one token writes into states that the backward needs, one over two does not.
                embeddings = F.pad(embeddings, (0, 0, 0, 1))
            return self._passes.read(cache, starts, lengths, ids=ids, embeddings=embeddings)[0][:, :width]
        states = []
        for piece in self._pieces(width, sequences[0].pool.spacing):
            part, cache = self._passes.read(
                cache,
                [start + piece.start for start in starts],
                [max(0, min(piece.stop, count) - piece.start) for count in lengths],
                ids=None if ids is None else ids[:, piece],
                embeddings=None if embeddings is None else embeddings[:, piece],
            )
            states.append(part)
            self._keep(cache, sequences, starts, [min(piece.stop, count) for count in lengths], piece.stop)
            if piece.stop < width:
                cache = self.layout.joined([sequence.part for sequence in sequences])
        return states[0] if len(states) == 1 else torch.cat(states, dim=1)

    def _pieces(self, width: int, spacing: int) -> list[slice]:
        """Columns of a suffix that one pass reads, so that the state after it can be remembered."""
        if self.layout.croppable or not self.manner.several:
            return [slice(0, width)]
        return [slice(n, min(n + spacing, width)) for n in range(0, width, spacing)]

    def _keep(
        self,
        cache: object,
        sequences: Sequence[CachedSequence],
        starts: Sequence[int],
        counts: Sequence[int],
        columns: int,
    ) -> None:
        """Have sequences be the rows of a cache, after so many tokens of their suffixes."""
        longest, former = max(starts), {sequence.rows for sequence in sequences} - {None}
        rows = sequences[0].pool.hold(CachedRows(cache, len(sequences), longest + columns))
        for n, (sequence, start, count) in enumerate(zip(sequences, starts, counts, strict=True)):
            sequence.go_on(rows, n, longest - start, start + count)
        for left in former:
            left.shrink()
