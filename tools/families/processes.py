"""A process of its own for each trial, with a time limit."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import redirect_stderr
from multiprocessing.connection import Connection
from typing import Any


def fork_server() -> Any:
    """A multiprocessing context whose processes start with torch and transformers imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.families.trial"])
    return context


def _worker(kind: str, task: str, end: Connection) -> None:
    import torch

    from tools.families.trial import trial

    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        end.send(trial(kind, task))


def attempt(context: Any, kind: str, task: str, seconds: float) -> dict[str, Any]:
    """What the trial of a type found, or how its process ended."""
    ours, theirs = context.Pipe()
    process = context.Process(target=_worker, args=(kind, task, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(seconds):
            return ours.recv()
        return {"kind": kind, "task": task, "stage": "time limit", "why": f"no end after {seconds:.0f} s"}
    except EOFError:
        process.join()
        return {
            "kind": kind,
            "task": task,
            "stage": "died",
            "why": f"the process ended with {process.exitcode}",
        }
    finally:
        process.kill()
        process.join()
