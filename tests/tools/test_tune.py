"""The tuning command: what it measures, what it leaves out, what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nabla_fast.ops import use_backend
from nabla_fast.ops.registry import backend_status
from nabla_fast.triton_kernels.common import presets
from tools import tune


@pytest.mark.skipif(bool(backend_status()["triton"]), reason="needs Triton or its interpreter")
def test_measured_or_left_out():
    from nabla_fast.triton_kernels.common.vocabulary_product import vocabulary_product

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden, head = torch.randn(3, 16, device=device), torch.randn(40, 16, device=device)
    good = presets.config("vocabulary_product", "float32", device)
    task = tune.Task(
        "vocabulary_product",
        "float32",
        lambda: [vocabulary_product([hidden], [head])],
        [good, good | {"COLUMNS": 32}, good | {"COLUMNS": 33}],
    )
    rows = tune.measure(task, device, seconds=0.0)
    assert [row["config"] for row in rows] == task.candidates
    assert all(row["median_ms"] > 0 for row in rows[:2])
    assert "median_ms" not in rows[2]  # no tile has 33 columns
    assert rows[2]["problem"]
    assert presets.config("vocabulary_product", "float32", device) == good


@pytest.mark.skipif(bool(backend_status()["triton"]), reason="needs Triton or its interpreter")
def test_every_task_runs_and_fits_the_presets():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = json.loads(presets.PATH.read_text())["default"]["kernels"]
    made = {}
    with use_backend("triton"):
        for task in tune.tasks(device, tune.QUICK):
            made[task.kernel, task.operands] = task
            (result, *_) = task.run()
            assert result.isfinite().all()
    assert {kernel for kernel, _ in made} == {kernel for kernel, _ in tune._tasks(device, tune.QUICK)} & (
        known.keys()
    )
    for (kernel, operands), (_make, candidates) in tune._tasks(device, tune.QUICK).items():
        if kernel in known:
            assert made[kernel, operands].candidates == candidates  # none is left out for its names


def test_a_part_of_a_descent_has_a_warp():
    for (kernel, _), (_make, candidates) in tune._tasks(torch.device("cpu"), tune.QUICK).items():
        if kernel == "dto_descent_latents":
            assert all(choice["PARTS"] == choice["num_warps"] for choice in candidates)


def test_a_result_that_is_off_is_left_out():
    # Only what follows the first call is wrong, as a miscompiled configuration would be.
    results = iter([torch.ones(2, 3)] + [torch.full((2, 3), 1.01)] * 9)
    task = tune.Task("vocabulary_product", "half", lambda: [next(results)], [{"ROWS": 16}])
    (row,) = tune.measure(task, torch.device("cpu"), seconds=0.0)
    assert row["problem"].startswith("differs by 1.0e-02")


@pytest.mark.skipif(bool(backend_status()["triton"]), reason="needs Triton or its interpreter")
def test_the_fastest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = json.loads(presets.PATH.read_text())
    path = tmp_path / "presets.json"
    path.write_text(json.dumps(before))
    monkeypatch.setattr(presets, "PATH", path)
    row = {"kernel": "vocabulary_product", "operands": "half"}
    rows = [
        row | {"config": {"ROWS": 1}, "median_ms": 2.0},
        row | {"config": {"ROWS": 2}, "median_ms": 1.0},
        row | {"config": {"ROWS": 3}, "problem": "too much shared memory"},
    ]
    copy = tmp_path / "copy.json"
    tune.write("Some GPU", rows, copy)
    assert json.loads(path.read_text()) == before
    tune.write("Some GPU", rows)
    after = json.loads(path.read_text())
    assert after == json.loads(copy.read_text())
    entry = after.pop("Some GPU")
    assert after == before
    assert entry["kernels"] == {"vocabulary_product": {"half": {"ROWS": 2}}}
    assert entry["measured"]["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]):
    assert tune.main([]) == 1
    assert capsys.readouterr().err.startswith("tuning needs a GPU")
