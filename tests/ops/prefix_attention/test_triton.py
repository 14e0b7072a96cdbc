"""The Triton prefix_attention and its backward: spans, heads, tiles, other pools, bad prefixes."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from nabla_fast.errors import InputError
from nabla_fast.ops import backend_status, prefix_attention, use_backend
from nabla_fast.ops.prefix_attention import prefix_attention_backward
from nabla_fast.ops.registry import Op

from ..contract import BackendContract
from ..harness import DEVICES, check, run, to_float64
from ..inputs import BF16, F16, Case, Draw
from .cases import (
    PREFIX_ATTENTION,
    PREFIX_ATTENTION_BACKWARD,
    attention_arguments,
    backward_arguments,
    with_results,
)

if why := backend_status()["triton"]:
    pytest.skip(why, allow_module_level=True)

from nabla_fast.triton_kernels import prefix_attention as kernels
from nabla_fast.triton_kernels import prefix_attention_decode as decode

SIZES: list[dict[str, Any]] = [
    # Spans of 64 positions: one, several, an end within one, none; few rows and more than a tile of them.
    {"prefixes": (100, 33, 64, 0), "suffix": 1, "heads": 14, "width": 16, "block_size": 16},
    {"prefixes": (96,), "suffix": 1, "heads": 7, "kv_heads": 1, "width": 8, "block_size": 7},
    {"prefixes": (70, 1), "suffix": 37, "heads": 6, "width": 20, "block_size": 5, "window": 20},
    {"prefixes": (40, 31), "suffix": 70, "heads": 2, "width": 16, "block_size": 16, "sinks": True},
    {"prefixes": (33, 65), "suffix": 5, "width": 80, "block_size": 16, "softcap": 2.0},
    {"prefixes": (90, 12), "suffix": 2, "width": 96, "block_size": 32, "window": 33, "sinks": True},
    {"prefixes": (40,), "suffix": 3, "width": 256, "block_size": 16},
    {"prefixes": (70, 9), "suffix": 20, "width": 64, "dtype": F16},
    {"prefixes": (70, 9), "suffix": 20, "width": 64, "dtype": BF16, "window": 30},
    # Half precision: tiles where windows begin, some without masks, and one at the prefix's end.
    {"prefixes": (300, 129), "suffix": 40, "width": 64, "dtype": BF16, "window": 190},
    {"prefixes": (200, 64), "suffix": 40, "width": 32, "dtype": F16, "softcap": 3.0},
    {"prefixes": (35,), "suffix": 4, "heads": 4, "kv_heads": 1, "width": 128, "dtype": BF16},
]


class TestContract(BackendContract):
    tested, backend = PREFIX_ATTENTION, "triton"


class TestBackwardContract(BackendContract):
    tested, backend = PREFIX_ATTENTION_BACKWARD, "triton"


@pytest.fixture(autouse=True)
def short_spans(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "SPAN", 64)


@pytest.fixture
def exact_rows(monkeypatch: pytest.MonkeyPatch):
    """Interpreted products whose rows have the same bits wherever in a tile they are, as on a GPU.

    Those of BLAS, which the interpreter multiplies with, have not.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def create_dot(_self: Any, a: Any, b: Any, sums: Any, *_: Any) -> Any:
        found = np.einsum("ij,jk->ik", a.data, b.data) + sums.data
        return interpreter.TensorHandle(found, sums.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def results(op: Op, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    with use_backend("triton"), torch.no_grad():
        return op(**arguments)


def sequence(arguments: dict[str, Any], index: int) -> dict[str, Any]:
    """The same call for one sequence alone."""
    batched = ("cotangent", "output", "logsumexp", "q", "k", "v", "block_tables", "prefix_lengths")
    return {key: value[index : index + 1] if key in batched else value for key, value in arguments.items()}


class AttentionOnTriton:
    """Attention or its backward."""

    op: ClassVar[Op]
    made: ClassVar[Any]

    def on_triton(self, arguments: dict[str, Any]) -> Any:
        return run(self.op, "triton", arguments)

    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    def test_sizes(self, sizes: dict[str, Any], draw: Draw):
        case = Case("sizes", lambda draw: type(self).made(draw, **sizes))
        check(self.op, case, draw, DEVICES[-1], self.on_triton)

    @pytest.mark.parametrize("suffix", [1, 9])
    def test_a_sequence_has_the_same_bits_alone(self, suffix: int, draw: Draw, exact_rows: None):
        given = type(self).made(
            draw, prefixes=(70, 0, 100, 32), suffix=suffix, heads=6, block_size=16, window=90, sinks=True
        )
        whole = results(self.op, given)
        for index in range(4):
            alone = results(self.op, sequence(given, index))
            assert all(torch.equal(a[index], b[0]) for a, b in zip(whole, alone, strict=True))

    @pytest.mark.parametrize("window", [None, 50])
    def test_sequences_that_share_blocks(self, window: int | None, draw: Draw, exact_rows: None):
        """Prefixes with leading blocks in common, of which one program reads these, give the same bits."""

        def sharing(draw: Draw) -> dict[str, Any]:
            made = type(self).made(
                draw, prefixes=(90, 90, 70, 33, 90), suffix=2, block_size=8, window=window
            )
            tables = made["block_tables"]
            tables[1] = tables[0]
            tables[2, :6], tables[3, :3] = tables[0, :6], tables[0, :3]
            return with_results(made) if self.op is prefix_attention_backward else made

        given = sharing(draw)
        whole = results(self.op, given)
        for index in range(5):
            alone = results(self.op, sequence(given, index))
            assert all(torch.equal(a[index], b[0]) for a, b in zip(whole, alone, strict=True))
        check(self.op, Case("shared", sharing), draw, DEVICES[-1], self.on_triton)

    @pytest.mark.parametrize("layout", ["heads before slots", "keys and values interleaved"])
    def test_pools_of_others_are_read_in_place(self, layout: str, draw: Draw):
        given = type(self).made(draw, prefixes=(40, 17), suffix=3, block_size=16)
        wanted = results(self.op, given)
        keys, values = given["key_pool"], given["value_pool"]
        if layout == "heads before slots":
            keys, values = (pool.transpose(1, 2).contiguous().transpose(1, 2) for pool in (keys, values))
            assert not keys.is_contiguous()
        else:
            keys, values = torch.stack([keys, values], dim=1).unbind(1)
        found = results(self.op, given | {"key_pool": keys, "value_pool": values})
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))

    def test_a_prefix_outside_the_pool(self, draw: Draw):
        given = type(self).made(draw, prefixes=(9, 5), suffix=2)
        for name, value in {"prefix_lengths": 1000, "block_tables": 10**6}.items():
            wrong = given[name].clone()
            wrong.view(-1)[0] = value
            with pytest.raises(InputError, match="does not fit"):
                run(self.op, "triton", given | {name: wrong})

    def test_what_kernels_say_of_it(self, draw: Draw):
        """On a device nothing has checked it before."""
        given = attention_arguments(draw, prefixes=(9, 5, 4), suffix=2)
        for name, value in {"prefix_lengths": 1000, "block_tables": -1}.items():
            wrong = given[name].clone()
            wrong.view(-1)[0] = value
            *_results, status = kernels.prefix_attention(**given | {name: wrong})
            assert status.tolist() == [4, 0, 0]


