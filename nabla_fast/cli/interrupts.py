"""Ctrl-C at moments when something is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def postponed() -> Iterator[None]:
    """Ctrl-C waits until the block is done, so that what it writes is written whole and counted.

    A second one does not wait: the block may hang.
    """
    former = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(former):
        yield  # no Ctrl-C arrives here, or it is ignored
        return
    caught: list[tuple] = []

    def handler(*arguments: object) -> None:
        caught.append(arguments)
        if len(caught) > 1:
            former(*arguments)

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
    if caught:
        former(*caught[0])
