"""Reading a suffix with a transformers decoder whose prefix lies in a block pool."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nabla_fast._native import loading as native_loading
from nabla_fast.errors import InputError, ModelError
from nabla_fast.models.backbone import Forward, backbone
from nabla_fast.models.boundary import probing, struck_in
from nabla_fast.models.llama_forward import LlamaForward
from nabla_fast.models.llama_layers import can_read
from nabla_fast.models.paged_attention import IMPLEMENTATION, PagedPass, expect_own_cap, reading
from nabla_fast.models.paged_kv import BlockPool, PagedSequence, block_tables, extend_all
from nabla_fast.models.probes import close, looking_far, probe_ids, probe_length
from nabla_fast.models.replica import configs_of, replica, returning_names
from nabla_fast.models.rotary import expect_fixed_frequencies


class PagedReader:
    """Reads suffixes of frozen prefixes with the backbone of a transformers model.

    The model itself keeps the attention that it has: a :func:`replica` over the same weights, whose configs
    are its own, is what reads.

    Args:
        model: a decoder-only model whose attention goes through transformers' AttentionInterface.

    Attributes:
        cuts_back, frozen_gradients, dtype: as of :class:`nabla_fast.models.readers.SuffixReader`.
    """

    cuts_back = frozen_gradients = True

    def __init__(self, model: nn.Module):
        """Probe the model on a few tokens.

        Raises:
            ModelError: its rotary embeddings depend on the other sequences of a batch, its own attention
                leaves out a cap of its scores, or its states after a paged prefix are not those of one pass
                over everything.
        """
        self._model = model
        self._widens = False
        self._llama_forward: LlamaForward | None = None
        self._module_passes: _ModulePasses | None = None
        expect_fixed_frequencies(model)
        expect_own_cap(model)
        config = model.config.get_text_config()
        with probing(model, "cannot be read"):
            count = probe_length(config)
            ids = [probe_ids(model, n, n) for n in (count, max(2, count // 2))]
        readable = returning_names(model)
        probes = dict.fromkeys([readable, looking_far(readable, count)])
        widens = [self._probe(probed, ids) for probed in probes]
        self._widens = all(widens)
        self.renew()

    @property
    def way(self) -> str:
        """How the model is read, in words."""
        if not self.capturable:
            return "behind paged keys and values, by the model's modules"
        own = "behind paged keys and values, by the package's own passes"
        weights = self._model.get_input_embeddings().weight.dtype
        if self.dtype == weights:
            return own
        arithmetic, given = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, weights))
        return f"{own} ({arithmetic} arithmetic on {given} weights)"

    @property
    def dtype(self) -> torch.dtype:
        """As of :class:`nabla_fast.models.readers.SuffixReader`; also of keys and values in its pools."""
        if isinstance(self.passes, LlamaForward):
            return self.passes.dtype
        return self._model.get_input_embeddings().weight.dtype

    def renew(self) -> None:
        """Read the weights again, which may have changed since the last call, as may the modules."""
        under = backbone(self._model)
        dtype = _arithmetics(self._model)[-1 if self._widens else 0]
        self._llama_forward = LlamaForward(under, dtype) if can_read(under) else None
        self._module_passes = (
            None if self._llama_forward is not None else _ModulePasses(returning_names(self._model))
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what holds addresses; the next :meth:`renew` makes it anew."""
        return {**self.__dict__, "_llama_forward": None, "_module_passes": None}

    def pool(self, blocks: int, block_size: int = 16, limit: int | None = None) -> BlockPool:
        """A pool for this model's keys and values; arguments as of :class:`BlockPool`."""
        config = self._model.config.get_text_config()
        heads = config.num_attention_heads
        return BlockPool(
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            blocks=blocks,
            block_size=block_size,
            limit=limit,
            dtype=self.dtype,
            device=self._model.get_input_embeddings().weight.device,
        )

    def read(
        self,
        sequences: Sequence[PagedSequence],
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
            store: put the suffixes' keys and values after the prefixes, which grow by them.
        Returns:
            [B, S, H]; rows of padding mean nothing.
        Raises:
            InputError: the sequences do not lie in one pool.
            PoolExhausted: the pool may not grow that far; no sequence has changed.
            ModelError: the model's attention needs something that paged attention does not have.
        """
        width = (ids if ids is not None else embeddings).shape[1]
        pool = sequences[0].pool
        strangers = [n for n, sequence in enumerate(sequences) if sequence.pool is not pool]
        if strangers:
            raise InputError(f"sequence {strangers[0]} lies in another pool than sequence 0")
        device = pool.keys.device
        before = torch.tensor([sequence.length for sequence in sequences], device=device)
        tables = block_tables(list(sequences), device)
        slots = None
        if store:
            rows = [row + [-1] * (width - len(row)) for row in extend_all(sequences, lengths)]
            slots = torch.tensor(rows, dtype=torch.int64, device=device)
        paged = PagedPass(pool, tables, before, slots)
        # Padding stands where the last token does: some models have no position for what comes after.
        offsets = torch.arange(width, device=device)
        if min(lengths) < width:
            last = torch.tensor([max(0, count - 1) for count in lengths], device=device)
            offsets = torch.minimum(offsets, last[:, None])
        positions = before[:, None] + offsets
        end = width + max(sequence.length for sequence in sequences)
        return self.passes(positions, end, paged, ids=ids, embeddings=embeddings)

    def read_next(
        self, pool: BlockPool, ids: Tensor, lengths: Tensor, tables: Tensor, slots: Tensor
    ) -> Tensor:
        """Final hidden states [B, H] of one token more of each sequence, whose tables the caller keeps.

        Nothing waits for the device, except where the model's own modules do.

        Args:
            pool: where the sequences lie.
            ids: [B] int64.
            lengths: [B] int64, tokens before it.
            tables: [B, M] int64, of blocks.
            slots: [B] int64, where its keys and values are put; −1: nowhere.
        """
        paged = PagedPass(pool, tables, lengths, slots[:, None])
        end = tables.shape[1] * pool.block_size + 1
        return self.passes(lengths[:, None], end, paged, ids=ids[:, None], embeddings=None)[:, 0]

    @property
    def passes(self) -> LlamaForward | _ModulePasses:
        """What reads the weights; another object after each :meth:`renew`."""
        if self._llama_forward is None and self._module_passes is None:
            self.renew()
        return self._llama_forward or self._module_passes

    @property
    def held(self) -> tuple[object, ...]:
        """What a captured pass has addresses of: while all of it is the same, the pass can be replayed."""
        passes = self.passes
        return (passes, passes.rotary_table) if isinstance(passes, LlamaForward) else (passes,)

    @property
    def capturable(self) -> bool:
        """Whether the passes are the package's own, of which it is known that nothing waits in them."""
        return isinstance(self.passes, LlamaForward)

    @torch.no_grad()
    def _probe(self, probed: nn.Module, ids: Sequence[list[int]]) -> bool:
        """Compare what is read in pieces, as a batch, with what is read at once and alone.

        Args:
            probed: the model, or a replica of it.
            ids: a long sequence and a short one.
        Returns:
            Whether the last of its arithmetics is right too: where a model's modules round so much that
            float32 arithmetic finds another state, the package's passes round as they do.
        """
        name, device = type(self._model).__name__, probed.get_input_embeddings().weight.device
        with probing(self._model, "cannot be read"):
            forward = Forward(backbone(probed))
            whole = [
                forward.states(input_ids=torch.tensor([row], device=device), use_cache=False)[0]
                for row in ids
            ]
        under = backbone(probed)
        arithmetics = _arithmetics(probed)
        for dtype in [None, *arithmetics] if can_read(under) else [None]:
            try:
                self._llama_forward = None if dtype is None else LlamaForward(under, dtype)
                self._module_passes = _ModulePasses(probed) if dtype is None else None
                pieces = self._in_pieces(ids, device)
            except ModelError:
                raise
            except Exception as error:
                raise ModelError(
                    f"{name} cannot read from a paged prefix ({struck_in(error, self._model)})"
                ) from error
            agree = all(close(*pair, pair[1].dtype) for pair in zip(pieces, whole, strict=True))
            if not agree and dtype in (None, arithmetics[0]):
                raise ModelError(f"{name} reads something else after a paged prefix than in one pass")
        return agree

    def _in_pieces(self, ids: Sequence[list[int]], device: torch.device) -> list[Tensor]:
        """States [S, H] of sequences that are read together in three pieces."""
        pool = self.pool(blocks=2, block_size=2)
        sequences = [pool.sequence() for _ in ids]
        pieces: list[list[Tensor]] = [[] for _ in ids]
        cuts = [(0, third := max(1, len(row) // 3), third + 1, len(row)) for row in ids]
        for start, stop in pairwise(range(4)):
            parts = [row[cut[start] : cut[stop]] for row, cut in zip(ids, cuts, strict=True)]
            lengths = list(map(len, parts))
            if not any(lengths):
                continue
            states = self.read(sequences, lengths, ids=padded_ids(parts, device), store=True)
            for row, length, found in zip(states, lengths, pieces, strict=True):
                found.append(row[:length])
        return [torch.cat(found) for found in pieces]


def _arithmetics(model: nn.Module) -> list[torch.dtype]:
    """Dtypes that the package's passes can compute a model in, the one to be preferred last.

    On the CPU float32 arithmetic reads half-precision weights as fast as they come from memory, by the C++
    kernels: PyTorch would copy them first. Elsewhere matrix units multiply the weights' own dtype.
    """
    weight = model.get_input_embeddings().weight
    if weight.device.type != "cpu" or not native_loading.available():
        return [weight.dtype]
    return list(dict.fromkeys([weight.dtype, torch.promote_types(weight.dtype, torch.float32)]))


def padded_ids(parts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids of several sequences, [B, S] int64, filled up with 0 on the right."""
    if len({len(part) for part in parts}) == 1:
        return torch.tensor(parts, dtype=torch.int64, device=device)
    rows = [torch.tensor(part, dtype=torch.int64) for part in parts]
    return pad_sequence(rows, batch_first=True).to(device)


class _ModulePasses:
    """Passes through the modules of a model's replica."""

    def __init__(self, model: nn.Module):
        self._name, copied = type(model).__name__, replica(model)
        self._forward = Forward(backbone(copied))
        for config in configs_of(copied):
            config._attn_implementation = IMPLEMENTATION

    def __call__(
        self,
        positions: Tensor,
        end: int,  # of no use here
        paged: PagedPass,
        *,
        ids: Tensor | None,
        embeddings: Tensor | None,
    ) -> Tensor:
        """As of :class:`LlamaForward`."""
        with reading(paged):
            states = self._forward.states(
                input_ids=ids, inputs_embeds=embeddings, position_ids=positions, use_cache=False
            )
        if not paged.calls:
            raise ModelError(f"{self._name} does not call its attention through transformers' interface")
        return states
