"""The C++ kernels: ``extension()`` has the functions of nabla_fast.h under their names.

Arguments are the fields of the function's struct, by keyword: numbers, tensors that lie as the field
says, sequences of these, None for what is not there. The struct's size, counts of arrays and a workspace
are filled in. Callers have checked their tensors: a function reads no dtype but float32 and bfloat16 of
matrices. It returns False where rows are bad and nothing has changed, and raises ValueError for what C
refuses, TypeError for another field. The extension is optional and loaded at the first call.
"""

from nabla_fast._native.loading import (
    ABI_VERSION,
    ISA_NAMES,
    MOST_HEAD_DIM,
    available,
    cpu_isa,
    extension,
    why_missing,
)

__all__ = [
    "ABI_VERSION",
    "ISA_NAMES",
    "MOST_HEAD_DIM",
    "available",
    "cpu_isa",
    "extension",
    "why_missing",
]
