"""What a launch has to do, as the description of its kernel in ``launches/`` says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, Union

if TYPE_CHECKING:
    from torch import Tensor

# Neighbouring programs whose equal loads reach the L2 cache as one: its request coalescer joins them where
# they come at the same time. 2 is assumed, the multiprocessors of a pair.
JOINED = 2

Memory: TypeAlias = Union["Tensor", tuple["Tensor", int]]


@dataclass(frozen=True)
class Product:
    """Products of a launch that one loop takes.

    Attributes:
        flops: of all programs together, padding and each term of a split operand counted.
        step: of one pass through the loop as it is written, in one program.
    """

    flops: float
    step: float


@dataclass(frozen=True)
class Work:
    """What one launch has to do.

    Attributes:
        elements: what it handles: logits, whatever is done with each; else numbers of its result.
        reads: what it reads, each byte once however often programs do: tensors, or a tensor and how many
            bytes of it.
        writes: what it writes; in place what is also among ``reads``.
        loaded: bytes that its programs load from the L2 cache together, what JOINED neighbours load alike
            once; None where each byte is loaded once.
        products: of its product loops, in the order of the code; a single one stands for all loops.
        passes: how often a program goes through a loop that holds no products itself.
    """

    elements: int
    reads: Sequence[Memory] = ()
    writes: Sequence[Memory] = ()
    loaded: float | None = None
    products: Sequence[Product] = field(default=())
    passes: float = 1.0


def size(*memory: Memory) -> int:
    """Bytes of these tensors and parts of tensors."""
    return sum(m[1] if isinstance(m, tuple) else m.numel() * m.element_size() for m in memory)


def tile_product(
    programs: int, shape: tuple[int, int], widths: Sequence[int], depth: int, terms: int
) -> Product:
    """Products of a tile of ``shape`` in each program, over ``widths`` columns, ``depth`` at a time."""
    step = 2.0 * shape[0] * shape[1] * depth * terms
    return Product(programs * step * sum(math.ceil(width / depth) for width in widths), step)


def terms(left: Tensor, right: Tensor) -> int:
    """Of a float32 operand that meets a bfloat16 one: three bfloat16 numbers hold its 24 bits."""
    import torch

    split = left.ndim == 3 or (left.dtype == torch.float32 and right.dtype == torch.bfloat16)
    return 3 if split else 1
