"""Reading a suffix together with everything before it, for models that can go on from nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nabla_fast.errors import ModelError
from nabla_fast.models.backbone import Forward, backbone
from nabla_fast.models.boundary import probing
from nabla_fast.models.cache_sequences import CachedSequence, CachePool
from nabla_fast.models.probes import close, probe_ids, probe_length
from nabla_fast.models.replica import returning_names


class WholeReader:
    """Reads whole sequences by the model's own modules; its sequences remain empty.

    Args:
        model: a transformers model with a backbone.

    Attributes:
        cuts_back, frozen_gradients: as of :class:`nabla_fast.models.cache_reader.CacheReader`.
        reason: why nothing faster is right.
    """

    cuts_back = frozen_gradients = False

    def __init__(self, model: nn.Module):
        """Probe the model on a few tokens.

        Raises:
            ModelError: what it reads of a sequence depends on the others of a batch.
        """
        self._model = model
        self.reason = f"{type(model).__name__} reads behind no cache what it reads in one pass"
        with probing(model, "cannot be read"):
            count = probe_length(model.config.get_text_config())
            ids = [probe_ids(model, n, seed) for seed, n in enumerate((count, count, max(1, count // 2)))]
            self.renew()
            self._probe(ids)

    @property
    def way(self) -> str:
        """How the model is read, in words."""
        return "anew with each pass"

    @property
    def dtype(self) -> torch.dtype:
        """As of :class:`nabla_fast.models.readers.SuffixReader`: that of the model's weights."""
        return self._model.get_input_embeddings().weight.dtype

    def renew(self) -> None:
        """Take the modules again, which may have changed since the last call."""
        self._forward = Forward(backbone(returning_names(self._model)))

    def pool(self, blocks: int, block_size: int = 16, limit: int | None = None) -> CachePool:
        """Where its sequences come from, which hold nothing; arguments as of other readers."""
        return CachePool(None)

    def read(
        self,
        sequences: Sequence[CachedSequence],
        lengths: Sequence[int],
        *,
        ids: Tensor | None = None,
        embeddings: Tensor | None = None,
        store: bool = False,
    ) -> Tensor:
        """Final hidden states [B, S, H] of whole sequences; arguments as of other readers.

        Args:
            sequences: B empty ones.
            lengths: tokens of each; the rest of a row, on the right, is padding.
            ids: [B, S] int64, or
            embeddings: [B, S, H].
            store: of no effect, as nothing is kept.
        """
        given = ids if ids is not None else embeddings
        if self._ragged or len(set(lengths)) == 1:
            return self._forward.states(input_ids=ids, inputs_embeds=embeddings, use_cache=False)
        found: dict[int, Tensor] = {}
        for length in set(lengths):
            rows = [n for n, count in enumerate(lengths) if count == length]
            part = {"input_ids" if ids is not None else "inputs_embeds": given[rows, :length]}
            states = self._forward.states(use_cache=False, **part)
            padding = (0, 0, 0, given.shape[1] - length)
            found |= zip(rows, torch.nn.functional.pad(states, padding), strict=True)
        return torch.stack([found[n] for n in range(len(lengths))])

    @torch.no_grad()
    def _probe(self, ids: Sequence[list[int]]) -> None:
        device = self._model.get_input_embeddings().weight.device
        rows = [torch.tensor(row, dtype=torch.int64, device=device) for row in ids]
        alone = [self._forward.states(input_ids=row[None], use_cache=False)[0] for row in rows]
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = list(map(len, ids))
        for self._ragged in (True, False):
            together = self.read([], lengths, ids=batch)
            parts = [row[:length] for row, length in zip(together, lengths, strict=True)]
            if all(close(*pair, pair[1].dtype) for pair in zip(parts, alone, strict=True)):
                return
        raise ModelError(
            f"{type(self._model).__name__} reads a sequence otherwise beside others than alone"
        )


class OwnForward:
    """Stands where a reader would for a reward that its own forward scores, sequence by sequence.

    Args:
        reason: why no reader is right for the model; None where it is no model.
        way: how it is read, in words.
    """

    cuts_back = frozen_gradients = False

    def __init__(
        self,
        reason: str | None,
        way: str = "anew with each pass, by its own forward, one sequence at a time",
    ):
        self.reason, self.way = reason, way

    def renew(self) -> None:
        """Nothing is kept."""

    def pool(self, blocks: int, block_size: int = 16, limit: int | None = None) -> CachePool:
        """Where its sequences come from, which hold nothing; arguments as of other readers."""
        return CachePool(None)
