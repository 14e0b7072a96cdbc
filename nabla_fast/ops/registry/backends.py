"""Backends: which exist, which are there on this machine, and which are forced."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable

from nabla_fast._native import cuda_library
from nabla_fast._native import loading as native_loading
from nabla_fast._triton import why_missing as why_triton_missing
from nabla_fast.errors import BackendUnavailable

BACKENDS = ("torch", "cpu", "triton", "cuda")
# Order of the choice by input: the first that is there and takes the input. The CUDA kernels come first
# where they were measured to be faster than those of Triton: nowhere so far.
PREFERENCE = ("triton", "cuda", "cpu", "torch")

# None where a backend is there, else one line that says why it is not.
_why_missing: dict[str, Callable[[], str | None]] = {
    "torch": lambda: None,
    "cpu": native_loading.why_missing,
    "triton": why_triton_missing,
    "cuda": cuda_library.why_missing,
}

# () is the choice by input; None is the environment's choice, until set_backend.
_forced: tuple[str, ...] | None = None


class _Block:
    """An open ``with use_backend`` block."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names


_blocks: list[_Block] = []  # open blocks of all threads; the one entered last is in force


def backend_status() -> dict[str, str | None]:
    """Each backend's name, with None if it is there or one line saying why it is not.

    Example:
        >>> backend_status()["torch"] is None
        True
    """
    return {name: _why_missing[name]() for name in BACKENDS}


def is_available(name: str) -> bool:
    """Whether a backend is there."""
    return _why_missing[name]() is None


@functools.cache
def warn_of_missing_kernels() -> None:
    """Say, once in a process, that ops run in plain PyTorch where the C++ kernels would have served."""
    warnings.warn(
        "ops on the CPU run in plain PyTorch, several times slower, as the C++ kernels are missing: "
        f"{native_loading.why_missing()} (set_backend('torch') silences this warning)",
        UserWarning,
        stacklevel=2,
    )


def set_backend(*names: str) -> None:
    """Force backends for the rest of the process, in order of preference.

    ``set_backend("cpu", "torch")`` takes the CPU kernels, and plain PyTorch where an op or an input has
    none; ``set_backend("cpu")`` raises there; ``set_backend()`` returns to the choice by device and
    dtype. Holds for every op in every thread. Inside a ``with use_backend(...)`` block it lasts until
    the end of the block.

    The environment variable ``NABLA_FAST_BACKEND`` (comma-separated names) has the same effect. It is
    read once, at the first op call or query, and only if no backend has been set before.

    Raises:
        BackendUnavailable: a name is unknown, or the backend is not there (the line says why).

    Example:
        >>> set_backend("torch")
        >>> set_backend()
    """
    global _forced
    if _blocks:
        _blocks[-1].names = _checked(names)
    else:
        _forced = _checked(names)


class use_backend:
    """Force backends inside a ``with`` block, in order of preference; names as in :func:`set_backend`.

    Takes effect when the block is entered, for every op in every thread; the former choice returns when
    the block is left, also by an exception. Blocks may be nested, and one object may be entered again.
    Where blocks of several threads overlap, the one entered last is in force for all of them. A function
    that ``torch.compile`` traces does not see blocks inside it: enter them outside.

    Raises:
        BackendUnavailable: a name is unknown, or the backend is not there (the line says why); raised
            when the object is made.

    Example:
        >>> with use_backend("torch"):
        ...     token_stats(torch.zeros(1, 3)).argmax
        tensor([0])
    """

    def __init__(self, *names: str):
        self._names = _checked(names)
        self._open: list[_Block] = []  # entered and not left yet

    def __enter__(self) -> use_backend:
        self._open.append(_Block(self._names))
        _blocks.append(self._open[-1])
        return self

    def __exit__(self, *_: object) -> None:
        _blocks.remove(self._open.pop())  # by identity: blocks of other threads may have come after it


def forced_backends() -> tuple[str, ...]:
    """The forced backends, in order of preference; () where the input decides."""
    if _blocks:
        return _blocks[-1].names
    return _environment_backends() if _forced is None else _forced


def allowed(name: str) -> bool:
    """Whether a backend may be used: any may, unless others are forced."""
    names = forced_backends()
    return not names or name in names


def forced(name: str) -> bool:
    """Whether a backend is asked for by name."""
    return name in forced_backends()


@functools.cache
def _environment_backends() -> tuple[str, ...]:
    """``NABLA_FAST_BACKEND``, read at the first call; a bad value raises at each, as nothing is kept."""
    names = os.environ.get("NABLA_FAST_BACKEND", "").split(",")
    return _checked(name.strip() for name in names if name.strip())


def _checked(names: Iterable[str]) -> tuple[str, ...]:
    names = tuple(names)
    for name in names:
        if name not in BACKENDS:
            raise BackendUnavailable(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
        if why := _why_missing[name]():
            raise BackendUnavailable(f"backend {name!r} is not available: {why}")
    return names
