"""What Triton's launcher calls for a launch.

The launcher is an object whose ``__call__`` in Python allocates scratch memory, adds what it knows of the
kernel, and calls a function in C. That function alone takes less than half as long (0.8 µs of 1.9, on one
CPU), and for a kernel without scratch memory gets the same each time, in an order that changes from release
to release. So the order is not written down here: a launcher that looks at nothing but what is known is
called once with another function in the place of the one in C, which sees what that would get.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, NamedTuple

# Whatever these are is the launcher's to handle: memory for each launch, or arguments of its own.
_TRUE_FOR_MORE = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")

# Names in the code of launchers of Triton 3.5 to 3.9 for NVIDIA's GPUs. One that looks at no others goes by
# its arguments, its attributes and scratch memory alone.
# fmt: off
_KNOWN = {
    "launch", "launch_cooperative_grid", "launch_pdl", "arg_annotations", "kernel_signature", "num_ctas",
    "global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align",
    "_allocation", "_allocator", "_profile_allocator", "has_profile_allocator",
    "allocate_default_profile_scratch", "get", "triton", "runtime", "driver", "active",
    # Where gsan_enabled is true.
    "gsan_enabled", "gsan", "experimental", "triton.experimental.gsan._allocator",
    "triton.experimental.gsan._stream_sync", "_stream_sync", "synchronize_launch_stream",
    "get_launch_state", "is_stream_capturing", "utils", "RuntimeError", "get_current_device",
    "get_device_rank", "get_global_state_pointer", "GSAN_PER_DEVICE_STATE_STRIDE",
}
# fmt: on


class DriverCall(NamedTuple):
    """``function(*before, stream, *middle, *args)``."""

    function: Callable[..., None]
    before: tuple
    middle: tuple
    args: tuple
    guards: tuple[tuple[Callable[[], Any], Any], ...] = ()  # functions, and what they have to return for it


def driver_call(
    run: Any, grid: tuple[int, int, int], function: Any, metadata: Any, args: tuple
) -> DriverCall:
    """What ``run(*grid, stream, function, metadata, None, None, None, *args)`` comes to, on any stream.

    Args:
        run: Triton's launcher of the kernel, ``function``.
    Returns:
        This call itself where the launcher may do more than to call one function, or calls it in a form
        that is not known here.
    """
    known = _is_known(type(run)) and not any(getattr(run, name, None) for name in _TRUE_FOR_MORE)
    found = _seen(run, grid, function, metadata, args) if known else None
    return found or DriverCall(run, grid, (function, metadata, None, None, None), args)


def _seen(run: Any, grid: tuple, function: Any, metadata: Any, args: tuple) -> DriverCall | None:
    calls: list[tuple[tuple, dict[str, Any]]] = []
    watched, stream = copy.copy(run), object()
    watched.launch = lambda *passed, **named: calls.append((passed, named))
    watched(*grid, stream, function, metadata, None, None, None, *args)
    if len(calls) != 1 or calls[0][1]:
        return None
    passed, _ = calls[0]
    places = [place for place, value in enumerate(passed) if value is stream]
    if len(places) != 1:
        return None
    before, after = passed[: places[0]], passed[places[0] + 1 :]
    if after and type(after[-1]) is tuple and _same(after[-1], args):
        split = len(after) - 1
    elif len(after) >= len(args) and _same(after[len(after) - len(args) :], args):
        split = len(after) - len(args)
    else:
        return None
    guards = ((_call_of(type(run)), type(run).__call__),)
    return DriverCall(run.launch, before, after[:split], after[split:], guards)


@functools.cache
def _call_of(launcher: type) -> Callable[[], Any]:
    """A function that returns what a call of such a launcher runs, which somebody may replace."""
    return functools.partial(getattr, launcher, "__call__")


@functools.cache
def _known(code: CodeType) -> bool:
    """Whether the code looks at nothing but what is known here."""
    names = set(code.co_names)
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return names <= _KNOWN and all(map(_known, inner))


def _is_known(launcher: type) -> bool:
    code = getattr(launcher.__call__, "__code__", None)
    return isinstance(code, CodeType) and "launch" in code.co_names and _known(code)


def _same(values: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether they hold the same objects."""
    return len(values) == len(others) and all(map(operator.is_, values, others))
