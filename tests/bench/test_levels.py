"""Levels of instruction sets: kernels and torch are limited alike, each level in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from nabla_fast import _native
from nabla_fast.bench import levels
from nabla_fast.cli import main

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))

# What torch's own kernels, oneDNN and MKL say of a level, and must not say.
TORCH_SAYS = {
    "avx2": ("AVX2", "AVX2", ["AVX-512", "AMX", "bfloat16"]),
    "avx512": ("AVX512", "AVX-512", ["AMX", "bfloat16"]),
    "avx512_bf16": ("AVX512", "bfloat16", ["AMX"]),
    "amx": ("AVX512", "AMX", []),
}

# `bench kernels` with one small case, in a process whose environment is the level's.
SMALL = """
import sys, torch
from nabla_fast.bench import kernel_cases, machine, measure
from nabla_fast.cli import main
cpu = torch.device("cpu")
measure._FLUSH_BYTES = 1 << 16
machine._READ_BYTES, machine._SECONDS = 1 << 20, 0.001
kernel_cases.cases = lambda device, **_: [kernel_cases.token_stats(3, 257, torch.float32, cpu)]
sys.exit(main(["bench", "kernels", "--no-compile", "--seconds", "0.01", "--json", *sys.argv[1:]]))
"""


@pytest.fixture
def stub(monkeypatch, tmp_path: Path):
    """Puts a program in Python's place: lines of code that have its arguments and `say(document)`."""

    program, python = tmp_path / "python", sys.executable

    def put(code: str) -> None:
        head = f"""\
            #!{python}
            import json, os, signal, sys, time
            def say(rows, interrupted=False, **more):
                level = sys.argv[sys.argv.index("--isa") + 1]
                environment = {{"isa": level, "variables": dict(os.environ), "arguments": sys.argv[1:]}}
                machine = {{"source": "loops"}}
                rows = [{{"isa": level, "check": "passed", **row}} for row in rows]
                print(json.dumps(dict(rows=rows, interrupted=interrupted, machine=machine,
                                      environment=environment)))
            """
        program.write_text(textwrap.dedent(head) + textwrap.dedent(code))
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return put


@pytest.fixture
def has_avx512(monkeypatch):
    """A CPU whose best level is the third one."""

    class Extension:
        @staticmethod
        def cpu_isa() -> int:
            return 2

    monkeypatch.setattr(_native, "extension", lambda: Extension)


def bench(capsys, *arguments: str) -> tuple[int, dict | None, str]:
    capsys.readouterr()
    status = main(["bench", "kernels", "--json", *arguments])
    said = capsys.readouterr()
    return status, json.loads(said.out) if said.out else None, said.err


@pytest.mark.parametrize("level", levels.LEVELS)
def test_torch_and_kernels_keep_to_the_level(level: str):
    if _native.ISA_NAMES.index(level) > _native.extension().cpu_isa():
        pytest.skip(f"this CPU has no {level}")
    done = subprocess.run(
        [sys.executable, "-c", SMALL, "--isa", level],
        env=os.environ | levels.environment_of(level),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"{level}: token_stats")
    document = json.loads(done.stdout)
    environment, machine = document["environment"], document["machine"]
    assert environment["isa"] == environment["cpu"]["kernels"] == level
    assert [row["isa"] for row in document["rows"]] == [level]
    aten, onednn, beyond = TORCH_SAYS[level]
    said = environment["torch_isa"]
    assert said["aten"] == aten
    assert said["onednn"] is None or onednn in said["onednn"]
    for name in ("onednn", "mkl"):
        assert not [word for word in beyond if word in (said[name] or "")]
    # No limit by a unit that the level does not have.
    assert (machine["tile_product_per_s"] is not None) == (level == "amx")
    assert (machine["dot_product_per_s"] is not None) == (level in ("avx512_bf16", "amx"))


