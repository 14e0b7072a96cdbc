"""The C++ kernels (``nabla_fast._C``): whether they can be called, and how.

The extension is optional and loaded at the first call. What calls it has checked its tensors.
"""

from nabla_fast._native.calls import call, matrix
from nabla_fast._native.loading import (
    ABI_VERSION,
    ISA_NAMES,
    MOST_HEAD_DIM,
    available,
    check,
    cpu_isa,
    extension,
    why_missing,
)

__all__ = [
    "ABI_VERSION",
    "ISA_NAMES",
    "MOST_HEAD_DIM",
    "available",
    "call",
    "check",
    "cpu_isa",
    "extension",
    "matrix",
    "why_missing",
]
