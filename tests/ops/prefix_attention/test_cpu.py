"""The C++ prefix_attention and its backward: widths, tiles, strides, threads, bad prefixes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from nabla_fast import _native
from nabla_fast.ops import prefix_attention, use_backend
from nabla_fast.ops.prefix_attention import prefix_attention_backward
from nabla_fast.ops.registry import Op

from ..contract import BackendContract, EveryInstructionSet
from ..harness import OP_ABSOLUTE, check, map_tensors, run, run_body, to_float64
from ..inputs import Case, Draw
from .cases import (
    PREFIX_ATTENTION,
    PREFIX_ATTENTION_BACKWARD,
    attention_arguments,
    backward_arguments,
    with_results,
)

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))


class TestContract(BackendContract):
    tested, backend = PREFIX_ATTENTION, "cpu"


class TestBackwardContract(BackendContract):
    tested, backend = PREFIX_ATTENTION_BACKWARD, "cpu"


class TestInstructionSets(EveryInstructionSet):
    tested = PREFIX_ATTENTION


class TestBackwardInstructionSets(EveryInstructionSet):
    tested = PREFIX_ATTENTION_BACKWARD


def made(op: Op, draw: Draw, **sizes: Any) -> dict[str, Any]:
    """Arguments of the op."""
    return (attention_arguments if op is prefix_attention else backward_arguments)(draw, **sizes)


def changed(op: Op, arguments: dict[str, Any], **changes: Tensor) -> dict[str, Any]:
    """The same with other inputs; of the backward, with what the forward makes of these."""
    arguments = arguments | changes
    return arguments if op is prefix_attention else with_results(arguments)


def attended(op: Op, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """The C++ kernel's results."""
    with use_backend("cpu"), torch.no_grad():
        return op(**arguments)


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(first, second, strict=True)
    )


