"""What a transformers cache is made of, whatever its class: tensors, and which of their axes mean what."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

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


class Part(NamedTuple):
    """One row of a cache: its tokens are ``length`` columns of what grows, from ``start`` on."""

    cache: Any
    row: int
    start: int
    length: int


class CacheLayout:
    """The axes of all tensors of one model's caches.

    Args:
        axes: in the order of :func:`tensors_of`.
        counts: whether something beside tensors follows how many tokens were read.

    Attributes:
        croppable: whether a cache can be cut back to any of its tokens.
        grows: whether there are tensors that grow with each token.
        counts: as of the argument; then rows of several lengths cannot be one cache.
    """

    def __init__(self, axes: Sequence[Axes], counts: bool):
        self._axes, self.counts = list(axes), counts
        self.grows = any(a.tokens is not None for a in axes)
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

    def joined(self, parts: Sequence[Part]) -> Any:
        """One cache of the rows of several: what a pass may change.

        Keys and values of shorter rows have zeros before them, so that all end together; where they do so
        already, they are shared. States are copied.
        """
        width = max(part.length for part in parts)
        first, end = parts[0].cache, parts[0].start + parts[0].length
        together = all(part.cache is first and part.start + part.length == end for part in parts)
        rows = [part.row for part in parts]
        cut = [tensors_of(part.cache) for part in ([parts[0]] if together else parts)]
        tensors = []
        for axes, *sources in zip(self._axes, *cut, strict=True):
            if axes.rows is None:
                tensors.append(sources[0].clone())
            elif together:
                tensors.append(_of_rows(sources[0], axes, rows, slice(end - width, end)))
            else:
                pieces = [
                    _of_rows(tensor, axes, [part.row], slice(part.start, part.start + part.length))
                    for tensor, part in zip(sources, parts, strict=True)
                ]
                if axes.tokens is not None:
                    pieces = [_from_the_left(piece, axes.tokens, width) for piece in pieces]
                tensors.append(torch.cat(pieces, dim=axes.rows))
        return rebuilt(first, tensors)

    def alone(self, part: Part) -> Any:
        """A cache of one row that shares nothing."""
        cache = self.joined([part])
        return rebuilt(cache, [tensor.clone() for tensor in tensors_of(cache)])

    def states(self, cache: Any) -> Any:
        """A cache without its growing tensors, to be put into a longer one with :meth:`restored`."""
        return rebuilt(
            cache,
            [
                tensor if axes.tokens is None else tensor.new_empty(0)
                for axes, tensor in zip(self._axes, tensors_of(cache), strict=True)
            ],
        )

    def restored(self, states: Any, place: int, latest: Part) -> Any:
        """The cache of one row after fewer tokens than it has read.

        Args:
            states: from :meth:`states`, after ``latest.length`` tokens; the row is there the one at
            place: in the batch.
            latest: a cache that was read on from there.
        """
        tensors = []
        for axes, state, grown in zip(
            self._axes, tensors_of(states), tensors_of(latest.cache), strict=True
        ):
            tensor, n = (state, place) if axes.tokens is None else (grown, latest.row)
            tensor = tensor if axes.rows is None else tensor.narrow(axes.rows, n, 1)
            if axes.tokens is not None:
                tensor = tensor.narrow(axes.tokens, latest.start, latest.length)
            tensors.append(tensor)
        return rebuilt(states, tensors)


def _of_rows(tensor: Tensor, axes: Axes, rows: Sequence[int], columns: slice) -> Tensor:
    """Rows of a tensor of a cache, and of its tokens those of ``columns``; a copy of a state."""
    if list(rows) != list(range(tensor.shape[axes.rows])):
        if len(rows) == 1:
            tensor = tensor.narrow(axes.rows, rows[0], 1)
        else:
            tensor = tensor.index_select(axes.rows, torch.tensor(rows, device=tensor.device))
    # Models write into states, never into what grows.
    if axes.tokens is None:
        return tensor.clone()
    return tensor.narrow(axes.tokens, columns.start, columns.stop - columns.start)


def _from_the_left(tensor: Tensor, axis: int, width: int) -> Tensor:
    """A tensor with zeros before its entries along an axis, ``width`` of both in all."""
    shape = list(tensor.shape)
    shape[axis] = width - shape[axis]
    return torch.cat([tensor.new_zeros(shape), tensor], dim=axis) if shape[axis] else tensor


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
