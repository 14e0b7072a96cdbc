"""Notes of what a call of an op put on a device's queue, from which a plan repeats it.

Most of it is seen: a :class:`Recorder` is a mode of torch's dispatcher. Launchers tell of what is not:
kernels by :meth:`Recorder.launch`, other functions by :func:`step`. A recorder that cannot know what to
repeat (a number read from the device, a shape that depends on data, a tensor that is neither an argument
nor made by the call) says why in ``reason`` and notes no more; the call itself goes on. What no dispatcher
sees is not seen here: the numbers of a tensor on the CPU by ``tolist()`` or ``numpy()``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nabla_fast.plans.extent import extent

_MOST_STEPS = 512  # of a call: beside more, a launcher's Python is little
# Memory is held until the call has ended. What is larger than a piece is a result or all that there is.
_PIECE, _MOST_BYTES = 64_000_000, 128_000_000

_LEAVES = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_DEPENDS_ON_DATA = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}

_aten = torch.ops.aten
_NEW = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
    _aten.empty_like.default,
}


class Memory(NamedTuple):
    """An argument of the call, or memory that it makes."""

    start: int
    end: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    made_by: int | None  # the step whose result it is; None: an argument, or empty memory


class View(NamedTuple):
    """A tensor as a part of a memory."""

    memory: int
    offset: int  # bytes
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Launch(NamedTuple):
    """``run(*before, stream(device), *middle, *args)``; Views stand for addresses."""

    run: Callable[..., None]
    before: tuple
    stream: Callable[[int], int]
    device: int
    middle: tuple
    args: tuple


class Step(NamedTuple):
    """``function(*args, **kwargs)``; Views stand for tensors."""

    function: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]


class _Unknown(Exception):
    """What is to be noted cannot be."""


class _Thread(threading.local):
    recorder: Recorder | None = None


_thread = _Thread()


def recorder() -> Recorder | None:
    """Of the call that this thread records."""
    return _thread.recorder


def step(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """``function(*args, **kwargs)``, which a plan repeats. It returns nothing that is of use."""
    if _thread.recorder is None:
        function(*args, **kwargs)
    else:
        _thread.recorder.step(function, args, kwargs)


class Recorder(TorchDispatchMode):
    """Notes of one call; entered around it.

    Attributes:
        memories: first the call's tensors, then what it makes.
        steps: in order.
        contexts: functions whose context managers the steps have to run in.
        guards: functions and what they all have to return for launches to be made without their launcher.
        reason: why there is no plan, or None.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self.memories: list[Memory] = []
        self.steps: list[Launch | Step] = []
        self.contexts: list[Callable[[], Any]] = []
        self.guards: list[tuple[Callable[[], Any], Any]] = []
        self.reason: str | None = None
        self.inputs = len(tensors)
        self._kept: list[Tensor] = []  # so that no address is given twice
        self._bytes = 0
        self._paused = False
        for tensor in tensors:
            self._add(tensor, None)

    def __enter__(self) -> Recorder:
        super().__enter__()
        _thread.recorder = self
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            _thread.recorder = None
        finally:
            super().__exit__(*error)
            self._kept.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused or self.reason:
            return func(*args, **kwargs)
        made = func in _NEW
        if not made:
            if not _DEPENDS_ON_DATA.isdisjoint(func.tags):
                self.refuse(f"what {func} returns depends on data")
            self._note(lambda: Step(func, self._noted(args), self._noted(kwargs)))
        with self.paused():  # an op of ours is one step, whatever it launches
            result = func(*args, **kwargs)
        if made:
            self._add(result, None)
        else:
            self._keep_result(result, func.is_view)
        return result

    def refuse(self, reason: str) -> None:
        """Note no more; the first reason stays."""
        self.reason = self.reason or reason
        self._kept.clear()

    def step(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
        """As the function :func:`step`."""
        if not self._paused:
            self._note(lambda: Step(function, self._noted(args), self._noted(kwargs)))
        with self.paused():
            function(*args, **kwargs)

    def launch(
        self,
        run: Callable[..., None],
        before: tuple,
        stream: Callable[[int], int],
        device: int,
        middle: tuple,
        args: tuple,
        guards: Sequence[tuple[Callable[[], Any], Any]],
    ) -> None:
        """Note a :class:`Launch`, which the caller makes itself; ``guards`` as of the attribute."""
        if self._paused:
            return
        self.guards += [guard for guard in guards if guard not in self.guards]
        self._note(lambda: Launch(run, before, stream, device, middle, self._noted(args)))

    def within(self, context: Callable[[], Any]) -> None:
        """Note that the steps have to run inside this function's context manager."""
        if context not in self.contexts:
            self.contexts.append(context)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is noted: it is part of a step that is."""
        former, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = former

    def view(self, tensor: Tensor) -> View | None:
        """The tensor as a part of a memory; None where it is of none, or of several.

        Arguments may share memory (a head that is a table too, parts of one projection): what begins where
        one of them does is of that one. Of those with the same address it does not matter which.
        """
        if tensor.is_neg() or tensor.is_conj():
            return None  # the sign is not in memory
        start, length = tensor.data_ptr(), extent(tensor)
        found: list[int] = []
        # Tensors without elements may all have the address 0: then it is the one made last.
        for number in range(len(self.memories) - 1, -1, -1):
            memory = self.memories[number]
            if memory.start <= start and start + length <= memory.end:
                if start == memory.start:
                    found = [number]
                    break
                if length or start < memory.end:
                    found.append(number)
        if len(found) != 1:
            return None
        offset, size, stride = start - self.memories[found[0]].start, tensor.shape, tensor.stride()
        return View(found[0], offset, tuple(size), tuple(stride), tensor.dtype)

    def _add(self, tensor: Tensor, made_by: int | None) -> None:
        start, length = tensor.data_ptr(), extent(tensor)
        size, stride = tuple(tensor.shape), tuple(tensor.stride())
        self.memories.append(
            Memory(start, start + length, size, stride, tensor.dtype, tensor.device, made_by)
        )
        if len(self.memories) <= self.inputs:
            return
        self._kept.append(tensor)
        self._bytes += length if length <= _PIECE else 0
        if self._bytes > _MOST_BYTES:
            self.refuse("the call makes much memory, a piece at a time")

    def _keep_result(self, result: Any, may_be_view: bool) -> None:
        """Add what the last step returned, unless it is memory that was there.

        Args:
            may_be_view: then the step is no step where it is.
        """
        if self.reason:
            return
        parts = result if isinstance(result, (list, tuple)) else [result]
        if not all(isinstance(part, Tensor) for part in parts):
            self.refuse(f"{self.steps[-1].function} returns no tensor")
        elif all(self.view(part) is not None for part in parts):
            if may_be_view:
                del self.steps[-1]
        elif parts is result:
            self.refuse(f"{self.steps[-1].function} returns several tensors")
        elif result.device != self.memories[0].device:
            self.refuse(f"{self.steps[-1].function} returns a tensor on another device")
        elif result.is_neg() or result.is_conj():
            self.refuse("a sign is not in memory")
        else:
            self._add(result, len(self.steps) - 1)

    def _noted(self, value: Any) -> Any:
        """A value with Views in place of tensors."""
        if isinstance(value, Tensor):
            view = self.view(value)
            if view is None:
                raise _Unknown("a tensor is neither an argument nor made by the call")
            return view
        if type(value) is dict:
            return {name: self._noted(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            parts = map(self._noted, value)
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        # A constexpr of Triton's is a number.
        if not isinstance(value, _LEAVES) and type(value).__name__ != "constexpr":
            raise _Unknown(f"nothing is known of a {type(value).__name__}")
        return value

    def _note(self, make: Callable[[], Launch | Step]) -> None:
        if self.reason:
            return
        try:
            self.steps.append(make())
        except _Unknown as unknown:
            self.refuse(str(unknown))
        if len(self.steps) > _MOST_STEPS:
            self.refuse("the call takes many steps")
