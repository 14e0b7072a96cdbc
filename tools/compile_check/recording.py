"""Launches that compile and do not run: a driver for a GPU that is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        function: name of the kernel's file and its own: ``token_stats._join_kernel``.
        kernel: Triton's ``CompiledKernel``.
        programs: of its grid.
        arguments: by name, constexprs among them.
    """

    function: str
    kernel: Any
    programs: int
    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def warps(self) -> int:
        return self.kernel.metadata.num_warps


@contextlib.contextmanager
def recorded(
    target: Target, heed: Callable[[Launch], object] = lambda launch: None
) -> Iterator[dict[str, Any]]:
    """Inside, ``kernel[grid](...)`` compiles for ``target`` and ``heed`` is told of it.

    The dict is filled with what was compiled, by its hash.
    """
    kernels: dict[str, Any] = {}
    run = triton.runtime.jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        defaults = {p.name: p.default for p in self.params if p.has_default}
        arguments = defaults | dict(zip(self.arg_names, args, strict=False)) | kwargs
        programs = 1
        for size in grid(arguments) if callable(grid) else grid:
            programs *= size
        kernels[kernel.hash] = kernel
        function = f"{self.fn.__module__.rsplit('.', 1)[-1]}.{self.fn.__name__}"
        heed(Launch(function, kernel, programs, arguments))
        return kernel

    former = driver._active
    driver.set_active(_AbsentDevice(target))
    try:
        with mock.patch.object(triton.runtime.jit.JITFunction, "run", compile_only):
            yield kernels
    finally:
        driver._active = former
