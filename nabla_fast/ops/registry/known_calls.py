"""Calls like one that was checked before: what of a call its checks and the choice of a backend look at.

Two calls are alike if they agree in every dtype, shape, stride and device, in every number and switch, in
what is forced and in whether gradients are recorded. Where no check reads a tensor's data, the second
needs none of them: on a device none does, on the CPU an op says which arguments' data its own may read.
Other calls on the CPU, and whatever is out of the ordinary (subclasses of tensors, modes, other kinds of
numbers), have no signature.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter as ModuleParameter

from nabla_fast.ops.registry.backends import forced_backends
from nabla_fast.ops.registry.layout import Layout
from nabla_fast.ops.registry.schema import Parameter, tensors_in
from nabla_fast.plans.extent import extent
from nabla_fast.plans.plan import Plans

_MOST = 512  # signatures of an op that are remembered
_PLAIN = frozenset((float, int, bool, str, type(None)))


@dataclass
class Known:
    """What is to be done for calls of one signature.

    Attributes:
        backend: its name.
        changed: places, among the call's tensors, of those that it changes in place.
        extents: bytes from the first to past the last of each tensor, where overlaps are looked for.
        plans: of the calls, where the backend's launches can be repeated without their launcher.
        records_gradient: whether autograd is told of the call.
        layout: of the calls, where it is; made for the second.
    """

    backend: str
    changed: tuple[int, ...]
    extents: tuple[int, ...] | None
    plans: Plans | None
    records_gradient: bool
    layout: Layout | None = None

    def apart(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it is certain that what is changed shares no memory with anything."""
        if self.extents is None:
            return True
        starts = [tensor.data_ptr() for tensor in tensors]
        spans = sorted(zip(starts, self.extents, strict=True))
        end = 0
        for start, length in spans:
            if start < end and length:
                return False
            end = max(end, start + length)
        return True


class KnownCalls:
    """The signatures of an op's calls that were found good."""

    def __init__(self, parameters: Sequence[Parameter], reads: Sequence[str] | None):
        self._parameters = parameters
        names = [parameter.name for parameter in parameters]
        self._reads = None if reads is None else [names.index(name) for name in reads]
        self._positional = sum(not parameter.keyword for parameter in parameters)
        # () stands for no tensors where a list is taken.
        self._rest = [(p.name, [] if p.default == () else p.default) for p in parameters]
        self._known: dict[Hashable, Known] = {}

    def arranged(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """The values of all parameters, in order, as they were given; None where they do not fit."""
        if len(args) > self._positional:
            return None
        values, used = list(args), 0
        for name, default in self._rest[len(args) :]:
            if name in kwargs:
                values.append(kwargs[name])
                used += 1
            else:
                values.append(default)
        return values if used == len(kwargs) else None

    def signature(self, values: Sequence[Any]) -> tuple[Hashable, list[Tensor]] | None:
        """Of a call, and its tensors in order."""
        tensors: list[Tensor] = []
        key = _signature(values, tensors)
        if key is None or not tensors or self._may_be_read(values, tensors):
            return None
        return (key, forced_backends(), torch.is_grad_enabled()), tensors

    def _may_be_read(self, values: Sequence[Any], tensors: Sequence[Tensor]) -> bool:
        """Whether a check may read data of the call."""
        if self._reads is None:
            return any(tensor.is_cpu for tensor in tensors)
        return any(tensor.is_cpu for place in self._reads for tensor in tensors_in((values[place],)))

    def get(self, signature: Hashable) -> Known | None:
        return self._known.get(signature)

    def remember(
        self,
        signature: tuple[Hashable, list[Tensor]],
        values: Sequence[Any],
        backend: str,
        mutated: Sequence[int],
        finds_overlaps: bool,
        records_gradient: bool,
    ) -> None:
        """Remember a call that was checked; not one whose values a backend would get in another form."""
        for parameter, value in zip(self._parameters, values, strict=True):
            if value is not None and not _canonical(parameter, value):
                return
        key, tensors = signature
        changed, place = [], 0
        for index, value in enumerate(values):
            own: list[Tensor] = []
            _signature((value,), own)
            if index in mutated:
                changed += range(place, place + len(own))
            place += len(own)
        extents = None if finds_overlaps or not changed else tuple(map(extent, tensors))
        if len(self._known) >= _MOST:
            self._known.clear()
        plans = Plans() if backend == "triton" else None
        self._known[key] = Known(backend, tuple(changed), extents, plans, records_gradient)


def _canonical(parameter: Parameter, value: Any) -> bool:
    if parameter.record is not None:
        return isinstance(value, parameter.record)
    if parameter.sequence:
        return type(value) is list
    kind = parameter.types[0].removesuffix("?")
    return kind not in ("float", "SymInt", "bool") or type(value) is _TYPES[kind]


_TYPES = {"float": float, "SymInt": int, "bool": bool}


def _signature(values: Sequence[Any], tensors: list[Tensor]) -> tuple | None:
    """Of nested lists and tuples, whose tensors are added to ``tensors``."""
    parts: list[Any] = []
    for value in values:
        kind = value.__class__
        if kind is Tensor or kind is ModuleParameter:
            if value.layout is not torch.strided or value.is_nested or value.is_neg():
                return None
            tensors.append(value)
            parts += (value.dtype, value.shape, value.stride(), value.device, value.requires_grad)
        elif kind in _PLAIN:
            # The zeros are equal, and NaN is not.
            special = kind is float and (value == 0.0 or value != value)
            parts += (kind, value.hex() if special else value)
        elif isinstance(value, (list, tuple)):
            own = _signature(value, tensors)
            if own is None:
                return None
            parts += (kind, own)
        else:
            return None
    return tuple(parts)
