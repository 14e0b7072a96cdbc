"""Ops: the mathematics in plain PyTorch, and faster backends registered on it.

``@op`` turns a function into an :class:`Op`. Its body is the ``torch`` backend and the oracle that
every other backend is tested against. The op is also a ``torch.library`` custom op
(``torch.ops.nabla_fast.<name>``), so that ``torch.compile`` keeps it whole and autograd sees it:
the schema is read off the annotations, where a ``NamedTuple`` of tensors stands for its fields.

    @op
    def token_stats(rows: Tensor, head: Tensor | None = None, *, tau: float = 1.0) -> TokenStats: ...

    @token_stats.backend("cpu", when=lambda rows, head, **_: head is None and ...)
    def _(rows, head, *, tau): ...
"""

from __future__ import annotations

import inspect
import os
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_fast import _native, _triton
from nabla_fast.errors import BackendUnavailable, InputError

BACKENDS = ("torch", "cpu", "triton", "cuda")

_ops: dict[str, Op] = {}
_availability: dict[str, Callable[[], str | None]] = {
    "torch": lambda: None,
    "cpu": _native.why_missing,
    "triton": _triton.why_missing,
}
_forced: tuple[str, ...] | None = None  # () is the choice by input; None, what the environment says


def backend_status() -> dict[str, str | None]:
    """Each backend's name, with None if it is there or one line saying why it is not."""
    return {
        name: _availability[name]() if name in _availability else "this release has no such kernels yet"
        for name in BACKENDS
    }


