"""Parts of a run: each a process with a time limit, and what it gave packed as soon as it ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOG_BYTES = 2 << 20  # the end of a part's output that the log keeps
TIMED_OUT = 124
GRACE_SECONDS = 5.0  # between the interruption of a late part and its end


@dataclass(frozen=True)
class Part:
    """One process of a run.

    Attributes:
        name: of its files and its line.
        command: what runs.
        seconds: its limit.
        prints_json: whether its standard output is JSON, and goes to ``<name>.json``.
        variables: of its environment, beside those of all parts.
    """

    name: str
    command: Sequence[str]
    seconds: float
    prints_json: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """How a part went. ``rc`` is its exit status, 124 if its time ran out."""

    name: str
    rc: int
    seconds: float
    note: str = ""

    @property
    def failed(self) -> bool:
        return self.rc != 0

    def __str__(self) -> str:
        word = f"FAILED (rc {self.rc})" if self.failed else "ok"
        return f"{word}, {self.seconds:.1f} s" + (f", {self.note}" if self.note else "")


def run_process(
    command: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> tuple[int, bytes, bytes]:
    """Exit status, standard output and standard error of a command.

    One that is late is interrupted, so that it can print what it has, and killed with all its processes.
    """
    # Files, not pipes: a grandchild that outlives the command would keep a pipe open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            rc = process.wait(seconds)
        except subprocess.TimeoutExpired:
            rc = TIMED_OUT
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        finally:
            # Its children may outlive it, and hold memory of the GPU.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        return rc, out.read(), err.read()


class Run:
    """The parts that have run, their files, and the time that is left.

    In ``out`` are few files: ``results.tar.gz`` with all that there is, renewed after each part,
    ``summary.json`` with how each part went, and what parts write line by line, which is there when a
    run is killed. All others are in ``files``.
    """

    patience = 1.0  # times a part's limit

    def __init__(self, out: Path, files: Path, gpu: str, seconds: float, environment: Mapping[str, str]):
        self.out = out
        self.files = files
        self.gpu = gpu
        self.environment = dict(environment)
        self.results: list[Result] = []
        self._seconds = seconds
        self._started = time.monotonic()
        shutil.rmtree(files, ignore_errors=True)
        for folder in (out, files):
            folder.mkdir(parents=True, exist_ok=True)
        for path in self._lines():
            path.unlink()
        self._log = self.files / "log.txt"
        self._log.write_bytes(b"")

    def left(self) -> float:
        """Seconds."""
        return self._seconds - (time.monotonic() - self._started)

    def part(self, part: Part) -> Result:
        """Run one part."""
        return self.together([part])[0]

    def together(self, parts: Sequence[Part]) -> list[Result]:
        """Run parts side by side."""
        with ThreadPoolExecutor(len(parts)) as pool:
            ran = list(pool.map(self._ran, parts))
        for part, (result, printed) in zip(parts, ran, strict=True):
            with self._log.open("ab") as log:
                log.write(f"==== {part.name}: {' '.join(part.command)}\n".encode())
                log.write(printed[-LOG_BYTES:].rstrip() + b"\n\n")
            self.results.append(result)
            print(f"{result.name}: {result}", file=sys.stderr, flush=True)
        self._pack()
        return [result for result, _ in ran]

    def skip(self, name: str, why: str) -> None:
        """Note a part that this machine cannot run."""
        self.results.append(Result(name, 0, 0.0, f"skipped: {why}"))
        print(f"{name}: {self.results[-1]}", file=sys.stderr, flush=True)

    def _ran(self, part: Part) -> tuple[Result, bytes]:
        began, limit = time.monotonic(), min(self.patience * part.seconds, self.left())
        if limit < 1:
            return Result(part.name, TIMED_OUT, 0.0, "no time left for it"), b""
        rc, stdout, stderr = run_process(part.command, limit, self.environment | part.variables)
        note = f"stopped after {limit:.0f} s" if rc == TIMED_OUT else ""
        if part.prints_json:
            (self.files / f"{part.name}.json").write_bytes(stdout)
            if rc == 0 and not _is_json(stdout):
                rc, note = 1, "its standard output is not JSON"
        result = Result(part.name, rc, round(time.monotonic() - began, 1), note)
        return result, stderr if part.prints_json else stdout + stderr

    def _pack(self) -> None:
        summary = {
            "gpu": self.gpu or None,
            "parts": [asdict(result) for result in self.results],
            "seconds": round(time.monotonic() - self._started, 1),
        }
        (self.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        # Under its name there is a whole archive at any time.
        unfinished = self.files.parent / "unfinished.tar.gz"
        with tarfile.open(unfinished, "w:gz") as archive:
            for path in (self.out / "summary.json", *self._lines(), *sorted(self.files.iterdir())):
                archive.add(path, path.name)
        shutil.move(unfinished, self.out / "results.tar.gz")

    def _lines(self) -> list[Path]:
        return sorted(self.out.glob("*.jsonl"))


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
