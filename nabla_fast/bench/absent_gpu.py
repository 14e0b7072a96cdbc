"""Triton's launches for a GPU that is not there: all of them but what the driver does.

Tensors lie on the CPU and say that they are on a device. Triton compiles for one architecture, and its
own launcher packs the arguments; it is linked to a libcuda made here, whose every function returns at
once. Products of matrices (``torch.mm`` and its kin) are not computed either. What else a launcher asks
of torch (memory, views, small sums) torch does on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nabla_fast._triton import interpreted
from nabla_fast.errors import BackendUnavailable
from nabla_fast.ops.registry import backends

ARCHITECTURE = 90
_PROPERTIES = SimpleNamespace(  # of an H200, as far as launchers look
    name="absent GPU",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=50 << 20,
    gcnArchName="",
)
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul")

# Functions that Triton's launcher must get an answer from; the others return 0, which is success.
_ANSWERS = """
long nabla_fast_launches = 0;
int cuLaunchKernelEx(void) { ++nabla_fast_launches; return 0; }
int cuFuncGetAttribute(int *value) { *value = 1024; return 0; }
int cuDeviceGetAttribute(int *value) { *value = 232448; return 0; }
int cuDeviceGet(int *device) { *device = 0; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuModuleLoadData(void **module) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **function) { *function = (void *)1; return 0; }
"""


@dataclass
class Launches:
    """How many there were, of kernels, of products and of selections of a table's rows."""

    library: ctypes.CDLL
    products: int = 0
    selections: int = 0
    _kernels: int = field(default=0, init=False)

    def start(self) -> None:
        self.products = self.selections = 0
        self._kernels = self._all()

    @property
    def kernels(self) -> int:
        return self._all() - self._kernels

    def _all(self) -> int:
        return ctypes.c_long.in_dll(self.library, "nabla_fast_launches").value


def why_not() -> str | None:
    """One line that says why launches cannot be timed here; None where they can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    if interpreted():
        return "TRITON_INTERPRET=1 makes kernels run in Triton's interpreter"
    if not _compiler():
        return "no C compiler, which Triton's launcher needs"
    return None


@contextlib.contextmanager
def absent_gpu() -> Iterator[Launches]:
    """Inside, every tensor is on a GPU that is not there, and the backend ``triton`` takes it.

    Raises:
        BackendUnavailable: Triton, or a C compiler, is missing.
    """
    if reason := why_not():
        raise BackendUnavailable(f"launches cannot be timed: {reason}")
    library = _libcuda()
    from triton.runtime import driver

    from nabla_fast.triton_kernels.common import library_products, presets

    launches = Launches(library)
    former = driver._active
    with contextlib.ExitStack() as stack:
        stack.enter_context(_torch_on_a_gpu(launches))
        stack.enter_context(_memory_that_stays())
        stack.enter_context(mock.patch.dict(backends._why_missing, triton=lambda: None))
        stack.enter_context(presets.assumed(f"sm_{ARCHITECTURE}"))
        # Which products a GPU has is tried by multiplying on it.
        stack.enter_context(mock.patch.object(library_products, "_adds_in_float32", return_value=True))
        driver.set_active(_driver())
        try:
            yield launches
        finally:
            driver._active = former


@contextlib.contextmanager
def _memory_that_stays() -> Iterator[None]:
    """Memory that is freed is kept for the next tensor, as a GPU's allocator does.

    The C library returns what is large to the system, which takes longer than all the rest of a call.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):  # glibc's own
        yield
        return
    mmap_max, trim_threshold = -4, -1
    library.mallopt(mmap_max, 0)
    library.mallopt(trim_threshold, 2**31 - 1)
    try:
        yield
    finally:
        library.mallopt(mmap_max, 65536)
        library.mallopt(trim_threshold, 128 << 10)


@contextlib.contextmanager
def _torch_on_a_gpu(launches: Launches) -> Iterator[None]:
    """What launchers ask of torch, answered as for tensors on a GPU."""

    def product(*operands: Any, out: Tensor | None = None, out_dtype: Any = None) -> Tensor:
        """Not computed: of the last two operands, after what they are added to."""
        launches.products += 1
        if out is not None:
            return out
        *_, a, b = (operand for operand in operands if isinstance(operand, Tensor))
        return torch.empty(*a.shape[:-1], b.shape[-1], dtype=out_dtype or a.dtype)

    def added(result: Tensor, *_: Any, **__: Any) -> Tensor:
        launches.products += 1
        return result

    def selection(source: Tensor, dim: int, index: Tensor, out: Tensor | None = None) -> Tensor:
        """Not computed: no kernel has written which rows they are."""
        launches.selections += 1
        return torch.empty(len(index), *source.shape[1:], dtype=source.dtype) if out is None else out

    answers: dict[tuple[Any, str], Any] = {
        (Tensor, "is_cuda"): property(lambda tensor: True),
        (Tensor, "is_cpu"): property(lambda tensor: False),
        (torch, "index_select"): selection,
        (torch.cuda, "current_device"): lambda: None,  # the index of the tensors' device
        (torch.cuda, "is_current_stream_capturing"): lambda: False,
        (torch.cuda, "get_device_properties"): lambda device=None: _PROPERTIES,
        (torch.cuda, "_exchange_device"): lambda device: device,
        (torch.cuda, "_maybe_exchange_device"): lambda device: device,
    }
    answers |= {(torch, name): product for name in _PRODUCTS}
    answers |= {(Tensor, name): product for name in (*_PRODUCTS, "__matmul__")}
    answers |= {(Tensor, name): added for name in ("addmm_", "baddbmm_")}
    with contextlib.ExitStack() as stack:
        for (owner, name), answer in answers.items():
            stack.enter_context(mock.patch.object(owner, name, answer))
        yield


@cache
def _driver() -> Any:
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        """Triton's own, but for the device."""

        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", ARCHITECTURE, 32)

    knobs.nvidia.libcuda_path = str(_folder())
    return Driver()


@cache
def _libcuda() -> ctypes.CDLL:
    """The library that Triton's launcher takes for the driver's, as it is loaded before."""
    import triton.backends.nvidia as nvidia

    package = Path(nvidia.__file__).parent
    text = "".join((package / name).read_text() for name in ("driver.c", "driver.py"))
    names = set(re.findall(r"\bcu[A-Z]\w+", text)) - set(re.findall(r"\bcu\w+", _ANSWERS))
    source = _ANSWERS + "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names))
    path = _folder() / "libcuda.so.1"
    command = [*_compiler(), "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(path)]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], input=source, text=True, check=True)
    (_folder() / "libcuda.so").symlink_to(path.name)  # what Triton 3.5 links
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


_kept: list[tempfile.TemporaryDirectory] = []


@cache
def _folder() -> Path:
    """Of the library; removed when the process ends."""
    _kept.append(tempfile.TemporaryDirectory(prefix="nabla_fast_libcuda_"))
    return Path(_kept[0].name)


def _compiler() -> list[str]:
    """As Triton finds it; empty if there is none."""
    if named := os.environ.get("CC"):
        return named.split()
    found = shutil.which("gcc") or shutil.which("clang")
    return [found] if found else []
