"""``nabla-fast env``: one object for programs, a table for people."""

from __future__ import annotations

import json

import pytest

from nabla_fast import _native
from nabla_fast.cli import env


@pytest.mark.smoke
def test_env_says_what_is_there_and_what_is_not(run):
    status, out, _ = run("env", "--json")
    assert status == 0
    backends = json.loads(out)["backends"]
    assert set(backends) == {"torch", "cpu", "triton", "cuda"}
    for backend in backends.values():
        assert backend["available"] == (backend["why"] is None)
    assert run("env")[0] == 0


def test_env_prints_a_table(run):
    environment = json.loads(run("env", "--json")[1])
    status, out, err = run("env")
    assert (status, err) == (0, "")
    rows = [" ".join(line.split()) for line in out.splitlines()]
    for name, backend in environment["backends"].items():
        assert f"{name} yes" in rows or f"{name} no: {backend['why']}" in rows
    assert f"transformers {environment['versions']['transformers']}" in rows
    assert f"include {environment['native']['include']}" in rows
    assert f"threads {environment['threads']}" in rows
    if _native.available():
        assert f"kernels use {_native.cpu_isa()}" in rows
    assert any(row.startswith(f"CPU {environment['cpu']['name']}, ") for row in rows)
    assert "{" not in out


def test_the_table_says_what_is_missing(capsys):
    backend = {"available": False, "why": "no [CUDA] device was found"}
    env._show(
        {
            "versions": {"nabla_fast": "1.0", "torch": "2.9", "cuda": "12.8", "triton": None},
            "commit": None,
            "platform": "Linux",
            "cpu": {"name": "a CPU", "count": 2, "flags": [], "kernels": None},
            "threads": 2,
            "gpus": [{"name": "a GPU", "memory_bytes": 3 * 2**30, "architecture": "sm_90"}],
            "backends": {"cuda": backend},
            "native": {
                **{"library": None, "why": "not built", "cuda_library": None, "why_no_cuda": "no nvcc"},
                **{"include": "i", "cmake": "c", "pkgconfig": "p"},
            },
        }
    )
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "torch 2.9 (CUDA 12.8)",
        "triton not installed",
        "commit unknown",
        "kernels use none",
        "GPU 0 a GPU, 3.0 GiB, sm_90",
        "cuda no: no [CUDA] device was found",
        "library no: not built",
        "CUDA library no: no nvcc",
    ):
        assert part in out
