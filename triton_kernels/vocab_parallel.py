"""The embedding mix of a slice of the vocabulary: the schedule of the whole one, with sums over processes.

A process sums its slice relative to its own largest logits. What is sent then is the rows' largest logits
and tokens, and sums moved to the largest of all: by powers of two, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .common.exponential import exp_base
from .common.gradient_sums import FIELDS
from .common.gumbel import add_gumbel_noise
from .common.library_products import add_vocabulary_products, converted_bytes, float32_products
from .common.row_tops import Noise, RowTops
from .common.sizes import cdiv
from .common.soft_mix import SoftMix, scratch_bytes
from .common.vocabulary_chunks import SLICE, WARPS, Partition, partition
from .embedding_mix import jacobian_kernel, part_of, survey_kernel

Reduce = Callable[[Tensor, str], Tensor]  # (tensor, "SUM", "MAX" or "MIN") → over all processes, in place

_NONE = torch.iinfo(torch.int64).max


class VocabularySlice:
    """Some of the tokens, V' from ``first`` on, of logits [N, V'] and tables [V', H_t].

    Args:
        noise: seed and position [N] int64 of the rows' noise, contiguous, or None.
        reduce: of the processes that hold the others.
    """

    def __init__(
        self, logits: Tensor, tables: list[Tensor], first: int, tau: float, noise: Noise, reduce: Reduce
    ):
        self.logits = logits
        self.tables = tables
        self.first = first
        self.tau = tau
        self.noise = noise
        self.reduce = reduce
        # Noise is added to a copy of a chunk, in float32.
        self.copied = 0 if noise is None else 4

    # -- forward ---------------------------------------------------------------------------------------

    def mix(self, *, hard: bool) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """The mixes [N, H_t], the rows' largest logit and hard token [N], and their status [N] int32.

        The same in every process.
        """
        rows, vocabulary = self.logits.shape
        widths = [table.shape[1] for table in self.tables]
        kinds = list(dict.fromkeys(table.dtype for table in self.tables))
        row_bytes, token_bytes = 8 * cdiv(vocabulary, SLICE), 0
        if not hard:
            row_bytes, token_bytes = scratch_bytes(self.tables, vocabulary)
        cut = partition(rows, vocabulary, row_bytes=row_bytes, token_bytes=token_bytes + self.copied)
        tops = self.logits.new_empty(rows, cdiv(vocabulary, SLICE), dtype=torch.float32)
        tokens = torch.empty_like(tops, dtype=torch.int32)
        sums = self.logits.new_empty(rows, sum(widths) + len(kinds), dtype=torch.float32)
        exponent = self.logits.new_empty(rows, 1, dtype=torch.float64)
        mix = (
            None
            if hard
            else SoftMix(self.logits, cut.most_rows, vocabulary, self.tables, self.tau, cut.tokens)
        )
        of_part = mix.row_tops if mix else RowTops(self.logits, cut.most_rows, vocabulary)
        with float32_products():
            for part in cut.rows:
                size = part.stop - part.start
                for logits, first, end, origin in self._chunks(part, cut):
                    if mix:
                        mix.add(logits, None, first, end, origin)
                    else:
                        of_part.measure(logits, None, first, end, origin)
                tops[part], tokens[part] = of_part.tops[:size], of_part.tokens[:size]
                if mix:
                    exponent[part] = mix.exponents[:size].amax(dim=1, keepdim=True)
                    scale = torch.exp2(mix.exponents[:size] - exponent[part])
                    totals = [(scale * of_kind[:size]).sum(dim=1, keepdim=True) for of_kind in mix.totals]
                    sums[part] = torch.cat([mix.sums[:size], *(total.float() for total in totals)], dim=1)
        top, token, status = self._joined(tops, tokens)
        if hard:
            here, place = self.owned(token)
            columns = [table[place].float() * here[:, None] for table in self.tables]
            mixed = self.reduce(torch.cat(columns, dim=1), "SUM").split(widths, dim=1)
        else:
            largest = self.reduce(exponent.clone(), "MAX")
            sums *= torch.exp2(exponent - largest).float()
            self.reduce(sums, "SUM")
            *mixed, totals = sums.split([*widths, len(kinds)], dim=1)
            mixed = [
                mix / totals[:, kinds.index(table.dtype), None]
                for mix, table in zip(mixed, self.tables, strict=True)
            ]
        mixes = [mix.to(table.dtype) for mix, table in zip(mixed, self.tables, strict=True)]
        return mixes, top, token, status

    def _joined(self, tops: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows' largest logit, its token, the first of equals, and their status, over all processes."""
        nan = tops.isnan()
        tops = tops.masked_fill(nan, -torch.inf)
        local = tops.amax(dim=1)
        token = torch.where(tops == local[:, None], tokens.long(), _NONE).amin(dim=1) + self.first
        top, any_nan = self.reduce(torch.stack([local, nan.any(dim=1).float()]), "MAX")
        token = self.reduce(torch.where(local == top, token, _NONE), "MIN")
        status = torch.where(top == torch.inf, 2, torch.where(top == -torch.inf, 3, 0))
        return top, token, torch.where(any_nan > 0, 1, status).to(torch.int32)

    def owned(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """[N] whether tokens are in this slice, and their places in it, 0 where they are not."""
        place = token - self.first
        here = (place >= 0) & (place < self.logits.shape[1])
        return here, torch.where(here, place, 0)

    def _chunks(self, part: slice, cut: Partition) -> Iterator[tuple[Tensor, int, int, int]]:
        """z + g of some rows: logits, first token and end of a chunk, token of the logits' first column."""
        noise, memory = part_of(self.noise, part), None
        for first, end in cut.chunks(self.logits.shape[1]):
            if noise is None:
                yield self.logits[part], first, end, 0
                continue
            if memory is None:
                memory = self.logits.new_empty(
                    (part.stop - part.start) * (end - first), dtype=torch.float32
                )
            chunk = self.logits[part, first:end]
            perturbed = memory[: chunk.numel()].view(chunk.shape).copy_(chunk)
            add_gumbel_noise(perturbed, *noise, self.first + first)
            yield perturbed, first, end, first

    # -- backward --------------------------------------------------------------------------------------

    def gradient(
        self, cotangents: list[Tensor], direct: Tensor | None, top: Tensor, token: Tensor
    ) -> Tensor:
        """This slice of ∂ℒ/∂z, [N, V'] in the dtype of the logits.

        In half precision it takes N·V' bytes beside the scratch memory, for bits of G that must last until
        all processes have sent theirs.

        Args:
            cotangents: ∂ℒ/∂e_t [N, H_t] each.
            direct: [N, V'], this slice of it, or None.
            top, token: [N], of :meth:`mix`.
        """
        rows, vocabulary = self.logits.shape
        device = self.logits.device
        out = torch.empty(rows, vocabulary, dtype=self.logits.dtype, device=device)
        slices = cdiv(vocabulary, SLICE)
        sums = torch.empty(rows, FIELDS.value, slices, dtype=torch.float32, device=device)
        split = out.dtype != torch.float32
        rest = torch.empty(rows, vocabulary, dtype=torch.uint8, device=device) if split else out
        row_bytes = converted_bytes(cotangents, self.tables)
        cut = partition(rows, vocabulary, row_bytes=row_bytes, token_bytes=4 + self.copied)
        memory = out.new_empty(
            cut.most_rows * min(cut.tokens, vocabulary) if split else 0, dtype=torch.float32
        )
        base = exp_base(self.tau)
        options = {"COLUMNS": SLICE, "NOISE": False, "SPLIT": split, "num_warps": WARPS}
        options["DIRECT"] = direct is not None

        def shared(part: slice) -> tuple:
            return (sums, 0, 0) if direct is None else (direct[part], *direct.stride())

        with float32_products(), torch.cuda.device_of(out):
            for part in cut.rows:
                states, size = [cotangent[part] for cotangent in cotangents], part.stop - part.start
                high = out[part].view(torch.int16) if split else out
                for logits, first, end, origin in self._chunks(part, cut):
                    product = out[part, first:end]
                    if split:
                        product = memory[: size * (end - first)].view(size, end - first)
                    add_vocabulary_products(product, states, [table[first:end] for table in self.tables])
                    of_chunk = cdiv(end - first, SLICE)
                    survey_kernel[(size * of_chunk,)](
                        product,
                        product.stride(0),
                        first,
                        *shared(part),
                        logits,
                        *logits.stride(),
                        origin,
                        sums,
                        sums,
                        sums[part],
                        high,
                        rest[part],
                        vocabulary,
                        end,
                        first // SLICE,
                        of_chunk,
                        slices,
                        base,
                        **options,
                    )
            joined = self._joined_gradient(sums, top, token)
            for part in cut.rows:
                size = part.stop - part.start
                for logits, first, end, origin in self._chunks(part, cut):
                    of_chunk = cdiv(end - first, SLICE)
                    jacobian_kernel[(size * of_chunk,)](
                        out[part],
                        vocabulary,
                        0,
                        *shared(part),
                        logits,
                        *logits.stride(),
                        origin,
                        sums,
                        sums,
                        sums[part],
                        joined[part],
                        out[part].view(torch.int16) if split else out,
                        rest[part],
                        out[part],
                        vocabulary,
                        end,
                        first // SLICE,
                        of_chunk,
                        slices,
                        base,
                        **options,
                    )
        return out

    def _joined_gradient(self, sums: Tensor, top: Tensor, token: Tensor) -> Tensor:
        """[N, 4] float32: max z, G[ŷ], 1/(S τ), ⟨p, G⟩ − G[ŷ], over all processes."""
        tops, _tokens, total, tilt, grad, lost = sums.double().unbind(dim=1)
        here, place = self.owned(token)
        hard_grad = grad.gather(1, (place // SLICE)[:, None]) * here[:, None]
        hard_grad = self.reduce(hard_grad, "SUM")
        share = ((tops - top[:, None]) / self.tau).exp().nan_to_num(nan=0.0)
        moved = torch.where(share > 0, share * (tilt + total * (grad - hard_grad)), 0.0)
        spoiled = (((lost - top[:, None]) / self.tau).exp().nan_to_num(nan=0.0) > 2.0**-126).any(dim=1)
        pair = torch.stack([(share * total).sum(dim=1), moved.sum(dim=1)])
        pair[1].masked_fill_(spoiled, torch.nan)
        total, tilt = self.reduce(pair, "SUM")
        columns = [top.double(), hard_grad[:, 0], 1 / (total * self.tau), tilt / total]
        return torch.stack(columns, dim=1).float()
