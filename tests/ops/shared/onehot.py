"""Inputs of onehot_grad and onehot_grad_norm, and the tests that both pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from nabla_fast.errors import InputError, RowError
from nabla_fast.ops import use_backend
from nabla_fast.ops.onehot_grad import onehot_grad_native
from nabla_fast.ops.onehot_grad_norm import onehot_grad_norm_native
from nabla_fast.ops.registry import Op

from ..contract import OnBackend, only_if
from ..harness import home, interpreted, map_tensors, run, to_device
from ..inputs import BF16, F16, F32, F64, WHOLE, Case, Draw, cases_of, masked_by_head, strided
from .head_maps import head_map_cases
from .passes import Call, VocabularyPass, forced

NATIVE = {"onehot_grad": onehot_grad_native, "onehot_grad_norm": onehot_grad_norm_native}

# -- inputs ------------------------------------------------------------------------------------------


def onehot_arguments(
    draw: Draw,
    rows: int,
    vocabulary: int,
    tables: Sequence[tuple[int, torch.dtype]] = ((16, F32),),
    hidden: int = 16,
    head: torch.dtype = F32,
    nll_coeff: float = 1e-3,
    cotangents: float = 1.0,
    small: torch.dtype | None = None,
    masked: float = 0.0,
    gaps: bool = False,
    maps: Sequence[int | None] = (),
) -> dict[str, Any]:
    """``small``: the dtype of cotangents and hidden states, instead of their tables'; ``maps``: rows of
    each table that has other ones than the vocabulary, and a map."""
    counts = [vocabulary if count is None else count for count in maps or [None] * len(tables)]
    matrices = [draw.tables(count, [table])[0] for count, table in zip(counts, tables, strict=True)]
    token_maps = [None if count is None else draw.integers(0, count, vocabulary) for count in maps]
    gradients = [
        draw.normal(rows, width, dtype=small or dtype, scale=cotangents) for width, dtype in tables
    ]
    states = draw.normal(rows, hidden, dtype=small or head, scale=3 * hidden**-0.5)
    matrix = draw.normal(vocabulary, hidden, dtype=head)
    if masked:
        states, matrix = masked_by_head(draw, states, matrix, masked)
    if gaps:
        gradients, matrices = ([strided(t) for t in tensors] for tensors in (gradients, matrices))
        states, matrix = strided(states), strided(matrix)
    return {
        "cotangents": gradients,
        "tables": matrices,
        "hidden": states,
        "head": matrix,
        "nll_coeff": nll_coeff,
        "token_maps": token_maps,
    }


_ONEHOT: dict[str, dict[str, Any]] = {
    "two tables": {"rows": 5, "vocabulary": 257, "tables": ((24, F32), (17, F32)), "hidden": 33},
    "one token": {"rows": 3, "vocabulary": 1},
    "two tokens": {"rows": 3, "vocabulary": 2},
    "one row": {"rows": 1, "vocabulary": 4099, "tables": ((1, F32),)},
    "seventeen rows": {"rows": 17, "vocabulary": 257},
    "likelihood alone": {"rows": 3, "vocabulary": 1021, "nll_coeff": 1.0, "cotangents": 0.0},
    "no likelihood": {"rows": 3, "vocabulary": 1021, "nll_coeff": 0.0},
    "bf16": {"rows": 3, "vocabulary": 515, "tables": ((24, BF16), (8, BF16)), "hidden": 32, "head": BF16},
    "fp16": {"rows": 3, "vocabulary": 515, "tables": ((24, F16), (8, F32)), "hidden": 32, "head": F16},
    "float64": {"rows": 3, "vocabulary": 257, "tables": ((16, F64),), "head": F64},
    "bf16 tables": {"rows": 9, "vocabulary": 515, "tables": ((24, BF16),), "head": BF16, "small": F32},
    "bf16 tables, many rows": {
        "rows": 37,
        "vocabulary": 515,
        "tables": ((70, BF16), (24, BF16)),
        "head": BF16,
        "small": F32,
        "gaps": True,
    },
    "masked": {"rows": 9, "vocabulary": 515, "masked": 0.9, "nll_coeff": 0.5},
    "gaps": {"rows": 18, "vocabulary": 515, "tables": ((7, F32), (24, F32)), "gaps": True},
    "mapped": {"rows": 9, "vocabulary": 257, "tables": ((24, BF16), (17, F32)), "maps": (None, 61)},
    "both mapped": {
        "rows": 5,
        "vocabulary": 515,
        "tables": ((24, BF16), (8, BF16)),
        "head": BF16,
        "maps": (700, 1),
        "gaps": True,
    },
    "whole vocabulary": {"rows": 2, "vocabulary": WHOLE, "hidden": 8, "tables": ((8, F32),)},
}


def onehot_cases() -> list[Case]:
    """The cases of both ops."""
    half = {"tables": ((24, BF16), (17, BF16)), "head": BF16, "small": F32}
    sizes = {"tables": ((24, F32), (17, F32)), "hidden": 33, "nll_coeff": 0.5}
    return cases_of(onehot_arguments, _ONEHOT) + head_map_cases(
        onehot_arguments, half, rows=9, vocabulary=257, **sizes
    )


def made(
    draw: Draw,
    rows: int,
    vocabulary: int,
    hidden: int = 20,
    widths: tuple[int, ...] = (17, 9),
    small: torch.dtype = F32,
    dtype: torch.dtype = F32,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of either op whose tables and head have one dtype."""
    tables = [(width, dtype) for width in widths]
    return onehot_arguments(draw, rows, vocabulary, tables, hidden, head=dtype, small=small, **options)


