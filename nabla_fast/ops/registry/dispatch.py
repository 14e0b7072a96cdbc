"""An op: its registrations, the choice of a backend for a call, and the way through torch or past it."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nabla_fast.errors import BackendUnavailable, InputError, RowError, one_line
from nabla_fast.ops.overlaps import expect_apart
from nabla_fast.ops.registry.backends import (
    BACKENDS,
    PREFERENCE,
    forced_backends,
    is_available,
    warn_of_missing_kernels,
)
from nabla_fast.ops.registry.gradients import Gradient, mark_constant, recorded
from nabla_fast.ops.registry.known_calls import Known, KnownCalls
from nabla_fast.ops.registry.rules import Rule, Table, plain_value
from nabla_fast.ops.registry.schema import (
    is_record,
    read_parameters,
    tensors_in,
    with_tensors,
    without_tensors,
    write_schema,
)

# Parameters and result of an op's body, which a type checker holds calls to.
P = ParamSpec("P")
R = TypeVar("R")

_ops: dict[str, Op] = {}


@dataclass(frozen=True)
class Backend:
    """One way to compute an op."""

    run: Callable[..., Any]
    refuses: Callable[..., str | None]
    finds_overlaps: bool = False  # of what it changes in place, with a ValueError


class Op(Generic[P, R]):
    """A function with backends. Call it like the function it was made from.

    Attributes:
        body: the function itself, in plain PyTorch.
        name: its name.
        parameters: its parameters, as the schema has them.
        table: what its tensors must be.
        record: the NamedTuple that it returns, or None.
    """

    def __init__(
        self,
        body: Callable[P, R],
        arguments: Mapping[str, Rule],
        mutates: Sequence[str] = (),
        reads: Sequence[str] | None = None,
    ):
        self.body = body
        self.name = body.__name__
        self.__name__, self.__doc__, self.__module__ = body.__name__, body.__doc__, body.__module__
        self.__signature__ = inspect.signature(body)
        self.parameters = read_parameters(body)
        self.table = Table(self.name, self.parameters, arguments)
        result = typing.get_type_hints(body)["return"]
        self.record = result if is_record(result) else None

        self._keywords = [p.name for p in self.parameters if p.keyword]
        self._positional = len(self.parameters) - len(self._keywords)
        self._fields = [field for p in self.parameters for field in p.fields]
        self._mutated = [index for index, p in enumerate(self.parameters) if p.name in mutates]
        self._reads = reads
        self._gradient: Gradient | None = None
        self._check: Callable[..., None] = lambda *_, **__: None
        self._backends: dict[str, Backend] = {}
        self._preferred: tuple[str, ...] = ()  # backends of this op, in order of preference
        self.backend("torch", refuses=lambda *_, **__: None)(body)

        mutated = {field for index in self._mutated for field in self.parameters[index].fields}
        self._library_op = torch.library.custom_op(
            f"nabla_fast::{self.name}",
            self._compute_flat,
            mutates_args=mutated,
            schema=write_schema(self.parameters, mutated, result),
        )
        _ops[self.name] = self

    def __repr__(self) -> str:
        return f"<op {self.name}{self.__signature__}>"

    def __reduce__(self) -> str:
        return self.name  # a copy is the op itself, as a function's is

    # -- registration ------------------------------------------------------------------------------

    def check(self, function: Callable[..., None]) -> Callable[..., None]:
        """Register what the table of arguments cannot say, for every backend: it raises InputError.

        Of tensors on a device it reads no data: there a call like one before is not checked again.
        """
        self._check = function
        return function

    def backend(
        self, name: str, *, refuses: Callable[..., str | None], finds_overlaps: bool = False
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a function that computes the op where ``refuses(*arguments)`` is None.

        Elsewhere ``refuses`` returns one line that names the argument, as in "rows is float64 (the C++
        kernels take float32 and bfloat16)"; it reads no data, as its answer holds for calls like this one.
        Among backends that are there and take an input,
        ``PREFERENCE`` decides, whatever the order of registration. ``finds_overlaps``: the function raises
        ValueError itself where what it changes in place overlaps another argument.
        """
        if name not in BACKENDS:
            raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
        if name in self._backends:
            raise ValueError(f"{self.name} has a backend {name!r} already: {self._backends[name].run!r}")
        if not callable(refuses):
            raise TypeError(f"refuses must be a function of the op's arguments, got {refuses!r}")

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self._known = KnownCalls(self.parameters, self._reads)  # another backend may be the choice now
            self._backends[name] = Backend(function, refuses, finds_overlaps)
            self._preferred = tuple(known for known in PREFERENCE if known in self._backends)
            return function

        return register

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register the shapes and dtypes of the results, for tracing."""

        def fake_flat(*flat: Any) -> Any:
            args, kwargs = self._split(self._gather(flat))
            return self._flatten_result(function(*args, **kwargs))

        self._library_op.register_fake(fake_flat)
        return function

    def gradient(
        self, *wrt: str, constant: Sequence[str] = ()
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register ``function(arguments, outputs, cotangents) -> gradient`` of the arguments ``wrt``.

        ``arguments`` is the dict of the call, ``outputs`` the result, ``cotangents`` the list of
        gradients of its tensors; the function returns a tensor, or one for each of several arguments.
        ``constant`` names the fields of a record that have no gradient: their cotangents are zeros.
        Double backward is an error: the gradient is itself an op without one.
        """
        indices = [self._fields.index(name) for name in wrt]
        constants = tuple(self.record._fields.index(name) for name in constant)

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
                ctx.save_for_backward(*tensors_in((inputs, output)))
                ctx.others = without_tensors((inputs, output))
                mark_constant(ctx, constants, output)

            def backward(ctx: Any, *cotangents: Any) -> tuple:
                inputs, output = with_tensors(ctx.others, iter(ctx.saved_tensors))
                names = (p.name for p in self.parameters)
                arguments = dict(zip(names, self._gather(inputs), strict=True))
                outputs = output if isinstance(output, (tuple, list)) else (output,)
                # A list result has one list of cotangents; a result that nobody used has None.
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
            names = tuple(p.name for p in self.parameters)
            self._gradient = Gradient(self.name, names, wrt, constants, function)
            return function

        return register

    # -- calling -----------------------------------------------------------------------------------

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        given = signature = None
        if _nothing_special() and forward_ad._current_level < 0:
            given = self._known.arranged(args, kwargs)
            signature = given and self._known.signature(given)
            if signature and (known := self._known.get(signature[0])):
                return self._call_again(known, given, signature[1])
        values = self._bind(args, kwargs)
        if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
            self._expect_no_tangent(values)
        if (
            self._mutated
            and torch.is_grad_enabled()
            and any(tensor.requires_grad for tensor in tensors_in(values))
        ):
            raise InputError(
                f"{self.name} changes tensors in place and has no gradient: detach what requires grad"
            )
        if _is_plain(values):
            result = self._compute(values, signature and (signature, given))
            if self._mutated:
                # Kernels write through pointers, which autograd does not see.
                changed = [values[index] for index in self._mutated]
                torch.autograd.graph.increment_version(list(tensors_in(changed)))
        elif self._gradient and _is_eager(values):
            known_as = signature and (signature, given)
            layout, tensors = self._gradient.layout(values), tensors_in(values)
            result = recorded(
                self._gradient, lambda: self._compute(values, known_as, True), tensors, layout
            )
        else:
            if any(tensor.is_meta for tensor in tensors_in(values)):
                self.table.expect(values)  # the dispatcher would answer for meta tensors beside others
            # So it would, with an assertion of its own, for what is changed in place.
            if not torch.compiler.is_compiling() and any(t.is_neg() for t in tensors_in(values)):
                values = self._without_negative_views(values)
            pairs = zip(self.parameters, values, strict=True)
            result = self._library_op(*(flat for p, value in pairs for flat in p.flatten(value)))
        return self._as_record(result)

    def _call_again(self, known: Known, values: list[Any], tensors: list[Tensor]) -> Any:
        """A call like one that was checked."""
        if not known.apart(tensors):
            self._expect_apart(values)
        if known.records_gradient:
            known.layout = known.layout or self._gradient.layout(values, of_many=True)
            result = recorded(
                self._gradient, lambda: self._repeat(known, values, tensors), tensors, known.layout
            )
        else:
            result = self._repeat(known, values, tensors)
        if known.changed:
            torch.autograd.graph.increment_version([tensors[place] for place in known.changed])
        return self._as_record(result)

    def _repeat(self, known: Known, values: list[Any], tensors: list[Tensor]) -> Any:
        """The result of a call like one that was checked."""

        def compute() -> Any:
            args, kwargs = self._split(values)
            return self._run(self._backends[known.backend], args, kwargs, values)

        # A caller's autocast would round what a plan multiplies.
        if known.plans is None or torch.is_autocast_enabled(tensors[0].device.type):
            return compute()
        try:
            return known.plans.run(compute, tensors)
        except (InputError, RowError):
            raise
        except ValueError as error:
            raise self._refused(self._backends[known.backend], values, error) from error

    def _as_record(self, result: Any) -> Any:
        """A result as the body returns it."""
        return result if self.record is None or type(result) is self.record else self.record(*result)

    def chosen(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """The backend that these arguments get, to be called without checks on others like them.

        Neither converts nor checks arguments, nor records a gradient: for inner loops whose arguments
        are right by construction.
        """
        return self._choose(args, kwargs).run

    def backends(self) -> tuple[str, ...]:
        """The backends registered on this op, the plain-PyTorch one first."""
        return tuple(name for name in BACKENDS if name in self._backends)

    def _bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """The plain arguments of a call in the order of the parameters; empties ``kwargs``."""
        if len(args) > self._positional:
            raise TypeError(f"{self.name}() takes {self._positional} positional arguments, got {len(args)}")
        pairs = zip(self.parameters[: len(args)], args, strict=True)
        values = [plain_value(self.name, p, value) for p, value in pairs]
        for parameter in self.parameters[len(args) :]:
            value = kwargs.pop(parameter.name, parameter.default)
            if value is inspect.Parameter.empty:
                raise TypeError(f"{self.name}() missing argument {parameter.name!r}")
            values.append(plain_value(self.name, parameter, value))
        if kwargs:
            raise TypeError(f"{self.name}() got an unknown or a second argument {next(iter(kwargs))!r}")
        return values

    def _split(self, values: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments."""
        keywords = zip(self._keywords, values[self._positional :], strict=True)
        return values[: self._positional], dict(keywords)

    def _gather(self, flat: Sequence[Any]) -> list[Any]:
        """The values that the flat arguments of the schema stand for."""
        values, start = [], 0
        for parameter in self.parameters:
            stop = start + len(parameter.fields)
            values.append(parameter.gather(flat[start:stop]))
            start = stop
        return values

    def _flatten_result(self, result: Any) -> Any:
        """A result as the schema has it."""
        return result if isinstance(result, Tensor) else (tuple if self.record else list)(result)

    def _compute_flat(self, *flat: Any) -> Any:
        """The implementation of the ``torch.library`` op."""
        return self._flatten_result(self._compute(self._gather(flat)))

    def _compute(
        self, values: list[Any], known_as: tuple | None = None, records_gradient: bool = False
    ) -> Any:
        """The result for plain values; ``known_as``: the call's signature, and its values as given."""
        if self.table.expect(values):
            values = self._without_negative_views(values)
        args, kwargs = self._split(values)
        self._check(*args, **kwargs)
        backend = self._choose(args, kwargs)
        if self._mutated and not backend.finds_overlaps:
            self._expect_apart(values)
        if known_as:
            name = next(name for name, registered in self._backends.items() if registered is backend)
            mutated = () if records_gradient else self._mutated
            self._known.remember(*known_as, name, mutated, backend.finds_overlaps, records_gradient)
        return self._run(backend, args, kwargs, values)

    def _run(self, backend: Backend, args: list[Any], kwargs: dict[str, Any], values: list[Any]) -> Any:
        """The result of a backend for arguments that it takes."""
        device = next(tensors_in(values)).device.type
        try:
            if not torch.is_autocast_enabled(device):
                return backend.run(*args, **kwargs)
            # A caller's autocast would round what is promised in float32.
            with torch.autocast(device, enabled=False):
                return backend.run(*args, **kwargs)
        except (InputError, RowError):
            raise
        except ValueError as error:  # the C interface refuses what only a pass over the data finds
            raise self._refused(backend, values, error) from error

    def _refused(self, backend: Backend, values: list[Any], error: ValueError) -> InputError:
        """What a caller is told of a backend's error; or an InputError of its own of what overlaps."""
        if backend.finds_overlaps:
            self._expect_apart(values)
        return InputError(f"{self.name}: {one_line(error)}")

    def _without_negative_views(self, values: list[Any]) -> list[Any]:
        """The arguments with views whose sign is not in memory written out.

        Raises:
            InputError: one of them is to be changed in place.
        """
        for index in self._mutated:
            for name, tensor in self.parameters[index].named(values[index]):
                if tensor.is_neg():
                    raise InputError(
                        f"{self.name}: {name} is changed in place, and its sign is not in memory: "
                        "pass what its resolve_neg() returns"
                    )
        tensors = (tensor.resolve_neg() for tensor in tensors_in(values))
        return with_tensors(without_tensors(values), tensors)

    def _expect_no_tangent(self, values: list[Any]) -> None:
        """Raise InputError for forward-mode derivatives, of which torch's dispatcher would make zeros."""
        for parameter, value in zip(self.parameters, values, strict=True):
            for name, tensor in parameter.named(value):
                if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
                    raise InputError(
                        f"{self.name}: {name} has a tangent, and ops have no forward-mode derivative: "
                        "differentiate in reverse mode"
                    )

    def _expect_apart(self, values: list[Any]) -> None:
        """Raise InputError where what the op changes in place overlaps itself or another argument."""
        changed: list[tuple[str, Tensor]] = []
        read: list[tuple[str, Tensor]] = []
        for index, (parameter, value) in enumerate(zip(self.parameters, values, strict=True)):
            into = changed if index in self._mutated else read
            into += ((name, t) for name, t in parameter.named(value) if isinstance(t, Tensor))
        expect_apart(self.name, changed, read)

    def _choose(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Backend:
        names = forced_backends()
        for name in names or self._preferred:
            backend = self._backends.get(name)
            if not backend:
                continue
            if not names and not is_available(name):
                given = tensors_in((*args, *kwargs.values()))
                if name == "cpu" and all(tensor.device.type == "cpu" for tensor in given):
                    warn_of_missing_kernels()
                continue
            if backend.refuses(*args, **kwargs) is None:
                return backend
        reasons = (f"backend {name}: {self._refusal(name, args, kwargs)}" for name in names)
        raise BackendUnavailable(f"{self.name}: {'; '.join(reasons)}")

    def _refusal(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
        if name not in self._backends:
            return f"no such kernel (this op has: {', '.join(self.backends())})"
        return self._backends[name].refuses(*args, **kwargs)


def op(
    *, arguments: Mapping[str, Rule], mutates: Sequence[str] = (), reads: Sequence[str] | None = None
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make an :class:`Op` of a function.

    Args:
        arguments: the rule of each argument that has tensors; see :mod:`nabla_fast.ops.registry.rules`.
        mutates: names of those that it changes in place.
        reads: names of those whose data its check reads where they are on the CPU; None stands for any.
            Calls on the CPU that are like one before need no checks where none of these are there.
    """
    return lambda body: Op(body, arguments, mutates, reads)


def all_ops() -> dict[str, Op]:
    """Every op by name."""
    return dict(_ops)


def _nothing_special() -> bool:
    """Whether nothing is traced and no mode of torch's dispatcher is on."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _is_plain(values: Iterable[Any]) -> bool:
    """Whether a call needs nothing of torch's dispatcher: no gradient, no tracing, no other mode.

    A small op costs less than its way through the dispatcher.
    """
    if not _nothing_special():
        return False
    graded = torch.is_grad_enabled()
    return all(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not (graded and tensor.requires_grad)
        and not tensor.is_meta
        for tensor in tensors_in(values)
    )


def _is_eager(values: Iterable[Any]) -> bool:
    """Whether a call needs nothing of torch's dispatcher but a gradient."""
    return _nothing_special() and all(
        type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta and not tensor.is_neg()
        for tensor in tensors_in(values)
    )
