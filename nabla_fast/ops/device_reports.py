"""Statuses of rows on devices: kept there until they are asked for, with one wait a device.

An op leaves the status [N] int32 of its rows in device memory, and nothing waits for it. Statuses are
kept as they came, at most MOST_CALLS of them and some MOST_ROWS rows, and are then joined on the device
into a log. Of a log and the one before it, that with the first bad row stays, so that memory is bounded
however late somebody asks.

Inside the capture of a CUDA graph nothing has run yet, and the graph's next call uses its memory again.
There a status is joined, row by row, to codes that outlive the graph, by one launch that is part of it:
each replay adds what it met. The codes are made by calls outside a capture, for as many rows as those
have. Of an op that was never called on a device outside a capture, nothing is kept there.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

MOST_CALLS = 64  # kept as they came
MOST_ROWS = 1 << 20  # of these together
_FEWEST_ROWS = 1024  # that a graph's codes are made for

# (row, code), or (row, −code) where it is this row or a later one.
BadRow = tuple[int, int]

_names: list[str] = []  # of ops, by number
_numbers: dict[str, int] = {}
_lock = threading.Lock()


class _Log:
    """The statuses of the calls on one stream of a device, in order."""

    def __init__(self, stream: torch.cuda.Stream | None):
        self.stream = stream
        self._calls: list[Tensor] = []  # mark, status, mark, status, …
        self._rows = 0
        self._codes: Tensor | None = None  # [M] int32: mark, status, mark, status, …
        self._worst: Tensor | None = None  # [] int32: the largest of them, not positive if all are good

    def add(self, mark: Tensor, status: Tensor) -> None:
        self._calls += (mark, status)
        self._rows += status.shape[0]
        if len(self._calls) >= 2 * MOST_CALLS or self._rows >= MOST_ROWS:
            self.worst()

    def worst(self) -> Tensor | None:
        """[] int32 on the device, positive if a row is bad; None if there was no call."""
        if self._calls:
            codes = torch.cat(self._calls)
            worst = codes.amax()
            self._calls, self._rows = [], 0
            if self._codes is not None:
                was_bad = self._worst > 0
                length = max(len(codes), len(self._codes))  # zeros beyond are good rows
                before, codes = (pad(part, (0, length - len(part))) for part in (self._codes, codes))
                codes = torch.where(was_bad, before, codes)
                worst = torch.where(was_bad, self._worst, worst)
            self._codes, self._worst = codes, worst
        return self._worst

    def first(self) -> tuple[str, list[BadRow]] | None:
        """The first op with a bad row, and all its bad rows, of what is joined; waits for the device."""
        name, row, rows = "", 0, []
        for code in () if self._codes is None else self._codes.tolist():
            if code < 0:
                if rows:
                    break
                name, row = _names[-1 - code], 0
                continue
            if code:
                rows.append((row, code))
            row += 1
        return (name, rows) if rows else None


class _Replays:
    """What replays of graphs met in the rows of one op: a code for each of R rows, one for all beyond."""

    def __init__(self, rows: int, device: torch.device):
        self.rows = rows
        self.captured = False
        with torch.inference_mode(False):  # a caller's would forbid changes outside it
            self.codes = torch.zeros(rows + 1, dtype=torch.int32, device=device)

    def join(self, status: Tensor) -> None:
        """Add the status [N] of a call that is captured."""
        self.captured = True
        here, beyond = status[: self.rows], status[self.rows :]
        own = self.codes[: len(here)]
        torch.maximum(own, here, out=own)
        if len(beyond):
            last = self.codes[self.rows]
            torch.maximum(last, beyond.amax(), out=last)

    def bad_rows(self) -> list[BadRow]:
        *codes, beyond = self.codes.tolist()
        rows = [(row, code) for row, code in enumerate(codes) if code]
        return [*rows, (self.rows, -beyond)] if beyond else rows


class _Device:
    """The logs of a device's streams, and what replays of graphs met there."""

    def __init__(self, device: torch.device):
        self.device = device
        self._logs: dict[int, _Log] = {}
        self._marks: dict[tuple[str, int], Tensor] = {}  # [1] int32: −1 − number of the op
        # By op. Of several, the last has the most rows; graphs write to those before it.
        self._replays: dict[str, list[_Replays]] = {}

    def add(self, op: str, status: Tensor) -> None:
        if _capturing(self.device):
            if op in self._replays:
                self._replays[op][-1].join(status)
            return
        if op not in self._replays or self._replays[op][-1].rows < status.shape[0]:
            self._make_room(op, status.shape[0])
        stream = _stream_number(self.device)
        log = self._logs.get(stream)
        if log is None:
            log = self._logs[stream] = _Log(_current_stream(self.device))
        mark = self._marks.get((op, stream))
        if mark is None:
            mark = self._marks[op, stream] = self._mark(op)
        log.add(mark, status)

    def take(self) -> _Taken:
        """What came in since the last call; the next begins with nothing."""
        logs, self._logs = list(self._logs.values()), {}
        graphs = [
            (op, replays) for op, made in self._replays.items() for replays in made if replays.captured
        ]
        return _Taken(self.device, logs, graphs)

    def _mark(self, op: str) -> Tensor:
        number = _numbers.get(op)
        if number is None:
            number = _numbers[op] = len(_names)
            _names.append(op)
        return torch.full((1,), -1 - number, dtype=torch.int32, device=self.device)

    def _make_room(self, op: str, rows: int) -> None:
        made = [replays for replays in self._replays.get(op, ()) if replays.captured]
        room = max(_FEWEST_ROWS, 1 << max(0, rows - 1).bit_length())
        self._replays[op] = [*made, _Replays(room, self.device)]