# -- against autograd --------------------------------------------------------------------------------

VOCABULARY, HIDDEN, WIDTHS, NLL = 23, 6, (5, 4), 0.37


class Loss:
    """ℒ(y) = f(y·E, y·R) − ν Σ y log π for hard tokens y, π from other hidden states."""

    def __init__(self, draw: Draw, rows: int):
        self.tables = draw.tables(VOCABULARY, [(width, F64) for width in WIDTHS])
        self.hidden, self.head = (
            draw.normal(rows, HIDDEN, dtype=F64),
            draw.normal(VOCABULARY, HIDDEN, dtype=F64),
        )
        self._mixing = draw.normal(sum(WIDTHS), sum(WIDTHS), dtype=F64)
        tokens = draw.integers(0, VOCABULARY, rows)
        self._onehot = torch.nn.functional.one_hot(tokens, VOCABULARY).double()

    def _from_mixes(self, mixes: list[Tensor]) -> Tensor:
        # Rows interact, as they do in a transformer.
        return (torch.cat(mixes, dim=1) @ self._mixing).tanh().sum(dim=0).square().sum()

    def onehot_grad(self) -> Tensor:
        """∂ℒ/∂y [N, V], every term by autograd."""
        y = self._onehot.clone().requires_grad_()
        log_pi = torch.log_softmax(self.hidden @ self.head.T, dim=-1)
        (self._from_mixes([y @ table for table in self.tables]) - NLL * (y * log_pi).sum()).backward()
        return y.grad

    def arguments(self) -> dict[str, Any]:
        """The small tensors that stand for it."""
        mixes = [(self._onehot @ table).requires_grad_() for table in self.tables]
        self._from_mixes(mixes).backward()
        return {
            "cotangents": [mix.grad for mix in mixes],
            "tables": self.tables,
            "hidden": self.hidden,
            "head": self.head,
            "nll_coeff": NLL,
        }


