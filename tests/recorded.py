"""A CUDA graph without a GPU: what a function does is recorded once and done again on the same memory.

As in a graph, Python does not run when a recording is replayed: whatever it decided stays decided, and
whatever it read from memory that is not kept would be read again as it was. What a graph cannot hold is
refused while it is recorded: the host reads a number, a shape depends on data, data of the host is copied,
or a tensor is read that neither was made inside nor is known to stay.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nabla_fast.ops import rows
from nabla_fast.ops.registry import all_ops

_READS = {
    getattr(Tensor, name)
    for name in ("tolist", "item", "numpy", "cpu", "cuda", "__bool__", "__int__", "__float__", "__index__")
}
_COPIES = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray}
_aten = torch.ops.aten
_WAITS = {
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.masked_select,
    _aten.equal,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
    _aten.bincount,
    _aten.repeat_interleave,
}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}


class NotInAGraph(AssertionError):
    """A graph cannot hold what was done."""


class _FromPython(TorchFunctionMode):
    """Refuses calls that read numbers of tensors or bring some of the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            raise NotInAGraph(f"the host reads a tensor: {func.__name__}")
        if func in _COPIES:
            raise NotInAGraph(f"data of the host is copied: {func.__name__}")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Writes down each call; tensors stay alive as long as it does."""

    def __init__(self, known: Iterable[Tensor] | None):
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, Any]] = []
        self._known = None if known is None else {_memory(tensor) for tensor in known}
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in _WAITS:
            raise NotInAGraph(f"the host waits for data: {func}")
        if packet in _INDEXED and any(
            isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        ):
            raise NotInAGraph(f"a shape depends on data: {func} by a mask")
        if func.namespace == "nabla_fast":
            op = all_ops()[packet.__name__]
            values = op._gather([*args, *(kwargs[a.name] for a in func._schema.arguments[len(args) :])])
            positional, keywords = op._split(values)
            with self:
                return op._flatten_result(op.chosen(*positional, **keywords)(*positional, **keywords))
        return self._called(func, args, kwargs)

    def kernel(self, function: Callable) -> Callable:
        """A function that is one call of the recording, whatever it does."""

        def called(*args: Any, **kwargs: Any) -> Any:
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                return self._called(function, args, kwargs)

        return called

    def _called(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        for tensor in _tensors((args, kwargs)):
            memory = _memory(tensor)
            if memory in self._made or memory in self._before:
                continue
            if self._known is not None and memory not in self._known and tensor.numel():
                raise NotInAGraph(f"{func} reads a tensor {list(tensor.shape)} that does not stay")
            whole = _whole(tensor)
            self._before[memory] = (whole, whole.clone())
        result = func(*args, **kwargs)
        given = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        self._made |= {_memory(t) for t in _tensors(result)} - given - self._before.keys()
        self.calls.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        """Memory from outside as it was before the recording: capturing a graph runs nothing."""
        for tensor, before in self._before.values():
            tensor.copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            given = {_memory(tensor) for tensor in _tensors((args, kwargs))}
            again = func(*args, **kwargs)
            for tensor, new in zip(_tensors(result), _tensors(again), strict=True):
                if _memory(tensor) not in given:
                    tensor.copy_(new)


class Recordings:
    """Captures steps, in the place of CUDA graphs.

    Args:
        known: returns the tensors that stay; None: any may be read.
    """

    def __init__(self, known: Callable[[], Iterable[Tensor]] | None = None):
        self._known = known
        self.captured = self.replayed = 0
        self._recorder: _Recorder | None = None

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        recorder = _Recorder(None if self._known is None else self._known())
        self._recorder = recorder
        try:
            with as_on_a_device(), _FromPython(), recorder:
                function()
        finally:
            self._recorder = None
            recorder.undo()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            recorder.replay()

        return replay

    def watch(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        """Make a kernel's launcher, which no mode of torch's sees through, one call of a recording."""
        function = getattr(module, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            recorder = self._recorder
            return (recorder.kernel(function) if recorder else function)(*args, **kwargs)

        monkeypatch.setattr(module, name, called)


@contextlib.contextmanager
def as_on_a_device() -> Iterator[None]:
    """Without what ops do for tensors of the CPU alone: they look for bad rows and blocks at once."""
    report = rows.report
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("nabla_fast.ops.") and getattr(module, "report", None) is report:
                patch.setattr(module, "report", lambda op, status: None)
        patch.setattr(sys.modules["nabla_fast.ops.prefix_attention"], "_expect_blocks", lambda *_: None)
        yield


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor's memory."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage)
