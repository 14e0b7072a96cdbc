"""Launches of kernels with less work in Python than Triton's own.

For each launch Triton goes over the arguments, turns what it finds into a key by way of a string, and
compares every global that the kernel reads: 9 to 46 µs. Here one expression, written once for the types of
the arguments, makes the key, and what Triton compiled for the first call of that key is launched by
Triton's own launcher; a recording gets what that launcher calls.

    @launched
    @triton.jit
    def kernel(...): ...

    kernel[(programs,)](*arguments, TILE=2048, num_warps=8)

    step = repeated(kernel, (programs,), "turn", *arguments, turn=1, TILE=2048)
    for turn in range(1, 21):
        step(turn)  # packs the arguments, and nothing else
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nabla_fast.plans.recording import recorder, step
from nabla_fast.triton_kernels.common.driver_call import driver_call

# Whoever puts another function in its place, to compile without a launch, sees every launch.
_RUN = JITFunction.run

Grid = tuple[int, ...]


def launched(kernel: Any) -> Any:
    """The kernel with faster launches, which recordings see; for AMD's GPUs itself.

    For those Triton looks at more than is looked at here.
    """
    if torch.version.hip:
        return kernel
    return Launched(kernel) if isinstance(kernel, JITFunction) else _Interpreted(kernel)


def repeated(kernel: Any, grid: Grid, name: str, *args: Any, **options: Any) -> Callable[[int], None]:
    """Launches that differ in one argument alone, on one stream.

    Args:
        kernel: of :func:`launched`.
        grid, args, options: of all launches; ``options[name]`` is looked at for its type.
        name: of an integer in ``do_not_specialize``, below 2³¹.
    Returns:
        A function of its value.
    """
    if isinstance(kernel, Launched):
        return kernel.repeated(grid, name, args, options)
    return lambda value: kernel[grid](*args, **{**options, name: value})


class _Interpreted:
    """A kernel that Triton's interpreter runs: a function to recordings."""

    def __init__(self, kernel: Any):
        self._kernel = kernel

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        return lambda *args, **options: step(self._kernel[grid], *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


class Launched:
    """A kernel whose launches find what was compiled by a key of their own.

    The key has all that Triton specializes a kernel on: types and dtypes, whether an address or an integer
    is a multiple of 16, whether an integer is 1 and how many bits it takes, and what is constant.
    """

    def __init__(self, kernel: JITFunction):
        self.kernel = kernel
        self.fn = kernel.fn
        self._calls: dict[tuple, Callable[..., tuple[tuple, tuple]] | None] = {}
        self._compiled: dict[tuple, tuple[Callable[..., None], Any, Any]] = {}

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        return lambda *args, **options: self._launch(grid, args, options)

    def repeated(
        self, grid: Grid, name: str, args: tuple, options: dict[str, Any]
    ) -> Callable[[int], None]:
        """As :func:`repeated`."""
        parameter = next(p for p in self.kernel.params if p.name == name)
        if not parameter.do_not_specialize:
            raise ValueError(f"{self.fn.__name__}: {name} is not in do_not_specialize")
        found = self._find(args, options) if self._usual() else None
        if found is None or recorder() is not None:
            return lambda value: self._launch(grid, args, {**options, name: value})
        (run, function, metadata), ordered, device = found
        before, after = ordered[: parameter.num], ordered[parameter.num + 1 :]
        start = (*grid, 1, 1)[:3]
        start += (driver.active.get_current_stream(device), function, metadata, None, None, None, *before)
        return lambda value: run(*start, value, *after)

    def _launch(self, grid: Grid, args: tuple, options: dict[str, Any]) -> None:
        found = self._find(args, options) if self._usual() else None
        recording = recorder()
        if found is None:
            compiled = self.kernel[grid](*args, **options)
            if self._usual() and isinstance(compiled, CompiledKernel):
                self._remember(args, options, compiled)
            if recording is not None:
                recording.refuse("a kernel is not compiled yet, or somebody watches its launches")
            return
        (run, function, metadata), ordered, device = found
        (x, y, z), stream = (*grid, 1, 1)[:3], driver.active.get_current_stream
        run(x, y, z, stream(device), function, metadata, None, None, None, *ordered)
        if recording is not None:
            call = driver_call(run, (x, y, z), function, metadata, ordered)
            hooks = self.kernel.pre_run_hooks.__len__
            guards = (driver.active.get_current_device, device), (_nobody_watches, True), (hooks, 0)
            told = call.before, stream, device, call.middle, call.args, (*guards, *call.guards)
            recording.launch(call.function, *told)

    def _usual(self) -> bool:
        """Whether nobody is to be told of a launch."""
        return not self.kernel.pre_run_hooks and _nobody_watches()

    def _find(self, args: tuple, options: dict[str, Any]) -> tuple[tuple, tuple, int] | None:
        """What to launch, its arguments in order, and the device; None if it has to be compiled."""
        call = self._calls.get(_structure(args, options))
        if call is None:
            return None
        key, ordered = call(*args, *options.values())
        device = driver.active.get_current_device()
        compiled = self._compiled.get((device, call, key))
        return compiled and (compiled, ordered, device)

    def _remember(self, args: tuple, options: dict[str, Any], compiled: CompiledKernel) -> None:
        structure = _structure(args, options)
        if structure not in self._calls:
            self._calls[structure] = self._written(args, options)
        if call := self._calls[structure]:
            key, _ = call(*args, *options.values())
            device = driver.active.get_current_device()
            entry = (compiled.run, compiled.function, compiled.packed_metadata)
            self._compiled[device, call, key] = entry

    def _written(self, args: tuple, options: dict[str, Any]) -> Callable[..., tuple[tuple, tuple]] | None:
        """A function of the values that returns their key, and the arguments in the kernel's order.

        None where a value is of another kind than launches here have.
        """
        given = dict(zip((p.name for p in self.kernel.params), args, strict=False)) | options
        parameters = {p.name: p for p in self.kernel.params}
        key: list[str] = []
        for name, value in given.items():
            parameter = parameters.get(name)
            if parameter is None or parameter.is_constexpr:
                key.append(name)
                continue
            own = _specialized(name, value, parameter.do_not_specialize)
            if own is None:
                return None
            key += own
        ordered = [name if name in given else f"default_{name}" for name in parameters]
        defaults = {f"default_{p.name}": p.default for p in self.kernel.params if p.has_default}
        text = f"lambda {', '.join(given)}: (({''.join(f'{part}, ' for part in key)}), "
        text += f"({''.join(f'{part}, ' for part in ordered)}))"
        return eval(text, defaults)


def _structure(args: tuple, options: dict[str, Any]) -> tuple:
    """What the function that makes a key is written for."""
    values = (*args, *options.values())
    types = tuple(map(type, values))
    if tuple in types:
        types += tuple([_types(value) for value in values if type(value) is tuple])
    return len(args), *options, types


def _types(values: tuple) -> tuple:
    """Types of what a tuple holds, and of what tuples in it hold."""
    types = tuple(map(type, values))
    if tuple in types:
        types += tuple([_types(value) for value in values if type(value) is tuple])
    return types


def _specialized(text: str, value: Any, plain: bool) -> list[str] | None:
    """Expressions of what Triton specializes on in ``value``, of which ``text`` is the expression."""
    kind = type(value)
    if value is None or kind in (float, bool):
        return []
    if kind in (Tensor, Parameter):
        return [f"{text}.dtype", f"{text}.data_ptr() & 15 == 0"]
    if kind is int:
        return [f"{text}.bit_length() >> 5"] + ([] if plain else [f"{text} == 1", f"{text} & 15 == 0"])
    if kind is tuple:
        parts = [_specialized(f"{text}[{place}]", part, plain) for place, part in enumerate(value)]
        return None if None in parts else [part for own in parts for part in own]
    return None


def _nobody_watches() -> bool:
    """Whether launches are Triton's own, and no hook is called with them."""
    runtime = knobs.runtime
    return (
        JITFunction.run is _RUN
        and not _called(runtime.launch_enter_hook)
        and not _called(runtime.launch_exit_hook)
    )


def _called(hook: Any) -> bool:
    """Whether a hook of Triton's does something: None, a function, or a chain of functions."""
    return hook is not None and bool(getattr(hook, "calls", True))
