"""The run on a machine with a GPU: nothing is lost, nothing runs past its time, and in which order."""

from __future__ import annotations

import json
import os
import sys
import tarfile
import time
from pathlib import Path
from unittest import mock

import pytest

from tools.gpu_run import __main__ as gpu_run
from tools.gpu_run import package
from tools.gpu_run.running import TIMED_OUT, Part, Result, Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "out", tmp_path / "files", "", 60.0, os.environ)


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def archived(run: Run) -> dict[str, bytes]:
    with tarfile.open(run.out / "results.tar.gz") as archive:
        return {name: archive.extractfile(name).read() for name in archive.getnames()}


def test_each_part_is_packed_when_it_ends(run: Run):
    assert not run.part(Part("one", python("print('{\"a\": 1}')"), 20, True)).failed
    assert archived(run)["one.json"] == b'{"a": 1}\n'
    failed = run.part(Part("two", python("import sys; print('said'); sys.exit(3)"), 20))
    assert (failed.rc, failed.failed) == (3, True)
    files = archived(run)
    assert files.keys() == {"summary.json", "log.txt", "one.json"}
    assert b"==== two" in files["log.txt"]
    assert b"said" in files["log.txt"]
    summary = json.loads(files["summary.json"])
    assert [(part["name"], part["rc"]) for part in summary["parts"]] == [("one", 0), ("two", 3)]
    assert sorted(path.name for path in run.out.iterdir()) == ["results.tar.gz", "summary.json"]


def test_what_is_no_json_fails(run: Run):
    result = run.part(Part("one", python("print('{')"), 20, True))
    assert (result.rc, result.note) == (1, "its standard output is not JSON")


def test_a_late_part_is_stopped_and_its_lines_are_kept(run: Run):
    rows = run.out / "rows.jsonl"
    program = f"import time; print('{{}}', file=open({str(rows)!r}, 'a'), flush=True); time.sleep(60)"
    start = time.monotonic()
    result = run.part(Part("late", python(program), 2))
    assert time.monotonic() - start < 30
    assert (result.rc, result.note) == (TIMED_OUT, "stopped after 2 s")
    assert archived(run)["rows.jsonl"] == b"{}\n"


def test_no_time_left(tmp_path: Path):
    run = Run(tmp_path / "out", tmp_path / "files", "", 0.5, os.environ)
    assert run.part(Part("one", python(""), 20)).note == "no time left for it"


def test_parts_side_by_side(run: Run):
    started = python("import time; time.sleep(1)")
    start = time.monotonic()
    results = run.together([Part(str(number), started, 30) for number in range(3)])
    assert [result.name for result in results] == ["0", "1", "2"]
    assert time.monotonic() - start < 2.9 or os.getloadavg()[0] > 2


def test_a_run_begins_with_nothing_of_the_last(tmp_path: Path):
    first = Run(tmp_path / "out", tmp_path / "files", "", 60.0, os.environ)
    (first.out / "rows.jsonl").write_text("{}\n")
    (first.files / "left.txt").write_text("")
    second = Run(tmp_path / "out", tmp_path / "files", "", 60.0, os.environ)
    second.part(Part("one", python(""), 20))
    assert archived(second).keys() == {"summary.json", "log.txt"}


def planned(run: Run, architecture: str) -> list[str]:
    native = mock.create_autospec(package.NativeBuild, instance=True)
    names: list[str] = []
    with mock.patch.object(gpu_run.Plan, "_has_native", return_value=True):
        for parts in gpu_run.Plan(run, architecture).parts(native):
            several = [parts] if isinstance(parts, Part) else parts
            assert all(part.command[0] == sys.executable or run.gpu for part in several)
            names += [part.name.split(" ")[0] for part in several]
    return list(dict.fromkeys(names))


def test_the_parts_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_run.shutil, "which", lambda name: f"/usr/bin/{name}")
    run = Run(
        tmp_path / "out", tmp_path / "files", "Some GPU", 60.0, os.environ | {"TRITON_CACHE_DIR": "c"}
    )
    names = planned(run, "sm_90")
    assert " ".join(names) == (
        "environment compile check kernels launch tune others "
        "ncu memcheck racecheck compiled decode demo tests"
    )
    assert not run.results
    monkeypatch.setattr(gpu_run.shutil, "which", lambda name: None)
    assert "ncu" not in planned(run, "")
    assert [result.name for result in run.results] == ["ncu", "memcheck", "racecheck"]


def test_the_parts_on_a_cpu(run: Run):
    names = planned(run, "")
    assert " ".join(names) == "environment check kernels launch tune calls compiled decode demo tests"
    assert {result.name for result in run.results} == {"others", "ncu", "memcheck", "racecheck"}


def test_the_table_has_times_and_failures(run: Run):
    rows = [
        {"op": "a", "shape": "s", "dtype": "d", "check": "passed", "median_ms": 2.0, "products_ms": 1.0},
        {"op": "b", "shape": "s", "dtype": "d", "check": "passed"},
        {"op": "c", "shape": "s", "dtype": "d", "check": "error", "error": "ValueError: no"},
    ]
    (run.out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.results.append(Result("one", 1, 2.0))
    table = gpu_run.summary_table(run).splitlines()
    assert table[0] == "one            FAILED (rc 1), 2.0 s"
    assert table[1:3] == ["a s d: median 2 ms, products 1 ms", "c s d: error ValueError: no"]


def test_the_package_before_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run):
    monkeypatch.setattr(package, "SITE", tmp_path / "site")
    site = package.link_package()
    environment = package.environment_of(site, None)
    program = (
        "import nabla_fast, nabla_fast.triton_kernels.common.presets as presets, json;"
        "print(json.dumps([nabla_fast.__file__, presets.__file__]))"
    )
    run.environment = environment
    assert not run.part(Part("import", python(program), 60, True)).failed
    files = json.loads((run.files / "import.json").read_bytes())
    assert all(file.startswith(str(site)) for file in files)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(gpu_run, "find_gpu", lambda: ("", ""))
    assert gpu_run.main([]) == 1
    assert "no GPU found" in capsys.readouterr().err
