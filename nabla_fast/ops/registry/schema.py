"""A Python signature as a ``torch.library`` schema, and a call's arguments as the flat list it takes.

``torch.library`` knows tensors, numbers and lists. A ``NamedTuple`` of tensors, a record for short, is
spread over its fields: ``noise: GumbelNoise`` becomes ``Tensor noise_seed, Tensor noise_position``.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_PLAIN_TYPES = {Tensor: "Tensor", float: "float", int: "SymInt", bool: "bool", str: "str"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of an op, and the flat arguments that stand for it in the schema."""

    name: str
    fields: tuple[str, ...]  # names of the flat arguments; (name,) unless it is a record
    types: tuple[str, ...]  # their schema types
    record: type | None  # the NamedTuple, if it is one
    sequence: bool
    default: Any
    keyword: bool  # keyword-only

    def flatten(self, value: Any) -> list[Any]:
        """The flat arguments that stand for a plain value."""
        if self.record is None:
            return [value]
        return [None] * len(self.fields) if value is None else list(value)

    def named(self, value: Any) -> list[tuple[str, Any]]:
        """The parts of a plain value, each with the name that a caller knows it by."""
        if self.sequence:
            return [(f"{self.name}[{index}]", part) for index, part in enumerate(value)]
        if self.record is None or value is None:
            return [(self.name, value)]
        return [(f"{self.name}.{field}", part) for field, part in value._asdict().items()]

    def gather(self, flat: Sequence[Any]) -> Any:
        """The value that flat arguments stand for."""
        if self.record is None:
            return flat[0]
        return None if flat[0] is None else self.record(*flat)


def is_record(hint: Any) -> bool:
    """Whether an annotation is a NamedTuple."""
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def read_parameters(body: Callable[..., Any]) -> tuple[Parameter, ...]:
    """The parameters of an annotated function, in order."""
    hints = typing.get_type_hints(body)
    return tuple(
        _read_parameter(name, hints[name], parameter)
        for name, parameter in inspect.signature(body).parameters.items()
    )


def write_schema(parameters: Sequence[Parameter], mutated: Set[str], result: Any) -> str:
    """The schema of an op, as in ``(Tensor(a!) z, float tau) -> Tensor``.

    Args:
        parameters: of the op.
        mutated: names of the flat arguments that the op changes in place.
        result: annotation of what it returns.
    """
    arguments = []
    aliases = 0
    for parameter in parameters:
        for field, kind in zip(parameter.fields, parameter.types, strict=True):
            if field in mutated:
                kind = kind.replace("Tensor", f"Tensor({chr(ord('a') + aliases)}!)", 1)
                aliases += 1
            arguments.append(f"{kind} {field}")
    returns = f"({', '.join(['Tensor'] * len(result._fields))})" if is_record(result) else _type(result)
    return f"({', '.join(arguments)}) -> {returns}"


def _read_parameter(name: str, hint: Any, parameter: inspect.Parameter) -> Parameter:
    keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
    inner = _without_none(hint)
    if not is_record(inner):
        kind = _type(hint)
        return Parameter(name, (name,), (kind,), None, kind.endswith("[]"), parameter.default, keyword)
    kind = "Tensor" if inner is hint else "Tensor?"
    fields = tuple(f"{name}_{field}" for field in inner._fields)
    return Parameter(name, fields, (kind,) * len(fields), inner, False, parameter.default, keyword)


def _type(hint: Any) -> str:
    """The schema's word for an annotation."""
    if hint in _PLAIN_TYPES:
        return _PLAIN_TYPES[hint]
    if (inner := _without_none(hint)) is not hint:
        return _type(inner) + "?"
    if typing.get_origin(hint) in (list, Sequence, tuple):
        return _type(typing.get_args(hint)[0]) + "[]"
    raise TypeError(f"an op cannot take or return {hint}")


def _without_none(hint: Any) -> Any:
    """T for T | None; any other annotation as it is."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint
    inner = [argument for argument in typing.get_args(hint) if argument is not types.NoneType]
    return inner[0] if len(inner) == 1 else hint


# -- tensors in nested arguments -----------------------------------------------------------------------

_PLACE = object()  # stands where a tensor was taken out


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested lists and tuples, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from tensors_in(branch)


def without_tensors(tree: Any) -> Any:
    """Nested lists and tuples with a mark in place of each tensor."""
    if isinstance(tree, Tensor):
        return _PLACE
    return _like(tree, map(without_tensors, tree)) if isinstance(tree, (tuple, list)) else tree


def with_tensors(tree: Any, tensors: Iterator[Tensor]) -> Any:
    """The inverse of :func:`without_tensors`, given the tensors in order."""
    if tree is _PLACE:
        return next(tensors)
    if not isinstance(tree, (tuple, list)):
        return tree
    return _like(tree, (with_tensors(branch, tensors) for branch in tree))


def _like(tree: Any, branches: Iterator[Any]) -> Any:
    """A list, tuple or record of the same type."""
    return type(tree)(*branches) if hasattr(tree, "_fields") else type(tree)(branches)
