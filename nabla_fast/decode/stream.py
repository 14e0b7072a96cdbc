"""Results of many prompts, one after another as they finish."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress

from torch import nn

from nabla_fast.decode.failures import DecodeFailure
from nabla_fast.decode.problem import Problem
from nabla_fast.errors import DecodingFailed, DecodingInterrupted
from nabla_fast.models.frozen import frozen
from nabla_fast.models.interrupts import deferred
from nabla_fast.results import Result

Decoding = Generator[tuple[int, Result], None, None]


class ResultStream(Iterator[tuple[int, Result]]):
    """An iterator of (index, result) as prompts finish: what :meth:`NablaDecoder.stream` returns.

    The models are frozen and taken only while ``next`` runs. Between two results they are the caller's,
    flags and all, to generate with or to train. Weights that changed in between are noticed, and what
    is under way starts over: each result is what the weights give when it is yielded. (Changes through
    ``parameter.data`` are not noticed; PyTorch does not see them either.)

    Threads may share a stream: each result goes to one of them.

    Close it, or use it in a ``with`` statement, to stop before the end; what it holds goes with it.

    Args:
        models: frozen while ``next`` runs.
        problems: one a prompt.
        decode: yields (index, result) of the problems it is given by index.

    Attributes:
        results: one entry a prompt, in order: its result, or None where it has not finished.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        problems: Sequence[Problem],
        decode: Callable[[Mapping[int, Problem]], Decoding],
    ):
        self.results: list[Result | None] = [None] * len(problems)
        self._models, self._decode = models, decode
        self._left = dict(enumerate(problems))
        self._decoding: Decoding | None = None
        self._weights: list[tuple[int, int]] = []
        self._running, self._thread = threading.Lock(), 0  # held by the thread in ``_decoding``
        _streams.add(self)

    def __next__(self) -> tuple[int, Result]:
        """The next result.

        Raises:
            DecodingInterrupted: Ctrl-C; the stream is at its end.
            DecodingFailed: an error in a decode; likewise.
            InputError: the models are decoding around this very call; the stream is as it was.
        """
        if not self._left:
            raise StopIteration
        try:
            with frozen(self._models) as signals:
                try:
                    # Another thread may have taken the last one while this one waited for its turn.
                    finished = self._advance(signals) if self._left else None
                finally:
                    self._free_at_the_end()
        except KeyboardInterrupt:
            with suppress(KeyboardInterrupt):  # one is enough
                self.close()
            raise DecodingInterrupted(self.results) from None
        if finished is None:
            raise StopIteration
        return finished

    def _advance(self, signals: deferred) -> tuple[int, Result]:
        """Decode up to the next result and keep it."""
        problems = self._left
        with self._running:
            self._thread = threading.get_ident()
            try:
                index, result = signals.interruptible(lambda: self._result(problems))
            except DecodeFailure as failure:
                self._left = {}
                raise DecodingFailed(
                    failure.problems, self.results, failure.__cause__
                ) from failure.__cause__
            except Exception as error:
                # From the loop that decodes one problem after another: from the first that is left.
                self._left = {}
                raise DecodingFailed([min(problems)], self.results, error) from error
            self.results[index] = result
            del problems[index]
        return index, result

    def _result(self, problems: Mapping[int, Problem]) -> tuple[int, Result]:
        if self._decoding is None or self._weights != self._fingerprint():
            if self._decoding is not None:
                self._decoding.close()
            self._decoding = self._decode(problems)
        try:
            finished = next(self._decoding)
        except BaseException:
            self._decoding = None  # at its end: whoever goes on, after a time limit say, starts over
            raise
        self._weights = self._fingerprint()
        return finished

    def _fingerprint(self) -> list[tuple[int, int]]:
        """A value that changes with any weight: where each lies, and how often it has been written to."""
        return [(_address(p), p._version) for model in self._models for p in model.parameters()]

    def close(self) -> None:
        """End the stream and free what it holds; ``results`` stay.

        A thread that decodes just now still gets its result, and frees the rest.
        """
        with deferred():
            self._left = {}
            self._free_at_the_end()

    def _free_at_the_end(self) -> None:
        if not self._left and self._running.acquire(blocking=False):
            try:
                if self._decoding is not None:
                    self._decoding.close()
            finally:
                self._running.release()

    def __enter__(self) -> ResultStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_streams: weakref.WeakSet[ResultStream] = weakref.WeakSet()


def _leave_other_threads_decodes() -> None:
    """In a forked process: what another thread was decoding nobody goes on with; it starts over."""
    for stream in _streams:
        if stream._running.locked() and stream._thread != threading.get_ident():
            stream._running, stream._decoding = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_other_threads_decodes)


def _address(weight: nn.Parameter) -> int:
    try:
        return weight.data_ptr()
    except RuntimeError:  # quantized weights put together of several tensors have none
        return id(weight)
