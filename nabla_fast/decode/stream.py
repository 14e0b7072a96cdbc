"""Results of many prompts, one after another as they finish."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

from torch import nn

from nabla_fast.decode.failures import DecodeFailure
from nabla_fast.decode.problem import Problem
from nabla_fast.errors import DecodingFailed, DecodingInterrupted
from nabla_fast.models.frozen import frozen
from nabla_fast.results import Result

Decoding = Generator[tuple[int, Result], None, None]


class ResultStream(Iterator[tuple[int, Result]]):
    """An iterator of (index, result) as prompts finish: what :meth:`NablaDecoder.stream` returns.

    The models are frozen and taken only while ``next`` runs. Between two results they are the caller's,
    flags and all, to generate with or to train. Weights that changed in between are noticed, and what
    is under way starts over: each result is what the weights give when it is yielded. (Changes through
    ``parameter.data`` are not noticed; PyTorch does not see them either.)

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
            with frozen(self._models):
                index, result = self._advance()
        except KeyboardInterrupt:
            self.close()
            raise DecodingInterrupted(self.results) from None
        del self._left[index]
        self.results[index] = result
        return index, result

    def _advance(self) -> tuple[int, Result]:
        try:
            if self._decoding is None or self._weights != self._fingerprint():
                if self._decoding is not None:
                    self._decoding.close()
                self._decoding = self._decode(self._left)
            index, result = next(self._decoding)
            self._weights = self._fingerprint()
        except DecodeFailure as failure:
            self.close()
            raise DecodingFailed(failure.problems, self.results, failure.__cause__) from failure.__cause__
        except Exception as error:
            # From the loop that decodes one problem after another: from the first that is left.
            first = min(self._left)
            self.close()
            raise DecodingFailed([first], self.results, error) from error
        return index, result

    def _fingerprint(self) -> list[tuple[int, int]]:
        """A value that changes with any weight: where each lies, and how often it has been written to."""
        return [(_address(p), p._version) for model in self._models for p in model.parameters()]

    def close(self) -> None:
        """End the stream and free what it holds; ``results`` stay."""
        self._left = {}
        if self._decoding is not None:
            self._decoding.close()

    def __enter__(self) -> ResultStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _address(weight: nn.Parameter) -> int:
    try:
        return weight.data_ptr()
    except RuntimeError:  # quantized weights put together of several tensors have none
        return id(weight)
