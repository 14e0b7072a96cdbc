"""How an op finds its backend, and how one is forced."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nabla_fast.errors import BackendUnavailable
from nabla_fast.ops import backend_status, registry, use_backend


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


@pytest.fixture(scope="module")
def toy() -> registry.Op:
    """An op that says which backend ran: torch anything, cpu float32, triton only what is large."""

    @registry.op
    def toy(x: Tensor, pair: Pair | None = None, *, scale: float = 1.0) -> Tensor:
        return x.new_tensor([0.0, scale, 0.0 if pair is None else float(pair.b)])

    @toy.backend("cpu", when=lambda x, pair, **_: x.dtype == torch.float32)
    def _(x: Tensor, pair: Pair | None, *, scale: float) -> Tensor:
        return x.new_tensor([1.0, scale, 0.0 if pair is None else float(pair.b)])

    @toy.backend("triton", when=lambda x, pair, **_: x.numel() > 4)
    def _(x: Tensor, pair: Pair | None, *, scale: float) -> Tensor:
        return x.new_tensor([2.0, scale, 0.0 if pair is None else float(pair.b)])

    del registry._ops["toy"]
    return toy


@pytest.fixture(autouse=True)
def availability(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this imagined machine there is all but CUDA, and nothing is forced."""
    monkeypatch.delenv("NABLA_FAST_BACKEND", raising=False)
    for name in ("cpu", "triton"):
        monkeypatch.setitem(registry._availability, name, lambda: None)
    monkeypatch.setitem(registry._availability, "cuda", lambda: "no CUDA device was found")


SMALL, LARGE, DOUBLE = torch.zeros(2), torch.zeros(9), torch.zeros(2, dtype=torch.float64)


def ran(toy: registry.Op, x: Tensor) -> str:
    return ("torch", "cpu", "triton")[int(toy(x)[0])]


def test_the_last_backend_that_takes_the_input(toy: registry.Op):
    assert [ran(toy, x) for x in (SMALL, LARGE, DOUBLE)] == ["cpu", "triton", "torch"]


def test_missing_backends_are_passed_over(toy: registry.Op, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(registry._availability, "triton", lambda: "triton is not installed")
    assert ran(toy, LARGE) == "cpu"


def test_forced(toy: registry.Op):
    with use_backend("torch"):
        assert ran(toy, LARGE) == "torch"
        with use_backend("triton", "cpu"):
            assert [ran(toy, x) for x in (SMALL, LARGE)] == ["cpu", "triton"]
            with use_backend():
                assert ran(toy, DOUBLE) == "torch"
        assert ran(toy, SMALL) == "torch"
    assert ran(toy, SMALL) == "cpu"


def test_the_former_choice_returns_after_an_error(toy: registry.Op):
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert ran(toy, SMALL) == "cpu"


def test_forced_without_a_context(toy: registry.Op):
    with use_backend():  # restores the choice there was before this test
        use_backend("torch")
        assert ran(toy, LARGE) == "torch"
        use_backend()
        assert ran(toy, LARGE) == "triton"


def test_forced_backend_that_does_not_take_the_input(toy: registry.Op):
    with use_backend("cpu"), pytest.raises(BackendUnavailable) as error:
        toy(DOUBLE)
    message = str(error.value)
    assert message.startswith("toy: no backend of cpu takes torch.float64 on cpu")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("cuda", "backend 'cuda' is not available: no CUDA device was found"),
        ("cudnn", "unknown backend 'cudnn': expected one of torch, cpu, triton, cuda"),
    ],
)
def test_backends_that_cannot_be_forced(toy: registry.Op, name: str, line: str):
    with pytest.raises(BackendUnavailable) as error:
        use_backend("cpu", name)
    assert str(error.value) == line
    assert ran(toy, LARGE) == "triton"


def test_environment(toy: registry.Op, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NABLA_FAST_BACKEND", " cpu, torch ")
    assert [ran(toy, x) for x in (LARGE, DOUBLE)] == ["cpu", "torch"]
    with use_backend("triton"):
        assert ran(toy, LARGE) == "triton"
    assert ran(toy, LARGE) == "cpu"


def test_choosing_by_input_again_overrides_the_environment(
    toy: registry.Op, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NABLA_FAST_BACKEND", "torch")
    with use_backend():
        assert ran(toy, LARGE) == "triton"
    assert ran(toy, LARGE) == "torch"


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


# -- calling an op like the function it was made from ------------------------------------------------


def test_arguments(toy: registry.Op):
    pair = Pair(torch.zeros(1), torch.ones(1))
    assert toy(SMALL, pair, scale=2.0).tolist() == [1, 2, 1]
    assert toy(x=SMALL, pair=pair).tolist() == [1, 1, 1]
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
        registry.op(body)
    assert "body" not in registry.all_ops()
