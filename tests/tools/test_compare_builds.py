"""The comparison of two builds: turns, ratios, what counts as slower, and both processes' own packages."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nabla_fast import _native
from tools import compare_builds
from tools.compare_builds import Pass, in_turns, verdict

ROOT = Path(__file__).resolve().parents[2]


def test_both_run_in_turns():
    order = []
    times = in_turns(lambda: order.append("old") or 1.0, lambda: order.append("new") or 2.0, 0.0)
    assert order[:4] == ["old", "new", "new", "old"]
    assert times == ([1.0] * 7, [2.0] * 7)


def test_the_interval_leaves_out_what_is_rare():
    one = Pass.of([1.0] * 90 + [9.0] * 5 + [0.1] * 5)
    assert one == (1.0, 1.0, 1.0)
    assert Pass.of([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ([Pass(1.1, 1.05, 1.2), Pass(1.1, 1.05, 1.2)], "slower"),
        ([Pass(1.1, 1.05, 1.2), Pass(1.1, 0.95, 1.2)], ""),
        ([Pass(1.01, 1.005, 1.02), Pass(1.01, 1.005, 1.02)], ""),
        ([Pass(0.9, 0.85, 0.95), Pass(0.8, 0.7, 0.9)], "faster"),
        ([Pass(0.9, 0.85, 0.95), Pass(1.1, 1.05, 1.2)], ""),
    ],
)
def test_a_row_is_slower_where_every_pass_says_so(passes: list[Pass], said: str):
    assert verdict(passes, 0.02) == said


@pytest.mark.slow
@pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))
@pytest.mark.skipif(not (ROOT / "tools").is_dir(), reason="not run from a checkout")
def test_a_build_is_as_fast_as_itself(tmp_path: Path, capsys):
    package = Path(_native.extension().__file__).parent
    if package.parent != ROOT:
        pytest.skip("the checkout has no extension of its own")
    other = tmp_path / "other"
    shutil.copytree(package, other / "nabla_fast", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    options = ["--op", "prefix_attention forward B=1 P", "--seconds", "0", "--passes", "1"]
    status = compare_builds.main([str(ROOT), str(other), *options, "--least", "10", "--isa", "avx2"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert status == 0
    assert "at avx2, 1 threads" in header
    assert [row.split("  ")[0] for row in rows] == [
        "prefix_attention forward B=1 P=600 S=1 H=14/2 D=64 float32"
    ]
    assert "other bits" not in rows[0]


@pytest.mark.slow
def test_a_tree_without_a_package_is_refused(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"has no package of its own|ended"):
        compare_builds.main([str(tmp_path), str(tmp_path), "--passes", "1", "--seconds", "0"])
