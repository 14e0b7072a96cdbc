"""How an op is called, finds its backend, and has one forced."""

from __future__ import annotations

import doctest
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import nabla_fast
from nabla_fast import ops
from nabla_fast.errors import BackendUnavailable
from nabla_fast.ops import backend_status, registry, set_backend, token_stats, use_backend
from nabla_fast.ops.registry import backends, dispatch


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


@pytest.fixture(scope="module")
def toy() -> registry.Op:
    """An op whose result says which backend ran: torch anything, cpu float32, triton only what is large."""

    scalar = registry.floats()
    x = registry.tensors(("N",), ("N", "M"), dtypes=registry.FLOATS)

    @registry.op(arguments={"x": x, "pair": {"a": scalar, "b": scalar}})
    def toy(x: Tensor, pair: Pair | None = None, *, scale: float = 1.0) -> Tensor:
        return x.new_tensor([0.0, scale, 0.0 if pair is None else float(pair.b)])

    # The preferred one first: the order of registration decides nothing.
    @toy.backend(
        "triton", refuses=lambda x, pair, **_: None if x.numel() > 4 else f"x has {x.numel()} elements"
    )
    def toy_triton(x: Tensor, pair: Pair | None, *, scale: float) -> Tensor:
        return x.new_tensor([2.0, scale, 0.0 if pair is None else float(pair.b)])

    @toy.backend(
        "cpu", refuses=lambda x, pair, **_: None if x.dtype == torch.float32 else "x is not float32"
    )
    def toy_cpu(x: Tensor, pair: Pair | None, *, scale: float) -> Tensor:
        return x.new_tensor([1.0, scale, 0.0 if pair is None else float(pair.b)])

    del dispatch._ops["toy"]
    return toy


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An imagined machine that has all but CUDA, and a process in which nothing is forced yet."""
    monkeypatch.delenv("NABLA_FAST_BACKEND", raising=False)
    for name in ("cpu", "triton"):
        monkeypatch.setitem(backends._why_missing, name, lambda: None)
    monkeypatch.setitem(backends._why_missing, "cuda", lambda: "no CUDA device was found")
    monkeypatch.setattr(backends, "_forced", None)
    backends._environment_backends.cache_clear()
    yield
    backends._environment_backends.cache_clear()


SMALL, LARGE, DOUBLE = torch.zeros(2), torch.zeros(9), torch.zeros(2, dtype=torch.float64)


def ran(toy: registry.Op, x: Tensor) -> str:
    return ("torch", "cpu", "triton")[int(toy(x)[0])]


# -- the choice by input -------------------------------------------------------------------------------


def test_the_preferred_backend_that_takes_the_input(toy: registry.Op):
    assert [ran(toy, x) for x in (SMALL, LARGE, DOUBLE)] == ["cpu", "triton", "torch"]


def test_missing_backends_are_passed_over(toy: registry.Op, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(backends._why_missing, "triton", lambda: "triton is not installed")
    assert ran(toy, LARGE) == "cpu"


def test_preference_is_declared():
    assert registry.PREFERENCE == ("triton", "cuda", "cpu", "torch")
    assert sorted(registry.PREFERENCE) == sorted(registry.BACKENDS)


def test_unknown_backend_of_an_op(toy: registry.Op):
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"):
        toy.backend("cudnn", refuses=lambda *_, **__: None)
    assert toy.backends() == ("torch", "cpu", "triton")


# -- forced for a block --------------------------------------------------------------------------------


def test_forced(toy: registry.Op):
    with use_backend("torch"):
        assert ran(toy, LARGE) == "torch"
        with use_backend("triton", "cpu"):
            assert [ran(toy, x) for x in (SMALL, LARGE)] == ["cpu", "triton"]
            with use_backend():
                assert ran(toy, DOUBLE) == "torch"
        assert ran(toy, SMALL) == "torch"
    assert ran(toy, SMALL) == "cpu"


def test_nothing_is_forced_before_the_block(toy: registry.Op):
    torch_alone = use_backend("torch")
    assert ran(toy, SMALL) == "cpu"
    with torch_alone:
        assert ran(toy, SMALL) == "torch"
    assert ran(toy, SMALL) == "cpu"


def test_a_block_is_entered_again(toy: registry.Op):
    torch_alone = use_backend("torch")
    with torch_alone, use_backend("cpu"):
        with torch_alone:
            assert ran(toy, SMALL) == "torch"
        assert ran(toy, SMALL) == "cpu"
    assert ran(toy, LARGE) == "triton"


def test_the_former_choice_returns_after_an_error(toy: registry.Op):
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert ran(toy, SMALL) == "cpu"


# -- forced for the process ----------------------------------------------------------------------------


def test_set(toy: registry.Op):
    set_backend("cpu", "torch")
    assert [ran(toy, x) for x in (LARGE, DOUBLE)] == ["cpu", "torch"]
    with use_backend("torch"):
        assert ran(toy, LARGE) == "torch"
    assert ran(toy, LARGE) == "cpu"
    set_backend()
    assert ran(toy, LARGE) == "triton"


def test_set_inside_a_block_ends_with_it(toy: registry.Op):
    with use_backend("torch"):
        set_backend("cpu")
        assert ran(toy, LARGE) == "cpu"
    assert ran(toy, LARGE) == "triton"


@pytest.mark.parametrize("force", [use_backend, set_backend])
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("cuda", "backend 'cuda' is not available: no CUDA device was found"),
        ("cudnn", "unknown backend 'cudnn': expected one of torch, cpu, triton, cuda"),
    ],
)
def test_backends_that_cannot_be_forced(toy: registry.Op, force, name: str, line: str):
    with pytest.raises(BackendUnavailable) as error:
        force("cpu", name)
    assert str(error.value) == line
    assert ran(toy, LARGE) == "triton"


# -- the line that says why ----------------------------------------------------------------------------


def refused(call, *args, **kwargs) -> str:
    with pytest.raises(BackendUnavailable) as error:
        call(*args, **kwargs)
    return str(error.value)


def test_each_forced_backend_gives_its_reason(toy: registry.Op):
    with use_backend("cpu"):
        assert refused(toy, DOUBLE) == "toy: backend cpu: x is not float32"
    with use_backend("triton", "cpu"):
        assert refused(toy, DOUBLE) == (
            "toy: backend triton: x has 2 elements; backend cpu: x is not float32"
        )


def test_a_backend_that_the_op_does_not_have():
    with use_backend("triton"):
        line = refused(ops.nll_grad, torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]))
    assert line == "nll_grad: backend triton: no such kernel (this op has: torch, cpu)"


READS = "the C++ kernels take float32 and bfloat16"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"rows": torch.zeros(2, 3).half()}, f"rows is float16 ({READS})"),
        (
            {"rows": torch.zeros(2, 6)[:, ::2]},
            "rows has stride 2 between its columns (the C++ kernels read unit stride)",
        ),
        ({"rows": torch.zeros(2, 3), "head": torch.zeros(4, 3).half()}, f"head is float16 ({READS})"),
        (
            {"rows": torch.zeros(2, 3).double(), "head": torch.zeros(4, 3)},
            "rows is float64 (the C++ kernels compute in float32)",
        ),
    ],
)
def test_reasons_of_the_cpu_backend(arguments: dict, reason: str):
    with use_backend("cpu"):
        assert refused(token_stats, **arguments) == f"token_stats: backend cpu: {reason}"


def test_reasons_name_the_element_of_a_list():
    with use_backend("cpu"):
        tables = [torch.zeros(3, 2), torch.zeros(3, 2).double()]
        line = refused(ops.embedding_mix, torch.zeros(1, 3), tables)
        assert line == f"embedding_mix: backend cpu: tables[1] is float64 ({READS})"
        cotangents = [torch.zeros(1, 2).double()]
        line = refused(
            ops.onehot_grad, cotangents, tables[:1], torch.zeros(1, 2), torch.zeros(3, 2), nll_coeff=1.0
        )
        assert line == (
            "onehot_grad: backend cpu: cotangents[0] is float64 (the C++ kernels compute in float32)"
        )


def test_reasons_of_a_descent():
    z = torch.zeros(2, 3)
    state = ops.AdamState.zeros(z)._replace(step=torch.zeros(4, dtype=torch.int64)[::2])
    with use_backend("cpu"):
        line = refused(ops.dto_descent, z, z.double(), state, ops.cosine_schedule(2, 0.1))
        assert line == "dto_descent: backend cpu: grad is float64 (the C++ kernels take float32)"
        line = refused(ops.dto_descent, z, z, state, ops.cosine_schedule(2, 0.1))
        assert line == (
            "dto_descent: backend cpu: state.step has strides [2] (the C++ kernels read contiguous memory)"
        )


# -- the environment -----------------------------------------------------------------------------------


def test_environment(toy: registry.Op, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NABLA_FAST_BACKEND", " cpu, torch ")
    assert [ran(toy, x) for x in (LARGE, DOUBLE)] == ["cpu", "torch"]
    with use_backend("triton"):
        assert ran(toy, LARGE) == "triton"
    assert ran(toy, LARGE) == "cpu"


@pytest.mark.parametrize("first", [lambda toy: toy(LARGE), lambda toy: registry.allowed("cpu")])
def test_environment_is_read_once(toy: registry.Op, first, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NABLA_FAST_BACKEND", "cpu")
    first(toy)
    monkeypatch.setenv("NABLA_FAST_BACKEND", "torch")
    assert ran(toy, LARGE) == "cpu"


def test_choosing_by_input_again_overrides_the_environment(
    toy: registry.Op, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NABLA_FAST_BACKEND", "torch")
    with use_backend():
        assert ran(toy, LARGE) == "triton"
    assert ran(toy, LARGE) == "torch"
    set_backend()
    assert ran(toy, LARGE) == "triton"


SCRIPT = """
import torch, nabla_fast
for _ in range(2):
    try:
        nabla_fast.ops.token_stats(torch.zeros(1, 2))
    except nabla_fast.BackendUnavailable as error:
        print(error)
