"""The C++ kernels that pass rows over a vocabulary: one-hot gradients and statistics with a head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_fast import _native
from nabla_fast.errors import RowError
from nabla_fast.ops import onehot_grad, onehot_grad_norm, token_stats, use_backend
from nabla_fast.ops.registry import Op

from .cases import BF16, CASES, F32, Case, Draw
from .cases import onehot_grad as onehot_arguments
from .cases import token_stats as stats_arguments
from .harness import check, map_tensors, rows_of, run, takes

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))

OPS = pytest.mark.parametrize("op", [onehot_grad, onehot_grad_norm, token_stats], ids=lambda op: op.name)
DTYPES = pytest.mark.parametrize(
    ("small", "dtype"), [(F32, F32), (F32, BF16), (BF16, BF16)], ids=["fp32", "bf16 tables", "bf16"]
)


def made(
    draw: Draw,
    op: Op,
    rows: int,
    vocabulary: int,
    hidden: int = 20,
    widths: tuple[int, ...] = (17, 9),
    small: torch.dtype = F32,
    dtype: torch.dtype = F32,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of the op."""
    if op is token_stats:
        return stats_arguments(draw, rows, vocabulary, dtype=small, hidden=hidden, head=dtype, **options)
    tables = [(width, dtype) for width in widths]
    return onehot_arguments(draw, rows, vocabulary, tables, hidden, head=dtype, small=small, **options)


def held(draw: Draw, op: Op, make: Callable[[Draw], dict[str, Any]]) -> None:
    """Hold the kernel to the rule of errors on inputs of a kind."""
    check(op, Case("these inputs", make), draw, "cpu", partial(run, op, "cpu"))


@pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, case, id=f"{op.name}-{case.name}")
        for op in (onehot_grad, onehot_grad_norm, token_stats)
        for case in CASES[op.name]
    ],
)
def test_every_instruction_set(isa: str, op: Op, case: Case, draw: Draw):
    if not takes(op, "cpu", case.make(draw)):
        pytest.skip("not for this backend")
    check(op, case, draw, "cpu", partial(run, op, "cpu"))


@pytest.mark.parametrize(
    ("rows", "vocabulary", "hidden", "widths"),
    [
        (1, 1, 1, (1,)),
        (2, 63, 15, (16,)),
        (3, 64, 16, (3, 5, 7)),
        (4, 65, 130, (129,)),
        (8, 1023, 31, (32, 1)),
        (9, 1024, 33, (48,)),
        (15, 1025, 24, (257,)),
        (16, 127, 300, (64,)),
        (17, 2049, 1, (1,)),
        (48, 129, 40, (24, 24)),
        (49, 66, 7, (8,)),
        (63, 321, 16, (128,)),
        (65, 1090, 50, (100, 27)),
        (130, 1500, 11, (13,)),
        (257, 300, 16, (5,)),  # more than one pass
    ],
)
@DTYPES
@OPS
def test_sizes(
    isa: str,
    op: Op,
    rows: int,
    vocabulary: int,
    hidden: int,
    widths: tuple[int, ...],
    small: torch.dtype,
    dtype: torch.dtype,
    draw: Draw,
):
    sizes = {"rows": rows, "vocabulary": vocabulary, "hidden": hidden, "widths": widths}
    held(draw, op, partial(made, op=op, **sizes, small=small, dtype=dtype, gaps=rows % 2 == 1))


@pytest.mark.parametrize(("rows", "vocabulary"), [(2, 2**20), (130, 300_001)])
@pytest.mark.slow
@OPS
def test_large_vocabularies(op: Op, rows: int, vocabulary: int, draw: Draw):
    held(draw, op, partial(made, op=op, rows=rows, vocabulary=vocabulary, hidden=24, widths=(8,)))


@DTYPES
@OPS
def test_a_row_has_the_same_bits_in_any_company(
    isa: str,
    op: Op,
    small: torch.dtype,
    dtype: torch.dtype,
    draw: Draw,
    threads: Callable[[int], None],
):
    arguments = made(draw, op, rows=130, vocabulary=3001, hidden=150, small=small, dtype=dtype)
    together = run(op, "cpu", arguments)
    for part in [slice(n, n + 1) for n in (0, 7, 63, 64, 129)] + [
        slice(5, 13),
        slice(3, 12),
        slice(60, 127),
    ]:
        for name, value in run(op, "cpu", rows_of(arguments, part)).items():
            assert torch.equal(value, together[name][part]), f"rows {part} of {name}"
    for number in (2, 3, 8):
        threads(number)
        for name, value in run(op, "cpu", arguments).items():
            assert torch.equal(value, together[name]), f"{name} with {number} threads"


