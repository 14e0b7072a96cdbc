"""Random inputs and named kinds of them, which each op's ``cases`` put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_fast.ops import GumbelNoise

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
WHOLE = 151_937  # a vocabulary of today's size, odd


class Draw:
    """Random inputs on the CPU, the same for every device."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = F32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator)

    def logits(self, rows: int, vocabulary: int, dtype: torch.dtype = F32, masked: float = 0.0) -> Tensor:
        """[N, V], a share of the tokens masked, at least one of each row not."""
        logits = self.normal(rows, vocabulary, dtype=dtype, scale=3.0)
        mask = self.uniform(rows, vocabulary) < masked
        mask[torch.arange(rows), self.integers(0, vocabulary, rows)] = False
        return logits.masked_fill(mask, -torch.inf)

    def noise(self, rows: int) -> GumbelNoise:
        """Keys over the whole range of int64."""
        return GumbelNoise(self.integers(-(2**63), 2**63 - 1, rows), self.integers(0, 2**63 - 1, rows))

    def tables(self, vocabulary: int, tables: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
        return [self.normal(vocabulary, width, dtype=dtype) for width, dtype in tables]


Make = Callable[[Draw], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A named kind of input: ``make(draw)`` returns the op's arguments by name.

    Args:
        large: too large for an interpreter.
        slow: takes an interpreter seconds: such a run is marked slow.
        small: the same kind with less work for an interpreter, if ``make`` has too much.
    """

    name: str
    make: Make
    large: bool = False
    slow: bool = False
    small: Make | None = None


def cases_of(recipe: Callable[..., dict[str, Any]], table: dict[str, dict[str, Any]]) -> list[Case]:
    """A case of each name and sizes for ``recipe``; whole vocabularies are large."""
    return [
        Case(name, partial(recipe, **sizes), large=sizes.get("vocabulary") == WHOLE)
        for name, sizes in table.items()
    ]


def strided(tensor: Tensor) -> Tensor:
    """The same matrix with a gap after each row."""
    rows, columns = tensor.shape
    wide = tensor.new_zeros(rows, columns + 3)
    wide[:, 1 : columns + 1] = tensor
    return wide[:, 1 : columns + 1]


def masked_by_head(draw: Draw, hidden: Tensor, head: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The same where a share of the head's rows, not the last one, gives logits of −inf.

    The first column of the hidden states becomes positive, and that of those rows −inf.
    """
    hidden[:, 0] = hidden[:, 0].abs() + 0.125
    mask = draw.uniform(len(head)) < share
    mask[-1] = False
    head[:, 0].masked_fill_(mask, -torch.inf)
    return hidden, head


def far_columns(path: Path, table: Tensor, stride: int) -> Tensor:
    """``table`` [V, H] on the CPU, its columns ``stride`` elements apart, in a file without a name."""
    size = table.shape[1] * stride * table.itemsize
    try:
        storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=size)
    except RuntimeError as error:
        pytest.skip(f"needs a sparse file of {size} bytes: {error}")
    finally:
        path.unlink(missing_ok=True)
    return table.new_empty(0).set_(storage, 0, table.shape, (1, stride)).copy_(table)
