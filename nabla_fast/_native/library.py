"""Where C, C++ and Rust programs find the native core: a library that needs neither Python nor torch."""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARY = PACKAGE / "libnabla_fast.so"


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


def get_cmake_dir() -> str:
    """The directory that ``find_package(nabla_fast)`` wants as ``nabla_fast_DIR``; the target is
    ``nabla_fast::nabla_fast``."""
    return _directory("cmake")


def get_pkgconfig_dir() -> str:
    """The directory of ``nabla_fast.pc``, for ``PKG_CONFIG_PATH``."""
    return _directory("pkgconfig")


def _directory(name: str) -> str:
    installed = PACKAGE / name
    return str(installed if installed.is_dir() else PACKAGE.parent / "csrc" / name)
