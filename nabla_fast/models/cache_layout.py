"""What a transformers cache is made of, whatever its class: tensors, and which of their axes mean what."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

# What a cache may refer to and does not own.
_FOREIGN = (nn.Module, PretrainedConfig, FunctionType, MethodType, ModuleType, type, torch.dtype)
_PLAIN = (bool, int, float, str, type(None), torch.device)


class UnreadableCache(Exception):
    """A cache has a tensor whose axes mean something that is not known here; the message says which."""


@dataclass(frozen=True)
class Axes:
    """What one tensor of a cache is indexed by.

    Attributes:
        rows: the axis of the batch; None: the tensor is the same for all of them.
        tokens: the axis that has one entry for each token read, so that it can be cut back to any of
            them; None: a state, which is that of the last token alone.
    """

    rows: int | None
    tokens: int | None


class CacheLayout:
    """The axes of all tensors of one model's caches.

    Args:
        axes: in the order of :func:`tensors_of`.
        counts: whether something beside tensors follows how many tokens were read.
    """

    def __init__(self, axes: Sequence[Axes], counts: bool):
        self._axes = list(axes)
        # Cutting a cache back leaves everything but tensors as it is.
        self.croppable = not counts and all(a.rows is None or a.tokens is not None for a in axes)

    @classmethod
    def seen(cls, few: Any, more_rows: Any, more_tokens: Any, lengths: tuple[int, int]) -> CacheLayout:
        """The layout of which three caches are examples.

        Args:
            few: of 2 rows of ``lengths[0]`` tokens.
            more_rows: of 3 rows of as many tokens.
            more_tokens: of 2 rows of ``lengths[1]`` tokens.
        Raises:
            UnreadableCache: the examples do not tell what an axis means.
        """
        windowed = _windowed(few)
        examples = [tensors_of(cache) for cache in (few, more_rows, more_tokens)]
        if len(set(map(len, examples))) > 1:
            raise UnreadableCache("a cache holds more tensors after some passes than after others")
        axes = []
        for first, wider, longer in zip(*examples, strict=True):
            if len({first.dim(), wider.dim(), longer.dim()}) > 1:
                raise UnreadableCache(f"a tensor {list(first.shape)} of the cache changes its axes")
            rows = [d for d in range(first.dim()) if first.shape[d] != wider.shape[d]]
            if len(rows) > 1 or any((first.shape[d], wider.shape[d]) != (2, 3) for d in rows):
                raise UnreadableCache(f"a tensor {list(first.shape)} of the cache has no axis of rows")
            changing = [d for d in range(first.dim()) if first.shape[d] != longer.shape[d]]
            grows = [(first.shape[d], longer.shape[d]) for d in changing] == [lengths]
            tokens = changing[0] if grows and rows and id(first) not in windowed else None
            axes.append(Axes(rows[0] if rows else None, tokens))
        return cls(axes, plain_of(few) != plain_of(more_tokens))

    def cut(self, cache: Any, rows: Sequence[int], length: int) -> Any:
        """A cache of some rows, cut to ``length`` tokens: keys and values are views, states copies."""
        return rebuilt(cache, self._cut(tensors_of(cache), rows, length))

    def joined(self, caches: Sequence[Any], rows: Sequence[int], length: int) -> Any:
        """One cache of a row of each of several caches, all cut to ``length`` tokens."""
        if all(cache is caches[0] for cache in caches):
            return self.cut(caches[0], rows, length)
        cut = [self._cut(tensors_of(cache), [row], length) for cache, row in zip(caches, rows, strict=True)]
        tensors = [
            parts[0] if axes.rows is None else torch.cat(parts, dim=axes.rows)
            for axes, parts in zip(self._axes, zip(*cut, strict=True), strict=True)
        ]
        return rebuilt(caches[0], tensors)

    def states(self, cache: Any) -> Any:
        """A cache without its growing tensors, to be put into a longer one with :meth:`restored`."""
        return rebuilt(
            cache,
            [
                tensor if axes.tokens is None else tensor.new_empty(0)
                for axes, tensor in zip(self._axes, tensors_of(cache), strict=True)
            ],
        )

    def restored(self, states: Any, latest: Any, row: tuple[int, int], length: int) -> Any:
        """The cache of one row after its first ``length`` tokens.

        Args:
            states: from :meth:`states`, after that many tokens.
            latest: a cache that was read on from there.
            row: the row's number in either.
        """
        tensors = []
        for axes, state, grown in zip(self._axes, tensors_of(states), tensors_of(latest), strict=True):
            tensor, n = (state, row[0]) if axes.tokens is None else (grown, row[1])
            tensor = tensor if axes.rows is None else tensor.narrow(axes.rows, n, 1)
            tensors.append(tensor if axes.tokens is None else tensor.narrow(axes.tokens, 0, length))
        return rebuilt(states, tensors)

    def _cut(self, tensors: Sequence[Tensor], rows: Sequence[int], length: int) -> list[Tensor]:
        cut = []
        for axes, tensor in zip(self._axes, tensors, strict=True):
            if axes.rows is not None and list(rows) != list(range(tensor.shape[axes.rows])):
                if len(rows) == 1:
                    tensor = tensor.narrow(axes.rows, rows[0], 1)
                else:
                    tensor = tensor.index_select(axes.rows, torch.tensor(rows, device=tensor.device))
            # Models write into states, never into what grows.
            cut.append(tensor.clone() if axes.tokens is None else tensor.narrow(axes.tokens, 0, length))
        return cut


def tensors_of(cache: Any) -> list[Tensor]:
    """All tensors that a cache owns, in an order that its class gives."""
    found: dict[int, Tensor] = {}
    for value in _walk(cache, set()):
        if isinstance(value, Tensor):
            found.setdefault(id(value), value)
    return list(found.values())


def plain_of(cache: Any) -> list[Any]:
    """All numbers, strings and flags that a cache owns."""
    return [value for value in _walk(cache, set()) if isinstance(value, _PLAIN)]


def rebuilt(cache: Any, tensors: Sequence[Tensor]) -> Any:
    """A copy of a cache with other tensors, in the order of :func:`tensors_of`."""
    memo: dict[int, Any] = {id(old): new for old, new in zip(tensors_of(cache), tensors, strict=True)}
    for value in _walk(cache, set(), foreign=True):
        if isinstance(value, _FOREIGN) and not isinstance(value, MethodType):
            memo[id(value)] = value
    # Methods that a model has put on its cache are bound to the copy, as deepcopy does it.
    return copy.deepcopy(cache, memo)


def each_layer(cache: Any, change: Callable[[Any], None]) -> None:
    """Call a function for every layer of a cache that has layers."""
    for layer in getattr(cache, "layers", ()):
        change(layer)


def _windowed(cache: Any) -> set[int]:
    """Tensors of layers that keep a window only: cut back, they would lack what has left it."""
    ids: set[int] = set()

    def note(layer: Any) -> None:
        if getattr(layer, "sliding_window", None) is not None:
            ids.update(map(id, tensors_of(layer)))

    each_layer(cache, note)
    return ids


def _walk(value: Any, seen: set[int], foreign: bool = False) -> Iterator[Any]:
    if isinstance(value, _PLAIN):
        yield value
        return
    if isinstance(value, _FOREIGN):
        if foreign:
            yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _walk(part, seen, foreign)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _walk(part, seen, foreign)
    elif hasattr(value, "__dict__"):
        for part in vars(value).values():
            yield from _walk(part, seen, foreign)
