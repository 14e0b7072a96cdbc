"""Inputs of embedding_mix and linear_embedding_mix, and their gradients against autograd's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from nabla_fast.errors import InputError
from nabla_fast.ops import embedding_mix, gumbel_noise, linear_embedding_mix

from ..inputs import BF16, F16, F32, F64, WHOLE, Case, Draw, strided
from ..reference import mix_loss, relaxed_onehot

# -- inputs ------------------------------------------------------------------------------------------


def _options(
    draw: Draw, rows: int, vocabulary: int, tau: float, noise: bool, direct: bool
) -> dict[str, Any]:
    return {
        "tau": tau,
        "noise": draw.noise(rows) if noise else None,
        "direct": draw.normal(rows, vocabulary) if direct else None,
    }


def mix_arguments(
    draw: Draw,
    rows: int,
    vocabulary: int,
    tables: Sequence[tuple[int, torch.dtype]] = ((16, F32),),
    dtype: torch.dtype = F32,
    masked: float = 0.0,
    transposed: bool = False,
    gaps: bool = False,
    tau: float = 1.0,
    noise: bool = False,
    direct: bool = False,
    hidden: int = 0,
    **hard: bool,
) -> dict[str, Any]:
    """Arguments of embedding_mix, or of linear_embedding_mix if ``hidden`` is its width."""
    arguments: dict[str, Any] = {}
    if hidden:
        arguments["hidden"] = draw.normal(rows, hidden, dtype=dtype, scale=3 * hidden**-0.5)
        arguments["head"] = draw.normal(vocabulary, hidden, dtype=tables[0][1])
    else:
        arguments["logits"] = draw.logits(rows, vocabulary, dtype, masked)
    arguments["tables"] = draw.tables(vocabulary, tables)
    if transposed or gaps:
        relaid = strided if gaps else (lambda tensor: tensor.T.contiguous().T)
        for name in ("hidden", "head", "logits"):
            if name in arguments:
                arguments[name] = relaid(arguments[name])
        arguments["tables"] = [relaid(table) for table in arguments["tables"]]
    return arguments | _options(draw, rows, vocabulary, tau, noise, direct) | hard


def backward_arguments(draw: Draw, rows: int, **sizes: Any) -> dict[str, Any]:
    """The same without ``hard``, and with the cotangents of every mix."""
    arguments = mix_arguments(draw, rows, **sizes)
    cotangents = [draw.normal(rows, table.shape[1], dtype=table.dtype) for table in arguments["tables"]]
    return {"cotangents": cotangents} | arguments


_MIXES: dict[str, dict[str, Any]] = {
    "two tables": {"rows": 5, "vocabulary": 257, "tables": ((24, F32), (17, F32))},
    "one token": {"rows": 3, "vocabulary": 1},
    "two tokens": {"rows": 3, "vocabulary": 2, "direct": True},
    "one row": {"rows": 1, "vocabulary": 4099, "tables": ((33, F32), (3, F32)), "direct": True},
    "masked": {"rows": 4, "vocabulary": 515, "masked": 0.9, "direct": True},
    "noise": {"rows": 3, "vocabulary": 4099, "noise": True, "direct": True, "tau": 0.7},
    "cold": {"rows": 4, "vocabulary": 257, "tau": 0.1, "direct": True},
    "hot": {"rows": 4, "vocabulary": 257, "tau": 10.0, "noise": True},
    "bf16": {"rows": 3, "vocabulary": 1021, "dtype": BF16, "tables": ((40, BF16), (24, BF16))},
    "fp16": {"rows": 3, "vocabulary": 1021, "dtype": F16, "tables": ((40, F16), (24, F16))},
    "dtypes": {"rows": 7, "vocabulary": 515, "tables": ((40, BF16), (8, F32), (12, F16)), "noise": True},
    "float64": {"rows": 3, "vocabulary": 257, "dtype": F64, "tables": ((16, F64), (9, F32))},
    "transposed": {"rows": 5, "vocabulary": 257, "transposed": True},
    "gaps": {"rows": 5, "vocabulary": 257, "gaps": True},
    "whole vocabulary": {"rows": 2, "vocabulary": WHOLE, "noise": True, "direct": True},
}


def mix_cases(backward: bool, hidden: int = 0) -> list[Case]:
    """The cases of a mix, hard and soft, or of its backward, of hidden states if they have a width."""
    recipe = backward_arguments if backward else mix_arguments
    modes = {"": {}} if backward else {", hard": {"hard": True}, ", soft": {"hard": False}}
    return [
        Case(
            name + suffix,
            partial(recipe, **sizes, **mode, hidden=hidden),
            large=sizes["vocabulary"] == WHOLE,
        )
        for name, sizes in _MIXES.items()
        for suffix, mode in modes.items()
        if not (hidden and "masked" in sizes)  # a finite head masks nothing
    ]


# -- against autograd --------------------------------------------------------------------------------

ROWS, VOCABULARY, HIDDEN, WIDTHS = 3, 11, 5, (4, 3)


class Mix:
    """One of the two ops on one set of inputs in float64."""

    def __init__(
        self, kind: str, draw: Draw, *, noise: bool = False, direct: bool = False, tau: float = 0.7
    ):
        self.tables = draw.tables(VOCABULARY, [(width, F64) for width in WIDTHS])
        self.cotangents = [draw.normal(ROWS, width, dtype=F64) for width in WIDTHS]
        self.noise = draw.noise(ROWS) if noise else None
        self.direct = draw.normal(ROWS, VOCABULARY, dtype=F64) if direct else None
        self.tau = tau
        self.head = draw.normal(VOCABULARY, HIDDEN, dtype=F64) if kind == "linear" else None
        self.parameter = draw.normal(ROWS, HIDDEN if kind == "linear" else VOCABULARY, dtype=F64)
        self.parameter.requires_grad_()

    def __call__(self, parameter: Tensor, *, hard: bool) -> list[Tensor]:
        options: dict[str, Any] = {
            "tau": self.tau,
            "noise": self.noise,
            "direct": self.direct,
            "hard": hard,
        }
        if self.head is None:
            return embedding_mix(parameter, self.tables, **options)
        return linear_embedding_mix(parameter, self.head, self.tables, **options)

    def perturbed(self, parameter: Tensor) -> Tensor:
        """z + g by definition, differentiable."""
        z = parameter if self.head is None else parameter @ self.head.T
        return z if self.noise is None else z + gumbel_noise(self.noise, VOCABULARY)

    def reference(self, *, hard: bool) -> tuple[list[Tensor], Tensor]:
        """Mixes and ∂ℒ/∂parameter by plain autograd."""
        parameter = self.parameter.detach().requires_grad_()
        z = self.perturbed(parameter)
        mixes = [relaxed_onehot(z, self.tau, hard) @ table for table in self.tables]
        mix_loss(z, self.tables, self.cotangents, self.direct, self.tau, hard).backward()
        return [mix.detach() for mix in mixes], parameter.grad


def weighted(mixes: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Tensor:
    return sum((mix * cotangent).sum() for mix, cotangent in zip(mixes, cotangents, strict=True))


NOISE = pytest.mark.parametrize("noise", [False, True], ids=["", "noise"])
DIRECT = pytest.mark.parametrize("direct", [False, True], ids=["", "direct"])
HARD = pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])


class MixAgainstAutograd:
    """The op of logits, or the linear one of hidden states."""

    kind: ClassVar[str]

    @NOISE
    def test_soft_gradcheck(self, noise: bool, draw: Draw):
        mix = Mix(self.kind, draw, noise=noise)
        assert torch.autograd.gradcheck(lambda x: tuple(mix(x, hard=False)), mix.parameter)

    @NOISE
    def test_soft_gradient_with_direct_by_differences(self, noise: bool, draw: Draw):
        # `direct` is the gradient of a term that is no part of the mixes, which gradcheck cannot take.
        mix = Mix(self.kind, draw, noise=noise, direct=True)
        weighted(mix(mix.parameter, hard=False), mix.cotangents).backward()

        def loss(x: Tensor) -> Tensor:
            z = mix.perturbed(x)
            return mix_loss(z, mix.tables, mix.cotangents, mix.direct, mix.tau, hard=False)

        x, step = mix.parameter.detach(), 1e-5
        for index in range(x.numel()):
            shift = torch.zeros(x.numel(), dtype=F64)
            shift[index] = step
            shift = shift.view_as(x)
            slope = (loss(x + shift) - loss(x - shift)) / (2 * step)
            assert float(mix.parameter.grad.flatten()[index]) == pytest.approx(
                float(slope), rel=1e-5, abs=1e-8
            )

    @HARD
    @NOISE
    @DIRECT
    @pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
    def test_against_autograd(self, hard: bool, noise: bool, direct: bool, tau: float, draw: Draw):
        mix = Mix(self.kind, draw, noise=noise, direct=direct, tau=tau)
        mixes, grad = mix.reference(hard=hard)
        ours = mix(mix.parameter, hard=hard)
        weighted(ours, mix.cotangents).backward()
        torch.testing.assert_close(ours, mixes, rtol=1e-10, atol=1e-12)
        # Autograd does not centre G: where p is nearly one-hot it loses what is small beside G / τ.
        torch.testing.assert_close(mix.parameter.grad, grad, rtol=1e-8, atol=1e-11)

    def test_hard_mix_is_a_row_of_each_table(self, draw: Draw):
        mix = Mix(self.kind, draw, noise=True)
        token = mix.perturbed(mix.parameter).argmax(dim=-1)
        for ours, table in zip(mix(mix.parameter, hard=True), mix.tables, strict=True):
            assert torch.equal(ours, table[token])

    @HARD
    @pytest.mark.parametrize("used", range(len(WIDTHS)))
    def test_backward_with_one_of_the_mixes_used(self, hard: bool, used: int, draw: Draw):
        mix = Mix(self.kind, draw, direct=True)
        mix.cotangents = [c if t == used else torch.zeros_like(c) for t, c in enumerate(mix.cotangents)]
        _, grad = mix.reference(hard=hard)
        (mix(mix.parameter, hard=hard)[used] * mix.cotangents[used]).sum().backward()
        torch.testing.assert_close(mix.parameter.grad, grad, rtol=1e-8, atol=1e-12)

    @HARD
    def test_second_backward_is_an_error(self, hard: bool, draw: Draw):
        mix = Mix(self.kind, draw)
        loss = weighted(mix(mix.parameter, hard=hard), mix.cotangents).square()
        (grad,) = torch.autograd.grad(loss, mix.parameter, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            grad.sum().backward()

    @HARD
    def test_constants_get_no_gradient(self, hard: bool, draw: Draw):
        mix = Mix(self.kind, draw)
        constants = mix.tables + ([] if mix.head is None else [mix.head])
        for tensor in constants:
            tensor.requires_grad_()
        weighted(mix(mix.parameter, hard=hard), mix.cotangents).backward()
        assert mix.parameter.grad is not None
        assert all(tensor.grad is None for tensor in constants)

    def test_direct_must_be_a_constant(self, draw: Draw):
        mix = Mix(self.kind, draw, direct=True)
        mix.direct.requires_grad_()
        with pytest.raises(InputError, match="direct is a constant"):
            mix(mix.parameter, hard=True)

    @HARD
    def test_no_rows(self, hard: bool, draw: Draw):
        mix = Mix(self.kind, draw)
        parameter = mix.parameter.detach()[:0].requires_grad_()
        mixes = mix(parameter, hard=hard)
        assert [tuple(m.shape) for m in mixes] == [(0, width) for width in WIDTHS]
        sum(m.sum() for m in mixes).backward()
        assert parameter.grad.shape == parameter.shape

    @HARD
    @pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
    def test_dtypes_of_mixes_and_gradient(self, hard: bool, dtype: torch.dtype, draw: Draw):
        tables, head = draw.tables(7, [(3, BF16), (2, F32), (4, F16)]), draw.normal(7, 7, dtype=BF16)
        parameter = draw.normal(2, 7, dtype=dtype).requires_grad_()
        if self.kind == "logits":
            mixes = embedding_mix(parameter, tables, hard=hard)
        else:
            mixes = linear_embedding_mix(parameter, head, tables, hard=hard)
        assert [mix.dtype for mix in mixes] == [BF16, F32, F16]
        sum(mix.float().sum() for mix in mixes).backward()
        assert parameter.grad.dtype == dtype
