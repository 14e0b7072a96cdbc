"""Signals that wait while something is half done."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TypeVar

T = TypeVar("T")

# Not those by which the system reports a fault of the program itself.
_FAULTS = {
    getattr(signal, f"SIG{name}", None) for name in ("SEGV", "BUS", "FPE", "ILL", "ABRT", "TRAP", "SYS")
}
_NUMBERS = sorted({int(number) for number in signal.valid_signals() - _FAULTS})


class _Interruption(BaseException):
    """What carries a handler's ``Exception`` to the end of a block, past whoever catches exceptions.

    A ``TimeoutError`` would be taken for a failure of the model that an alarm interrupts.
    """

    def __init__(self, error: Exception):
        self.error = error
        super().__init__(error)


class _Handler:
    """A handler that lets a signal through to its former, or lets it wait.

    Each has its own former: code that sets another handler in a block may call the one that it replaced.
    """

    def __init__(self, former: Callable[[int, FrameType | None], object]):
        self.former = former

    def __call__(self, number: int, frame: FrameType | None) -> None:
        _signals.arrive(self.former, number, frame)


class _Signals:
    """Which signals wait; the main thread alone, where signals arrive, uses it.

    It lets signals through unless ``deferring``, so that a handler does no harm where it stays behind.

    Attributes:
        deferring: whether signals wait just now.
        depth: how many blocks of :class:`deferred` have been entered.
        thread: the one that entered them.
        raised: what a handler has raised inside of them.
    """

    def __init__(self) -> None:
        self.deferring, self.depth, self.thread = False, 0, 0
        self._handling: int | None = None  # the depth at which a handler runs
        self.raised: BaseException | None = None
        self._caught: list[tuple[Callable[[int, FrameType | None], object], int, FrameType | None]] = []
        self._numbers: set[int] = set()

    def arrive(
        self, handler: Callable[[int, FrameType | None], object], number: int, frame: FrameType | None
    ) -> None:
        """Let a signal wait, or have it handled."""
        # What a handler raises passes through blocks that give back, which no second signal may split.
        if self.deferring or self._passes():
            self._caught.append((handler, number, frame))
            return
        before, self._handling = self._handling, self.depth
        inside = before == self.depth  # of another handler, to which it may matter what is raised
        try:
            handler(number, frame)
        except BaseException as error:
            if not self.depth or inside:
                raise
            self.raised = _Interruption(error) if isinstance(error, Exception) else error
            raise self.raised from None
        finally:
            self._handling = before
            if self.depth:
                self.install()  # a handler may make another one its successor

    def _passes(self) -> bool:
        """Whether what a handler has raised is on its way, and has not been caught and dropped."""
        error, seen = sys.exc_info()[1] if self.raised else None, set()
        while error is not None and error is not self.raised and id(error) not in seen:
            seen.add(id(error))
            error = error.__context__
        return error is not None and error is self.raised

    def raise_again(self) -> None:
        """Raise what a handler has raised, which somebody may have caught; nothing if there is nothing."""
        if self.raised:
            raise self.raised

    def install(self) -> None:
        """Stand before every handler that is a Python function."""
        for number in _NUMBERS:
            handler = signal.getsignal(number)
            if callable(handler) and not isinstance(handler, _Handler):
                self._numbers.add(number)
                signal.signal(number, _Handler(handler))

    def restore(self) -> None:
        """Leave the handlers as they were; those that were changed meanwhile stay changed."""
        for number in list(self._numbers):
            handler = signal.getsignal(number)
            if isinstance(handler, _Handler):
                signal.signal(number, handler.former)
            self._numbers.discard(number)

    def forget(self) -> None:
        """Drop what waits and what has been raised."""
        self._caught.clear()
        self.raised = None

    def deliver(self) -> None:
        """Let those through that have waited, all of them where no block is left to wait for."""
        while self._caught and not self.deferring and not self._passes():
            try:
                self.arrive(*self._caught.pop(0))
            except BaseException:
                if not self.depth:
                    self.deliver()
                raise


_signals = _Signals()


class deferred:
    """A block that no signal's handler runs in, but where :meth:`interruptible` says so.

    ``KeyboardInterrupt`` may come between any two bytecodes: between a lock's acquisition and the
    ``try`` that would release it, or in the ``finally`` that does. Inside this block it waits; it is
    raised when the outermost block ends. In threads other than the main one, where no handler runs, the
    block does nothing.

    What a handler raises in :meth:`interruptible` comes out of the outermost block as it is, also where
    other code has caught it, and is no ``Exception`` on the way.

    Example:
        with deferred() as signals:
            take()
            try:
                signals.interruptible(work)
            finally:
                give_back()
    """

    def __enter__(self) -> deferred:
        self._here = threading.current_thread() is threading.main_thread()
        if self._here:
            self._depth, self._before = _signals.depth, _signals.deferring
            _signals.thread = threading.get_ident()
            try:
                if not self._depth:
                    _signals.install()
                    _signals.forget()
                _signals.deferring = True
            except BaseException:
                self._restore_if_outermost()
                raise
            _signals.depth = self._depth + 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._here:
            _signals.depth = self._depth
            try:
                _signals.deferring = self._before  # from here on one may come again
                self._restore_if_outermost()
            except BaseException:
                self._restore_if_outermost()
                raise
            if not self._depth:
                _signals.raised = None
            _signals.deliver()
            if isinstance(error, _Interruption) and not self._depth:
                error.error.__suppress_context__ = True  # it comes from the handler, not from here
                raise error.error

    def _restore_if_outermost(self) -> None:
        if not self._depth:
            _signals.restore()

    def interruptible(self, work: Callable[[], T]) -> T:
        """The value of ``work()``, during which signals arrive, as do those that have waited."""
        if not self._here:
            return work()
        try:
            _signals.deferring = False
            _signals.deliver()
            return work()
        finally:
            _signals.deferring = True
            _signals.install()  # work may have set handlers of its own
            _signals.raise_again()


def _forget_the_parents_main_thread() -> None:
    """In a forked process: the block that another thread was in will not end here."""
    if _signals.thread != threading.get_ident():
        _signals.depth, _signals.deferring = 0, False
        _signals.forget()
        _signals.restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_the_parents_main_thread)