def _parse_backends(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name not in BACKENDS:
            raise BackendUnavailable(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
        if why := backend_status()[name]:
            raise BackendUnavailable(f"backend {name!r} is not available: {why}")
    return tuple(names)


class use_backend:
    """Force backends for every op of this process, in order of preference, or choose again by input.

    ``use_backend("cpu", "torch")`` takes the CPU kernels and plain PyTorch where an op or an input
    has none; ``use_backend("cpu")`` raises there; ``use_backend()`` returns to the choice by device
    and dtype. Takes effect at once; as a context manager it restores the former choice at exit.
    The environment variable ``NABLA_FAST_BACKEND`` (comma-separated) sets the choice at start.

    Raises:
        BackendUnavailable: a name is unknown, or the backend is not there (the line says why).
    """

    def __init__(self, *names: str):
        global _forced
        self._former = _forced
        _forced = _parse_backends(names)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *_: object) -> None:
        global _forced
        _forced = self._former


def _forced_backends() -> tuple[str, ...]:
    if _forced is None and (names := os.environ.get("NABLA_FAST_BACKEND")):
        return _parse_backends([name.strip() for name in names.split(",") if name.strip()])
    return _forced or ()


def allowed(name: str) -> bool:
    """Whether a backend may be used: any may, unless others are forced."""
    forced = _forced_backends()
    return not forced or name in forced


def precedes(name: str, other: str) -> bool:
    """Whether a backend may be used, and is not asked for after another."""
    forced = _forced_backends()
    return allowed(name) and not (other in forced and forced.index(other) < forced.index(name))


def forced(name: str) -> bool:
    """Whether a backend is asked for by name."""
    return name in _forced_backends()


@dataclass(frozen=True)
class _Backend:
    run: Callable[..., Any]
    when: Callable[..., bool]


@dataclass(frozen=True)
class _Parameter:
    """One argument of an op: how it is written in the schema and spread over tensors."""

    name: str
    schema: tuple[str, ...]  # one type a flat argument
    fields: tuple[str, ...]  # names of the flat arguments
    record: type | None  # the NamedTuple it is gathered into, if it is one
    default: Any
    keyword: bool

    def flatten(self, value: Any) -> list[Any]:
        if self.record is None:
            return [list(value) if self.schema[0].endswith("[]") else value]
        return [None] * len(self.fields) if value is None else list(value)

    def gather(self, flat: Sequence[Any]) -> Any:
        if self.record is None:
            return flat[0]
        return None if flat[0] is None else self.record(*flat)


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def _schema_type(hint: Any) -> str:
    plain = {Tensor: "Tensor", float: "float", int: "SymInt", bool: "bool", str: "str"}
    if hint in plain:
        return plain[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union) and types.NoneType in arguments:
        (inner,) = (a for a in arguments if a is not types.NoneType)
        return _schema_type(inner) + "?"
    if origin in (list, Sequence, tuple):
        return _schema_type(arguments[0]) + "[]"
    raise TypeError(f"an op cannot take or return {hint}")


def _parameters(body: Callable[..., Any]) -> tuple[_Parameter, ...]:
    hints = typing.get_type_hints(body)
    result = []
    for name, parameter in inspect.signature(body).parameters.items():
        hint, optional = hints[name], ""
        if types.NoneType in typing.get_args(hint):
            (inner,) = (a for a in typing.get_args(hint) if a is not types.NoneType)
            if _is_record(inner):
                hint, optional = inner, "?"
        record = hint if _is_record(hint) else None
        result.append(
            _Parameter(
                name,
                ("Tensor" + optional,) * len(record._fields) if record else (_schema_type(hint),),
                tuple(f"{name}_{field}" for field in record._fields) if record else (name,),
                record,
                parameter.default,
                parameter.kind is inspect.Parameter.KEYWORD_ONLY,
            )
        )
    return tuple(result)


class Op:
    """A function with backends. Call it like the function it was made from."""

    def __init__(self, body: Callable[..., Any], mutates: Sequence[str] = ()):
        self.body = body
        self.name = body.__name__
        self.__name__, self.__doc__, self.__module__ = body.__name__, body.__doc__, body.__module__
        self.__signature__ = inspect.signature(body)
        self.parameters = _parameters(body)
        hint = typing.get_type_hints(body)["return"]
        self.record = hint if _is_record(hint) else None
        self._backends = {"torch": _Backend(body, lambda *_, **__: True)}
        self._check: Callable[..., None] = lambda *_, **__: None
        mutated = {f for p in self.parameters if p.name in mutates for f in p.fields}
        fields = [f for p in self.parameters for f in p.fields]
        self._mutates = [n for n, f in enumerate(fields) if f in mutated]
        self._library_op = torch.library.custom_op(
            f"nabla_fast::{self.name}",
            self._run,
            mutates_args=mutated,
            schema=self._schema(hint, mutated),
        )
        _ops[self.name] = self

    def _schema(self, result: Any, mutated: set[str]) -> str:
        arguments = []
        for parameter in self.parameters:
            for kind, field in zip(parameter.schema, parameter.fields, strict=True):
                if field in mutated:
                    letter = chr(ord("a") + sum("!" in a for a in arguments))
                    kind = kind.replace("Tensor", f"Tensor({letter}!)", 1)
                arguments.append(f"{kind} {field}")
        returns = (
            f"({', '.join(['Tensor'] * len(self.record._fields))})" if self.record else _schema_type(result)
        )
        return f"({', '.join(arguments)}) -> {returns}"

    # -- registration ------------------------------------------------------------------------------

    def check(self, function: Callable[..., None]) -> Callable[..., None]:
        """Register what is wrong with an input, for every backend: ``function`` raises InputError."""
        self._check = function
        return function

    def backend(self, name: str, *, when: Callable[..., bool]) -> Callable[[Callable], Callable]:
        """Register a faster way to compute the op where ``when(*arguments)`` holds.

        Among the backends that apply, the one registered last is taken.
        """

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self._backends[name] = _Backend(function, when)
            return function

        return register

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register the shapes and dtypes of the results, for tracing."""
        self._library_op.register_fake(lambda *flat: self._flatten_result(self._apply(function, flat)))
        return function

    def gradient(self, *wrt: str) -> Callable[[Callable], Callable]:
        """Register ``function(arguments, outputs, cotangents) -> gradient`` of the arguments ``wrt``.

        ``arguments`` is the dict of the call, ``outputs`` what it returned, ``cotangents`` the list of
        their gradients; the function returns a tensor, or one for each of several arguments. Double
        backward is an error: the gradient is itself an op without one.
        """
        fields = [field for p in self.parameters for field in p.fields]
        indices = [fields.index(name) for name in wrt]

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
                ctx.save_for_backward(*_tensors((inputs, output)))
                ctx.shape = _without_tensors((inputs, output))

            def backward(ctx: Any, *cotangents: Any) -> tuple:
                inputs, output = _with_tensors(ctx.shape, iter(ctx.saved_tensors))
                arguments = dict(zip((p.name for p in self.parameters), self._gather(inputs), strict=True))
                outputs = output if isinstance(output, (tuple, list)) else (output,)
                # A list result comes back as one list of cotangents; results nobody used, as None.
                flat = cotangents[0] if isinstance(output, list) else cotangents
                filled = [
                    torch.zeros_like(o) if c is None else c for o, c in zip(outputs, flat, strict=True)
                ]
                gradients = [[None] * len(value) if isinstance(value, list) else None for value in inputs]
                result = function(arguments, output, filled)
                for index, gradient in zip(indices, result if len(wrt) > 1 else (result,), strict=True):
                    gradients[index] = gradient
                return tuple(gradients)

            self._library_op.register_autograd(backward, setup_context=setup_context)
            return function

        return register

    # -- calling -----------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = []
        positional = 0
        for parameter in self.parameters:
            if positional < len(args) and not parameter.keyword:
                value = args[positional]
                positional += 1
                if parameter.name in kwargs:
                    raise TypeError(f"{self.name}() got multiple values for argument {parameter.name!r}")
            elif parameter.name in kwargs:
                value = kwargs.pop(parameter.name)
            elif parameter.default is not inspect.Parameter.empty:
                value = parameter.default
            else:
                raise TypeError(f"{self.name}() missing argument {parameter.name!r}")
            flat.extend(parameter.flatten(value))
        if kwargs or positional < len(args):
            extra = next(iter(kwargs), f"{len(args)} positional")
            raise TypeError(f"{self.name}() got an unexpected argument: {extra}")
        if self._mutates and torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(flat)):
            raise InputError(
                f"{self.name} changes tensors in place and has no gradient: detach what requires grad"
            )
        if _is_plain(flat):
            result = self._run(*flat)
            if self._mutates:
                # Kernels write through pointers, which autograd does not see.
                torch.autograd.graph.increment_version([flat[n] for n in self._mutates])
        else:
            result = self._library_op(*flat)
        return self.record(*result) if self.record else result

    def chosen(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """The backend that these arguments get, to be called without checks on others like them.

        For inner loops whose arguments are right by construction: no gradient, no tracing.
        """
        return self._choose(list(args), kwargs)

    def backends(self) -> tuple[str, ...]:
        """The backends registered on this op, the plain-PyTorch one first."""
        return tuple(self._backends)

    def _gather(self, flat: Sequence[Any]) -> Iterator[Any]:
        start = 0
        for parameter in self.parameters:
            stop = start + len(parameter.fields)
            yield parameter.gather(flat[start:stop])
            start = stop

    def _apply(self, function: Callable[..., Any], flat: Sequence[Any]) -> Any:
        args, kwargs = self._split(flat)
        return function(*args, **kwargs)

    def _split(self, flat: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        values = list(zip(self.parameters, self._gather(flat), strict=True))
        return [v for p, v in values if not p.keyword], {p.name: v for p, v in values if p.keyword}

    def _flatten_result(self, result: Any) -> Any:
        return result if isinstance(result, Tensor) else (tuple if self.record else list)(result)

    def _run(self, *flat: Any) -> Any:
        args, kwargs = self._split(flat)
        self._check(*args, **kwargs)
        run = self._choose(args, kwargs)
        device = next(_tensors((args, kwargs))).device.type
        if not torch.is_autocast_enabled(device):
            return self._flatten_result(run(*args, **kwargs))
        # A caller's autocast would round what is promised in float32.
        with torch.autocast(device, enabled=False):
            return self._flatten_result(run(*args, **kwargs))

    def _choose(self, args: list[Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
        forced = _forced_backends()
        for name in forced or reversed(self._backends):
            backend = self._backends.get(name)
            if backend and (forced or not _availability[name]()) and backend.when(*args, **kwargs):
                return backend.run
        tensor = next(_tensors((args, kwargs)))
        raise BackendUnavailable(
            f"{self.name}: no backend of {', '.join(forced)} takes {tensor.dtype} on {tensor.device}; "
            f"this op has: {', '.join(self._backends)}"
        )


def op(body: Callable[..., Any] | None = None, *, mutates: Sequence[str] = ()) -> Any:
    """Make an :class:`Op` of a function; ``mutates`` names the arguments it changes in place."""
    return Op(body, mutates) if body else lambda body: Op(body, mutates)


def all_ops() -> dict[str, Op]:
    """Every op by name."""
    return dict(_ops)


def _is_plain(flat: Sequence[Any]) -> bool:
    """Whether a call needs nothing of torch's dispatcher: no gradient, no tracing, no other mode.

    A small op costs less than its way through the dispatcher.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False
    graded = torch.is_grad_enabled()
    return all(
        type(tensor) in (Tensor, torch.nn.Parameter) and not (graded and tensor.requires_grad)
        for tensor in _tensors(flat)
    )


_HOLE = object()


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for leaf in tree:
            yield from _tensors(leaf)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _without_tensors(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return _HOLE
    return type(tree)(map(_without_tensors, tree)) if isinstance(tree, (tuple, list)) else tree


def _with_tensors(tree: Any, tensors: Iterator[Tensor]) -> Any:
    if tree is _HOLE:
        return next(tensors)
    return type(tree)(_with_tensors(t, tensors) for t in tree) if isinstance(tree, (tuple, list)) else tree
