"""Command lines in processes of their own, for tests that send signals or read a pipe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from golden_data import GOLDEN

MODELS = ["--model", str(GOLDEN / "lm"), "--reward-model", str(GOLDEN / "rm")]

_ONE_AFTER_ANOTHER = """
import json, sys
from nabla_fast.cli import main
for line in sys.stdin:
    status = main(json.loads(line))
    print(f"status {status}", flush=True)
"""


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start Python; ``options`` go to Popen. The process has no standard input unless they name one."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options},
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=_heed_interrupts,
    )


def _heed_interrupts() -> None:
    """A shell's background jobs, of which the tests may be one, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process if it still runs, and close its pipes."""
    if process.poll() is None:
        process.kill()
    with process:
        pass


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Return when the condition holds; the process must go on until then."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"exit status {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Commands:
    """A process that runs command lines one after another, so that torch is imported once.

    Args:
        errors: the file for its standard error.
    """

    def __init__(self, errors: Path):
        self._errors = errors
        with errors.open("wb") as file:
            self.process = start("-c", _ONE_AFTER_ANOTHER, stdin=subprocess.PIPE, stderr=file)

    def begin(self, *arguments: str) -> None:
        """Run a command line there."""
        self._before = self._errors.stat().st_size
        self.process.stdin.write(json.dumps(arguments).encode() + b"\n")
        self.process.stdin.flush()

    def finish(self) -> tuple[int, str, str]:
        """Exit status, standard output and standard error of the command line, once it is done."""
        out = b""
        for line in self.process.stdout:
            if line.startswith(b"status "):
                error = self._errors.read_bytes()[self._before :]
                return int(line.split()[1]), out.decode(), error.decode()
            out += line
        raise AssertionError(f"the process ended: {self._errors.read_text()}")

    def close(self) -> None:
        """End the process."""
        end(self.process)