class TestForward(AttentionOnTriton):
    op, made = prefix_attention, staticmethod(attention_arguments)


class TestBackward(AttentionOnTriton):
    op, made = prefix_attention_backward, staticmethod(backward_arguments)


def test_gradients_below_float16(draw: Draw):
    """Of a loss that hardly depends on the output: what ∂ℒ/∂s is then, float16 does not hold."""
    given = backward_arguments(draw, prefixes=(70, 9), suffix=5, width=32, dtype=F16)
    given["cotangent"] = torch.full_like(given["cotangent"], 2.0**-20)
    given["cotangent"][:, :, 0] = 2.0**-14
    wanted = prefix_attention_backward.body(**to_float64(given))
    for found, right in zip(results(prefix_attention_backward, given), wanted, strict=True):
        error = (found.double() - right).abs().max()
        # Results themselves are float16, with steps of 2⁻²⁴ near 0.
        assert error <= 2.0**-24 + 2e-3 * right.abs().max()


@pytest.mark.parametrize("op", [prefix_attention, prefix_attention_backward], ids=lambda op: op.name)
def test_a_window_wider_than_everything(op: Op, draw: Draw):
    made = attention_arguments if op is prefix_attention else backward_arguments
    given = made(draw, prefixes=(40, 3), suffix=20, heads=14, window=2**30)
    wide, whole = results(op, given), results(op, given | {"window": None})
    assert all(torch.equal(a, b) for a, b in zip(wide, whole, strict=True))


def test_values_that_nobody_sees_are_not_read(draw: Draw):
    """What lies in a block after the prefix's end, and in other blocks, may be anything."""
    given = attention_arguments(draw, prefixes=(9, 5), suffix=2, block_size=4)
    wanted = results(prefix_attention, given)
    keys, values = given["key_pool"].clone(), given["value_pool"].clone()
    seen = torch.zeros(keys.shape[:2], dtype=torch.bool)
    for table, length in zip(given["block_tables"], given["prefix_lengths"], strict=True):
        for position in range(int(length)):
            seen[table[position // 4], position % 4] = True
    keys[~seen], values[~seen] = torch.nan, torch.nan
    found = results(prefix_attention, given | {"key_pool": keys, "value_pool": values})
    assert torch.equal(wanted[0], found[0])


def test_one_gradient_for_all(draw: Draw):
    """Autograd through the forward gives what the backward op gives."""
    given = attention_arguments(draw, prefixes=(40, 3), suffix=4, sinks=True)
    cotangent = draw.normal(*given["q"].shape)
    leaves = [given[name].requires_grad_() for name in "qkv"]
    with use_backend("triton"):
        found = torch.autograd.grad(prefix_attention(**given).output, leaves, cotangent)
    plain = {k: v.detach() if isinstance(v, Tensor) else v for k, v in given.items()}
    with use_backend("triton"), torch.no_grad():
        output, logsumexp = prefix_attention(**plain)
    plain |= {"cotangent": cotangent, "output": output, "logsumexp": logsumexp}
    wanted = results(prefix_attention_backward, plain)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