class OnehotAgainstAutograd:
    """The gradient of a small loss, or its norms."""

    op: ClassVar[Op]

    @staticmethod
    def of_gradient(grad: Tensor) -> Tensor:
        """The op's result, from ∂ℒ/∂y [N, V]."""
        raise NotImplementedError

    # More rows than the norm keeps at a time, and not a multiple of them.
    @pytest.mark.parametrize("rows", [1, 8, 21])
    def test_against_autograd(self, rows: int, draw: Draw):
        loss = Loss(draw, rows)
        wanted = self.of_gradient(loss.onehot_grad())
        torch.testing.assert_close(self.op(**loss.arguments()), wanted)

    @pytest.mark.parametrize("dtype", [F32, BF16, F16])
    def test_half_precision_enters_float32_arithmetic(self, dtype: torch.dtype, draw: Draw):
        given = map_tensors(lambda tensor: tensor.to(dtype), Loss(draw, 5).arguments())
        result = self.op(**given)
        assert result.dtype == F32
        wanted = self.op(**map_tensors(Tensor.double, given))
        scale = float(wanted.abs().max())
        torch.testing.assert_close(result.double(), wanted, rtol=0, atol=2e-6 * scale)

    @pytest.mark.parametrize("wrong", [-1, 9])
    def test_a_map_to_no_row_is_refused(self, wrong: int, draw: Draw):
        arguments = {
            "cotangents": [draw.normal(2, 5), draw.normal(2, 4)],
            "tables": [draw.normal(VOCABULARY, 5), draw.normal(9, 4)],
            "hidden": draw.normal(2, HIDDEN),
            "head": draw.normal(VOCABULARY, HIDDEN),
            "nll_coeff": NLL,
        }
        token_map = draw.integers(0, 9, VOCABULARY)
        token_map[4] = wrong
        with pytest.raises(InputError, match=rf"token_maps\[1\] gives token 4 row {wrong} of a table of 9"):
            self.op(**arguments, token_maps=[None, token_map])
        with pytest.raises(InputError, match="int64"):
            self.op(**arguments, token_maps=[None, token_map[1:]])
        with pytest.raises(InputError, match="one token map a table"):
            self.op(**arguments, token_maps=[token_map])
        with pytest.raises(InputError, match=r"tables\[1\]"):
            self.op(**arguments)
        with pytest.raises(ValueError, match="has no row"):
            NATIVE[self.op.name](*arguments.values(), [None, token_map])

    def test_no_rows(self, draw: Draw):
        arguments = Loss(draw, 3).arguments()
        arguments["hidden"] = arguments["hidden"][:0]
        arguments["cotangents"] = [tensor[:0] for tensor in arguments["cotangents"]]
        assert self.op(**arguments).shape == self.of_gradient(torch.zeros(0, VOCABULARY)).shape


# -- on a backend ------------------------------------------------------------------------------------


class OnehotOnBackend(OnBackend):
    """One op on one backend beyond the contract: bad rows, and tables whose rows are mapped."""

    op: ClassVar[Op]

    @pytest.mark.parametrize(
        ("value", "reason"), [(torch.nan, "NaN"), (torch.inf, r"\+inf"), (-torch.inf, "no finite")]
    )
    def test_bad_rows_are_named(self, value: float, reason: str, draw: Draw):
        arguments = {
            "cotangents": [draw.normal(3, 5)],
            "tables": draw.tables(VOCABULARY, [(5, F32)]),
            "hidden": draw.normal(3, HIDDEN),
            "head": draw.normal(VOCABULARY, HIDDEN).abs() + 0.1,
            "nll_coeff": NLL,
        }
        arguments["hidden"][1] = value
        with pytest.raises(RowError, match=reason) as error:
            run(self.op, self.backend, to_device(home(self.backend), arguments))
        assert "row 1" in str(error.value)
        assert "row 2" not in str(error.value)

    @only_if(lambda cls: cls.backend != "triton")
    def test_the_row_is_named_by_its_place_in_the_call(self, draw: Draw, monkeypatch: pytest.MonkeyPatch):
        # The body keeps a few rows at a time.
        monkeypatch.setattr("nabla_fast.ops.rows._ELEMENTS", 200)
        arguments = made(draw, rows=9, vocabulary=100)
        arguments["hidden"][7, 0] = torch.nan
        with use_backend(self.backend), pytest.raises(RowError, match=f"{self.op.name}.*row 7 has a NaN"):
            self.op(**arguments)

    @pytest.mark.parametrize("rows", [1, 3, 9, 70])
    @pytest.mark.parametrize("dtype", [F32, BF16])
    def test_a_map_gives_the_bits_of_an_aligned_copy(self, rows: int, dtype: torch.dtype, draw: Draw):
        # Past the 16 rows of its smallest tile, an interpreter is only slower.
        rows = min(rows, 17) if interpreted(self.backend) else rows
        maps = [None, draw.integers(0, 50, 333), draw.integers(0, 400, 333)]
        maps[2][:200] = torch.arange(7, 207)  # pieces of the table that lie as tokens do
        sizes = zip((333, 50, 400), (7, 33, 64), strict=True)
        arguments = {
            "tables": [draw.normal(count, width, dtype=dtype) for count, width in sizes],
            "cotangents": [draw.normal(rows, width) for width in (7, 33, 64)],
            "hidden": draw.normal(rows, HIDDEN),
            "head": draw.normal(333, HIDDEN),
            "nll_coeff": NLL,
        }
        copies = [
            table if token_map is None else table[token_map]
            for table, token_map in zip(arguments["tables"], maps, strict=True)
        ]
        mapped = run(self.op, self.backend, to_device(home(self.backend), arguments | {"token_maps": maps}))
        aligned = run(self.op, self.backend, to_device(home(self.backend), arguments | {"tables": copies}))
        assert torch.equal(mapped["result"], aligned["result"])


