"""The head of a language model: logits z = c·tanh(s·(W h + b)/c) of its final hidden states h."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_fast.models.head_rows import HeadRows
from nabla_fast.ops import (
    AdamState,
    Descent,
    TokenStats,
    dto_descent_latents,
    lm_logits,
    logits_backward,
    nll_grad,
    onehot_grad,
    onehot_grad_norm,
    token_stats,
)
from nabla_fast.ops.dto_descent_latents import descend_latents
from nabla_fast.ops.head_map import logits_of_product, product_gradient
from nabla_fast.ops.nll_grad import target_gradient
from nabla_fast.ops.onehot_grad import masked_gradient
from nabla_fast.ops.rows import accumulation_dtype, report, row_slices, row_status
from nabla_fast.ops.softmax import onehot_gradient

# Rows of W that are read at a time where they have to be put together.
_TILE = 8192


@dataclass(frozen=True)
class HeadMap:
    """What a model does to W h.

    Attributes:
        bias: b [V], or None.
        scale: s.
        softcap: c, or None.
    """

    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def options(self) -> dict[str, Any]:
        """Arguments of ops that take a head; none where logits are W h itself."""
        given = {"bias": self.bias, "scale": self.scale, "softcap": self.softcap}
        return {} if self == HeadMap() else given

    def __str__(self) -> str:
        parts = ["bias"] if self.bias is not None else []
        parts += [f"scale {self.scale:.6g}"] if self.scale != 1.0 else []
        parts += [f"soft cap {self.softcap:.6g}"] if self.softcap is not None else []
        return ", ".join(parts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadMap):
            return NotImplemented
        return self.bias is other.bias and (self.scale, self.softcap) == (other.scale, other.softcap)

    __hash__ = None


class Head(ABC):
    """A head as the loops use it; all methods take hidden states [N, H] and are without a graph.

    Attributes:
        map: what is done to W h.
        vocabulary, width: V and H of W.
        dtype, device: of W.
    """

    vocabulary: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def __init__(self, head_map: HeadMap):
        self.map = head_map

    @abstractmethod
    def with_map(self, head_map: HeadMap) -> Head:
        """The same W with another map."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """z [N, V] in float32 (float64 if ``hidden`` is)."""

    @abstractmethod
    def backward(self, dz: Tensor, z: Tensor) -> Tensor:
        """∂ℒ/∂h [N, H] of ∂ℒ/∂z [N, V] at logits z [N, V]."""

    @abstractmethod
    def stats(self, hidden: Tensor) -> TokenStats:
        """:func:`~nabla_fast.ops.token_stats` of z."""

    @abstractmethod
    def nll_grad(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """:func:`~nabla_fast.ops.nll_grad`, [N, H]."""

    @abstractmethod
    def onehot_grad(
        self, cotangents: Sequence[Tensor], tables: Sequence[Tensor], hidden: Tensor, **options: Any
    ) -> Tensor:
        """:func:`~nabla_fast.ops.onehot_grad`, [N, V]."""

    @abstractmethod
    def onehot_grad_norm(
        self, cotangents: Sequence[Tensor], tables: Sequence[Tensor], hidden: Tensor, **options: Any
    ) -> Tensor:
        """:func:`~nabla_fast.ops.onehot_grad_norm`, [N]."""

    @abstractmethod
    def descend(
        self, h: Tensor, grad: Tensor, state: AdamState, schedule: Tensor, **options: Any
    ) -> Descent:
        """:func:`~nabla_fast.ops.dto_descent_latents`, in place."""

    def chosen(self, hidden: Tensor) -> Callable[[Tensor], Tensor]:
        """:meth:`logits` for hidden states like these, in inner loops."""
        return self.logits

    def describe(self) -> str:
        """In words."""
        return str(self.map) or "plain"


class DenseHead(Head):
    """A head whose W is a tensor [V, H], which the kernels read.

    Attributes:
        weight: W, the model's own.
    """

    def __init__(self, weight: Tensor, head_map: HeadMap | None = None):
        super().__init__(head_map or HeadMap())
        self.weight = weight
        (self.vocabulary, self.width), self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self._options = self.map.options()

    def with_map(self, head_map: HeadMap) -> DenseHead:
        return DenseHead(self.weight, head_map)

    def logits(self, hidden: Tensor) -> Tensor:
        return lm_logits(hidden, self.weight, **self._options)

    def chosen(self, hidden: Tensor) -> Callable[[Tensor], Tensor]:
        run, options = lm_logits.chosen(hidden, self.weight, **self._options), self._options
        return lambda states: run(states, self.weight, **options)

    def backward(self, dz: Tensor, z: Tensor) -> Tensor:
        return logits_backward(product_gradient(dz, z, self.map.scale, self.map.softcap), self.weight)

    def stats(self, hidden: Tensor) -> TokenStats:
        return token_stats(hidden, self.weight, **self._options)

    def nll_grad(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return nll_grad(hidden, self.weight, tokens, **self._options)

    def onehot_grad(
        self, cotangents: Sequence[Tensor], tables: Sequence[Tensor], hidden: Tensor, **options: Any
    ) -> Tensor:
        return onehot_grad(cotangents, tables, hidden, self.weight, **options, **self._options)

    def onehot_grad_norm(
        self, cotangents: Sequence[Tensor], tables: Sequence[Tensor], hidden: Tensor, **options: Any
    ) -> Tensor:
        return onehot_grad_norm(cotangents, tables, hidden, self.weight, **options, **self._options)

    def descend(
        self, h: Tensor, grad: Tensor, state: AdamState, schedule: Tensor, **options: Any
    ) -> Descent:
        return dto_descent_latents(h, self.weight, grad, state, schedule, **options, **self._options)


class TiledHead(Head):
    """A head whose W is put together tile by tile: quantized, or with a low-rank adapter beside it.

    No copy of W is made: every call reads its tiles anew, so that it follows what is trained. Logits of
    some rows exist at a time, products are those of :func:`~nabla_fast.ops.lm_logits` with tiles.
    """

    def __init__(self, rows: HeadRows, head_map: HeadMap | None = None):
        super().__init__(head_map or HeadMap())
        self._rows = rows
        (self.vocabulary, self.width), self.dtype, self.device = rows.shape, rows.dtype, rows.device

    def with_map(self, head_map: HeadMap) -> TiledHead:
        return TiledHead(self._rows, head_map)

    def describe(self) -> str:
        return f"{self._rows.kind}{', ' * bool(str(self.map))}{self.map}"

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.vocabulary, _TILE):
            place = slice(start, min(start + _TILE, self.vocabulary))
            yield place, self._rows.tile(place)

    def logits(self, hidden: Tensor) -> Tensor:
        z = hidden.new_empty(len(hidden), self.vocabulary, dtype=accumulation_dtype(hidden))
        for place, tile in self._tiles():
            z[:, place] = lm_logits(hidden, tile)
        return logits_of_product(z, self.map.bias, self.map.scale, self.map.softcap)

    def backward(self, dz: Tensor, z: Tensor) -> Tensor:
        du = product_gradient(dz, z, self.map.scale, self.map.softcap)
        grad = du.new_zeros(len(du), self.width)
        for place, tile in self._tiles():
            grad += logits_backward(du[:, place], tile)
        return grad

    def stats(self, hidden: Tensor) -> TokenStats:
        parts = [token_stats(self.logits(hidden[rows])) for rows in self._slices(hidden)]
        return TokenStats(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def nll_grad(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        gradients = []
        for rows in self._slices(hidden):
            z = self.logits(hidden[rows])
            gradients.append(self.backward(target_gradient(z, tokens[rows]), z))
        return torch.cat(gradients)

    def onehot_grad(
        self,
        cotangents: Sequence[Tensor],
        tables: Sequence[Tensor],
        hidden: Tensor,
        *,
        nll_coeff: float,
        token_maps: Sequence[Tensor | None] = (),
    ) -> Tensor:
        dtype = accumulation_dtype(hidden, *cotangents)
        z = self.logits(hidden.to(dtype))
        report("onehot_grad", row_status(z))
        grad = onehot_gradient(cotangents, tables, None, dtype, token_maps)
        return masked_gradient(grad, z, nll_coeff)

    def onehot_grad_norm(
        self, cotangents: Sequence[Tensor], tables: Sequence[Tensor], hidden: Tensor, **options: Any
    ) -> Tensor:
        norms = []
        for rows in self._slices(hidden):
            parts = [cotangent[rows] for cotangent in cotangents]
            norms.append(self.onehot_grad(parts, tables, hidden[rows], **options).norm(dim=-1))
        return torch.cat(norms)

    def descend(
        self, h: Tensor, grad: Tensor, state: AdamState, schedule: Tensor, **options: Any
    ) -> Descent:
        return descend_latents(self.logits, self.backward, h, grad, state, schedule, **options)

    def _slices(self, hidden: Tensor) -> Iterator[slice]:
        """Slices of rows, at least one; few where the vocabulary is large, as each reads all tiles."""
        return iter([*row_slices(len(hidden), math.ceil(self.vocabulary / 8))] or [slice(0, 0)])
