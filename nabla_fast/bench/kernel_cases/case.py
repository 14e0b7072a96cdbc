"""A case of the kernel benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Outputs = list[Tensor]


@dataclass(frozen=True)
class Versions:
    """The computations of one case on one set of inputs. Each returns the same results.

    Attributes:
        ours: the op, through whatever backend is forced.
        naive: the straightforward expression in plain PyTorch.
        eager: plain PyTorch written to be fast: memory taken beforehand, in place, one product after the
            other through the routine that measured best.
        in_float64: ``ours`` on the same inputs in float64, on the plain-PyTorch backend.
        reset: makes good what a run changed; not timed.
        in_place: whether the results lie in memory that was there before.
        products: the op's products of matrices alone, each once, by the library in the tables' dtype.
        checked: what is checked in place of these, where float64 would take too long, and
        checked_as: what sets it apart, for the report.
    """

    ours: Callable[[], Outputs]
    naive: Callable[[], Outputs]
    eager: Callable[[], Outputs]
    in_float64: Callable[[], Outputs]
    reset: Callable[[], None] = lambda: None
    in_place: bool = False
    products: Callable[[], object] | None = None
    checked: Versions | None = None
    checked_as: str | None = None


@dataclass(frozen=True)
class Case:
    """One op at one shape. Nothing is allocated before ``prepare`` is called.

    Attributes:
        op, shape, dtype: for the report; the dtype is that of logits, head and tables.
        bytes: least memory traffic.
        flops: least arithmetic, 0 where it does not count.
        prepare: makes inputs; they live as long as what it returns.
        bf16_terms: how many products in bf16 may stand for one: 1 where both sides may be bf16, 2 where a
            float32 side is the sum of two; 0 where all are in float32.
    """

    op: str
    shape: str
    dtype: str
    bytes: int
    flops: int
    prepare: Callable[[], Versions]
    bf16_terms: int = 0


def normal(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    """Normal numbers, drawn in float32 and rounded."""
    numbers = torch.randn(*shape, device=device)
    # In place: a table of float32 is half a gigabyte.
    return (numbers if scale == 1.0 else numbers.mul_(scale)).to(dtype)


def normal_table(vocabulary: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A head or an embedding table [V, H] whose rows have a norm of about 1."""
    return normal(vocabulary, width, dtype=dtype, device=device, scale=width**-0.5)


def terms_of(dtype: torch.dtype) -> int:
    """``bf16_terms`` of the product of something float32 and a table of ``dtype``."""
    return 2 if dtype == torch.bfloat16 else 0


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for torch.float32."""
    return str(dtype).removeprefix("torch.")
