"""Launches by op, at the shapes that matter, and what each of their kernels handles.

A module has ``launches(dtype)``, and ``WORK`` where it has kernels of its own: for each, by the names of
its file and itself, a function from a :class:`~..recording.Launch` to its :class:`~..work.Work`. What
several ops launch is in ``_products``.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.compile_check.recording import Launch
    from tools.compile_check.work import Work


def ops() -> list[str]:
    """Ops that have launches."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if not name.startswith("_"))


def described(launch: Launch) -> Work | None:
    """What a launch has to do; None if its kernel is not described."""
    for name in ("_products", *ops()):
        work = getattr(importlib.import_module(f"{__name__}.{name}"), "WORK", {})
        if describe := work.get(launch.function):
            return describe(launch)
    return None
