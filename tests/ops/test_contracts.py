"""Every op on every backend is put to the contract, in its own folder."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from nabla_fast.ops.registry import all_ops

from .contract import BackendContract, LibraryContract

FILES = {"torch": "test_reference", "cpu": "test_cpu", "triton": "test_triton", "cuda": "test_cuda"}
HERE = Path(__file__).parent


def classes(base: type, file: str) -> list[type]:
    """The test classes of a kind in every op's file of this name; none where the backend is missing."""
    found = []
    for path in HERE.glob(f"*/{file}.py"):
        try:
            module = importlib.import_module(f".{path.parent.name}.{file}", __package__)
        except pytest.skip.Exception:
            continue
        tests = (value for name, value in vars(module).items() if name.startswith("Test"))
        found += [test for test in tests if isinstance(test, type) and issubclass(test, base)]
    return found


@pytest.mark.parametrize("backend", FILES)
def test_every_op_on_every_backend_keeps_the_contract(backend: str):
    tests = classes(BackendContract, FILES[backend])
    if not tests and any(HERE.glob(f"*/{FILES[backend]}.py")):
        pytest.skip(f"{backend} is missing")
    assert {test.backend for test in tests} <= {backend}
    wanted = {op.name for op in all_ops().values() if backend in op.backends()}
    assert sorted(test.tested.op.name for test in tests) == sorted(wanted)


def test_every_op_keeps_the_contract_of_the_library():
    tests = classes(LibraryContract, "test_reference")
    assert sorted(test.tested.op.name for test in tests) == sorted(all_ops())


def test_every_op_has_cases():
    for test in classes(BackendContract, "test_reference"):
        names = [case.name for case in test.tested.cases]
        assert names, test.tested.op.name
        assert len(set(names)) == len(names), test.tested.op.name