def test_kernels_are_limited_inside_alone():
    before = _native.cpu_isa()
    with levels.kernels_at(_native.ISA_NAMES[0]):
        assert _native.cpu_isa() == "baseline"
    assert _native.cpu_isa() == before


def test_a_level_has_a_process_with_its_environment(stub, has_avx512, capsys):
    stub('say([{"op": "a"}])')
    options = ["--threads", "1", "--op", "a", "b", "--no-compile", "--seconds", "0.5"]
    status, document, _ = bench(capsys, "--isa", "avx2", *options)
    environment = document["environment"]
    assert status == 0
    assert [row["op"] for row in document["rows"]] == ["a"]
    assert environment["variables"].items() >= levels.environment_of("avx2").items()
    assert environment["arguments"][:4] == ["-m", "nabla_fast", "bench", "kernels"]
    line = " ".join(environment["arguments"])
    for said in ("--isa avx2", "--json", "--seconds=0.5", "--no-compile", "--threads=1", "--op a b"):
        assert said in line


def test_all_levels_are_one_document(stub, has_avx512, capsys):
    stub('say([{"op": "a"}, {"op": "b", "check": "failed"}]); sys.exit(1)')
    status, document, _ = bench(capsys, "--isa", "all")
    assert status == 1
    assert [(row["isa"], row["op"]) for row in document["rows"]] == [
        (level, op) for level in ("avx2", "avx512") for op in "ab"
    ]
    assert list(document["levels"]) == ["avx2", "avx512"]
    assert document["levels"]["avx512"]["environment"]["isa"] == "avx512"
    assert document["levels"]["avx2"]["machine"]
    assert document["interrupted"] is False
    assert document["environment"]["versions"]


def test_a_level_that_ends_early_is_the_last(stub, has_avx512, capsys):
    stub('say([{"op": "a"}], interrupted=True); sys.exit(130)')
    status, document, _ = bench(capsys, "--isa", "all")
    assert (status, len(document["rows"]), document["interrupted"]) == (130, 1, True)
    stub("os.kill(os.getpid(), signal.SIGKILL)")
    status, document, err = bench(capsys, "--isa", "all")
    assert (status, document) == (1, None)
    assert "avx2: the process that measured it was ended by signal 9" in err


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """A shell's background jobs, of which the tests may be one, ignore Ctrl-C."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("heeds_interrupts")
def test_an_interrupt_is_passed_on_and_keeps_rows(stub, has_avx512, capsys, tmp_path: Path):
    started = tmp_path / "started"
    # The process tells its parent, this one, that it is time for the signal.
    stub(f"""
        def stop(*_):
            say([{{"op": "a"}}], interrupted=True)
            sys.exit(130)
        signal.signal(signal.SIGTERM, stop)
        open({str(started)!r}, "w").close()
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
        say([{{"op": "b"}}])
    """)
    status, document, _ = bench(capsys, "--isa", "all")
    assert started.exists()
    assert (status, [row["op"] for row in document["rows"]]) == (130, ["a"])
    assert document["interrupted"] is True


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--isa", "avx512_bf16"], "--isa avx512_bf16: this CPU's kernels have avx2, avx512"),
        (["--isa", "sse9"], "invalid choice: 'sse9'"),
        (["--isa", "avx2", "--seconds", "0"], "--seconds must be positive"),
    ],
)
def test_refuses_in_one_line(has_avx512, capsys, options: list[str], line: str):
    try:
        status, document, err = bench(capsys, *options)
    except SystemExit as ended:
        status, document, err = ended.code, None, capsys.readouterr().err
    assert (status, document) == (2, None)
    assert line in err


def test_without_kernels_there_is_no_level(monkeypatch, capsys):
    monkeypatch.setattr(_native, "available", lambda: False)
    monkeypatch.setattr(_native, "why_missing", lambda: "no compiler")
    status, document, err = bench(capsys, "--isa", "avx2")
    assert (status, document) == (2, None)
    assert "--isa avx2: no compiler" in err
