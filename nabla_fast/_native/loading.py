"""The extension ``nabla_fast._C``: whether it is there, what it runs with, and what its statuses mean."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

# NABLA_FAST_ABI_VERSION that this file is written against.
ABI_VERSION = 6

# The widest head that attention takes: NABLA_FAST_MOST_HEAD_DIM.
MOST_HEAD_DIM = 512

# nabla_fast_isa of nabla_fast.h, by value.
ISA_NAMES = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The extension, or None and the one-line reason why there is none."""
    # torch brings a libgomp; loaded first, the extension shares it, and its threads.
    import torch  # noqa: F401

    try:
        module = importlib.import_module("nabla_fast._C")
    except ModuleNotFoundError:
        return None, (
            "nabla_fast._C is not built: no working C++ compiler was found when the package was installed"
        )
    except ImportError as error:
        return None, f"nabla_fast._C does not load: {' '.join(str(error).split())}"
    if module.abi_version() != ABI_VERSION:
        return None, (
            f"nabla_fast._C is stale: it has ABI version {module.abi_version()}, "
            f"this package needs {ABI_VERSION}; install the package again"
        )
    return module, None


def available() -> bool:
    """Whether the C++ kernels can be called."""
    return _load()[0] is not None


def why_missing() -> str | None:
    """One line that says why the C++ kernels cannot be called; None where they can."""
    return _load()[1]


def extension() -> ModuleType:
    """``nabla_fast._C``. Raises RuntimeError with ``why_missing()`` where there is none."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def cpu_isa() -> str:
    """The instruction set that kernels use, one of ``ISA_NAMES``."""
    return ISA_NAMES[extension().cpu_isa()]
