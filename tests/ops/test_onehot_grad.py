"""onehot_grad and onehot_grad_norm against autograd of a small loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_fast import _native
from nabla_fast.errors import InputError, RowError
from nabla_fast.ops import onehot_grad, onehot_grad_norm, use_backend
from nabla_fast.ops.registry import Op

from .cases import BF16, F16, F32, F64, Draw
from .harness import DEVICES, backend_parameters, run, to_device

VOCABULARY, HIDDEN, WIDTHS, NLL = 23, 6, (5, 4), 0.37


OPS_ON_BACKENDS = pytest.mark.parametrize(
    ("op", "backend"), backend_parameters("onehot_grad", "onehot_grad_norm")
)


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

    def _of_mixes(self, mixes: list[Tensor]) -> Tensor:
        # Rows interact, as they do in a transformer.
        return (torch.cat(mixes, dim=1) @ self._mixing).tanh().sum(dim=0).square().sum()

    def onehot_grad(self) -> Tensor:
        """∂ℒ/∂y [N, V], every term by autograd."""
        y = self._onehot.clone().requires_grad_()
        log_pi = torch.log_softmax(self.hidden @ self.head.T, dim=-1)
        (self._of_mixes([y @ table for table in self.tables]) - NLL * (y * log_pi).sum()).backward()
        return y.grad

    def arguments(self) -> dict[str, Any]:
        """The small tensors that stand for it."""
        mixes = [(self._onehot @ table).requires_grad_() for table in self.tables]
        self._of_mixes(mixes).backward()
        return {
            "cotangents": [mix.grad for mix in mixes],
            "tables": self.tables,
            "hidden": self.hidden,
            "head": self.head,
            "nll_coeff": NLL,
        }


# More rows than the norm keeps at a time, and not a multiple of them.
@pytest.mark.parametrize("rows", [1, 8, 21])
def test_against_autograd(rows: int, draw: Draw):
    loss = Loss(draw, rows)
    expected = loss.onehot_grad()
    torch.testing.assert_close(onehot_grad(**loss.arguments()), expected)
    torch.testing.assert_close(onehot_grad_norm(**loss.arguments()), expected.norm(dim=-1))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_half_precision_enters_float32_arithmetic(dtype: torch.dtype, draw: Draw):
    arguments = Loss(draw, 5).arguments()
    for name in ("tables", "cotangents"):
        arguments[name] = [tensor.to(dtype) for tensor in arguments[name]]
    arguments |= {name: arguments[name].to(dtype) for name in ("hidden", "head")}
    exact = {
        name: [t.double() for t in value] if isinstance(value, list) else value
        for name, value in arguments.items()
    } | {name: arguments[name].double() for name in ("hidden", "head")}
    grad, norm = onehot_grad(**arguments), onehot_grad_norm(**arguments)
    assert grad.dtype == norm.dtype == F32
    wanted = onehot_grad(**exact)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(grad.double(), wanted, rtol=0, atol=2e-6 * scale)
    torch.testing.assert_close(norm.double(), wanted.norm(dim=-1), rtol=1e-5, atol=0)


def test_a_masked_token_is_left_out(draw: Draw):
    arguments = Loss(draw, 4).arguments()
    arguments["hidden"] = arguments["hidden"].abs() + 0.1
    without = onehot_grad(**arguments)
    arguments["head"] = arguments["head"].index_fill(0, torch.tensor([3, 7]), -torch.inf)
    with use_backend("torch"):
        grad, norm = onehot_grad(**arguments), onehot_grad_norm(**arguments)
    assert (grad[:, [3, 7]] == 0).all()
    kept = [v for v in range(VOCABULARY) if v not in (3, 7)]
    # Only π is spread over the tokens that are left: one number a row.
    shift = grad[:, kept] - without[:, kept]
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift))
    assert (shift < 0).all()
    torch.testing.assert_close(norm, grad[:, kept].norm(dim=-1))


@OPS_ON_BACKENDS
@pytest.mark.parametrize(
    ("value", "reason"), [(torch.nan, "NaN"), (torch.inf, r"\+inf"), (-torch.inf, "no finite")]
)
def test_bad_rows_are_named(op: Op, backend: str, value: float, reason: str, draw: Draw):
    arguments = {
        "cotangents": [draw.normal(3, 5)],
        "tables": draw.tables(VOCABULARY, [(5, F32)]),
        "hidden": draw.normal(3, HIDDEN),
        "head": draw.normal(VOCABULARY, HIDDEN).abs() + 0.1,
        "nll_coeff": NLL,
    }
    arguments["hidden"][1] = value
    device = DEVICES[-1] if backend == "triton" else "cpu"
    with pytest.raises(RowError, match=reason) as error:
        run(op, backend, to_device(device, arguments))
    assert "row 1" in str(error.value)
    assert "row 2" not in str(error.value)


@OPS_ON_BACKENDS
@pytest.mark.parametrize("rows", [1, 3, 9, 70])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_map_gives_the_bits_of_an_aligned_copy(
    op: Op, backend: str, rows: int, dtype: torch.dtype, draw: Draw
):
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
    device = DEVICES[-1] if backend == "triton" else "cpu"
    mapped = run(op, backend, to_device(device, arguments | {"token_maps": maps}))
    aligned = run(op, backend, to_device(device, arguments | {"tables": copies}))
    assert torch.equal(mapped["result"], aligned["result"])


def test_a_row_too_long_for_a_near_copy(draw: Draw):
    # On the CPU mapped rows are copied some at a time: two of these at most, and none of the wider.
    for width, dtype in ((16_000, F32), (33_000, F32), (65_537, BF16)):
        arguments = {
            "cotangents": [draw.normal(2, width)],
            "tables": [draw.normal(9, width, dtype=dtype)],
            "hidden": draw.normal(2, HIDDEN),
            "head": draw.normal(21, HIDDEN),
            "nll_coeff": NLL,
        }
        token_map = draw.integers(0, 9, 21)
        aligned = arguments | {"tables": [arguments["tables"][0][token_map]]}
        with use_backend("cpu"):
            assert torch.equal(onehot_grad(**arguments, token_maps=[token_map]), onehot_grad(**aligned))


@pytest.mark.parametrize("op", [onehot_grad, onehot_grad_norm], ids=lambda op: op.name)
@pytest.mark.parametrize("wrong", [-1, 9])
def test_a_map_to_no_row_is_refused(op: Op, wrong: int, draw: Draw):
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
        op(**arguments, token_maps=[None, token_map])
    with pytest.raises(InputError, match="int64"):
        op(**arguments, token_maps=[None, token_map[1:]])
    with pytest.raises(InputError, match="one token map a table"):
        op(**arguments, token_maps=[token_map])
    with pytest.raises(InputError, match=r"tables\[1\]"):
        op(**arguments)
    native = {"onehot_grad": _native.onehot_grad, "onehot_grad_norm": _native.onehot_grad_norm}[op.name]
    with pytest.raises(ValueError, match="has no row"):
        native(*arguments.values(), [None, token_map])


def test_no_rows(draw: Draw):
    arguments = Loss(draw, 3).arguments()
    arguments["hidden"] = arguments["hidden"][:0]
    arguments["cotangents"] = [tensor[:0] for tensor in arguments["cotangents"]]
    assert onehot_grad(**arguments).shape == (0, VOCABULARY)
    assert onehot_grad_norm(**arguments).shape == (0,)