@dataclass(frozen=True)
class _Taken:
    """Logs of a device that nobody adds to any more, and its graphs, which may be replayed at any time."""

    device: torch.device
    logs: list[_Log]
    graphs: list[tuple[str, _Replays]]

    def first(self) -> tuple[str, list[BadRow]] | None:
        """The first op with a bad row, and its bad rows; waits for the device."""
        if self.device.type != "cuda":
            return self._first()
        with torch.cuda.device(self.device):
            return self._first()

    def _first(self) -> tuple[str, list[BadRow]] | None:
        worst = [_worst_of(log) for log in self.logs]
        if self.graphs:
            _wait(self.device)  # the replay may have been on any stream
            worst += (replays.codes.amax() for _, replays in self.graphs)
        worst = [one for one in worst if one is not None]
        if not worst or int(torch.stack(worst).amax() if len(worst) > 1 else worst[0]) <= 0:
            return None
        found = [log.first() for log in self.logs]
        for op, replays in self.graphs:
            if rows := replays.bad_rows():
                found.append((op, rows))
                replays.codes.zero_()
        _wait(self.device)  # a replay on another stream may follow
        return next(filter(None, found), None)


_devices: dict[torch.device, _Device] = {}


def add(op: str, status: Tensor) -> None:
    """Keep the status [N] int32 of a call of ``op`` on a device; nothing waits."""
    device = status.device
    with _lock:
        reports = _devices.get(device)
        if reports is None:
            reports = _devices[device] = _Device(device)
        reports.add(op, status)


def first() -> tuple[str, list[BadRow]] | None:
    """The first op that met a bad row since the last call, and its bad rows; waits for the devices.

    Calls come before replays of graphs. Inside the capture of a graph nothing has run: None.
    """
    if not _devices or any(map(_capturing, _devices)):
        return None
    with _lock:
        taken = [reports.take() for reports in _devices.values()]
    found = [of_device.first() for of_device in taken]  # other threads go on meanwhile
    return next(filter(None, found), None)


# -- what is CUDA's own ------------------------------------------------------------------------------


def _capturing(device: torch.device) -> bool:
    """Whether a graph is captured from the device's current stream."""
    if device.type != "cuda":
        return False
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _stream_number(device: torch.device) -> int:
    """Of the device's current stream. No object is made of it: that would cost as much as all the rest."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _worst_of(log: _Log) -> Tensor | None:
    """``log.worst()`` for the current stream, which waits for the log's; the host does not."""
    if log.stream is None or log.stream == (current := torch.cuda.current_stream()):
        return log.worst()
    with torch.cuda.stream(log.stream):
        worst = log.worst()
    current.wait_stream(log.stream)
    return worst


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
