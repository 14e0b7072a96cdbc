"""Layouts of calls whose backward is recorded: arguments and results are put back as they were."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nabla_fast.ops.registry.layout import Layout


class Pair(NamedTuple):
    seed: Tensor
    position: Tensor | None


def tensors(count: int) -> list[Tensor]:
    return [torch.full((2,), float(number)) for number in range(count)]


def arguments(given: list[Tensor]) -> list[Any]:
    a, b, c, d, e = given
    return [a, [b, c], -0.0, True, None, Pair(d, None), (), [], ("name", (e, 2)), 1]


NAMES = [f"argument{place}" for place in range(10)]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)):
        return (
            type(one) is type(other)
            and len(one) == len(other)
            and all(same(a, b) for a, b in zip(one, other, strict=True))
        )
    return one is other


@pytest.mark.parametrize("of_many", [False, True])
def test_what_is_put_back_is_what_was_given(of_many: bool):
    values = arguments(tensors(5))
    layout = Layout(NAMES, ["argument0"], values, of_many=of_many)
    for given in (tensors(5), tensors(5)):
        wanted = arguments(given)
        wanted[2] = values[2]  # numbers are the call's own
        back = layout.values(given)
        assert same(back, wanted)
        assert layout.values(given)[1] is not back[1]  # a list that its owner may change
    for result in (torch.ones(1), tensors(2), Pair(*tensors(2))):
        layout = Layout(NAMES, ["argument0"], values, of_many=of_many)
        parts = [result] if isinstance(result, Tensor) else list(result)
        assert same(layout.result(result)(parts), result)


@pytest.mark.parametrize("of_many", [False, True])
def test_gradients_have_the_places_of_their_tensors(of_many: bool):
    wrt = ["argument5", "argument0"]
    values = arguments(tensors(5))
    values[5] = torch.ones(1)
    layout = Layout(NAMES, wrt, values, of_many=of_many)
    assert layout.places == [1, None, None, 0, None]


def test_tensors_of_a_layout_for_many_calls_are_not_held():
    given = tensors(5)
    layout = Layout(NAMES, ["argument0"], arguments(given), of_many=True)
    layout.result(given[:2])
    held = [tensor for function in (layout.values, layout.result([])) for tensor in constants(function)]
    assert held == []


def constants(function: Any) -> list[Tensor]:
    return [value for value in function.__globals__.values() if isinstance(value, Tensor)]
