"""Standard output that is closed, broken, full or of another encoding; results that cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import MODELS, end, start

PROMPTS = '"2+2="\n"3+3="\n"4+4="\n'


@pytest.fixture
def generate(tmp_path: Path):
    """Starts ``generate`` of three prompts; results go to a file. Options go to Popen."""
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)
    files = ["--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "results.jsonl")]
    started = []

    def generate(*, before: str = "", **options) -> tuple[int, str, list[dict]]:
        code = f"import os, sys\n{before}\nfrom nabla_fast.cli import main\nsys.exit(main(sys.argv[1:]))"
        arguments = ["generate", *MODELS, *files, "--max-new-tokens", "4"]
        process = start("-c", code, *arguments, stderr=subprocess.PIPE, **options)
        started.append(process)
        error = process.communicate(timeout=120)[1].decode()
        lines = (tmp_path / "results.jsonl").read_text().splitlines()
        return process.returncode, error, [json.loads(line) for line in lines]

    yield generate
    for process in started:
        end(process)


def test_results_are_written_where_standard_output_is_closed(generate):
    code = "import nabla_fast.cli as cli; os.close(1); sys.stdout = None"
    status, error, results = generate(before=code)
    assert (status, sorted(result["index"] for result in results)) == (0, [0, 1, 2])
    assert "Traceback" not in error


def test_results_are_written_where_nobody_reads_standard_output(generate):
    read, write = os.pipe()
    os.close(read)
    status, error, results = generate(stdout=write)
    os.close(write)
    assert (status, len(results)) == (1, 3)
    assert error.splitlines()[-1] == "nabla-fast: nobody reads standard output any more"
    assert "Traceback" not in error
    assert "Exception ignored" not in error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_results_are_written_where_standard_output_is_full(generate):
    with open("/dev/full", "wb") as full:
        status, error, results = generate(stdout=full)
    assert (status, len(results)) == (1, 3)
    assert error.splitlines()[-1] == "nabla-fast: [Errno 28] No space left on device"
    assert "Traceback" not in error
    assert "Exception ignored" not in error


def test_characters_that_standard_output_lacks_are_escaped(run, monkeypatch, tmp_path: Path):
    code = "from nabla_fast.cli.output import make_writable as m; m(); print('a\u2a75b')"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=100)
    assert (result.returncode, result.stdout) == (0, b"a\\u2a75b\n")


def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_loaded(run, tmp_path: Path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, message in {
        loop: "Too many levels of symbolic links",
        tmp_path: "Is a directory",
        tmp_path / "none" / "out": "no such folder",
        tmp_path / ("x" * 300): "File name too long",
    }.items():
        status, out, err = run("generate", "--model", "/no/such", "--prompt", "x", "--output", str(path))
        assert (status, out) == (2, "")
        assert err.startswith(f"nabla-fast: --output {path}: ")
        assert message in err
    assert sorted(tmp_path.iterdir()) == [loop]


def test_a_refused_run_leaves_no_empty_file(run, tmp_path: Path):
    path = tmp_path / "out.jsonl"
    assert run("generate", "--model", "/no/such", "--prompt", "x", "--output", str(path))[0] == 2
    assert not path.exists()