class AttentionOnCpu:
    """Attention or its backward."""

    op: ClassVar[Op]

    @pytest.mark.parametrize(
        "sizes",
        [
            # Decode steps: lanes along the head, of widths known and unknown to the kernel.
            {"prefixes": (30,), "suffix": 1, "width": 16, "block_size": 16},
            {"prefixes": (127, 128, 129), "suffix": 1, "width": 32, "block_size": 16},
            {"prefixes": (300, 0), "suffix": 1, "width": 64, "block_size": 7},
            {"prefixes": (600,), "suffix": 1, "width": 128, "block_size": 16},
            {"prefixes": (260,), "suffix": 1, "width": 80, "block_size": 16},
            {"prefixes": (40,), "suffix": 1, "width": 256, "block_size": 16},
            {"prefixes": (40,), "suffix": 2, "width": 512, "block_size": 16, "window": 17},
            {"prefixes": (1000, 3), "suffix": 1, "width": 16, "block_size": 16, "window": 200},
            {"prefixes": (150,), "suffix": 1, "width": 48, "heads": 14},
            # Rows in lanes.
            {"prefixes": (63, 64, 65), "suffix": 17, "width": 16, "block_size": 16},
            {"prefixes": (5,), "suffix": 130, "width": 24, "block_size": 16},
            {"prefixes": (200, 7), "suffix": 33, "width": 64, "block_size": 16, "heads": 14},
            {"prefixes": (100,), "suffix": 70, "width": 40, "window": 50},
            {"prefixes": (30,), "suffix": 9, "width": 1},
            {"prefixes": (30,), "suffix": 9, "width": 100},
            {"prefixes": (10,), "suffix": 5, "width": 511, "heads": 2, "kv_heads": 1},
            {"prefixes": (700,), "suffix": 40, "width": 32, "block_size": 32, "window": 1},
        ],
        ids=str,
    )
    def test_widths_and_tiles(self, isa: str, sizes: dict, draw: Draw):
        case = Case(str(sizes), partial(made, self.op, **sizes))
        check(self.op, case, draw, "cpu", partial(run, self.op, "cpu"))

    def test_sharp_and_huge_scores(self, isa: str, draw: Draw, monkeypatch: pytest.MonkeyPatch):
        for factor in (1.0, 30.0, 1e4, 1e18):
            # Weights below 2^-126 count as 0. What they would add to a gradient is that many times the
            # queries and a few products of cotangent and values.
            monkeypatch.setitem(OP_ABSOLUTE, self.op.name, 2**-126 * factor * 64)

            def make(draw: Draw, factor: float = factor) -> dict[str, Any]:
                arguments = made(self.op, draw, prefixes=(90, 7), suffix=20, width=16)
                return changed(self.op, arguments, q=arguments["q"] * factor)

            check(self.op, Case(f"factor {factor}", make), draw, "cpu", partial(run, self.op, "cpu"))

    @pytest.mark.parametrize("suffix", [1, 19])
    def test_any_strides(self, isa: str, suffix: int, draw: Draw):
        arguments = made(self.op, draw, prefixes=(40, 9), suffix=suffix, width=32, block_size=4)
        expected = attended(self.op, arguments)

        # As models hand them over: parts of one tensor [B, S, heads, D], layers of one pool.
        joined = torch.cat([arguments[name].transpose(1, 2) for name in ("q", "k", "v")], dim=2)
        q, k, v = (part.transpose(1, 2) for part in joined.split([4, 2, 2], dim=2))
        pool = torch.stack([arguments["key_pool"], arguments["value_pool"]], dim=1)
        parts = {"q": q, "k": k, "v": v, "key_pool": pool[:, 0], "value_pool": pool[:, 1]}
        tables = torch.cat([arguments["block_tables"], arguments["block_tables"]], dim=1)
        parts["block_tables"] = tables[:, : arguments["block_tables"].shape[1]]
        assert same(expected, attended(self.op, arguments | parts))

        def unaligned(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan)
            wide[..., 1:-2] = tensor
            return wide[..., 1:-2]

        assert same(expected, attended(self.op, map_tensors(unaligned, arguments)))

    @pytest.mark.parametrize("suffix", [1, 19])
    def test_what_no_token_sees_is_not_read(self, isa: str, suffix: int, draw: Draw):
        arguments = made(self.op, draw, prefixes=(9, 2, 0), suffix=suffix, width=16, window=6)
        expected = attended(self.op, arguments)
        tables = arguments["block_tables"]
        seen = torch.zeros(arguments["key_pool"].shape[:2], dtype=torch.bool)
        for b, length in enumerate(arguments["prefix_lengths"].tolist()):
            for t in range(max(0, length - 5), length):
                seen[tables[b, t // 4], t % 4] = True
            tables[b, -(-length // 4) :] = -(10**12)
        for name in ("key_pool", "value_pool"):
            arguments[name][~seen] = torch.nan
        assert same(expected, attended(self.op, arguments))

    def test_a_query_that_is_no_number_spoils_its_row_alone(self, isa: str, draw: Draw):
        for suffix in (1, 19):
            for value in (torch.nan, torch.inf):
                arguments = made(self.op, draw, prefixes=(40, 9), suffix=suffix, width=32)
                before = attended(self.op, arguments)
                arguments["q"][1, 2, 0, 5] = value
                after = attended(self.op, arguments)
                # All results of attention have rows; of the gradients that of q.
                rows = 2 if self.op is prefix_attention else 1
                for old, new in zip(before[:rows], after[:rows], strict=True):
                    assert new[1, 2, 0].isnan().any()
                    new[1, 2, 0] = old[1, 2, 0]
                    assert torch.equal(old, new)

    @pytest.mark.parametrize("suffix", [1, 40])
    def test_same_bits_in_any_batch_on_any_threads(self, threads, suffix: int, draw: Draw):
        batch, prefix = (64, 700) if suffix == 1 else (3, 700)
        arguments = made(self.op, draw, prefixes=(prefix,) * batch, suffix=suffix, width=64, block_size=16)
        expected = attended(self.op, arguments)
        for count in (2, 3):
            threads(count)
            assert same(expected, attended(self.op, arguments))
        for b in (0, batch // 2, batch - 1):
            part = arguments | {
                name: value[b : b + 1]
                for name, value in arguments.items()
                if isinstance(value, Tensor) and "pool" not in name
            }
            assert same(tuple(result[b : b + 1] for result in expected), attended(self.op, part))

    def test_prefixes_outside_the_pool_are_refused(self, draw: Draw):
        arguments = made(self.op, draw, prefixes=(9, 2), suffix=3)
        for change in (
            {"prefix_lengths": torch.tensor([9, 13])},
            {"prefix_lengths": torch.tensor([-1, 2])},
            {"block_tables": arguments["block_tables"].index_fill(1, torch.tensor([0]), 99)},
            {"block_tables": arguments["block_tables"].index_fill(1, torch.tensor([0]), -1)},
        ):
            with pytest.raises(ValueError, match="a block of it is not in the pool"):
                attended(self.op, arguments | change)

    def test_nothing_to_do(self, draw: Draw):
        arguments = made(self.op, draw, prefixes=(5, 2), suffix=3)
        by_query = [n for n in ("q", "k", "v", "cotangent", "output", "logsumexp") if n in arguments]
        rows = (*by_query, "block_tables", "prefix_lengths")
        empty = {name: arguments[name][:0] for name in rows}
        assert all(result.numel() == 0 for result in attended(self.op, arguments | empty))
        short = {name: arguments[name][:, :, :0] for name in by_query}
        assert all(result.numel() == 0 for result in attended(self.op, arguments | short))

    def test_calls_from_several_threads(self, draw: Draw):
        arguments = made(self.op, draw, prefixes=(90, 31), suffix=5, width=16)
        expected = attended(self.op, arguments)

        def work(_: int) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return self.op.chosen(**arguments)(**arguments)

        with ThreadPoolExecutor(3) as pool:
            assert all(same(expected, result) for result in pool.map(work, range(12)))


class TestAttention(AttentionOnCpu):
    op = prefix_attention


class TestBackward(AttentionOnCpu):
    op = prefix_attention_backward


def test_a_cotangent_that_is_expanded(draw: Draw):
    # The gradient of a sum is one number for all elements.
    arguments = attention_arguments(draw, prefixes=(5, 2), suffix=3)
    gradients = []
    for backend in ("cpu", "torch"):
        leaves = {name: arguments[name].clone().requires_grad_() for name in ("q", "k", "v")}
        with use_backend(backend):
            prefix_attention(**arguments | leaves).output.sum().backward()
        gradients.append([leaf.grad for leaf in leaves.values()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("width", [16, 17])
@pytest.mark.parametrize("suffix", [1, 19])
class TestValuesNearTheLargest:
    def huge(self, op: Op, suffix: int, width: int, draw: Draw) -> dict[str, Any]:
        """Arguments whose values have one sign, so that sums overflow before they are divided."""
        arguments = made(op, draw, prefixes=(90, 7), suffix=suffix, width=width)
        huge = {name: arguments[name].abs().clamp(1, 3) * 1e38 for name in ("v", "value_pool")}
        return changed(op, arguments, **huge)

    def test_attention(self, suffix: int, width: int, isa: str, draw: Draw):
        # PyTorch's own kernel overflows: this is held to float64.
        arguments = self.huge(prefix_attention, suffix, width, draw)
        ours, logsumexp = attended(prefix_attention, arguments)
        exact = run_body(prefix_attention, to_float64(arguments))
        torch.testing.assert_close(ours.double(), exact["output"], rtol=3e-6, atol=0)
        torch.testing.assert_close(logsumexp.double(), exact["logsumexp"], rtol=1e-6, atol=1e-6)

    def test_backward(self, suffix: int, width: int, isa: str, draw: Draw):
        def make(draw: Draw) -> dict[str, Any]:
            arguments = self.huge(prefix_attention_backward, suffix, width, draw)
            return arguments | {"cotangent": arguments["cotangent"].abs().clamp(1, 3) / 100}

        compute = partial(run, prefix_attention_backward, "cpu")
        check(prefix_attention_backward, Case("huge", make), draw, "cpu", compute)
