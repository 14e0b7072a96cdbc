"""Where tensors lie in the arguments and the result of a call whose backward is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nabla_fast.ops.registry.schema import tensors_in, with_tensors, without_tensors


class Layout:
    """Of one call, or of calls alike.

    Attributes:
        values: a function of the call's tensors, in order, that returns its arguments.
        places: of each of these tensors, the index of its gradient among those of ``wrt``, or None.
    """

    def __init__(
        self, names: Sequence[str], wrt: Sequence[str], values: Sequence[Any], *, of_many: bool = False
    ):
        """
        Args:
            names: of the arguments.
            wrt: of those that have a gradient, each a tensor.
            values: the arguments.
            of_many: whether it is to stand for more calls, so that it pays to write functions for them.
        """
        self._putting_back = _written if of_many else _walking
        self._result: Callable[[Sequence[Tensor]], Any] | None = None
        self.values = self._putting_back(values)
        self.places: list[int | None] = []
        for name, value in zip(names, values, strict=True):
            if name in wrt:
                self.places.append(wrt.index(name))
            else:
                self.places += [None for _ in tensors_in(value)]

    def result(self, result: Any) -> Callable[[Sequence[Tensor]], Any]:
        """A function of the tensors of a result, in order, that returns it."""
        if self._result is None:
            self._result = self._putting_back(result)
        return self._result


def _walking(tree: Any) -> Callable[[Sequence[Tensor]], Any]:
    """A function of the tensors of nested lists and tuples, in order, that returns these."""
    others = without_tensors(tree)
    return lambda tensors: with_tensors(others, iter(tensors))


def _written(tree: Any) -> Callable[[Sequence[Tensor]], Any]:
    """As :func:`_walking`: it takes a tenth of the time, and some 60 µs to make."""
    constants: dict[str, Any] = {}
    count = 0

    def constant(value: Any) -> str:
        name = f"c{len(constants)}"
        constants[name] = value
        return name

    def text(tree: Any) -> str:
        nonlocal count
        if isinstance(tree, Tensor):
            count += 1
            return f"t[{count - 1}]"
        if not isinstance(tree, (tuple, list)):
            return constant(tree)
        branches = "".join(f"{text(branch)}, " for branch in tree)
        if hasattr(tree, "_fields"):
            return f"{constant(type(tree))}({branches})"
        return f"[{branches}]" if isinstance(tree, list) else f"({branches})"

    return eval(f"lambda t: {text(tree)}", constants)
