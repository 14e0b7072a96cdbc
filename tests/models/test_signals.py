"""Signals wait inside a block, come in its interruptible work, and none is lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

import pytest

from nabla_fast.models.interrupts import deferred

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGXCPU, signal.SIGWINCH, signal.SIGIO]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handlers are as they were afterwards."""
    formers = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, former in formers.items():
        signal.signal(number, former)


def raises(error: type[BaseException]) -> Callable[..., None]:
    def handler(*_: object) -> None:
        raise error

    return handler


def test_a_signal_waits_until_the_block_ends():
    def blocks() -> None:
        with deferred():
            with deferred():
                signal.raise_signal(signal.SIGINT)
                done.append("inner")
            done.append("outer")
        done.append("after")

    done = []
    with pytest.raises(KeyboardInterrupt):
        blocks()
    assert done == ["inner", "outer"]


def test_a_signal_comes_while_work_runs():
    def work() -> None:
        signal.raise_signal(signal.SIGINT)
        done.append("after the signal")

    def block() -> None:
        with deferred() as signals:
            try:
                signals.interruptible(work)
            finally:
                signal.raise_signal(signal.SIGINT)  # a second one waits
                done.append("given back")

    done = []
    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["given back"]


@pytest.mark.parametrize("number", SIGNALS)
def test_any_signal_waits(number: signal.Signals):
    def handler(*_: object) -> None:
        seen.append("signal")

    seen = []
    signal.signal(number, handler)
    with deferred():
        signal.raise_signal(number)
        seen.append("block")
    assert seen == ["block", "signal"]
    assert signal.getsignal(number) is handler


def test_an_exception_comes_out_as_it_is():
    def work() -> None:
        try:
            signal.raise_signal(signal.SIGALRM)
        except Exception:
            pytest.fail("taken for an error of the work")

    signal.signal(signal.SIGALRM, raises(TimeoutError))
    with pytest.raises(TimeoutError), deferred() as signals:
        signals.interruptible(work)


def test_all_that_wait_are_handled_though_the_first_raises():
    def block() -> None:
        with deferred():
            signal.raise_signal(signal.SIGALRM)
            signal.raise_signal(signal.SIGTERM)

    seen = []
    signal.signal(signal.SIGALRM, raises(TimeoutError))
    signal.signal(signal.SIGTERM, lambda *_: seen.append("terminated"))
    with pytest.raises(TimeoutError):
        block()
    assert seen == ["terminated"]


def test_the_second_signal_has_the_handler_that_the_first_one_set():
    """One press of Ctrl-C asks for an orderly end, two force it."""

    def first(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        seen.append("first")

    def block() -> None:
        with deferred() as signals:
            signals.interruptible(lambda: signal.raise_signal(signal.SIGINT))
            signal.raise_signal(signal.SIGINT)
            seen.append("not split")

    seen = []
    signal.signal(signal.SIGINT, first)
    with pytest.raises(KeyboardInterrupt):
        block()
    assert seen == ["first", "not split"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("inside", [True, False])
def test_a_handler_set_by_work_may_call_the_one_it_replaced(inside: bool):
    def work() -> None:
        replaced = signal.signal(signal.SIGTERM, lambda *call: (seen.append("new"), replaced(*call)))
        if inside:
            signal.raise_signal(signal.SIGTERM)

    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append("old"))
    with deferred() as signals:
        signals.interruptible(work)
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert seen == ["new", "old"] * (3 if inside else 2)


def test_a_handler_put_back_by_work():
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append("old"))
    with deferred() as signals:
        replaced = signals.interruptible(lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, replaced)
    signal.raise_signal(signal.SIGTERM)
    with deferred():
        signal.raise_signal(signal.SIGTERM)
    assert seen == ["old", "old"]


def test_a_handler_may_catch_its_own_time_limit():
    def finish(*_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(TimeoutError):
            time.sleep(60)
        seen.append("finished")

    seen = []
    signal.signal(signal.SIGALRM, raises(TimeoutError))
    signal.signal(signal.SIGTERM, finish)
    with deferred() as signals:
        signals.interruptible(lambda: signal.raise_signal(signal.SIGTERM))
        signal.raise_signal(signal.SIGTERM)
    assert seen == ["finished", "finished"]


def test_exceptions_in_a_circle():
    """An exception may be among its own contexts, if by no ordinary code."""

    def work() -> None:
        signal.raise_signal(signal.SIGALRM)

    def circle(*_: object) -> None:
        first, second = ValueError(), KeyError()
        first.__context__, second.__context__ = second, first
        try:
            raise first
        except ValueError:
            signal.raise_signal(signal.SIGTERM)
            seen.append("ended")

    def block() -> None:
        with deferred() as signals:
            try:
                signals.interruptible(work)
            finally:
                signals.interruptible(circle)

    seen = []
    signal.signal(signal.SIGALRM, raises(TimeoutError))
    signal.signal(signal.SIGTERM, lambda *_: seen.append("handled"))
    with pytest.raises(TimeoutError):
        block()
    assert sorted(seen) == ["ended", "handled"]
