"""Reading a suffix of any transformers decoder whose prefix lies in a cache of the model's own kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nabla_fast.errors import ModelError
from nabla_fast.models.boundary import probing, struck_in
from nabla_fast.models.cache_passes import MANNERS, Manner
from nabla_fast.models.cache_probes import gives_gradients, reads_right, whole_states
from nabla_fast.models.cache_reading import CacheReading, Rows
from nabla_fast.models.cache_sequences import SPACING, CachedSequence, CachePool
from nabla_fast.models.probes import looking_far, probe_ids, probe_length
from nabla_fast.models.replica import returning_names

_TOGETHER: tuple[Rows, ...] = ("any", "alike")
# From the fastest on: first many tokens a pass, then many rows.
_CHOICES: list[tuple[Rows, Manner]] = [
    *(
        (rows, m)
        for several in (True, False)
        for rows in _TOGETHER
        for m in MANNERS
        if m.several is several
    ),
    *(("alone", manner) for manner in MANNERS),
]
_IN_WORDS = {"any": "", "alike": ", sequences of one length together", "alone": ", one sequence at a time"}


class CacheReader:
    """Reads suffixes of frozen prefixes by the model's own modules, behind copies of its own caches.

    Keys and values are shared by all that begin alike; recurrent and convolution states are copied where
    sequences part.

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
        self._model, readable = model, returning_names(model)
        with probing(model, "cannot be read"):
            count = probe_length(model.config.get_text_config())
            ids = [probe_ids(model, n, seed) for seed, n in enumerate((count, count, max(2, count // 2)))]
            device = model.get_input_embeddings().weight.device
            # Beyond the model's windows too, as a cache drops there what attention does not see.
            probed = list(dict.fromkeys([looking_far(readable, count), readable]))
            probes = [_Probe(each, ids, whole_states(each, ids, device)) for each in probed]
        self._reading, self.frozen_gradients = self._chosen(probes)
        self.cuts_back = self._reading.layout.croppable
        self.renew()

    def _chosen(self, probes: Sequence[_Probe]) -> tuple[CacheReading, bool]:
        """The first reading that is right, and whether its gradients are, too."""
        reason = "takes no cache"
        for rows, manner in _CHOICES:
            try:
                readings = _right(probes, manner, rows)
            except TypeError:
                continue
            except Exception as error:
                reason = f"cannot read behind its cache ({struck_in(error, self._model)})"
                continue
            if not readings:
                reason = "reads something else behind its cache than in one pass"
                continue
            gradients = _gradients(probes, readings)
            if not gradients and rows == "any" and manner.several:
                others = _right(probes, manner, "alike")
                if others and _gradients(probes, others):
                    readings, gradients = others, True
            return readings[-1], gradients
        raise ModelError(f"{type(self._model).__name__} {reason}")

    @property
    def way(self) -> str:
        """How the model is read, in words."""
        manner = self._reading.manner
        kept = "keys and values shared" if self.cuts_back else "states copied where sequences part"
        steps = "" if manner.several else ", one token at a time behind it"
        gradients = "" if self.frozen_gradients else "; gradients by passes over everything"
        return f"behind {manner.name} ({kept}{steps}{_IN_WORDS[self._reading.rows]}){gradients}"

    @property
    def dtype(self) -> torch.dtype:
        """As of :class:`nabla_fast.models.readers.SuffixReader`: that of the model's weights."""
        return self._model.get_input_embeddings().weight.dtype

    def renew(self) -> None:
        """Take the modules again, which may have changed since the last call."""
        former = self._reading
        model = returning_names(self._model)
        self._reading = CacheReading(model, former.manner, former.rows, former.layout)

    def pool(
        self, blocks: int, block_size: int = 16, limit: int | None = None, spacing: int = SPACING
    ) -> CachePool:
        """A pool for this model's sequences.

        Args:
            blocks: of no use here.
            block_size, limit: the pool may hold ``limit · block_size`` tokens; None for no limit.
            spacing: as of :class:`CachePool`.
        """
        return self._reading.pool(None if limit is None else limit * block_size, spacing)

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
        return self._reading.read(sequences, lengths, ids=ids, embeddings=embeddings, store=store)


class _Probe(NamedTuple):
    """A model, or a replica of it, and what it reads at once and alone."""

    model: nn.Module
    ids: Sequence[list[int]]
    expected: Sequence[Tensor]


def _right(probes: Sequence[_Probe], manner: Manner, rows: Rows) -> list[CacheReading]:
    """Readings of all that is probed; none if one of them is not right."""
    readings = []
    for probe in probes:
        readings.append(CacheReading(probe.model, manner, rows, ids=probe.ids[0]))
        if not reads_right(readings[-1], probe.ids, probe.expected):
            return []
    return readings


def _gradients(probes: Sequence[_Probe], readings: Sequence[CacheReading]) -> bool:
    pairs = zip(readings, probes, strict=True)
    return all(gives_gradients(reading, probe.model, probe.ids) for reading, probe in pairs)
