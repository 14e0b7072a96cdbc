"""The C++ mixes: sizes around their tiles on every instruction set, threads, alignment."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch

from nabla_fast.ops import use_backend
from nabla_fast.ops.registry import Op

from ..harness import Arguments, Results, check, map_tensors, rows_of, run
from ..inputs import BF16, F32, Case, Draw
from .mixes import backward_arguments, mix_arguments

# Rows around a vector, a register's worth of rows and a group of 64; tokens around a tile of 64 and a
# segment of 2,048; widths around a strip of 64 columns and a chain of 128.
SIZES = [
    (1, 1, 1),
    (1, 4099, 130),
    (5, 63, 31),
    (16, 65, 64),
    (17, 129, 65),
    (33, 2049, 16),
    (48, 100, 257),
    (65, 2112, 33),
    (130, 300, 96),
]
DTYPES = [(F32, F32), (F32, BF16), (BF16, BF16)]  # of the rows and of the tables


def arguments(
    op: Op, draw: Draw, rows: int, vocabulary: int, width: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> dict[str, Any]:
    recipe = backward_arguments if "backward" in op.name else mix_arguments
    mode = {} if "backward" in op.name else {"hard": False}
    return recipe(
        draw,
        rows=rows,
        vocabulary=vocabulary,
        tables=((width, dtypes[1]), (23, dtypes[1])),
        dtype=dtypes[0],
        hidden=width if "linear" in op.name else 0,
        direct=True,
        tau=0.8,
        **mode,
    )


def huge_arguments(
    op: Op, draw: Draw, vocabulary: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> dict[str, Any]:
    """Tables of ±3e38 whose sums overflow, while mixes and gradients do not."""
    given = arguments(op, draw, 5, vocabulary, 33, dtypes)
    sign = torch.where(draw.uniform(vocabulary, 1) < 0.8, 1.0, -1.0)
    given["tables"] = [(3e38 * sign.expand_as(t)).to(t.dtype) for t in given["tables"]]
    # A token's G is about 0.3 times its 3e38: the difference of two is finite.
    if "cotangents" in given:
        given["cotangents"] = [(c.float().abs() / 160).to(c.dtype) for c in given["cotangents"]]
        # A hidden state's gradient is at most max |head| times the sum of |dz|, itself below 1.6e38.
        if "head" in given:
            given["head"] = given["head"].clamp(-2, 2)
    # From a flat row to a peaked one.
    name = "hidden" if "hidden" in given else "logits"
    given[name] = (given[name] * torch.tensor([[0], [0.03], [0.1], [0.3], [1]])).to(dtypes[0])
    return given


def cancelling_arguments(op: Op, draw: Draw, vocabulary: int) -> dict[str, Any]:
    """A bf16 table whose rows cancel in pairs, of tokens whose logits are nearly the same."""
    given = arguments(op, draw, 5, vocabulary, 33, (F32, BF16))
    pair = torch.arange(vocabulary) // 2 * 2
    sign = torch.where(torch.arange(vocabulary) % 2 == 0, 1.0, -1.0)[:, None]
    given["tables"] = [(table[pair] * sign).to(BF16) for table in given["tables"]]
    if "hidden" in given:
        given["hidden"] *= 1e-3
    else:
        given["logits"] = given["logits"][:, pair] + 1e-3 * given["logits"]
    return given


def rounded_mixes(arguments: Arguments) -> Results:
    """Soft mixes whose weights are rounded to the tables' dtype, as a product in that dtype asks for."""
    rows, head = arguments.get("hidden", arguments.get("logits")), arguments.get("head")
    z = rows.float() if head is None else rows.float() @ head.float().T
    p = torch.softmax(z / arguments["tau"], dim=-1)
    return {f"result[{n}]": p.to(t.dtype) @ t for n, t in enumerate(arguments["tables"])}


