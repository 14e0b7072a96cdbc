"""What the arguments of an op must be: a table an op, which every call is held to before any backend.

    @op(arguments={"rows": floats("N", "M"), "head": floats("V", "M")})
    def token_stats(rows: Tensor, head: Tensor | None = None, *, tau: float = 1.0) -> TokenStats: ...

An axis is a name, which stands for one number in a whole call, but one that ends in ``_t`` for one number
at each place of a list: ``cotangents`` of ``floats("N", "H_t")`` and ``tables`` of
``floats("V", "H_t")`` have equal widths place by place.
"""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nabla_fast.errors import InputError

if TYPE_CHECKING:
    from nabla_fast.ops.registry.schema import Parameter

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INT64 = 1 << 63

Axis = str | int


@dataclass(frozen=True)
class TensorRule:
    """What a tensor must be.

    Attributes:
        shapes: one or more, of which it has one.
        dtypes: of which it has one.
        like: name of another argument, whose dtype it has instead.
    """

    shapes: tuple[tuple[Axis, ...], ...]  # numbers in messages alone
    dtypes: tuple[torch.dtype, ...]
    like: str | None = None

    @functools.cached_property
    def axes(self) -> dict[int, tuple[Axis, ...]]:
        """The shape by its rank."""
        return {len(shape): shape for shape in self.shapes}

    @functools.cached_property
    def by_place(self) -> bool:
        """Whether an axis has a number at each place of a list."""
        return any(axis.endswith("_t") for shape in self.shapes for axis in shape)

    def __str__(self) -> str:
        dtypes = " or ".join(map(_short, self.dtypes))
        if self.like:
            dtypes = f"{dtypes} (as {self.like})"
        elif self.dtypes == FLOATS:
            dtypes = "floating-point"
        return f"{dtypes} {' or '.join(map(_written, self.shapes))}"


Rule = TensorRule | Mapping[str, TensorRule]  # of a record, by field


def floats(*axes: str, like: str | None = None) -> TensorRule:
    """A floating-point tensor of these axes, of any dtype or that of another argument."""
    return TensorRule((axes,), FLOATS, like)


def integers(*axes: str) -> TensorRule:
    """An int64 tensor of these axes."""
    return TensorRule((axes,), (torch.int64,))


def tensors(*shapes: tuple[str, ...], dtypes: Sequence[torch.dtype]) -> TensorRule:
    """A tensor of one of these shapes and dtypes."""
    return TensorRule(shapes, tuple(dtypes))


# -- kinds of values, which need no tensor's data ------------------------------------------------------


def plain_value(op: str, parameter: Parameter, value: Any) -> Any:
    """An argument as bodies and backends take it.

    That is a list for a sequence, a record for a tuple of its fields, Python's numbers for NumPy's.

    Raises:
        InputError: it is something else; the line names the argument.
    """
    kind = parameter.types[0]
    if value is None and kind.endswith("?"):
        return None
    if parameter.record is not None:
        return _record(op, parameter, value)
    if parameter.sequence:
        if isinstance(value, (Tensor, str, bytes, Mapping)) or not isinstance(value, Sequence):
            raise InputError(f"{op}: {parameter.name} must be a list of tensors, got {_kind(value)}")
        optional = kind == "Tensor?[]"
        return [
            part if optional and part is None else _tensor(op, f"{parameter.name}[{index}]", part)
            for index, part in enumerate(value)
        ]
    return _PLAIN[kind.removesuffix("?")](op, parameter.name, value)


def _record(op: str, parameter: Parameter, value: Any) -> Any:
    record = parameter.record
    if not isinstance(value, record):
        if not isinstance(value, (tuple, list)) or len(value) != len(record._fields):
            expected = f"{record.__name__}({', '.join(record._fields)})"
            raise InputError(f"{op}: {parameter.name} must be {expected}, got {_kind(value)}")
        value = record(*value)
    for field, part in zip(record._fields, value, strict=True):
        _tensor(op, f"{parameter.name}.{field}", part)
    return value


def _tensor(op: str, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(f"{op}: {name} must be a tensor, got {_kind(value)}")
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise InputError(f"{op}: {name} must be a dense tensor, got a {layout} one")
    return value


def plain_float(op: str, name: str, value: Any) -> Any:
    """A number as a float; a symbolic one as it is."""
    if type(value) is float or isinstance(value, torch.SymFloat):
        return value
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymInt)):
        raise InputError(f"{op}: {name} must be a number, got {_kind(value)}")
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"{op}: {name} is beyond float64's range") from None


