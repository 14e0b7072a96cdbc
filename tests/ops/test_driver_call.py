"""What a launcher of Triton's calls: as it calls it, whatever the release, or the launcher itself."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import triton
from triton.runtime import _allocation

from nabla_fast.triton_kernels.common.driver_call import driver_call

GRID, FUNCTION, METADATA, STREAM = (5, 3, 2), 77, (8, 1, 4096), 1234
ARGS = (1 << 40, (2 << 40, 16), 3.5, None, "name")
GSAN_PER_DEVICE_STATE_STRIDE = 1 << 20


@pytest.fixture(autouse=True)
def a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace())


class Launcher:
    """What launchers of all releases hold, and their scratch memory."""

    def __init__(self, **other: Any):
        self.calls: list[tuple] = []
        self.launch: Callable[..., None] = lambda *args: self.calls.append(args)
        self.num_ctas = 1
        self.global_scratch_size = self.profile_scratch_size = 0
        self.global_scratch_align = self.profile_scratch_align = 1
        self.launch_cooperative_grid, self.launch_pdl = False, True
        self.arg_annotations, self.kernel_signature = [object()], b"kernel"
        self.gsan_enabled = False
        vars(self).update(other)


class OfTriton36(Launcher):
    """As of Triton 3.5 and 3.6, whose function is made for a kernel and takes arguments one by one."""

    def __call__(self, gridX, gridY, gridZ, stream, function, *args):
        def allocate_scratch(size, align, allocator):
            if size > 0:
                return allocator.get()(gridX * gridY * gridZ * self.num_ctas * size, align, stream)
            return None

        size, align = self.global_scratch_size, self.global_scratch_align
        global_scratch = allocate_scratch(size, align, _allocation._allocator)
        size, align = self.profile_scratch_size, self.profile_scratch_align
        profile_scratch = allocate_scratch(size, align, _allocation._profile_allocator)
        pair = self.launch_cooperative_grid, self.launch_pdl
        self.launch(gridX, gridY, gridZ, stream, function, *pair, global_scratch, profile_scratch, *args)


class OfTriton37(Launcher):
    """As of Triton 3.7, whose function gets the kernel's arguments as a tuple."""

    def __call__(self, gridX, gridY, gridZ, stream, function, metadata, told, enter_hook, exit_hook, *args):
        scratch = [None, None]
        if self.global_scratch_size > 0:
            scratch[0] = _allocation._allocator.get()(gridX * self.num_ctas, 1, stream)
        pair = self.launch_cooperative_grid, self.launch_pdl
        hooks = told, enter_hook, exit_hook
        own = self.arg_annotations, self.kernel_signature
        self.launch(gridX, gridY, gridZ, stream, function, *pair, metadata, *hooks, *scratch, *own, args)


class OfTriton39(Launcher):
    """As of Triton 3.8 and 3.9, which may add arguments that follow the stream's launches."""

    def __call__(self, gridX, gridY, gridZ, stream, function, metadata, told, enter_hook, exit_hook, *args):
        active_driver = triton.runtime.driver.active
        profile_scratch = None
        if self.profile_scratch_size > 0 and not _allocation.has_profile_allocator():
            profile_scratch = active_driver.allocate_default_profile_scratch(gridX, 1, stream)
        kernel_args = args
        if self.gsan_enabled:
            device = active_driver.get_current_device()
            kernel_args = (*args, device * GSAN_PER_DEVICE_STATE_STRIDE, device)
        pair = self.launch_cooperative_grid, self.launch_pdl
        hooks = told, enter_hook, exit_hook
        scratch = None, profile_scratch
        own = self.arg_annotations, self.kernel_signature
        self.launch(
            gridX, gridY, gridZ, stream, function, *pair, metadata, *hooks, *scratch, *own, kernel_args
        )


class StreamAfterGrid(Launcher):
    """As of AMD's launchers, which begin with another argument; with names that are known."""

    def __call__(self, gridX, gridY, gridZ, stream, function, metadata, told, enter_hook, exit_hook, *args):
        self.launch(self.launch_pdl, gridX, gridY, gridZ, stream, function, metadata, self.num_ctas, args)


RELEASES = [OfTriton36, OfTriton37, OfTriton39, StreamAfterGrid]


def launched(run: Any, stream: int = STREAM) -> None:
    run(*GRID, stream, FUNCTION, METADATA, None, None, None, *ARGS)


def found(run: Any) -> Any:
    return driver_call(run, GRID, FUNCTION, METADATA, ARGS)


@pytest.mark.parametrize("release", RELEASES)
def test_the_call_is_the_launchers(release: type):
    run = release()
    call = found(run)
    assert run.calls == []  # to look launches nothing
    assert call.function is run.launch
    launched(run)
    call.function(*call.before, STREAM, *call.middle, *call.args)
    by_launcher, by_call = run.calls
    assert by_call == by_launcher
    launched(run, 9)
    call.function(*call.before, 9, *call.middle, *call.args)
    assert run.calls[2] == run.calls[3] != by_call
    # The kernel's arguments, and they alone, are among what a plan may exchange.
    assert call.args in (ARGS, (ARGS,))
    [(guard, wanted)] = call.guards
    assert guard() is wanted


def test_a_call_that_somebody_replaces_is_seen(monkeypatch: pytest.MonkeyPatch):
    [(guard, wanted)] = found(OfTriton37()).guards
    monkeypatch.setattr(OfTriton37, "__call__", lambda *args: None)
    assert guard() is not wanted


class LooksElsewhere(OfTriton37):
    """Something that a launcher does beside its call, in a release to come."""

    def __call__(self, *args):
        if self.counts_launches:
            self.launched += 1
        super().__call__(*args)


class Named(Launcher):
    def __call__(self, gridX, gridY, gridZ, stream, *args):
        self.launch(gridX, gridY, gridZ, stream=stream, args=args)


class TwoStreams(Launcher):
    def __call__(self, gridX, gridY, gridZ, stream, *args):
        self.launch(gridX, gridY, gridZ, stream, stream, args)


class Twice(Launcher):
    def __call__(self, gridX, gridY, gridZ, stream, function, metadata, told, enter_hook, exit_hook, *args):
        self.launch(gridX, stream, args)
        self.launch(gridX, stream, args)


class Never(Launcher):
    def __call__(self, *args):
        return self.launch


class OtherArguments(Launcher):
    def __call__(self, gridX, gridY, gridZ, stream, function, metadata, told, enter_hook, exit_hook, *args):
        self.launch(gridX, gridY, gridZ, stream, function, args[1:])


@pytest.mark.parametrize(
    "run",
    [
        *[release(global_scratch_size=128) for release in RELEASES],
        *[release(profile_scratch_size=16) for release in RELEASES],
        OfTriton39(gsan_enabled=True),
        LooksElsewhere(counts_launches=False),
        Named(),
        TwoStreams(),
        Twice(),
        Never(),
        OtherArguments(),
        print,
    ],
    ids=lambda run: type(run).__name__,
)
def test_the_launcher_itself_where_it_may_do_more(run: Any):
    call = found(run)
    assert call.function is run
    assert (*call.before, STREAM, *call.middle, *call.args) == (
        *GRID, STREAM, FUNCTION, METADATA, None, None, None, *ARGS
    )  # fmt: skip
    assert call.guards == ()
    assert getattr(run, "calls", []) == []
