"""Ctrl-C and requests to terminate: what was finished is written whole, and the exit status is 130."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from commands import MODELS, Commands, end, start, wait_for

from nabla_fast.cli.interrupts import postponed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_what_was_finished(number: int, commands: Commands, tmp_path: Path):
    prompts, written = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text('"2+2="\n' * 2000)
    options = ["--prompts", str(prompts), "--output", str(written), "--json", "--max-new-tokens", "8"]
    commands.begin("generate", *MODELS, *options)
    wait_for(lambda: written.exists() and written.read_text().count("\n") >= 2, commands.process)
    commands.process.send_signal(number)
    status, out, err = commands.finish()
    assert status == 130
    document = json.loads(out)
    lines = written.read_text().splitlines()
    assert len(document["results"]) == len(lines) >= 2
    assert f"{len(lines)} of 2000 prompts finished" in err
    assert "Traceback" not in err


def test_texts_are_printed_as_they_come_and_in_order(tmp_path: Path):
    prompts, written = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text("\n".join(json.dumps(f"{n}+{n}=") for n in range(2000)))
    options = ["--prompts", str(prompts), "--output", str(written), "--max-new-tokens", "8"]
    process = start(
        *("-m", "nabla_fast", "generate", *MODELS, *options, "--loop", "batched"),
        stderr=subprocess.PIPE,
        bufsize=0,  # communicate() does not see what readline() has buffered
    )
    try:
        first = process.stdout.readline() + process.stdout.readline()  # comes long before the last
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 130
    results = sorted(map(json.loads, written.read_text().splitlines()), key=lambda result: result["index"])
    assert (first + out).decode() == "".join(result["text"] + "\n" for result in results)
    assert [line for line in err.decode().splitlines() if line.startswith("--- ")] == [
        f"--- prompt {result['index']}" for result in results
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_what_is_half_written(number: int):
    former = signal.signal(number, signal.default_int_handler)
    done = []

    def work(interrupts: int) -> None:
        with postponed():
            for _ in range(interrupts):
                signal.raise_signal(number)
            done.append(interrupts)

    try:
        work(0)
        with pytest.raises(KeyboardInterrupt):
            work(1)
        with pytest.raises(KeyboardInterrupt):
            work(2)  # impatience
        assert done == [0, 1]
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, former)
