"""Parts of the eager versions: PyTorch that writes into memory it was given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_WIDENED = 16384  # rows of a half-precision table that exist in float32 at a time
_BLOCK = 1 << 18  # elements of a row-wise computation whose temporaries stay in a core's cache


class Products:
    """Products in float32 with tables [V, H], with the memory for them.

    On the CPU a product of few rows is fastest with the table on the left and its result turned over
    (at N = 16 by 40%); a half-precision table is widened block by block.
    """

    def __init__(self, rows: int, table: Tensor):
        vocabulary, width = table.shape
        empty = table.new_empty
        self._turned = (
            empty((vocabulary, rows), dtype=torch.float32)
            if rows > 1 and table.device.type == "cpu"
            else None
        )
        half = table.dtype != torch.float32
        self._wide = empty((min(_WIDENED, vocabulary), width), dtype=torch.float32) if half else None

    def __call__(self, x: Tensor, table: Tensor, out: Tensor) -> Tensor:
        """``out`` [N, V] = x·tableᵀ for x [N, H]."""
        for tokens, block in self._blocks(table):
            if self._turned is None:
                torch.mm(x, block.T, out=out[:, tokens])
            else:
                torch.mm(block, x.T, out=self._turned[tokens])
        return out if self._turned is None else out.copy_(self._turned.T)

    def mix(self, weights: Tensor, table: Tensor, out: Tensor) -> Tensor:
        """``out`` [N, H] = weights·table for weights [N, V]."""
        for tokens, block in self._blocks(table):
            if tokens.start == 0:
                torch.mm(weights[:, tokens], block, out=out)
            else:
                out.addmm_(weights[:, tokens], block)
        return out

    def _blocks(self, table: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Tokens and their rows of the table in float32."""
        step = len(table) if self._wide is None else len(self._wide)
        for start in range(0, len(table), step):
            block = table[start : start + step]
            tokens = slice(start, start + len(block))
            yield tokens, block if self._wide is None else self._wide[: len(block)].copy_(block)


def products_alone(
    rows: int, onto: Sequence[Tensor], through: Sequence[Tensor], times: int = 1
) -> Callable[[], None]:
    """The library's products in the tables' dtype: what nothing that multiplies as much is faster than.

    Args:
        onto: tables [V, H], each multiplied by [N, H].
        through: tables [V, H], each multiplied by weights [N, V].
        times: how often.
    """

    @functools.cache
    def operands() -> list[tuple[Tensor, Tensor, Tensor]]:
        """Both factors of each and its result. Drawn: of zeros, products are faster."""
        factors = [table.T for table in onto] + list(through)
        drawn = [factor.new_empty(rows, len(factor)).normal_() for factor in factors]
        outs = [factor.new_empty(rows, factor.shape[1]) for factor in factors]
        return list(zip(drawn, factors, outs, strict=True))

    def run() -> None:
        for _ in range(times):
            for x, factor, out in operands():
                torch.mm(x, factor, out=out)

    return run


def row_blocks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Parts of [N, V] whose temporaries stay in a cache; the whole on a GPU."""
    step = max(1, _BLOCK // vocabulary) if device.type == "cpu" else rows
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def softmax_gradient_(p: Tensor, grad: Tensor, work: Tensor) -> Tensor:
    """p ⊙ (G − ⟨p, G⟩), in place of G; all [N, V]."""
    mean = torch.mul(p, grad, out=work).sum(dim=-1, keepdim=True)
    return grad.sub_(mean).mul_(p)


def adam_step_(parameter: Tensor, grad: Tensor, moments: Sequence[Tensor], step: int, lr: float) -> None:
    """Step ``step`` (from 1) of Adam by the kernel of ``torch.optim.Adam(fused=True)``."""
    count = torch.tensor(float(step), device=parameter.device)
    torch._fused_adam_(
        [parameter],
        [grad],
        [moments[0]],
        [moments[1]],
        [],
        [count],
        lr=lr,
        beta1=0.9,
        beta2=0.999,
        weight_decay=0.0,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )
