"""Levels of instruction sets, beyond which neither our kernels nor torch go: a fair comparison at each.

Torch and its libraries read their limits as they are loaded, so a level has a process of its own.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

import nabla_fast._native as _native
from nabla_fast.errors import BackendUnavailable, InputError

LEVELS = _native.ISA_NAMES[1:]

# Of torch's own kernels, of oneDNN, of MKL and of torch.compile's C++ compiler, in this order. AVX-512
# of torch's own has no level with bf16 or AMX.
_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "TORCHINDUCTOR_CPP_MARCH",
)
_LIMITS = {
    "avx2": ("avx2", "AVX2", "AVX2", "x86-64-v3"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512", "x86-64-v4"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512_E3", "x86-64-v4"),
    "amx": ("avx512", "AVX512_CORE_AMX", "AVX512_E4", "native"),
}


def chosen_levels(name: str) -> list[str]:
    """The level of a name, or all that this CPU has for "all".

    Raises:
        InputError: this CPU does not have the level.
        BackendUnavailable: there are no kernels to limit.
    """
    if not _native.available():
        raise BackendUnavailable(f"--isa {name}: {_native.why_missing()}")
    has = list(LEVELS[: _native.extension().cpu_isa()])
    if name == "all":
        return has
    if name not in has:
        raise InputError(f"--isa {name}: this CPU's kernels have {', '.join(has) or 'none of the levels'}")
    return [name]


def environment_of(level: str) -> dict[str, str]:
    """Environment variables of a process in which torch is limited to a level."""
    return dict(zip(_VARIABLES, _LIMITS[level], strict=True))


def limited_here(level: str) -> bool:
    """Whether this process has the level's environment."""
    return all(os.environ.get(name) == value for name, value in environment_of(level).items())


@contextmanager
def kernels_at(level: str) -> Iterator[None]:
    """Our kernels go no further than the level inside."""
    native = _native.extension()
    former = native.cpu_isa()
    native.limit_cpu_isa(_native.ISA_NAMES.index(level))
    try:
        yield
    finally:
        native.limit_cpu_isa(former)


@functools.cache  # oneDNN says it once
def torch_isa() -> dict[str, str | None]:
    """What torch runs with here, in its own words: ``aten`` (its own kernels), ``onednn``, ``mkl``.

    None where a library is not there or does not say.
    """
    x = torch.ones(2, 2)
    found: dict[str, str | None] = {"aten": torch.backends.cpu.get_cpu_capability()}
    for name, library, pattern, call in (
        ("onednn", torch.backends.mkldnn, r"cpu,isa:(.*)", lambda: x.to_mkldnn().relu()),
        ("mkl", torch.backends.mkl, r" architecture (.*), \w+ [\d.]+GHz", lambda: x @ x),
    ):
        said = None
        if library.is_available():
            with library.verbose(1):
                said = re.search(pattern, _printed(call))
        found[name] = said[1].strip() if said else None
    return found


def _printed(call: Callable[[], object]) -> str:
    """What C and C++ print on standard output during the call."""
    sys.stdout.flush()
    flush = ctypes.CDLL(None).fflush
    flush(None)
    try:
        kept = os.dup(1)
    except OSError:  # closed
        return ""
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            call()
        finally:
            flush(None)
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return file.read().decode(errors="replace")
