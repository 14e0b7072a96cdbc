"""embedding_mix and linear_embedding_mix: their values, and their gradients by autograd's own checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_fast.errors import InputError
from nabla_fast.ops import embedding_mix, gumbel_noise, linear_embedding_mix

from .cases import BF16, F16, F32, F64, Draw
from .reference import mix_loss, relaxed_onehot

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


KINDS = pytest.mark.parametrize("kind", ["logits", "linear"])
NOISE = pytest.mark.parametrize("noise", [False, True], ids=["", "noise"])
DIRECT = pytest.mark.parametrize("direct", [False, True], ids=["", "direct"])
HARD = pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])


@KINDS
@NOISE
def test_soft_gradcheck(kind: str, noise: bool, draw: Draw):
    mix = Mix(kind, draw, noise=noise)
    assert torch.autograd.gradcheck(lambda x: tuple(mix(x, hard=False)), mix.parameter)


@KINDS
@NOISE
def test_soft_gradient_with_direct_by_differences(kind: str, noise: bool, draw: Draw):
    # `direct` is the gradient of a term that is no part of the mixes, which gradcheck cannot take.
    mix = Mix(kind, draw, noise=noise, direct=True)
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
        assert float(mix.parameter.grad.flatten()[index]) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)


@KINDS
@HARD
@NOISE
@DIRECT
@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
def test_against_autograd(kind: str, hard: bool, noise: bool, direct: bool, tau: float, draw: Draw):
    mix = Mix(kind, draw, noise=noise, direct=direct, tau=tau)
    mixes, grad = mix.reference(hard=hard)
    ours = mix(mix.parameter, hard=hard)
    weighted(ours, mix.cotangents).backward()
    torch.testing.assert_close(ours, mixes, rtol=1e-10, atol=1e-12)
    # Autograd does not centre G: where p is nearly one-hot it loses what is small beside G / τ.
    torch.testing.assert_close(mix.parameter.grad, grad, rtol=1e-8, atol=1e-11)


@KINDS
def test_hard_mix_is_a_row_of_each_table(kind: str, draw: Draw):
    mix = Mix(kind, draw, noise=True)
    token = mix.perturbed(mix.parameter).argmax(dim=-1)
    for ours, table in zip(mix(mix.parameter, hard=True), mix.tables, strict=True):
        assert torch.equal(ours, table[token])


@KINDS
@HARD
@pytest.mark.parametrize("used", range(len(WIDTHS)))
def test_backward_with_one_of_the_mixes_used(kind: str, hard: bool, used: int, draw: Draw):
    mix = Mix(kind, draw, direct=True)
    mix.cotangents = [c if t == used else torch.zeros_like(c) for t, c in enumerate(mix.cotangents)]
    _, grad = mix.reference(hard=hard)
    (mix(mix.parameter, hard=hard)[used] * mix.cotangents[used]).sum().backward()
    torch.testing.assert_close(mix.parameter.grad, grad, rtol=1e-8, atol=1e-12)


@KINDS
@HARD
def test_second_backward_is_an_error(kind: str, hard: bool, draw: Draw):
    mix = Mix(kind, draw)
    loss = weighted(mix(mix.parameter, hard=hard), mix.cotangents).square()
    (grad,) = torch.autograd.grad(loss, mix.parameter, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@KINDS
@HARD
def test_constants_get_no_gradient(kind: str, hard: bool, draw: Draw):
    mix = Mix(kind, draw)
    constants = mix.tables + ([] if mix.head is None else [mix.head])
    for tensor in constants:
        tensor.requires_grad_()
    weighted(mix(mix.parameter, hard=hard), mix.cotangents).backward()
    assert mix.parameter.grad is not None
    assert all(tensor.grad is None for tensor in constants)


@KINDS
def test_direct_must_be_a_constant(kind: str, draw: Draw):
    mix = Mix(kind, draw, direct=True)
    mix.direct.requires_grad_()
    with pytest.raises(InputError, match="direct is a constant"):
        mix(mix.parameter, hard=True)


@HARD
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_dtypes_of_mixes_and_gradient(hard: bool, dtype: torch.dtype, draw: Draw):
    tables, head = draw.tables(7, [(3, BF16), (2, F32), (4, F16)]), draw.normal(7, 7, dtype=BF16)
    for constants in ((tables,), (head, tables)):
        parameter = draw.normal(2, 7, dtype=dtype).requires_grad_()
        op = embedding_mix if len(constants) == 1 else linear_embedding_mix
        mixes = op(parameter, *constants, hard=hard)
        assert [mix.dtype for mix in mixes] == [BF16, F32, F16]
        sum(mix.float().sum() for mix in mixes).backward()
        assert parameter.grad.dtype == dtype


@HARD
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_masked_tokens_have_gradient_zero_whatever_direct_is(hard: bool, value: float, draw: Draw):
    logits = draw.logits(4, 33, masked=0.6).requires_grad_()
    masked = logits.detach() == -torch.inf
    assert masked.any()
    direct = draw.normal(4, 33).masked_fill(masked, value)
    tables = draw.tables(33, [(5, F32)])
    embedding_mix(logits, tables, hard=hard, direct=direct)[0].sum().backward()
    assert (logits.grad[masked] == 0).all()
    assert logits.grad.isfinite().all()
    assert (logits.grad[~masked] != 0).any()


@pytest.mark.parametrize("vocabulary", [1, 2])
def test_equal_logits_take_the_first(vocabulary: int, draw: Draw):
    tables = draw.tables(vocabulary, [(3, F32)])
    (mix,) = embedding_mix(torch.zeros(2, vocabulary), tables)
    assert torch.equal(mix, tables[0][:1].expand(2, 3))


@KINDS
@HARD
def test_no_rows(kind: str, hard: bool, draw: Draw):
    mix = Mix(kind, draw)
    parameter = mix.parameter.detach()[:0].requires_grad_()
    mixes = mix(parameter, hard=hard)
    assert [tuple(m.shape) for m in mixes] == [(0, width) for width in WIDTHS]
    sum(m.sum() for m in mixes).backward()
    assert parameter.grad.shape == parameter.shape
