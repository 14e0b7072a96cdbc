"""Where C, C++ and Rust programs find the native core: a library that needs neither Python nor torch."""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARY = PACKAGE / "libnabla_fast.so"
CUDA_LIBRARY = PACKAGE / "libnabla_fast_cuda.so"


def get_include() -> str:
    """The directory of ``nabla_fast.h``, the C interface."""
    return _directory("include")


def get_library() -> str:
    """The path of ``libnabla_fast.so``, which has the C interface and nothing else.

    It runs on OpenMP's threads: in a process with torch import torch first, and they are shared.

    Raises RuntimeError with one line where it was not built.
    """
    if not LIBRARY.is_file():
        reason = (
            "no working C++ compiler was found when the package was installed"
            if sys.platform == "linux"
            else f"it is built on Linux alone, and this is {sys.platform}"
        )
        raise RuntimeError(f"{LIBRARY.name} is not built: {reason}")
    return str(LIBRARY)


def get_cuda_library() -> str:
    """The path of ``libnabla_fast_cuda.so``, which has the functions of ``nabla_fast_cuda.h``.

    It loads where there is no driver. No GPU has run it yet.

    Raises RuntimeError with one line where it was not built: installing does not build it.
    """
    if not CUDA_LIBRARY.is_file():
        raise RuntimeError(
            f"{CUDA_LIBRARY.name} is not built: `make cuda` does, in the sources, with nvcc 13"
        )
    return str(CUDA_LIBRARY)


def get_cmake_dir() -> str:
    """The directory that ``find_package(nabla_fast)`` wants as ``nabla_fast_DIR``; the targets are
    ``nabla_fast::nabla_fast`` and, where it was built, ``nabla_fast::nabla_fast_cuda``."""
    return _directory("cmake")


def get_pkgconfig_dir() -> str:
    """The directory of ``nabla_fast.pc`` and ``nabla_fast_cuda.pc``, for ``PKG_CONFIG_PATH``."""
    return _directory("pkgconfig")


def _directory(name: str) -> str:
    installed = PACKAGE / name
    return str(installed if installed.is_dir() else PACKAGE.parent / "csrc" / name)
