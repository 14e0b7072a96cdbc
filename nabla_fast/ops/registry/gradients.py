"""Gradients of ops called eagerly, recorded past ``torch.library``.

A call that records a gradient takes some 300 µs through a custom op's layers, 10 µs as an autograd
function. Where torch traces or transforms a call, the custom op stands for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops.registry.schema import tensors_in, with_tensors, without_tensors


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


def recorded(gradient: Gradient, compute: Callable[[list[Any]], Any], values: list[Any]) -> Any:
    """``compute(values)``, a tensor or a list of some, with its backward recorded."""
    result = _Recorded.apply(gradient, compute, without_tensors(values), *tensors_in(values))
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


@contextmanager
def _recording_of(op: str, kept: Tensor | None = None) -> Iterator[None]:
    before = _recording.op, _recording.kept
    _recording.op, _recording.kept = op, kept
    try:
        yield
    finally:
        _recording.op, _recording.kept = before


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
        ctx: Any, gradient: Gradient, compute: Callable[[list[Any]], Any], others: list, *tensors: Tensor
    ) -> Any:
        with _recording_of(gradient.op):
            result = compute(with_tensors(others, iter(tensors)))
            ctx.keeps = _recording.kept is not None
            kept = [_recording.kept] if ctx.keeps else []
        ctx.gradient, ctx.inputs = gradient, others
        ctx.output = without_tensors(result)
        ctx.save_for_backward(*kept, *tensors, *tensors_in(result))
        mark_constant(ctx, gradient.constant, result)
        return result if isinstance(result, Tensor) else tuple(result)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        saved = iter(ctx.saved_tensors)
        kept = next(saved) if ctx.keeps else None
        values, output = with_tensors([ctx.inputs, ctx.output], saved)
        gradient: Gradient = ctx.gradient
        with _recording_of(gradient.op, kept):
            results = gradient.function(
                dict(zip(gradient.names, values, strict=True)), output, list(cotangents)
            )
        by_name = dict(zip(gradient.wrt, results if len(gradient.wrt) > 1 else (results,), strict=True))
        flat: list[Tensor | None] = []
        for name, value in zip(gradient.names, values, strict=True):
            if name in by_name:
                flat.append(by_name[name])
            else:
                flat += [None] * sum(1 for _ in tensors_in(value))
        return None, None, None, *flat
