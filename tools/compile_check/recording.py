"""Launches that compile and do not run: a driver for a GPU that is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tools.compile_check.targets import TARGETS, Target


class _AbsentDevice:
    """The part of a driver that Triton needs in order to compile."""

    def __init__(self, target: Target):
        self._target = GPUTarget(target.backend, target.arch, target.warp_size)
        # Triton keeps compiled kernels by device: one number a target.
        self._device = list(TARGETS).index(target.name)

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextlib.contextmanager
def recorded(target: Target) -> Iterator[dict[str, Any]]:
    """Inside, ``kernel[grid](...)`` compiles for ``target``; the dict is filled with what it compiled."""
    kernels: dict[str, Any] = {}
    run = triton.runtime.jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels[kernel.hash] = kernel
        return kernel

    former = driver._active
    driver.set_active(_AbsentDevice(target))
    try:
        with mock.patch.object(triton.runtime.jit.JITFunction, "run", compile_only):
            yield kernels
    finally:
        driver._active = former
