"""Gradients of ops called eagerly, recorded past ``torch.library``.

A call that records a gradient takes some 300 µs through a custom op's layers, 10 µs as an autograd
function. Where torch traces or transforms a call, the custom op stands for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops.registry.layout import Layout
from nabla_fast.ops.registry.schema import tensors_in


@dataclass(frozen=True)
class Gradient:
    """The backward of an op.

    Attributes:
        op: name of the op.
        names: of the op's parameters, in order.
        wrt: of those that have a gradient, each a tensor.
        constant: places, among the tensors of the result, of those that have none.
        function: (arguments by name, the result, cotangents of its tensors) → a gradient, or one for each
            of several ``wrt``.
    """

    op: str
    names: tuple[str, ...]
    wrt: tuple[str, ...]
    constant: tuple[int, ...]
    function: Callable[..., Any]

    def layout(self, values: Sequence[Any], *, of_many: bool = False) -> Layout:
        """Of a call with these arguments, as :class:`Layout` has it."""
        return Layout(self.names, self.wrt, values, of_many=of_many)


def recorded(
    gradient: Gradient, compute: Callable[[], Any], tensors: Iterable[Tensor], layout: Layout
) -> Any:
    """``compute()``, a tensor or a list of some, with its backward recorded.

    Args:
        tensors: of the call, in order.
        layout: of the call.
    """
    result = _Recorded.apply(gradient, compute, layout, *tensors)
    return list(result) if type(result) is tuple else result


def mark_constant(ctx: Any, places: Sequence[int], result: Any) -> None:
    """Tell autograd which tensors of a result have no gradient."""
    if places:
        ctx.mark_non_differentiable(*(result[place] for place in places))


class _Recording(threading.local):
    """The call that this thread is recording, or taking the gradient of."""

    op: str | None = None
    kept: Tensor | None = None


_recording = _Recording()


def is_recorded(op: str) -> bool:
    """Whether the call of ``op`` at work has its backward recorded, so that :func:`keep` is of use."""
    return _recording.op == op


def keep(tensor: Tensor) -> None:
    """Keep a tensor for the backward of the call at work, which finds it by :func:`kept`."""
    _recording.kept = tensor


def kept(op: str) -> Tensor | None:
    """What the forward of ``op`` has kept for the backward at work."""
    return _recording.kept if _recording.op == op else None


class _Recorded(torch.autograd.Function):
    """An op whose gradient is a function of its arguments."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Gradient, compute: Callable[[], Any], layout: Layout, *tensors: Tensor
    ) -> Any:
        before = _recording.op, _recording.kept
        _recording.op, _recording.kept = gradient.op, None
        try:
            result = compute()
            kept = () if _recording.kept is None else (_recording.kept,)
        finally:
            _recording.op, _recording.kept = before
        ctx.gradient, ctx.layout, ctx.keeps = gradient, layout, len(kept)
        ctx.result = layout.result(result)
        ctx.save_for_backward(*kept, *tensors, *tensors_in(result))
        mark_constant(ctx, gradient.constant, result)
        return result if isinstance(result, Tensor) else tuple(result)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        gradient: Gradient = ctx.gradient
        layout: Layout = ctx.layout
        saved = ctx.saved_tensors
        first = ctx.keeps  # of the call's tensors; before them lies what the forward has kept
        after = first + len(layout.places)
        values, result = layout.values(saved[first:after]), ctx.result(saved[after:])
        arguments = dict(zip(gradient.names, values, strict=True))
        before = _recording.op, _recording.kept
        _recording.op, _recording.kept = gradient.op, saved[0] if first else None
        try:
            results = gradient.function(arguments, result, list(cotangents))
        finally:
            _recording.op, _recording.kept = before
        if len(gradient.wrt) == 1:
            results = (results,)
        elif len(results) != len(gradient.wrt):
            raise ValueError(f"{gradient.op}: {len(results)} gradients of {len(gradient.wrt)} arguments")
        return None, None, None, *[None if place is None else results[place] for place in layout.places]
