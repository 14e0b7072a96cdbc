"""Calls like one that was checked before: what is left out, and what never is.

The CPU stands for the device: tensors say that they are not on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from nabla_fast.errors import InputError
from nabla_fast.ops import AdamState, cosine_schedule, dto_descent, registry, use_backend
from nabla_fast.ops.registry import dispatch
from nabla_fast.plans import plan
from nabla_fast.plans.recording import step


@pytest.fixture(autouse=True)
def on_a_device() -> Iterator[None]:
    with mock.patch.object(Tensor, "is_cpu", property(lambda tensor: False)):
        yield


@pytest.fixture
def seen() -> list[str]:
    """What was called, in order."""
    return []


@pytest.fixture
def toy(seen: list[str]) -> Iterator[registry.Op]:
    """An op that notes its checks and its backends."""

    @registry.op(arguments={"x": registry.floats("N", "M"), "more": registry.floats("N", "M")})
    def toy_known(x: Tensor, more: list[Tensor], *, scale: float = 1.0, flag: bool = False) -> Tensor:
        seen.append("torch")
        return x * scale

    @toy_known.check
    def check(x: Tensor, more: list[Tensor], *, scale: float, flag: bool) -> None:
        seen.append("check")
        if scale < 0:
            raise InputError("toy_known: scale must not be negative")

    @toy_known.backend("triton", refuses=lambda x, *_, **__: None if x.stride(1) == 1 else "x is turned")
    def toy_triton(x: Tensor, more: list[Tensor], *, scale: float, flag: bool) -> Tensor:
        seen.append("triton")
        return x * scale

    with use_backend("triton", "torch"):
        yield toy_known
    del dispatch._ops["toy_known"]


X = torch.ones(2, 3)


def test_the_second_call_is_not_checked(toy: registry.Op, seen: list[str]):
    for number in range(3):
        assert torch.equal(toy(X + number, [X], scale=2.0), 2.0 * (X + number))
    assert seen == ["check", "triton", "triton", "triton"]


@pytest.mark.parametrize(
    ("args", "kwargs", "backend"),
    [
        ((X.double(), [X.double()]), {}, "triton"),
        ((torch.ones(3, 2).T, [X]), {}, "torch"),
        ((torch.ones(4, 3), [torch.ones(4, 3)]), {}, "triton"),
        ((X, [X, X]), {}, "triton"),
        ((X, []), {}, "triton"),
        ((X, [X]), {"scale": 2.0}, "triton"),
        ((X, [X]), {"flag": True}, "triton"),
        ((X, (X,)), {}, "triton"),
        ((X, [X]), {"scale": 1}, "triton"),
    ],
)
def test_another_call_is(toy: registry.Op, seen: list[str], args: tuple, kwargs: dict, backend: str):
    toy(X, [X])
    seen.clear()
    toy(*args, **kwargs)
    assert seen == ["check", backend]


def test_by_name_or_by_place(toy: registry.Op, seen: list[str]):
    toy(X, [X])
    toy(X, more=[X], scale=1.0)
    assert seen == ["check", "triton", "triton"]
    with pytest.raises(TypeError, match="unknown or a second argument 'x'"):
        toy(X, [X], x=X)
    with pytest.raises(TypeError, match="missing argument 'more'"):
        toy(X)
    with pytest.raises(TypeError, match="unknown or a second argument 'scales'"):
        toy(X, [X], scales=1.0)
    with pytest.raises(TypeError, match="takes 2 positional arguments, got 3"):
        toy(X, [X], 1.0)


def test_what_is_refused_is_not_remembered(toy: registry.Op, seen: list[str]):
    for _ in range(2):
        with pytest.raises(InputError, match="negative"):
            toy(X, [X], scale=-1.0)
    assert seen == ["check", "check"]


def test_another_choice_of_backends(toy: registry.Op, seen: list[str]):
    toy(X, [X])
    with use_backend("torch"):
        toy(X, [X])
        toy(X, [X])
    toy(X, [X])
    assert seen == ["check", "triton", "check", "torch", "torch", "triton"]


def test_numbers_in_another_form(toy: registry.Op, seen: list[str]):
    for _ in range(2):
        toy(X, [X], scale=1)  # an int, of which the backend gets a float
    assert seen == ["check", "triton"] * 2


def test_gradients_and_tangents_take_the_long_way(toy: registry.Op, seen: list[str]):
    toy(X, [X])
    seen.clear()
    leaf = X.clone().requires_grad_()
    toy(leaf, [X])
    with torch.no_grad():
        toy(leaf, [X])
    assert seen == ["check", "triton"] * 2
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, X)
        with pytest.raises(InputError, match="x has a tangent"):
            toy(dual, [X])


def test_what_is_changed_in_place():
    schedule, grad = cosine_schedule(2, 0.1), torch.randn(2, 5)
    with use_backend("torch"):
        for _ in range(3):
            z = torch.randn(2, 5)
            state, version = AdamState.zeros(z), z._version
            dto_descent(z, grad, state, schedule)
            assert state.step.tolist() == [2, 2]
            assert z._version > version
        z = torch.randn(2, 5)
        state = AdamState.zeros(z)
        with pytest.raises(InputError, match="z is changed in place, and overlaps grad"):
            dto_descent(z, z, state, schedule)
        with pytest.raises(
            InputError, match=r"exp_avg_sq is changed in place, and overlaps state\.exp_avg"
        ):
            dto_descent(z, grad, state._replace(exp_avg_sq=state.exp_avg), schedule)
        dto_descent(z, grad, state, schedule)
        assert state.step.tolist() == [2, 2]


def test_memory_is_bounded(toy: registry.Op):
    for rows in range(1, 600):
        toy(torch.ones(rows, 1), [])
    assert len(toy._known._known) <= 512


def test_calls_that_record_a_gradient_are_known_too(toy: registry.Op, seen: list[str]):
    toy.gradient("x")(lambda arguments, result, cotangents: cotangents[0] * arguments["scale"])
    for number in range(3):
        leaf = (X + number).requires_grad_()
        result = toy(leaf, [X], scale=3.0)
        assert torch.equal(result.detach(), 3 * leaf.detach())
        (gradient,) = torch.autograd.grad(result, leaf, X)
        assert torch.equal(gradient, 3 * X)
    assert seen == ["check", "triton", "triton", "triton"]
    assert not toy(X, [X], scale=3.0).requires_grad


def test_zeros_of_both_signs_and_nan_are_different_numbers(toy: registry.Op, seen: list[str]):
    for scale in (0.0, -0.0, math.nan):
        for _ in range(2):
            result = toy(X, [X], scale=scale)
            assert math.copysign(1.0, result[0, 0]) == math.copysign(1.0, scale)
    assert seen == ["check", "triton", "triton"] * 3


def test_an_error_of_a_plan_is_that_of_its_launcher():
    @registry.op(arguments={"x": registry.floats("N")})
    def toy_positive(x: Tensor) -> Tensor:
        return x + 1

    @toy_positive.backend("triton", refuses=lambda x: None)
    def toy_triton(x: Tensor) -> Tensor:
        step(expect_positive, x)
        return x + 1

    def expect_positive(x: Tensor) -> None:
        if not bool((x > 0).all()):
            raise ValueError("x is negative")

    with use_backend("triton", "torch"), plan.enabled(True), mock.patch.object(plan, "CALLS_BEFORE", 0):
        for number in range(4):
            assert torch.equal(toy_positive(X[0] + number), X[0] + number + 1)
        (known,) = toy_positive._known._known.values()
        assert known.plans._plans
        with pytest.raises(InputError, match=r"^toy_positive: x is negative$"):
            toy_positive(-X[0])
    del dispatch._ops["toy_positive"]