def peer_of(op: Op, tables: torch.dtype, isa: str) -> Callable[[Arguments], Results] | None:
    """What rounds weights as the kernel does, where it does."""
    rounds = tables == BF16 and isa in ("avx512_bf16", "amx") and "backward" not in op.name
    return rounded_mixes if rounds else None


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers one element off every alignment."""
    memory = tensor.new_empty(tensor.numel() + 1)
    memory[1:] = tensor.flatten()
    return memory[1:].view(tensor.shape)


def _tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


class MixOnCpu:
    """A mix or its backward."""

    op: ClassVar[Op]

    @pytest.mark.parametrize("dtypes", DTYPES, ids=str)
    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    def test_sizes(self, dtypes: tuple, sizes: tuple, draw: Draw, isa: str):
        case = Case(str(sizes), lambda draw: arguments(self.op, draw, *sizes, dtypes))
        check(self.op, case, draw, "cpu", partial(run, self.op, "cpu"))

    @pytest.mark.parametrize("dtypes", DTYPES, ids=str)
    @pytest.mark.parametrize("vocabulary", [2, 63, 300, 4500])
    def test_numbers_near_the_largest(self, dtypes: tuple, vocabulary: int, draw: Draw, isa: str):
        case = Case("huge", lambda draw: huge_arguments(self.op, draw, vocabulary, dtypes))
        peer = peer_of(self.op, dtypes[1], isa)
        check(self.op, case, draw, "cpu", partial(run, self.op, "cpu"), peer)

    @pytest.mark.parametrize("vocabulary", [2, 64, 3000])
    def test_rows_of_bf16_that_cancel(self, vocabulary: int, draw: Draw, isa: str):
        case = Case("pairs", lambda draw: cancelling_arguments(self.op, draw, vocabulary))
        peer = peer_of(self.op, BF16, isa)
        check(self.op, case, draw, "cpu", partial(run, self.op, "cpu"), peer)

    @pytest.mark.slow
    @pytest.mark.parametrize("tables", [F32, BF16], ids=str)
    def test_a_huge_vocabulary(self, tables: torch.dtype, draw: Draw, isa: str):
        case = Case("huge", lambda draw: arguments(self.op, draw, 3, 300_001, 17, (F32, tables)))
        check(self.op, case, draw, "cpu", partial(run, self.op, "cpu"))

    @pytest.mark.parametrize("dtypes", DTYPES, ids=str)
    def test_a_row_has_the_same_bits_alone_and_on_any_threads(self, dtypes: tuple, draw: Draw, threads):
        given = arguments(self.op, draw, 67, 6200, 40, dtypes)
        together = run(self.op, "cpu", given)
        threads(3)
        again = run(self.op, "cpu", given)
        for name, value in together.items():
            assert torch.equal(value, again[name])
        for rows in (slice(0, 1), slice(3, 20), slice(66, 67)):
            part = run(self.op, "cpu", rows_of(given, rows))
            for name, value in part.items():
                assert torch.equal(value, together[name][rows]), f"{name} of rows {rows}"

    def test_noise_and_hard_tokens_on_every_level(self, draw: Draw, isa: str):
        def make(draw: Draw) -> dict[str, Any]:
            given = arguments(self.op, draw, 5, 2500, 24, (F32, F32))
            hard = {} if "backward" in self.op.name else {"hard": True}
            return given | hard | {"noise": draw.noise(5)}

        check(self.op, Case("noise", make), draw, "cpu", partial(run, self.op, "cpu"))

    @pytest.mark.parametrize("dtypes", DTYPES, ids=str)
    def test_alignment_does_not_matter(self, dtypes: tuple, draw: Draw):
        given = arguments(self.op, draw, 9, 333, 37, dtypes)
        moved = {k: v if k in ("tau", "hard") else map_tensors(shifted, v) for k, v in given.items()}
        with use_backend("cpu"), torch.no_grad():
            # Not copies, which would be aligned again.
            for a, b in zip(*(_tensors(self.op(**x)) for x in (given, moved)), strict=True):
                assert torch.equal(a, b)
