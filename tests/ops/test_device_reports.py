"""Statuses of rows on a device: what is kept, what is named, and when somebody waits.

The CPU stands for the device here; graphs are captured on a GPU alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from nabla_fast.errors import RowError
from nabla_fast.ops import device_reports, synchronize, token_stats
from nabla_fast.ops.device_reports import MOST_CALLS, add
from nabla_fast.ops.rows import ALL_MASKED, HAS_INF, HAS_NAN

CPU = torch.device("cpu")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def no_device_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_reports, "_devices", {})


def status(*codes: int) -> Tensor:
    return torch.tensor(codes, dtype=torch.int32)


@contextmanager
def waits() -> Iterator[list[str]]:
    """The names of the methods called inside for which the host would wait for a device."""
    seen: list[str] = []

    def watched(name: str, method: Callable) -> Callable:
        def call(self: Tensor, *args: object) -> object:
            seen.append(name)
            return method(self, *args)

        return call

    with ExitStack() as stack:
        for name in ("item", "tolist", "__int__", "__bool__", "cpu", "nonzero"):
            patch = mock.patch.object(Tensor, name, watched(name, getattr(Tensor, name)))
            stack.enter_context(patch)
        yield seen


@contextmanager
def captured() -> Iterator[None]:
    """Inside, a graph is captured, as far as reports can tell."""
    with mock.patch.object(device_reports, "_capturing", return_value=True):
        yield


def refused() -> str:
    with pytest.raises(RowError) as error:
        synchronize()
    synchronize()  # once
    return str(error.value)


# -- calls -------------------------------------------------------------------------------------------


def test_all_bad_rows_of_the_first_op_that_met_one():
    add("first", status(0, 0))
    add("second", status(0, HAS_NAN, 0, ALL_MASKED))
    add("third", status(HAS_INF))
    assert refused() == "second: row 1 has a NaN logit, row 3 has no finite logit"


def test_one_op_that_is_called_twice():
    add("first", status(0, HAS_INF))
    add("first", status(HAS_NAN, 0))
    assert refused() == "first: row 1 has a +inf logit"


@pytest.mark.parametrize("at", [0, MOST_CALLS - 1, MOST_CALLS, 3 * MOST_CALLS + 5])
def test_however_many_calls_follow(at: int):
    with waits() as seen:
        for number in range(5 * MOST_CALLS):
            rows = 1 + number % 7
            codes = [0] * rows
            if number == at or number > at + MOST_CALLS // 2:
                codes[-1] = HAS_NAN if number == at else HAS_INF
            add(f"op {number % 3}", status(*codes))
    assert not seen
    assert refused() == f"op {at % 3}: row {at % 7} has a NaN logit"


def test_good_rows_take_one_wait():
    for _ in range(3 * MOST_CALLS + 1):
        add("op", status(0, 0, 0))
    with waits() as seen:
        synchronize()
    assert seen == ["__int__"]
    with waits() as seen:
        synchronize()
    assert not seen


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device_reports, "MOST_ROWS", 100)
    for _ in range(1000):
        add("op", status(*[0] * 30))
        log = device_reports._devices[CPU]._logs[0]
        kept = sum(map(len, log._calls)) + (0 if log._codes is None else len(log._codes))
        assert kept <= 2 * (100 + 30 + 4)
    synchronize()


def test_calls_without_rows():
    add("op", status())
    synchronize()
    add("op", status())
    add("op", status(HAS_NAN))
    assert refused() == "op: row 0 has a NaN logit"


# -- graphs ------------------------------------------------------------------------------------------


def test_every_replay_adds_what_it_met():
    add("op", status(0, 0, 0))
    synchronize()
    for codes in ((0, 0, 0), (0, HAS_INF, 0), (0, 0, 0)):  # a capture, and what two replays of it do
        with captured(), waits() as seen:
            add("op", status(*codes))
        assert not seen
    assert refused() == "op: row 1 has a +inf logit"
    with captured():
        add("op", status(0, 0, HAS_NAN))
    assert refused() == "op: row 2 has a NaN logit"


def test_calls_come_before_replays():
    add("op", status(0))
    with captured():
        add("op", status(HAS_NAN))
    add("other", status(HAS_INF))
    assert refused() == "other: row 0 has a +inf logit"


def test_a_graph_keeps_its_codes_when_more_rows_come():
    add("op", status(0, 0))
    with captured():
        add("op", status(0, 0))
    (codes,) = device_reports._devices[CPU]._replays["op"]
    add("op", torch.zeros(5000, dtype=torch.int32))
    assert len(device_reports._devices[CPU]._replays["op"]) == 2
    codes.join(status(HAS_NAN, 0))  # what a replay of the graph does
    assert refused() == "op: row 0 has a NaN logit"


def test_more_rows_than_any_call_before():
    add("op", status(0))
    with captured():
        add("op", torch.full((2000,), HAS_INF, dtype=torch.int32))
    with pytest.raises(RowError) as error:
        synchronize()
    *rows, last = error.value.rows
    assert rows == [(row, "has a +inf logit") for row in range(1024)]
    assert last == (1024, "or a later one has a +inf logit")


def test_an_op_that_was_never_called_before():
    with captured():
        add("op", status(HAS_NAN))
        synchronize()
    synchronize()


def test_inside_a_capture_there_is_nothing_to_wait_for():
    add("op", status(HAS_NAN))
    with captured(), waits() as seen:
        synchronize()
    assert not seen
    assert refused() == "op: row 0 has a NaN logit"


def test_made_in_inference_mode_and_used_outside():
    with torch.inference_mode():
        add("op", status(0))
    with captured():
        add("op", status(HAS_NAN))
    assert refused() == "op: row 0 has a NaN logit"


# -- on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@NEEDS_GPU
def test_bad_rows_on_a_device_are_named_at_the_next_synchronization():
    logits = torch.zeros(3, 5, device="cuda")
    logits[1, 2] = torch.nan
    token_stats(logits)
    with pytest.raises(RowError, match="row 1 has a NaN logit"):
        synchronize()
    synchronize()


@pytest.mark.gpu
@NEEDS_GPU
def test_calls_on_two_streams():
    logits = torch.zeros(3, 5, device="cuda")
    logits[2, 2] = torch.nan
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    token_stats(logits[:2])
    with torch.cuda.stream(side):
        for _ in range(2 * MOST_CALLS):
            token_stats(logits)
    with pytest.raises(RowError, match="row 2 has a NaN logit"):
        synchronize()
    torch.cuda.current_stream().wait_stream(side)


@pytest.mark.gpu
@NEEDS_GPU
def test_a_bad_row_of_a_replay():
    logits = torch.zeros(3, 5, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        token_stats(logits)
    torch.cuda.current_stream().wait_stream(side)
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token_stats(logits)
        synchronize()
    graph.replay()
    synchronize()
    logits[1, 2] = torch.nan
    graph.replay()
    logits.zero_()
    graph.replay()
    with pytest.raises(RowError, match="row 1 has a NaN logit"):
        synchronize()
    graph.replay()
    synchronize()
