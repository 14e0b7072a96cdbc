"""C++ kernels that pass rows over a vocabulary: token_stats of hidden states, and one-hot gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from nabla_fast import _native
from nabla_fast.errors import RowError
from nabla_fast.ops import use_backend
from nabla_fast.ops.registry import Op

from ..harness import check, map_tensors, rows_of, run
from ..inputs import BF16, F32, Case, Draw

RESULTS = ("logsumexp", "grad", "norm")
Made = Callable[..., dict[str, Any]]
DTYPES = pytest.mark.parametrize(
    ("small", "dtype"), [(F32, F32), (F32, BF16), (BF16, BF16)], ids=["fp32", "bf16 tables", "bf16"]
)


def held(draw: Draw, op: Op, make: Callable[[Draw], dict[str, Any]]) -> None:
    """Hold the kernel to the rule of errors on inputs of a kind."""
    check(op, Case("these inputs", make), draw, "cpu", partial(run, op, "cpu"))


def forced(op: Op, arguments: dict[str, Any]) -> list[Tensor]:
    """The kernel's results."""
    with use_backend("cpu"):
        return _as_list(op(**arguments))


def _as_list(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


class Call:
    """A raw call of one of the kernels, on buffers with room around them."""

    name: ClassVar[str]
    results_of_a_row: ClassVar[int] = 1
    small: ClassVar[str] = "hidden"
    matrix_result: ClassVar[bool] = False  # [N, V] instead of numbers a row

    def __init__(self, draw: Draw, made: Made, rows: int = 21, vocabulary: int = 1100):
        self.native = _native.extension()
        self.arguments = made(draw, rows=rows, vocabulary=vocabulary)
        self.rows, self.vocabulary = rows, vocabulary
        self.hidden = self.matrix(self.arguments[self.small])
        self.head = self.matrix(self.arguments["head"])
        self.stride = vocabulary + 5
        size = rows * self.stride if self.matrix_result else rows
        self.results = [torch.full((size + 16,), -7.0) for _ in range(self.results_of_a_row)]
        self.argmax = torch.full((rows + 16,), -7)
        self.status = torch.full((rows + 16,), -7, dtype=torch.int32)
        self.table_change: dict[str, Any] = {}

    @property
    def writes_argmax(self) -> bool:
        return self.results_of_a_row > 1

    @staticmethod
    def matrix(tensor: Tensor) -> tuple[int, int, int, int]:
        dtype = 0 if tensor.dtype == F32 else 1
        return tensor.data_ptr(), tensor.shape[1], tensor.stride(0), dtype

    def fields(self) -> dict[str, Any]:
        """Fields of the kernel's own, the first result among them."""
        raise NotImplementedError

    def _fields(self, tau: float = 1.0) -> dict[str, Any]:
        return {
            "num_threads": 1,
            "rows": self.rows,
            "vocab": self.vocabulary,
            "hidden": self.hidden,
            "head": self.head,
            "row_status": self.status,
            **({"tau": tau} if self.writes_argmax else {}),
            **self.fields(),
        }

    def workspace(self) -> int:
        return getattr(self.native, f"{self.name}_workspace")(**self._fields())

    def __call__(self, memory: int, size: int, tau: float = 1.0, null: str = "") -> str:
        """Why the call is refused, or "ok"."""
        fields = self._fields(tau) | {"workspace": memory, "workspace_bytes": size}
        if null == "status":
            fields["row_status"] = None
        if null == "result":
            name, value = next(item for item in self.fields().items() if item[0] in RESULTS)
            fields[name] = (None, *value[1:]) if isinstance(value, tuple) else None
        try:
            assert getattr(self.native, self.name)(**fields)
        except ValueError as error:
            return str(error)
        return "ok"


class VocabularyPass:
    """One op's kernel: ``made`` makes arguments, ``call`` calls the C interface."""

    op: ClassVar[Op]
    made: ClassVar[Made]
    call: ClassVar[type[Call]]
    native: ClassVar[Callable[..., Any]]
    small: ClassVar[str] = "hidden"

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
    def test_sizes(
        self,
        isa: str,
        rows: int,
        vocabulary: int,
        hidden: int,
        widths: tuple[int, ...],
        small: torch.dtype,
        dtype: torch.dtype,
        draw: Draw,
    ):
        sizes = {"rows": rows, "vocabulary": vocabulary, "hidden": hidden, "widths": widths}
        held(draw, self.op, partial(self.made, **sizes, small=small, dtype=dtype, gaps=rows % 2 == 1))

    @pytest.mark.parametrize(("rows", "vocabulary"), [(2, 2**20), (130, 300_001)])
    @pytest.mark.slow
    def test_large_vocabularies(self, rows: int, vocabulary: int, draw: Draw):
        held(draw, self.op, partial(self.made, rows=rows, vocabulary=vocabulary, hidden=24, widths=(8,)))

    @DTYPES
    def test_a_row_has_the_same_bits_in_any_company(
        self,
        isa: str,
        small: torch.dtype,
        dtype: torch.dtype,
        draw: Draw,
        threads: Callable[[int], None],
    ):
        arguments = self.made(draw, rows=130, vocabulary=3001, hidden=150, small=small, dtype=dtype)
        together = run(self.op, "cpu", arguments)
        for part in [slice(n, n + 1) for n in (0, 7, 63, 64, 129)] + [
            slice(5, 13),
            slice(3, 12),
            slice(60, 127),
        ]:
            for name, value in run(self.op, "cpu", rows_of(arguments, part)).items():
                assert torch.equal(value, together[name][part]), f"rows {part} of {name}"
        for number in (2, 3, 8):
            threads(number)
            for name, value in run(self.op, "cpu", arguments).items():
                assert torch.equal(value, together[name]), f"{name} with {number} threads"

    @DTYPES
    def test_any_alignment(self, small: torch.dtype, dtype: torch.dtype, draw: Draw):
        def moved(tensor: Tensor) -> Tensor:
            return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

        arguments = self.made(draw, rows=19, vocabulary=131, hidden=37, small=small, dtype=dtype)
        wanted = run(self.op, "cpu", arguments)
        with use_backend("cpu"):
            result = self.op(**map_tensors(moved, arguments))
        for got, value in zip(_as_list(result), wanted.values(), strict=True):
            assert torch.equal(got, value)

    @pytest.mark.parametrize(
        ("first", "reason"), [(0.0, "NaN"), (-1.0, "+inf"), (1.0, "no finite"), (float("nan"), "NaN")]
    )
    def test_a_bad_row_is_named(self, first: float, reason: str, draw: Draw):
        arguments = self.made(draw, rows=70, vocabulary=1100)
        # All that the others have in this column is masked tokens, and not all tokens.
        arguments["head"][:, 0] = -torch.inf
        arguments["head"][1099, 0] = 0.0
        arguments[self.small][:, 0] = 1.0
        forced(self.op, arguments)
        arguments["head"][1099, 0] = -torch.inf
        arguments[self.small][:, 0] = first
        with pytest.raises(RowError) as raised:
            forced(self.op, rows_of(arguments, slice(66, 67)))
        assert reason in str(raised.value)
        with use_backend("torch"), pytest.raises(RowError) as by_torch:
            self.op(**rows_of(arguments, slice(66, 67)))
        assert str(by_torch.value) == str(raised.value)

    def test_a_bad_row_leaves_the_others_as_they_are(self, draw: Draw):
        arguments = self.made(draw, rows=70, vocabulary=1100)
        *wanted, status = self.native(*arguments.values())
        assert not status.any()
        arguments[self.small][65, 3] = torch.nan
        *results, status = self.native(*arguments.values())
        assert status.nonzero().flatten().tolist() == [65]
        assert int(status[65]) == 1
        others = [row for row in range(70) if row != 65]
        for value, good in zip(results, wanted, strict=True):
            assert torch.equal(value[others], good[others])
            assert (value[65].isnan() if value.is_floating_point() else value[65] == -1).all()

    def test_no_rows(self, draw: Draw):
        call = self.call(draw, self.made)
        call.rows = 0
        assert call(0, 0, null="status") == "ok"

    @pytest.mark.parametrize("shift", [0, 1, 63])
    def test_nothing_is_written_beside_results_and_workspace(self, shift: int, draw: Draw):
        call = self.call(draw, self.made)
        size = call.workspace()
        memory = torch.full((size + 256,), 255, dtype=torch.uint8)
        assert call(memory.data_ptr() + 64 + shift, size) == "ok"
        assert (memory[: 64 + shift] == 255).all()
        assert (memory[64 + shift + size :] == 255).all()
        wanted = list(run(self.op, "cpu", call.arguments).values())
        for result, value in zip(call.results, wanted, strict=False):
            if call.matrix_result:
                lines = result[: call.rows * call.stride].view(call.rows, call.stride)
                assert torch.equal(lines[:, : call.vocabulary], value)
                assert (lines[:, call.vocabulary :] == -7).all()
                assert (result[call.rows * call.stride :] == -7).all()
            else:
                assert torch.equal(result[: call.rows], value)
                assert (result[call.rows :] == -7).all()
        assert not call.status[: call.rows].any()
        assert (call.status[call.rows :] == -7).all()
        assert (call.argmax[call.rows if call.writes_argmax else 0 :] == -7).all()

    def test_rows_from_the_last_to_the_first(self, draw: Draw):
        call = self.call(draw, self.made)
        name = self.small
        turned = dict(call.arguments)
        turned[name] = call.arguments[name].flip(0)
        if "cotangents" in turned:
            turned["cotangents"] = [t.flip(0) for t in call.arguments["cotangents"]]
            last = call.rows - 1
            call.table_change["cotangents"] = [
                (t[last].data_ptr(), t.shape[1], -t.stride(0), 0) for t in call.arguments["cotangents"]
            ]
        wanted = next(iter(run(self.op, "cpu", turned).values()))
        small = call.arguments[name]
        call.hidden = (small[call.rows - 1].data_ptr(), small.shape[1], -small.stride(0), 0)
        memory = torch.empty(call.workspace(), dtype=torch.uint8)
        assert call(memory.data_ptr(), len(memory)) == "ok"
        got = call.results[0]
        if call.matrix_result:
            got = got[: call.rows * call.stride].view(call.rows, call.stride)[:, : call.vocabulary]
        assert torch.equal(got[: call.rows], wanted)

    def refused(self, draw: Draw, change: Callable[[Call], Any] = lambda call: None, **options: Any) -> str:
        """The message for a changed call, which has written nothing."""
        call = self.call(draw, self.made)
        size = call.workspace()
        memory = torch.empty(size, dtype=torch.uint8)
        change(call)
        assert call.workspace() == 0 or options
        text = call(options.pop("memory", memory.data_ptr()), size - options.pop("less", 0), **options)
        assert text != "ok"
        assert all((result == -7).all() for result in (*call.results, call.argmax, call.status))
        return text

    def test_what_the_interface_refuses(self, draw: Draw):
        def set_to(**attributes: Any) -> Callable[[Call], Any]:
            return lambda call: [setattr(call, *item) for item in attributes.items()]

        def hidden(index: int, value: int) -> Callable[[Call], Any]:
            return lambda call: setattr(
                call, "hidden", (*call.hidden[:index], value, *call.hidden[index + 1 :])
            )

        assert "negative" in self.refused(draw, set_to(rows=-1))
        assert "empty" in self.refused(draw, set_to(vocabulary=0))
        assert "null" in self.refused(draw, hidden(0, 0))
        assert "dtype" in self.refused(draw, hidden(3, 7))
        assert "negative" in self.refused(draw, hidden(1, 3))
        assert "address space" in self.refused(draw, hidden(2, 2**60))
        assert "address space" in self.refused(draw, set_to(rows=2**60))
        assert "null" in self.refused(draw, null="status")
        assert "null" in self.refused(draw, null="result")
        assert "null" in self.refused(draw, memory=0)
        assert "workspace" in self.refused(draw, less=1)