# -- the C++ kernels ---------------------------------------------------------------------------------


def exact(op: Op, arguments: dict[str, Any]) -> Tensor:
    """The result in float64."""
    with use_backend("torch"):
        return op(**map_tensors(torch.Tensor.double, arguments))


class OnehotCall(Call):
    """A raw call of onehot_grad or onehot_grad_norm."""

    def fields(self) -> dict[str, Any]:
        to: Any = self.results[0]
        if self.matrix_result:
            to = (to.data_ptr(), self.vocabulary, self.stride, 0)
        fields = {
            "nll_coeff": self.arguments["nll_coeff"],
            "cotangents": [self.matrix(t) for t in self.arguments["cotangents"]],
            "tables": [self.matrix(t) for t in self.arguments["tables"]],
            "grad" if self.matrix_result else "norm": to,
        }
        return fields | self.table_change


class OnehotPass(VocabularyPass):
    """Beyond all passes: numbers that cancel."""

    made = staticmethod(made)

    def test_one_token_is_certain(self, draw: Draw):
        arguments = self.made(draw, rows=5, vocabulary=1, nll_coeff=1.0, cotangents=0.0)
        assert (forced(self.op, arguments)[0] == 0).all()

    @pytest.mark.parametrize("offset", [-1024.0, 0.0, 512.0])
    def test_logits_far_from_zero(self, offset: float, draw: Draw):
        # Integers, so that the logits themselves are exact.
        arguments = self.made(draw, rows=20, vocabulary=3000, nll_coeff=1.0, cotangents=0.0)
        arguments["hidden"] = draw.integers(-2, 3, 20, 20).float()
        arguments["head"] = draw.integers(-2, 3, 3000, 20).float()
        arguments["hidden"][:, 0] = 1
        arguments["head"][:, 0] = offset
        wanted = exact(self.op, arguments)
        got = forced(self.op, arguments)[0].double()
        assert ((got - wanted).abs() <= 3e-7 * wanted.abs().amax(dim=-1, keepdim=True)).all()

    def test_first_tokens_unlike_the_others(self, draw: Draw):
        arguments = self.made(draw, rows=9, vocabulary=3000, nll_coeff=1.0, cotangents=0.0)
        arguments["hidden"] = draw.integers(-2, 3, 9, 20).float()
        arguments["head"] = draw.integers(-2, 3, 3000, 20).float()
        arguments["hidden"][:, 0] = 1
        arguments["head"][:64, 0] = -100_000.0
        wanted = exact(self.op, arguments)
        got = forced(self.op, arguments)[0].double()
        assert ((got - wanted).abs() <= 3e-7 * wanted.abs().amax(dim=-1, keepdim=True)).all()

    def test_what_the_interface_refuses_of_tables(self, draw: Draw):
        def same(call: OnehotCall) -> None:
            call.table_change.update(cotangents=[call.hidden, call.hidden])

        assert "negative" in self.refused(draw, same)
