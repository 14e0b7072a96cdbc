"""Digests of the C++ kernels' results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nabla_fast import _native
from tools import kernel_digests

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))


def test_other_bits_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    every = list(kernel_digests.runs())
    one_of_each = {name.split(" N=")[0]: (name, run) for name, run in every if "V=4099" not in name}
    monkeypatch.setattr(kernel_digests, "runs", lambda: iter(one_of_each.values()))
    file = tmp_path / "digests.json"
    assert kernel_digests.main(["--output", str(file)]) == 0
    assert kernel_digests.main(["--compare", str(file)]) == 0
    found = json.loads(file.read_text())
    assert {"Llama pass", "token_stats N=3 V=1 bfloat16"} <= found["baseline"].keys()
    found["baseline"]["Llama pass"] = "0" * 32
    file.write_text(json.dumps(found))
    assert kernel_digests.main(["--compare", str(file)]) == 1
    assert capsys.readouterr().out.endswith("baseline: Llama pass\n1 differ\n")
