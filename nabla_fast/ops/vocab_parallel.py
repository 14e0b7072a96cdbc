"""The embedding mix with its vocabulary sharded over processes: each has a slice of logits and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from nabla_fast.ops.checks import expect, expect_mix, expect_vocabulary
from nabla_fast.ops.embedding_mix import embedding_mix
from nabla_fast.ops.gumbel_noise import GumbelNoise, contiguous, gumbel_noise
from nabla_fast.ops.limits import triton_backend
from nabla_fast.ops.lm_logits import logits_backward
from nabla_fast.ops.registry import Table, allowed, backend_status
from nabla_fast.ops.rows import ALL_MASKED, HAS_INF, HAS_NAN, OK, accumulation_dtype, report, row_slices
from nabla_fast.ops.softmax import onehot_gradient

if TYPE_CHECKING:
    from nabla_fast.triton_kernels.vocab_parallel import VocabularySlice

_NAME = "vocab_parallel_embedding_mix"
_ARGUMENTS = Table(_NAME, embedding_mix.parameters, embedding_mix.table.rules)


def vocab_parallel_embedding_mix(
    logits: Tensor,
    tables: Sequence[Tensor],
    *,
    first: int,
    group: dist.ProcessGroup | None = None,
    tau: float = 1.0,
    hard: bool = True,
    noise: GumbelNoise | None = None,
    direct: Tensor | None = None,
) -> list[Tensor]:
    """:func:`~nabla_fast.ops.embedding_mix` of logits whose columns are spread over processes.

    Every process of the group calls it with the same rows and its own slice of the vocabulary, V' ≥ 1
    tokens from ``first`` on; slices may differ in size, and their order is that of ``first``. Every
    process gets the whole mixes and computes the same loss from them; its gradient is that of its slice
    of the logits. Traffic does not grow with V: the forward sends the rows' largest logits, their tokens,
    and one sum of mixes; the backward G[ŷ], and one pair of sums.

    Differentiable once, in ``logits`` alone.

    Args:
        logits: [N, V'] this slice of z, floating point; −inf marks a masked token. A slice may be masked
            whole.
        tables: [V', H_t] this slice of each embedding table, floating point.
        first: the slice's first token.
        group: the processes; the default group if None.
        tau, hard, noise: as in ``embedding_mix``, the same in every process.
        direct: [N, V'] this slice of it, or None.
    Returns:
        One [N, H_t] a table, in the table's dtype.
    Raises:
        InputError: a shape, dtype or device does not fit.
        RowError: a row has a NaN or +inf logit, or no finite one, in whatever slice; in every process.

    Source: sharded as Megatron-LM's vocabulary-parallel cross entropy, arXiv:1909.08053.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> logits, table = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0], [3.0]])
        >>> vocab_parallel_embedding_mix(logits, [table], first=0)
        [tensor([[3.]])]
        >>> dist.destroy_process_group()
    """
    logits, tables, tau, hard, noise, direct = _ARGUMENTS.plain(logits, tables, tau, hard, noise, direct)
    vocabulary = logits.shape[1]
    expect(first >= 0, f"{_NAME}: first must be at least 0, got {first}")
    expect_vocabulary(_NAME, first + vocabulary)
    expect_mix(_NAME, vocabulary, tables, tau=tau, direct=direct)
    part = _Slice([table.detach() for table in tables], first, group, tau, noise, direct)
    return list((_TritonMix if _by_triton(logits, part) else _Mix).apply(logits, part, hard))


def _by_triton(logits: Tensor, part: _Slice) -> bool:
    """Whether the Triton kernels compute a slice."""
    if not (allowed("triton") and backend_status()["triton"] is None and len(logits)):
        return False
    given = {"logits": logits, "tables": part.tables, "noise": part.noise, "direct": part.direct}
    return triton_backend.refusal(**given) is None


class _Slice:
    """One process's part of the constants, and its sums over its tokens."""

    def __init__(
        self,
        tables: list[Tensor],
        first: int,
        group: dist.ProcessGroup | None,
        tau: float,
        noise: GumbelNoise | None,
        direct: Tensor | None,
    ):
        self.tables = tables
        self.first = first
        self.group = group
        self.tau = tau
        self.noise = noise
        self.direct = direct

    def reduce(self, tensor: Tensor, operation: str = "SUM") -> Tensor:
        """The sum, or another reduction, over the group; in place."""
        # ReduceOp is looked up by name: a torch built without distributed has none to import.
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation), group=self.group)
        return tensor

    def perturbed(self, logits: Tensor, rows: slice) -> Tensor:
        """z + g of some of the rows."""
        z = logits[rows].to(accumulation_dtype(logits, *self.tables))
        if self.noise is None:
            return z
        noise = GumbelNoise(self.noise.seed[rows], self.noise.position[rows])
        return z + gumbel_noise(noise, self.first + z.shape[1])[:, self.first :].to(z.dtype)

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' largest z + g and its token, the first of equals, over the whole vocabulary.

        Raises RowError as every other op does.
        """
        tops, tokens = [], []
        for rows in row_slices(*logits.shape):
            top, token = self.perturbed(logits, rows).max(dim=-1)
            tops.append(top)
            tokens.append(token + self.first)
        local, token = torch.cat(tops), torch.cat(tokens)
        nan = local.isnan()
        top, any_nan = self.reduce(
            torch.stack([local.masked_fill(nan, -torch.inf), nan.to(local.dtype)]), "MAX"
        )
        status = torch.where(top == torch.inf, HAS_INF, torch.where(top == -torch.inf, ALL_MASKED, OK))
        report(_NAME, torch.where(any_nan > 0, HAS_NAN, status).to(torch.int32))
        none = torch.iinfo(torch.int64).max
        return top, self.reduce(torch.where(local == top, token, none), "MIN")

    def owned(self, token: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """[N] whether the tokens are in this slice, and their places in it (0 where they are not)."""
        place = token - self.first
        here = (place >= 0) & (place < vocabulary)
        return here, torch.where(here, place, 0)

    def exponentials(self, logits: Tensor, top: Tensor, rows: slice) -> Tensor:
        """exp((z + g − top)/τ), [n, V']; 0 where the logit is masked."""
        return ((self.perturbed(logits, rows) - top[rows, None]) / self.tau).exp()


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, part: _Slice, hard: bool) -> tuple[Tensor, ...]:
        if len(logits) == 0:
            top, token = logits.new_empty(0), logits.new_empty(0, dtype=torch.int64)
        else:
            top, token = part.largest(logits)
        ctx.save_for_backward(logits, top, token)
        ctx.part = part
        widths = [table.shape[1] for table in part.tables]
        dtype = accumulation_dtype(logits, *part.tables)
        if hard:
            here, place = part.owned(token, logits.shape[1])
            sums = torch.cat([table[place].to(dtype) for table in part.tables], dim=1) * here[:, None]
            mixes = part.reduce(sums)
        else:
            sums = logits.new_zeros(len(logits), sum(widths) + 1, dtype=dtype)
            for rows in row_slices(*logits.shape):
                e = part.exponentials(logits, top, rows)
                products = [logits_backward(e, table) for table in part.tables]
                sums[rows] = torch.cat([*products, e.sum(dim=1, keepdim=True)], dim=1)
            part.reduce(sums)
            mixes = sums[:, :-1] / sums[:, -1:]
        return tuple(
            mix.to(table.dtype) for mix, table in zip(mixes.split(widths, dim=1), part.tables, strict=True)
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        (logits, top, token), part = ctx.saved_tensors, ctx.part
        dtype = accumulation_dtype(logits, *part.tables)
        result = torch.empty_like(logits, memory_format=torch.contiguous_format)
        if len(logits) == 0:
            return result, None, None
        here, place = part.owned(token, logits.shape[1])

        # G of the hard token alone, which its owner has and the others centre at.
        hard_grad = logits.new_zeros(len(logits), dtype=dtype)
        for cotangent, table in zip(cotangents, part.tables, strict=True):
            hard_grad += (cotangent.to(dtype) * table[place].to(dtype)).sum(dim=1)
        if part.direct is not None:
            hard_grad += part.direct.gather(1, place[:, None]).squeeze(1).to(dtype)
        part.reduce(hard_grad.masked_fill_(~here, 0))

        def centred(rows: slice, e: Tensor) -> Tensor:
            grad = onehot_gradient(
                [cotangent[rows] for cotangent in cotangents],
                part.tables,
                None if part.direct is None else part.direct[rows],
                dtype,
            )
            return (grad - hard_grad[rows, None]).masked_fill_(e == 0, 0)

        sums = logits.new_zeros(len(logits), 2, dtype=dtype)
        for rows in row_slices(*logits.shape):
            e = part.exponentials(logits, top, rows)
            sums[rows] = torch.stack([e.sum(dim=1), (e * centred(rows, e)).sum(dim=1)], dim=1)
        part.reduce(sums)
        total, mean = sums[:, :1], sums[:, 1:] / sums[:, :1]
        for rows in row_slices(*logits.shape):
            e = part.exponentials(logits, top, rows)
            grad = e / total[rows] * (centred(rows, e) - mean[rows]) / part.tau
            result[rows] = grad.to(logits.dtype)
        return result, None, None


class _TritonMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, part: _Slice, hard: bool) -> tuple[Tensor, ...]:
        mixes, top, token, status = _kernels(logits, part).mix(hard=hard)
        report(_NAME, status)
        ctx.save_for_backward(logits, top, token)
        ctx.part = part
        return tuple(mixes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        (logits, top, token), part = ctx.saved_tensors, ctx.part
        kernels = _kernels(logits, part)
        return kernels.gradient(list(cotangents), part.direct, top, token), None, None


def _kernels(logits: Tensor, part: _Slice) -> VocabularySlice:
    from nabla_fast.triton_kernels.vocab_parallel import VocabularySlice

    return VocabularySlice(logits, part.tables, part.first, part.tau, contiguous(part.noise), part.reduce)