def plain_int(op: str, name: str, value: Any) -> Any:
    """A whole number of 64 bits as an int; a symbolic one as it is."""
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise InputError(f"{op}: {name} must be a whole number, got {_kind(value)}")
    try:
        whole = operator.index(value)
    except TypeError:  # an array of several
        raise InputError(f"{op}: {name} must be a whole number, got {_kind(value)}") from None
    if not -_INT64 <= whole < _INT64:
        raise InputError(f"{op}: {name} is beyond 64 bits")
    return whole


def _bool(op: str, name: str, value: Any) -> Any:
    if isinstance(value, (bool, torch.SymBool)):
        return value
    if type(value).__name__ in ("bool", "bool_"):  # NumPy's
        return bool(value)
    raise InputError(f"{op}: {name} must be True or False, got {_kind(value)}")


_PLAIN = {"Tensor": _tensor, "float": plain_float, "SymInt": plain_int, "bool": _bool}


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    return "a tensor" if isinstance(value, Tensor) else type(value).__name__


# -- tensors -------------------------------------------------------------------------------------------


class Table:
    """The rules of one op.

    Args:
        op: its name.
        parameters: its parameters.
        rules: of every parameter that has tensors, in the order in which they are looked at: what comes
            first gives a name its number.
    """

    def __init__(self, op: str, parameters: Sequence[Parameter], rules: Mapping[str, Rule]):
        with_tensors = [p for p in parameters if p.types[0].startswith("Tensor")]
        if {p.name for p in with_tensors} != rules.keys():
            raise ValueError(
                f"{op}: rules are of {sorted(rules)}, tensors of {[p.name for p in with_tensors]}"
            )
        self._op, self._parameters = op, parameters
        self.rules = dict(rules)
        index = {p.name: n for n, p in enumerate(parameters)}
        self._indexed = [(index[name], parameters[index[name]], rule) for name, rule in rules.items()]

    def plain(self, *values: Any) -> list[Any]:
        """Arguments, one a parameter, as :func:`plain_value` makes them, and held to the table."""
        plain = [plain_value(self._op, p, value) for p, value in zip(self._parameters, values, strict=True)]
        self.expect(plain)
        return plain

    def expect(self, values: Sequence[Any]) -> bool:
        """Hold the arguments of a call to the table; whether one has a sign that is not in memory.

        Raises:
            InputError: one does not fit, or they are on different devices.
        """
        sizes: dict[str | tuple[str, int], int] = {}
        dtypes: dict[str, torch.dtype] = {}
        device: torch.device | None = None
        negative = False
        for index, parameter, rule in self._indexed:
            value = values[index]
            if value is None:
                continue
            named: Iterable[tuple[str, Tensor, TensorRule, int]]
            if isinstance(value, Tensor):
                dtypes[parameter.name] = value.dtype
                named = ((parameter.name, value, rule, 0),)
            elif parameter.record is None:
                named = (
                    (f"{parameter.name}[{place}]", tensor, rule, place)
                    for place, tensor in enumerate(value)
                    if tensor is not None
                )
            else:
                named = (
                    (f"{parameter.name}.{field}", tensor, rule[field], 0)
                    for field, tensor in value._asdict().items()
                )
            for name, tensor, of_tensor, place in named:
                self._expect_tensor(name, tensor, of_tensor, place, sizes, dtypes)
                negative = negative or tensor.is_neg()
                if device is None:
                    device = tensor.device
                elif tensor.device != device:
                    raise InputError(
                        f"{self._op}: {name} is on {tensor.device}, another device than {device}"
                    )
        return negative

    def _expect_tensor(
        self,
        name: str,
        tensor: Tensor,
        rule: TensorRule,
        place: int,
        sizes: dict[str | tuple[str, int], int],
        dtypes: dict[str, torch.dtype],
    ) -> None:
        good = tensor.dtype is dtypes[rule.like] if rule.like else tensor.dtype in rule.dtypes
        shape = tensor.shape
        axes = rule.axes.get(len(shape))
        if axes is None:
            good = False
        elif good:
            keys = [_key(axis, place) for axis in axes] if rule.by_place else axes
            for key, size in zip(keys, shape, strict=True):
                if sizes.setdefault(key, size) != size:
                    good = False
        if not good:
            known = [tuple(sizes.get(_key(a, place), a) for a in axes) for axes in rule.shapes]
            wanted = (dtypes[rule.like],) if rule.like else rule.dtypes
            shown = TensorRule(tuple(known), wanted, rule.like)
            raise InputError(
                f"{self._op}: {name} must be {shown}, got {_short(tensor.dtype)} {list(tensor.shape)}"
            )


def _key(axis: str, place: int) -> str | tuple[str, int]:
    """What an axis stands for a number under."""
    return (axis, place) if axis.endswith("_t") else axis


def _written(axes: Sequence[Axis]) -> str:
    return f"[{', '.join(map(str, axes))}]"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