@DTYPES
@OPS
def test_any_alignment(op: Op, small: torch.dtype, dtype: torch.dtype, draw: Draw):
    def moved(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    arguments = made(draw, op, rows=19, vocabulary=131, hidden=37, small=small, dtype=dtype)
    wanted = run(op, "cpu", arguments)
    with use_backend("cpu"):
        result = op(**map_tensors(moved, arguments))
    for got, value in zip(result if op is token_stats else [result], wanted.values(), strict=True):
        assert torch.equal(got, value)


def forced(op: Op, arguments: dict[str, Any]) -> list[Tensor]:
    with use_backend("cpu"):
        result = op(**arguments)
    return list(result) if op is token_stats else [result]


@pytest.mark.parametrize(
    ("first", "reason"), [(0.0, "NaN"), (-1.0, "+inf"), (1.0, "no finite"), (float("nan"), "NaN")]
)
@OPS
def test_a_bad_row_is_named(op: Op, first: float, reason: str, draw: Draw):
    arguments = made(draw, op, rows=70, vocabulary=1100)
    name = "rows" if op is token_stats else "hidden"
    # All that the others have in this column is masked tokens, and not all tokens.
    arguments["head"][:, 0] = -torch.inf
    arguments["head"][1099, 0] = 0.0
    arguments[name][:, 0] = 1.0
    forced(op, arguments)
    arguments["head"][1099, 0] = -torch.inf
    arguments[name][:, 0] = first
    with pytest.raises(RowError) as raised:
        forced(op, rows_of(arguments, slice(66, 67)))
    assert reason in str(raised.value)
    with use_backend("torch"), pytest.raises(RowError) as by_torch:
        op(**rows_of(arguments, slice(66, 67)))
    assert str(by_torch.value) == str(raised.value)


@OPS
def test_a_bad_row_leaves_the_others_as_they_are(op: Op, draw: Draw):
    arguments = made(draw, op, rows=70, vocabulary=1100)
    native = {
        onehot_grad: _native.onehot_grad,
        onehot_grad_norm: _native.onehot_grad_norm,
        token_stats: _native.linear_token_stats,
    }[op]
    *wanted, status = native(*arguments.values())
    assert not status.any()
    arguments["rows" if op is token_stats else "hidden"][65, 3] = torch.nan
    *results, status = native(*arguments.values())
    assert status.nonzero().flatten().tolist() == [65]
    assert int(status[65]) == 1
    others = [row for row in range(70) if row != 65]
    for value, good in zip(results, wanted, strict=True):
        assert torch.equal(value[others], good[others])
        assert (value[65].isnan() if value.is_floating_point() else value[65] == -1).all()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("op", [onehot_grad, onehot_grad_norm], ids=lambda op: op.name)
def test_the_row_is_named_by_its_place_in_the_call(
    op: Op, backend: str, draw: Draw, monkeypatch: pytest.MonkeyPatch
):
    # The body keeps a few rows at a time.
    monkeypatch.setattr("nabla_fast.ops.rows._ELEMENTS", 200)
    arguments = made(draw, op, rows=9, vocabulary=100)
    arguments["hidden"][7, 0] = torch.nan
    with use_backend(backend), pytest.raises(RowError, match=f"{op.name}.*row 7 has a NaN"):
        op(**arguments)


# -- numbers that cancel -------------------------------------------------------------------------------

NORMS = pytest.mark.parametrize("op", [onehot_grad, onehot_grad_norm], ids=lambda op: op.name)


def exact(op: Op, arguments: dict[str, Any]) -> Tensor:
    with use_backend("torch"):
        return op(**map_tensors(torch.Tensor.double, arguments))


@NORMS
def test_one_token_is_certain(op: Op, draw: Draw):
    arguments = made(draw, op, rows=5, vocabulary=1, nll_coeff=1.0, cotangents=0.0)
    assert (forced(op, arguments)[0] == 0).all()


@pytest.mark.parametrize("offset", [-1024.0, 0.0, 512.0])
@NORMS
def test_logits_far_from_zero(op: Op, offset: float, draw: Draw):
    # Integers, so that the logits themselves are exact.
    arguments = made(draw, op, rows=20, vocabulary=3000, nll_coeff=1.0, cotangents=0.0)
    arguments["hidden"] = draw.integers(-2, 3, 20, 20).float()
    arguments["head"] = draw.integers(-2, 3, 3000, 20).float()
    arguments["hidden"][:, 0] = 1
    arguments["head"][:, 0] = offset
    wanted = exact(op, arguments)
    got = forced(op, arguments)[0].double()
    assert ((got - wanted).abs() <= 3e-7 * wanted.abs().amax(dim=-1, keepdim=True)).all()


@NORMS
def test_first_tokens_unlike_the_others(op: Op, draw: Draw):
    arguments = made(draw, op, rows=9, vocabulary=3000, nll_coeff=1.0, cotangents=0.0)
    arguments["hidden"] = draw.integers(-2, 3, 9, 20).float()
    arguments["head"] = draw.integers(-2, 3, 3000, 20).float()
    arguments["hidden"][:, 0] = 1
    arguments["head"][:64, 0] = -100_000.0
    wanted = exact(op, arguments)
    got = forced(op, arguments)[0].double()
    assert ((got - wanted).abs() <= 3e-7 * wanted.abs().amax(dim=-1, keepdim=True)).all()


def test_subnormal_gradients(isa: str, draw: Draw):
    arguments = made(draw, onehot_grad, rows=9, vocabulary=300, widths=(16,), nll_coeff=0.0)
    arguments["cotangents"] = [g * 1e-40 for g in arguments["cotangents"]]
    wanted = exact(onehot_grad, arguments)
    assert float(wanted.abs().max()) < 2**-126
    got = forced(onehot_grad, arguments)[0].double()
    assert ((got - wanted).abs() <= 16 * 2**-149).all()


# -- the C interface -----------------------------------------------------------------------------------


class Call:
    """A raw call of one of the kernels, on buffers with room around them."""

    def __init__(self, op: Op, draw: Draw, rows: int = 21, vocabulary: int = 1100):
        self.native = _native.extension()
        self.op = op
        self.arguments = made(draw, op, rows=rows, vocabulary=vocabulary)
        self.rows, self.vocabulary = rows, vocabulary
        small = self.arguments["rows" if op is token_stats else "hidden"]
        self.hidden, self.head = self.matrix(small), self.matrix(self.arguments["head"])
        self.stride = vocabulary + 5
        size = rows * self.stride if op is onehot_grad else rows
        self.results = [torch.full((size + 16,), -7.0) for _ in range(3 if op is token_stats else 1)]
        self.argmax = torch.full((rows + 16,), -7)
        self.status = torch.full((rows + 16,), -7, dtype=torch.int32)
        self.table_change: dict[str, Any] = {}

    @staticmethod
    def matrix(tensor: Tensor) -> tuple[int, int, int, int]:
        dtype = 0 if tensor.dtype == F32 else 1
        return tensor.data_ptr(), dtype, tensor.shape[1], tensor.stride(0)

    def inputs(self) -> Any:
        parts = {
            "rows": self.rows,
            "vocab": self.vocabulary,
            "cotangents": [self.matrix(t) for t in self.arguments["cotangents"]],
            "tables": [self.matrix(t) for t in self.arguments["tables"]],
            "hidden": self.hidden,
            "head": self.head,
            "nll_coeff": self.arguments["nll_coeff"],
            "token_maps": [],
            "table_rows": [],
        }
        return self.native.Onehot(**(parts | self.table_change))

    def workspace(self) -> int:
        if self.op is token_stats:
            return self.native.linear_token_stats_workspace(
                self.hidden, self.rows, self.head, self.vocabulary
            )
        return getattr(self.native, f"{self.op.name}_workspace")(self.inputs())

    def __call__(self, memory: int, size: int, tau: float = 1.0, null: str = "") -> str:
        def at(name: str, tensor: Tensor) -> int:
            return 0 if name == null else tensor.data_ptr()

        tail = (at("status", self.status), memory, size, 1)
        if self.op is token_stats:
            status = self.native.linear_token_stats(
                self.hidden,
                self.rows,
                self.head,
                self.vocabulary,
                tau,
                at("result", self.results[0]),
                *(tensor.data_ptr() for tensor in (*self.results[1:], self.argmax)),
                *tail,
            )
        else:
            strides = [self.stride] if self.op is onehot_grad else []
            run_op = getattr(self.native, self.op.name)
            status = run_op(self.inputs(), at("result", self.results[0]), *strides, *tail)
        return self.native.status_string(status)


@pytest.mark.parametrize("shift", [0, 1, 63])
@OPS
def test_nothing_is_written_beside_results_and_workspace(op: Op, shift: int, draw: Draw):
    call = Call(op, draw)
    size = call.workspace()
    memory = torch.full((size + 256,), 255, dtype=torch.uint8)
    assert call(memory.data_ptr() + 64 + shift, size) == "ok"
    assert (memory[: 64 + shift] == 255).all()
    assert (memory[64 + shift + size :] == 255).all()
    wanted = list(run(op, "cpu", call.arguments).values())
    for result, value in zip(call.results, wanted, strict=False):
        if op is onehot_grad:
            lines = result[: call.rows * call.stride].view(call.rows, call.stride)
            assert torch.equal(lines[:, : call.vocabulary], value)
            assert (lines[:, call.vocabulary :] == -7).all()
            assert (result[call.rows * call.stride :] == -7).all()
        else:
            assert torch.equal(result[: call.rows], value)
            assert (result[call.rows :] == -7).all()
    assert not call.status[: call.rows].any()
    assert (call.status[call.rows :] == -7).all()
    assert (call.argmax[call.rows if op is token_stats else 0 :] == -7).all()


@OPS
def test_rows_from_the_last_to_the_first(op: Op, draw: Draw):
    call = Call(op, draw)
    name = "rows" if op is token_stats else "hidden"
    turned = dict(call.arguments)
    turned[name] = call.arguments[name].flip(0)
    if op is not token_stats:
        turned["cotangents"] = [t.flip(0) for t in call.arguments["cotangents"]]
        last = call.rows - 1
        call.table_change["cotangents"] = [
            (t[last].data_ptr(), 0, t.shape[1], -t.stride(0)) for t in call.arguments["cotangents"]
        ]
    wanted = next(iter(run(op, "cpu", turned).values()))
    small = call.arguments[name]
    call.hidden = (small[call.rows - 1].data_ptr(), 0, small.shape[1], -small.stride(0))
    memory = torch.empty(call.workspace(), dtype=torch.uint8)
    assert call(memory.data_ptr(), len(memory)) == "ok"
    got = call.results[0]
    if op is onehot_grad:
        got = got[: call.rows * call.stride].view(call.rows, call.stride)[:, : call.vocabulary]
    assert torch.equal(got[: call.rows], wanted)


@OPS
def test_what_the_interface_refuses(op: Op, draw: Draw):
    def refused(change: Callable[[Call], None], **options: Any) -> str:
        call = Call(op, draw)
        size = call.workspace()
        memory = torch.empty(size, dtype=torch.uint8)
        change(call)
        assert call.workspace() == 0 or options
        text = call(options.pop("memory", memory.data_ptr()), size - options.pop("less", 0), **options)
        assert text != "ok"
        assert all((result == -7).all() for result in (*call.results, call.argmax, call.status))
        return text

    def nothing(call: Call) -> None:
        pass

    def set_to(**attributes: Any) -> Callable[[Call], None]:
        return lambda call: [setattr(call, *item) for item in attributes.items()]

    def hidden(index: int, value: int) -> Callable[[Call], None]:
        return lambda call: setattr(
            call, "hidden", (*call.hidden[:index], value, *call.hidden[index + 1 :])
        )

    assert "negative" in refused(set_to(rows=-1))
    assert "empty" in refused(set_to(vocabulary=0))
    assert "null" in refused(hidden(0, 0))
    assert "dtype" in refused(hidden(1, 7))
    assert "negative" in refused(hidden(2, 3))
    assert "address space" in refused(hidden(3, 2**60))
    assert "address space" in refused(set_to(rows=2**60))
    assert "null" in refused(nothing, null="status")
    assert "null" in refused(nothing, null="result")
    assert "null" in refused(nothing, memory=0)
    assert "workspace" in refused(nothing, less=1)
    if op is token_stats:
        assert "tau" in refused(nothing, tau=0.0)
        assert "tau" in refused(nothing, tau=float("nan"))
    else:
        assert "negative" in refused(
            lambda call: call.table_change.update(cotangents=[call.hidden, call.hidden])
        )


@OPS
def test_no_rows(op: Op, draw: Draw):
    call = Call(op, draw)
    call.rows = 0
    assert call(0, 0, null="status") == "ok"


def test_no_tables(draw: Draw):
    call = Call(onehot_grad, draw)
    call.table_change = {"cotangents": [], "tables": []}
    memory = torch.empty(call.workspace(), dtype=torch.uint8)
    assert call(memory.data_ptr(), len(memory)) == "ok"
    zeros = [torch.zeros_like(t) for t in call.arguments["cotangents"]]
    wanted = exact(onehot_grad, call.arguments | {"cotangents": zeros})
    got = call.results[0][: call.rows * call.stride].view(call.rows, call.stride)[:, : call.vocabulary]
    # A token that is all but sure has a log π near 0, the difference of two numbers of the logits' size.
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-8)
