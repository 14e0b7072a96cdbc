"""Interrupts: Ctrl-C, a request to terminate, and moments when something is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Inside, a request to terminate is a Ctrl-C: a job whose time is up prints what it has."""
    former = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or former is not signal.SIG_DFL:
        yield  # no signal arrives here, or the caller handles it
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def postponed() -> Iterator[None]:
    """Interrupts wait until the block is done, so that its lines are written whole and counted.

    A second one does not wait: the block may hang.
    """
    formers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    formers = {which: former for which, former in formers.items() if callable(former)}
    if threading.current_thread() is not threading.main_thread():
        formers = {}  # none arrives here
    caught: list[tuple] = []

    def handler(which: int, frame: object) -> None:
        caught.append((which, frame))
        if len(caught) > 1:
            formers[which](which, frame)

    for which in formers:
        signal.signal(which, handler)
    try:
        yield
    finally:
        for which, former in formers.items():
            signal.signal(which, former)
    if caught:
        which, frame = caught[0]
        formers[which](which, frame)