with nabla_fast.use_backend("torch"):
    print(nabla_fast.ops.token_stats(torch.zeros(1, 2)).argmax.tolist())
"""


def test_environment_of_a_process():
    # Importing never fails; each call says what is wrong.
    environment = os.environ | {"NABLA_FAST_BACKEND": "cublas"}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    unknown = "unknown backend 'cublas': expected one of torch, cpu, triton, cuda"
    assert process.stdout.splitlines() == [unknown, unknown, "[0]"]


def test_status_is_one_line_each():
    status = backend_status()
    assert tuple(status) == registry.BACKENDS
    assert status["torch"] is None
    assert all(why is None or (why and "\n" not in why) for why in status.values())


# -- calling an op like the function it was made from --------------------------------------------------


def test_arguments(toy: registry.Op):
    pair = Pair(torch.tensor(0.0), torch.tensor(1.0))
    assert toy(SMALL, pair, scale=2.0).tolist() == [1, 2, 1]
    assert toy(x=SMALL, pair=pair).tolist() == [1, 1, 1]
    assert toy(SMALL, tuple(pair)).tolist() == [1, 1, 1]
    assert toy(SMALL, None).tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((SMALL, None, 2.0), {}),
        ((SMALL,), {"x": SMALL}),
        ((SMALL,), {"scales": 2.0}),
    ],
    ids=["missing", "too many", "twice", "unknown"],
)
def test_wrong_calls(toy: registry.Op, args: tuple, kwargs: dict):
    with pytest.raises(TypeError, match=r"toy\(\)"):
        toy(*args, **kwargs)


def test_unsupported_annotations():
    def body(x: dict) -> Tensor: ...

    with pytest.raises(TypeError, match="an op cannot take or return"):
        registry.op(arguments={})(body)
    assert "body" not in registry.all_ops()


# -- reading an op's file ------------------------------------------------------------------------------


def test_every_function_of_an_op_has_its_name():
    for name, op in registry.all_ops().items():
        for backend in op.backends():
            suffix = "" if backend == "torch" else f"_{backend}"
            assert op._backends[backend].run.__name__ == name + suffix


RECORDS = ("Attention", "BackendUnavailable", "Descent", "TokenStats")  # and an error
EXAMPLES = [name for name in ops.__all__ if name not in RECORDS]


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str):
    public = getattr(ops, name)
    names = vars(ops) | {"torch": torch, "nabla_fast": nabla_fast}
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(public), names, name, None, None)
    assert example.examples
    with use_backend("torch"):
        assert doctest.DocTestRunner().run(example).failed == 0


def test_blocks_that_overlap(toy: registry.Op):
    # As two threads may enter and leave them.
    first, second = use_backend("torch"), use_backend("cpu", "torch")
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert backends.forced_backends() == ("cpu", "torch")
    second.__exit__()
    assert backends.forced_backends() == ()


def test_a_backend_is_registered_once(toy: registry.Op):
    with pytest.raises(ValueError, match="toy has a backend 'torch' already"):
        toy.backend("torch", refuses=lambda *_, **__: None)
    with pytest.raises(TypeError, match="refuses must be a function"):
        toy.backend("cuda", refuses=None)
