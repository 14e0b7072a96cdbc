"""Reading a suffix of any transformers decoder whose prefix lies in a cache of the model's own kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nabla_fast.errors import ModelError
from nabla_fast.models.backbone import Forward, backbone
from nabla_fast.models.boundary import probing, struck_in
from nabla_fast.models.cache_layout import CacheLayout
from nabla_fast.models.cache_passes import MANNERS, CachePasses, Manner
from nabla_fast.models.cache_sequences import SPACING, CachedRows, CachedSequence, CachePool
from nabla_fast.models.probes import close, looking_far, probe_ids, probe_length
from nabla_fast.models.replica import returning_names


class CacheReader:
    """Reads suffixes of frozen prefixes by the model's own modules, behind copies of its own caches.

    Keys and values are shared by all that begin alike; recurrent and convolution states are copied where
    sequences part. Sequences of one length are read as one batch.

    Args:
        model: a decoder-only model with a cache.

    Attributes:
        cuts_back: whether sequences can be cut back to any length.
        frozen_gradients: whether gradients behind a prefix are right; else they are taken by passes over
            everything.
    """

    def __init__(self, model: nn.Module):
        """Probe the model on a few tokens.

        Raises:
            ModelError: it reads behind no cache what it reads in one pass.
        """
        self._model = model
        with probing(model, "cannot be read"):
            readable = returning_names(model)
            count = probe_length(model.config.get_text_config())
            ids = [probe_ids(model, n, seed) for seed, n in enumerate((count, count, max(2, count // 2)))]
            self._device = model.get_input_embeddings().weight.device
            probed = list(dict.fromkeys([looking_far(readable, count), readable]))
            expected = [_whole(each, ids, self._device) for each in probed]
        reason = "takes no cache"
        for self._alone, manner in product((False, True), MANNERS):
            try:
                layouts = [self._probe(*pair, ids, manner) for pair in zip(probed, expected, strict=True)]
            except _Differs as error:
                reason = str(error)
                continue
            except TypeError:
                continue
            except Exception as error:
                reason = f"cannot read behind its cache ({struck_in(error, model)})"
                continue
            self._manner, self._layout = manner, layouts[-1]
            break
        else:
            raise ModelError(f"{type(model).__name__} {reason}")
        self.cuts_back = self._layout.croppable
        self.frozen_gradients = all(
            self._gives_gradients(each, ids, layout) for each, layout in zip(probed, layouts, strict=True)
        )
        self.renew()

    @property
    def way(self) -> str:
        """How the model is read, in words."""
        alone = ", one sequence at a time" if self._alone else ""
        kept = "keys and values shared" if self.cuts_back else "states copied where sequences part"
        steps = "" if self._manner.several else ", one token at a time behind it"
        gradients = "" if self.frozen_gradients else "; gradients by passes over everything"
        return f"behind {self._manner.name} ({kept}{steps}{alone}){gradients}"

    def renew(self) -> None:
        """Take the modules again, which may have changed since the last call."""
        self._use(returning_names(self._model), self._manner, self._layout)

    def _use(self, model: nn.Module, manner: Manner, layout: CacheLayout) -> None:
        self._passes, self._whole = CachePasses(model, manner), Forward(backbone(model))
        self._manner, self._layout = manner, layout

    def pool(
        self, blocks: int, block_size: int = 16, limit: int | None = None, spacing: int = SPACING
    ) -> CachePool:
        """A pool for this model's sequences.

        Args:
            blocks: of no use here.
            block_size, limit: the pool may hold ``limit · block_size`` tokens; None for no limit.
            spacing: as of :class:`CachePool`.
        """
        return CachePool(self._layout, None if limit is None else limit * block_size, spacing)

    def read(
        self,
        sequences: Sequence[CachedSequence],
        lengths: Sequence[int],
        *,
        ids: Tensor | None = None,
        embeddings: Tensor | None = None,
        store: bool = False,
    ) -> Tensor:
        """Final hidden states of suffixes that continue sequences of one pool.

        Gradients reach ``embeddings`` and stop at the prefixes.

        Args:
            sequences: B prefixes; none may stand twice if ``store``.
            lengths: tokens of each suffix; the rest of a row, on the right, is padding.
            ids: [B, S] int64, or
            embeddings: [B, S, H].
            store: keep what the model remembers of the suffixes; the sequences grow by them.
        Returns:
            [B, S, H]; rows of padding mean nothing.
        Raises:
            PoolExhausted: the pool may not hold that much; no sequence has changed.
        """
        given = ids if ids is not None else embeddings
        if store:
            sequences[0].pool.expect_room(
                sum(s.length + n for s, n in zip(sequences, lengths, strict=True))
            )
        found: list[Tensor | None] = [None] * len(sequences)
        for rows in self._alike(sequences, lengths, store):
            width = max(lengths[n] for n in rows)
            part = given[:, :width] if len(rows) == len(sequences) else given[rows, :width]
            states = self._read_alike(
                [sequences[n] for n in rows],
                [lengths[n] for n in rows],
                ids=part if ids is not None else None,
                embeddings=None if ids is not None else part,
                store=store,
            )
            if len(rows) == len(sequences) and states.shape[1] == given.shape[1]:
                return states
            for n, row in zip(rows, states, strict=True):
                found[n] = F.pad(row, (0, 0, 0, given.shape[1] - width))
        nothing = torch.zeros_like(next(row for row in found if row is not None))
        return torch.stack([nothing if row is None else row for row in found])

    def _alike(
        self, sequences: Sequence[CachedSequence], lengths: Sequence[int], store: bool
    ) -> Iterator[list[int]]:
        """Rows that can be read as one batch: what stands right of a state would become part of it."""
        alike: dict[tuple[int, int, int], list[int]] = {}
        for n, (sequence, count) in enumerate(zip(sequences, lengths, strict=True)):
            if count:
                key = sequence.length, count if store and not self.cuts_back else 0, n if self._alone else 0
                alike.setdefault(key, []).append(n)
        yield from alike.values()

    def _read_alike(
        self,
        sequences: Sequence[CachedSequence],
        lengths: Sequence[int],
        *,
        ids: Tensor | None,
        embeddings: Tensor | None,
        store: bool,
    ) -> Tensor:
        """As of :meth:`read`, for sequences of one length."""
        start, width = sequences[0].length, max(lengths)
        cache = None
        if start:
            cache = self._layout.joined(
                [sequence.rows.cache for sequence in sequences], [s.row for s in sequences], start
            )
        if not store and not start:
            return self._whole.states(input_ids=ids, inputs_embeds=embeddings, use_cache=False)
        if not store:
            if width == 1 and embeddings is not None and embeddings.requires_grad:
                # A pass over one token writes into states that the backward needs, one over two does not.
                embeddings = F.pad(embeddings, (0, 0, 0, 1))
            return self._passes.read(cache, start, ids=ids, embeddings=embeddings)[0][:, :width]
        states = []
        for stop in self._stops(sequences[0], start, start + width):
            done = sum(part.shape[1] for part in states)
            piece = slice(done, stop - start)
            part, cache = self._passes.read(
                cache,
                start + done,
                ids=None if ids is None else ids[:, piece],
                embeddings=None if embeddings is None else embeddings[:, piece],
            )
            states.append(part)
            rows = sequences[0].pool.hold(CachedRows(cache, len(sequences), stop))
            mark = part.shape[1] > 1 or stop % sequences[0].pool.spacing == 0
            for n, (sequence, count) in enumerate(zip(sequences, lengths, strict=True)):
                sequence.go_on(rows, n, min(stop, start + count), mark=mark)
            if stop < start + width:
                cache = self._layout.joined([cache] * len(sequences), range(len(sequences)), stop)
        return states[0] if len(states) == 1 else torch.cat(states, dim=1)

    def _stops(self, sequence: CachedSequence, start: int, end: int) -> list[int]:
        """Where a pass ends, so that its state can be remembered."""
        if self.cuts_back or not self._manner.several:
            return [end]
        spacing = sequence.pool.spacing
        return [*range(start - start % spacing + spacing, end, spacing), end]

    # -- probes ------------------------------------------------------------------------------------

    def _probe(
        self, probed: nn.Module, expected: list[Tensor], ids: Sequence[list[int]], manner: Manner
    ) -> CacheLayout:
        """Compare what is read in pieces, forked and cut back, with what is read at once and alone.

        Raises:
            _Differs: it is something else.
        """
        with torch.no_grad():
            layout = CachePasses(probed, manner).layout(ids[0], self._device)
            self.cuts_back = layout.croppable
            self._use(probed, manner, layout)
            for ours, theirs in zip(self._in_pieces(ids), expected, strict=True):
                if not close(ours, theirs, theirs.dtype):
                    raise _Differs("reads something else behind its cache than in one pass")
        return layout

    def _in_pieces(self, ids: Sequence[list[int]]) -> list[Tensor]:
        """States [S, H] of sequences that are read together, in pieces, along forks and after cuts."""
        pool = self.pool(1, spacing=4)
        sequences, unread = [pool.sequence() for _ in ids], [list(row) for row in ids]
        found: list[list[Tensor]] = [[] for _ in ids]

        def read(counts: Sequence[int]) -> None:
            width = max(counts)
            rows = [row[:count] + [0] * (width - count) for row, count in zip(unread, counts, strict=True)]
            batch = torch.tensor(rows, dtype=torch.int64, device=self._device)
            states = self.read(sequences, counts, ids=batch, store=True)
            for n, count in enumerate(counts):
                found[n].append(states[n, :count])
                unread[n] = unread[n][count:]

        def back(n: int) -> None:
            length = sequences[n].length
            kept = torch.cat(found[n])[:length]
            found[n], unread[n] = [kept], list(ids[n][length:])

        third = [max(1, len(row) // 3) for row in ids]
        read(third)
        read([1] * len(ids))
        for _ in range(2):
            read([1, 2, 1] if min(map(len, unread)) > 2 else [1 if row else 0 for row in unread])
        # A fork reads other tokens first: the sequence that it comes from must not notice.
        fork = sequences[0].fork(sequences[0].length - 1)
        others = torch.tensor([ids[1][fork.length :]], dtype=torch.int64, device=self._device)
        self.read([fork], [others.shape[1]], ids=others, store=True)
        sequences[0].truncate(sequences[0].length - 1)
        sequences[1] = sequences[1].fork(sequences[1].length - 1)
        back(0)
        back(1)
        read([len(row) for row in unread])
        return [torch.cat(parts) for parts in found]

    def _gives_gradients(self, probed: nn.Module, ids: Sequence[list[int]], layout: CacheLayout) -> bool:
        """Whether gradients behind a cache are those of a pass over everything."""
        if not self._manner.several:
            return False
        try:
            self._use(probed, self._manner, layout)
            found, expected = self._gradients(probed, ids)
        except Exception:  # whatever a cache does to autograd: passes over everything are left
            return False
        return all(close(*pair, pair[1].dtype) for pair in zip(found, expected, strict=True))

    @torch.no_grad()
    def _gradients(self, probed: nn.Module, ids: Sequence[list[int]]) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of suffixes, read together behind their prefixes; and by passes over everything."""
        table, pool = probed.get_input_embeddings(), self.pool(1, spacing=4)
        rows = [torch.tensor(row, dtype=torch.int64, device=self._device) for row in ids]
        cuts = [len(rows[0]) // 2, len(rows[1]) // 2, len(rows[2]) - 1]
        sequences = [pool.sequence() for _ in ids]
        for sequence, row, cut in zip(sequences, rows, cuts, strict=True):
            self.read([sequence], [cut], ids=row[None, :cut], store=True)
        generator = torch.Generator().manual_seed(0)
        found, expected = [], []
        for several in ([0, 1], [2]):
            suffixes = [table(rows[n][cuts[n] :]).detach().requires_grad_() for n in several]
            with torch.enable_grad():
                states = self.read(
                    [sequences[n] for n in several],
                    [len(suffix) for suffix in suffixes],
                    embeddings=torch.stack(suffixes),
                )
            weights = torch.randn(states.shape, generator=generator, dtype=torch.float64).to(states)
            found += torch.autograd.grad(states, suffixes, weights)
            for n, suffix, weight in zip(several, suffixes, weights, strict=True):
                with torch.enable_grad():
                    own = suffix.detach().requires_grad_()
                    whole = torch.cat([table(rows[n][: cuts[n]]).detach(), own])[None]
                    full = self._whole.states(inputs_embeds=whole, use_cache=False)[0, cuts[n] :]
                expected += torch.autograd.grad(full, own, weight)
        return found, expected


class _Differs(Exception):
    """A manner of reading gives other states."""


@torch.no_grad()
def _whole(model: nn.Module, ids: Sequence[list[int]], device: torch.device) -> list[Tensor]:
    """States [S, H] of sequences that are read at once and alone."""
    forward = Forward(backbone(model))
    return [forward.states(input_ids=torch.tensor([row], device=device), use_cache=False)[0] for row in ids]
