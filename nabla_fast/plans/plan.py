"""Plans: calls of an op repeated with other tensors, without its launcher's Python.

A launcher's work in Python (sizes, views, parts of a problem, arguments of kernels) costs several times
what its launches do, and depends on nothing but the signature of the call and its addresses modulo 16. So
one call of a signature that comes often is recorded, and later ones run a function written from the notes:
each tensor is an offset from an argument or from memory that the function makes. The kernels are those of
the launcher, with the same arguments and in the same order.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast._triton import interpreted
from nabla_fast.plans.recording import Launch, Memory, Recorder, View, recorder

CALLS_BEFORE = 3  # by the launcher: to record one costs as much as some ten of them
_ATTEMPTS = 3  # at recording calls of one signature
_MOST = 64  # plans of one signature
_MOST_BYTES = 64_000_000  # beside results, which a launcher takes a part at a time
_ALIGNED = 256  # bytes, of each memory in the one that only kernels see

Plan = Callable[[Callable[[], Any], Sequence[Tensor], Sequence[int]], Any]

# Launches for AMD's GPUs are Triton's own, and the interpreter needs no plans.
_enabled = not torch.version.hip and not interpreted()
_configuration: tuple[object, ...] = ()  # what launchers were told to choose, by open blocks of all threads
_lock = threading.Lock()


@contextlib.contextmanager
def enabled(whether: bool) -> Iterator[None]:
    """Inside, plans are used or not: also in the interpreter, where tests look at them."""
    global _enabled
    former, _enabled = _enabled, whether
    try:
        yield
    finally:
        _enabled = former


@contextlib.contextmanager
def other_configuration() -> Iterator[None]:
    """Inside, launchers may choose otherwise: plans of outside are not used, nor those of inside later."""
    global _configuration
    own = object()
    with _lock:
        _configuration = (*_configuration, own)
    try:
        yield
    finally:
        with _lock:
            _configuration = tuple(one for one in _configuration if one is not own)


class Plans:
    """Of the calls of one signature."""

    def __init__(self) -> None:
        self._plans: dict[tuple, Plan] = {}
        self._calls: dict[tuple, int] = {}  # that were no plan's
        self.reason: str | None = None  # why the last recording made no plan

    def run(self, compute: Callable[[], Any], tensors: Sequence[Tensor]) -> Any:
        """The result of ``compute()``, the call with these tensors, by a plan where there is one."""
        if not _enabled:
            return compute()
        addresses = [tensor.data_ptr() for tensor in tensors]
        # Launchers may look at addresses modulo 16, and arguments may be one tensor.
        key = (_configuration, *[address & 15 for address in addresses])
        if len(set(addresses)) < len(addresses):
            key += tuple(map(addresses.index, addresses))
        plan = self._plans.get(key)
        if plan is not None:
            return plan(compute, tensors, addresses)
        return self._recorded(key, compute, tensors)

    def _recorded(self, key: tuple, compute: Callable[[], Any], tensors: Sequence[Tensor]) -> Any:
        calls = self._calls.get(key, 0)
        if calls >= CALLS_BEFORE + _ATTEMPTS or recorder() is not None:
            return compute()
        if key not in self._calls and len(self._calls) >= _MOST:
            oldest = next(iter(self._calls))
            del self._calls[oldest]
            self._plans.pop(oldest, None)
        self._calls[key] = calls + 1
        if calls < CALLS_BEFORE:
            return compute()
        with Recorder(tensors) as notes:
            result = compute()
            written = None if notes.reason else _written(notes, result)
        self.reason = notes.reason
        if written is not None:
            self._plans[key] = written
        return result


def _written(notes: Recorder, result: Any) -> Plan | None:
    """The plan; None, with the reason in the notes, where a result is not memory that the call made."""
    writer = _Writer(notes)
    try:
        writer.write(result)
    except _NotMade as error:
        notes.refuse(str(error))
        return None
    return writer.function()


class _NotMade(Exception):
    """A tensor cannot be made by a plan."""


class _Writer:
    """Writes a plan's text.

    Arguments of the call are ``t0, t1, …``, their addresses ``p0, p1, …``; so are memories that it makes.
    Constants are ``c0, c1, …``.
    """

    def __init__(self, notes: Recorder):
        self._notes = notes
        self._names: dict[str, Any] = {"empty_strided": torch.empty_strided, "as_strided": torch.as_strided}
        self._constants: dict[int, str] = {}
        self._views: dict[View, str] = {}
        self._lines: list[str] = []
        self._offsets: dict[int, int] = {}  # in the memory that only kernels see
        self._sums: dict[tuple[str, int], str] = {}  # of an address and an offset
        self._addressed: set[int] = set()

    def write(self, result: Any) -> None:
        """All of it.

        Args:
            result: of the call.
        """
        notes = self._notes
        returned = self._with_views(result)
        as_tensors = {v.memory for v in _views_in(returned)}
        for step in notes.steps:
            of_step = {v.memory for v in _views_in((step.args, getattr(step, "kwargs", {})))}
            if isinstance(step, Launch):
                self._addressed |= of_step
            else:
                as_tensors |= of_step
        made = {n for n, m in enumerate(notes.memories) if n >= notes.inputs}
        scratch = made - {v.memory for v in _views_in(returned)}
        if sum(notes.memories[n].end - notes.memories[n].start for n in scratch) > _MOST_BYTES:
            raise _NotMade("the call makes much memory beside its results")
        self._begin()
        self._make(as_tensors)
        by_step = {m.made_by: n for n, m in enumerate(notes.memories) if m.made_by is not None}
        for number, step in enumerate(notes.steps):
            if isinstance(step, Launch):
                self._launch(step)
                continue
            arguments = [self._tensor(arg) for arg in step.args]
            arguments += (f"{name}={self._tensor(arg)}" for name, arg in step.kwargs.items())
            call = f"{self._constant(step.function)}({', '.join(arguments)})"
            if number in by_step:
                made = by_step[number]
                self._lines.append(f"t{made} = {call}")
                if made in self._addressed:
                    self._lines.append(f"p{made} = t{made}.data_ptr()")
            else:
                self._lines.append(call)
        self._lines.append(f"return {self._tensor(returned)}")

    def function(self) -> Plan:
        """What was written."""
        guards = [
            f"{self._constant(function)}() == {self._constant(value)}"
            for function, value in self._notes.guards
        ]
        lines = [f"if not ({' and '.join(guards)}):", "    return compute()"] if guards else []
        if self._notes.contexts:
            contexts = ", ".join(f"{self._constant(context)}()" for context in self._notes.contexts)
            lines += [f"with {contexts}:", *(f"    {line}" for line in self._lines)]
        else:
            lines += self._lines
        text = "def plan(compute, tensors, addresses):\n" + "".join(f"    {line}\n" for line in lines)
        exec(compile(text, "<plan>", "exec"), self._names)
        return self._names["plan"]

    def _begin(self) -> None:
        names = range(self._notes.inputs)
        self._lines.append(f"{''.join(f't{n}, ' for n in names)} = tensors")
        self._lines.append(f"{''.join(f'p{n}, ' for n in names)} = addresses")
        for launch in self._notes.steps:
            if isinstance(launch, Launch):
                stream, device = self._constant(launch.stream), self._constant(launch.device)
                self._lines.append(f"stream = {stream}({device})")
                break

    def _make(self, as_tensors: set[int]) -> None:
        """Memory: a tensor of its own for what torch is to see, one for all the rest."""
        end = 0
        hidden: list[Memory] = []
        for number, memory in enumerate(self._notes.memories):
            if number < self._notes.inputs or memory.made_by is not None:
                continue
            if number in as_tensors:
                self._lines.append(f"t{number} = {self._empty(memory.size, memory.stride, memory)}")
                if number in self._addressed:
                    self._lines.append(f"p{number} = t{number}.data_ptr()")
            elif number in self._addressed:
                self._offsets[number] = end
                end += -(-(memory.end - memory.start) // _ALIGNED) * _ALIGNED
                hidden.append(memory)
        if hidden:
            self._lines.append(f"hidden = {self._empty((end,), (1,), hidden[0], torch.uint8)}")
            self._lines.append("h = hidden.data_ptr()")

    def _empty(
        self, size: tuple[int, ...], stride: tuple[int, ...], like: Memory, dtype: torch.dtype | None = None
    ) -> str:
        kind, device = self._constant(dtype or like.dtype), self._constant(like.device)
        return f"empty_strided({size}, {stride}, dtype={kind}, device={device})"

    def _launch(self, launch: Launch) -> None:
        values = [*map(self._constant, launch.before), "stream", *map(self._constant, launch.middle)]
        values += map(self._address, launch.args)
        self._lines.append(f"{self._constant(launch.run)}({', '.join(values)})")

    def _address(self, value: Any) -> str:
        """A kernel's argument."""
        if isinstance(value, View):
            if value.memory in self._offsets:
                offset = self._offsets[value.memory] + value.offset
                return self._sum("h", offset)
            return self._sum(f"p{value.memory}", value.offset)
        if type(value) is tuple and any(True for _ in _views_in(value)):
            return f"({''.join(f'{self._address(part)}, ' for part in value)})"
        return self._constant(value)

    def _sum(self, name: str, offset: int) -> str:
        """An address of a memory, added up before the first launch that takes it."""
        if not offset:
            return name
        if (name, offset) not in self._sums:
            self._sums[name, offset] = f"a{len(self._sums)}"
            self._lines.append(f"{self._sums[name, offset]} = {name} + {offset}")
        return self._sums[name, offset]

    def _tensor(self, value: Any) -> str:
        """A function's argument, or a result."""
        if isinstance(value, View):
            return self._viewed(value)
        if isinstance(value, (list, tuple)) and any(True for _ in _views_in(value)):
            parts = "".join(f"{self._tensor(part)}, " for part in value)
            if type(value) is list:
                return f"[{parts}]"
            return f"({parts})" if type(value) is tuple else f"{self._constant(type(value))}({parts})"
        if type(value) is dict:
            parts = (f"{self._constant(key)}: {self._tensor(part)}, " for key, part in value.items())
            return f"{{{''.join(parts)}}}"
        return self._constant(value)

    def _viewed(self, view: View) -> str:
        memory, name = self._notes.memories[view.memory], f"t{view.memory}"
        if view.offset == 0 and view[2:] == (memory.size, memory.stride, memory.dtype):
            return name
        if view.dtype.itemsize != memory.dtype.itemsize or view.offset % memory.dtype.itemsize:
            raise _NotMade("a tensor has wider or narrower elements than the memory that it lies in")
        if view not in self._views:
            offset = str(view.offset // memory.dtype.itemsize)
            if view.memory < self._notes.inputs or memory.made_by is not None:
                offset = f"{name}.storage_offset() + {offset}"
            text = f"as_strided({name}, {view.size}, {view.stride}, {offset})"
            if view.dtype != memory.dtype:
                text += f".view({self._constant(view.dtype)})"
            self._views[view] = f"v{len(self._views)}"
            self._lines.append(f"{self._views[view]} = {text}")
        return self._views[view]

    def _constant(self, value: Any) -> str:
        if value is None or type(value) is bool or (type(value) is int and value >= 0):
            return repr(value)
        name = self._constants.setdefault(id(value), f"c{len(self._constants)}")
        self._names[name] = value  # kept, so that no other gets its id
        return name

    def _with_views(self, result: Any) -> Any:
        """The call's result with Views in place of tensors."""
        if isinstance(result, Tensor):
            view = self._notes.view(result)
            if view is None or view.memory < self._notes.inputs or type(result) is not Tensor:
                raise _NotMade("a result is not made by the call")
            return view
        if isinstance(result, (list, tuple)):
            parts = [self._with_views(part) for part in result]
            return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
        return result


def _views_in(tree: Any) -> Iterator[View]:
    if isinstance(tree, View):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from _views_in(branch)
    elif isinstance(tree, dict):
        yield from _views_in(list(tree.values()))
