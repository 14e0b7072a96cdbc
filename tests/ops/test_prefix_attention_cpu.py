"""The C++ prefix_attention: every instruction set, widths, tiles, strides, threads, bad prefixes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_fast import _native
from nabla_fast.ops import prefix_attention, use_backend
from nabla_fast.ops.prefix_attention import prefix_attention_backward
from nabla_fast.ops.registry import Op

from .cases import CASES, Case, Draw
from .cases import attention_backward as backward_arguments_of
from .cases import prefix_attention as arguments_of
from .harness import OP_ABSOLUTE, check, map_tensors, run, takes

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))

OPS = pytest.mark.parametrize("op", [prefix_attention, prefix_attention_backward], ids=lambda op: op.name)


def made(op: Op, draw: Draw, **sizes: Any) -> dict[str, Any]:
    """Arguments of the op."""
    return (arguments_of if op is prefix_attention else backward_arguments_of)(draw, **sizes)


def attended(op: Op, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """What the C++ kernel gives."""
    with use_backend("cpu"), torch.no_grad():
        result = op(**arguments)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("case", CASES["prefix_attention"], ids=lambda case: case.name)
@OPS
def test_every_instruction_set(isa: str, op: Op, case: Case, draw: Draw):
    case = next(c for c in CASES[op.name] if c.name == case.name)
    if not takes(op, "cpu", case.make(draw)):
        pytest.skip("not for this backend")
    check(op, case, draw, "cpu", partial(run, op, "cpu"))


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
@OPS
def test_widths_and_tiles(isa: str, op: Op, sizes: dict, draw: Draw):
    case = Case(str(sizes), partial(lambda draw: made(op, draw, **sizes)))
    check(op, case, draw, "cpu", partial(run, op, "cpu"))


@OPS
def test_sharp_and_huge_scores(isa: str, op: Op, draw: Draw, monkeypatch: pytest.MonkeyPatch):
    for factor in (1.0, 30.0, 1e4, 1e18):
        # Weights below 2^-126 count as 0. What they would add to a gradient is that many times the
        # queries and a few products of cotangent and values.
        monkeypatch.setitem(OP_ABSOLUTE, op.name, 2**-126 * factor * 64)

        def make(draw: Draw, factor: float = factor) -> dict[str, Any]:
            arguments = made(op, draw, prefixes=(90, 7), suffix=20, width=16)
            return arguments | {"q": arguments["q"] * factor}

        check(op, Case(f"factor {factor}", make), draw, "cpu", partial(run, op, "cpu"))


@pytest.mark.parametrize("suffix", [1, 19])
@OPS
def test_any_strides(isa: str, op: Op, suffix: int, draw: Draw):
    arguments = made(op, draw, prefixes=(40, 9), suffix=suffix, width=32, block_size=4)
    expected = attended(op, arguments)

    # As models hand them over: parts of one tensor [B, S, heads, D], layers of one pool.
    joined = torch.cat([arguments[name].transpose(1, 2) for name in ("q", "k", "v")], dim=2)
    q, k, v = (part.transpose(1, 2) for part in joined.split([4, 2, 2], dim=2))
    pool = torch.stack([arguments["key_pool"], arguments["value_pool"]], dim=1)
    parts = {"q": q, "k": k, "v": v, "key_pool": pool[:, 0], "value_pool": pool[:, 1]}
    tables = torch.cat([arguments["block_tables"], arguments["block_tables"]], dim=1)
    parts["block_tables"] = tables[:, : arguments["block_tables"].shape[1]]
    assert same(expected, attended(op, arguments | parts))

    def unaligned(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan)
        wide[..., 1:-2] = tensor
        return wide[..., 1:-2]

    assert same(expected, attended(op, map_tensors(unaligned, arguments)))


@pytest.mark.parametrize("suffix", [1, 19])
@OPS
def test_what_no_token_sees_is_not_read(isa: str, op: Op, suffix: int, draw: Draw):
    arguments = made(op, draw, prefixes=(9, 2, 0), suffix=suffix, width=16, window=6)
    expected = attended(op, arguments)
    tables = arguments["block_tables"]
    seen = torch.zeros(arguments["key_pool"].shape[:2], dtype=torch.bool)
    for b, length in enumerate(arguments["prefix_lengths"].tolist()):
        for t in range(max(0, length - 5), length):
            seen[tables[b, t // 4], t % 4] = True
        tables[b, -(-length // 4) :] = -(10**12)
    for name in ("key_pool", "value_pool"):
        arguments[name][~seen] = torch.nan
    assert same(expected, attended(op, arguments))


@OPS
def test_a_query_that_is_no_number_spoils_its_row_alone(isa: str, op: Op, draw: Draw):
    for suffix in (1, 19):
        for value in (torch.nan, torch.inf):
            arguments = made(op, draw, prefixes=(40, 9), suffix=suffix, width=32)
            before = attended(op, arguments)[0]
            arguments["q"][1, 2, 0, 5] = value
            after = attended(op, arguments)[0]
            assert after[1, 2, 0].isnan().any()
            after[1, 2, 0] = before[1, 2, 0]
            assert torch.equal(before, after)


@pytest.mark.parametrize("suffix", [1, 40])
@OPS
def test_same_bits_in_any_batch_on_any_threads(threads, op: Op, suffix: int, draw: Draw):
    batch, prefix = (64, 700) if suffix == 1 else (3, 700)
    arguments = made(op, draw, prefixes=(prefix,) * batch, suffix=suffix, width=64, block_size=16)
    expected = attended(op, arguments)
    for count in (2, 3):
        threads(count)
        assert same(expected, attended(op, arguments))
    for b in (0, batch // 2, batch - 1):
        part = arguments | {
            name: value[b : b + 1]
            for name, value in arguments.items()
            if isinstance(value, Tensor) and "pool" not in name
        }
        assert same(tuple(result[b : b + 1] for result in expected), attended(op, part))


@OPS
def test_prefixes_outside_the_pool_are_refused(op: Op, draw: Draw):
    arguments = made(op, draw, prefixes=(9, 2), suffix=3)
    for change in (
        {"prefix_lengths": torch.tensor([9, 13])},
        {"prefix_lengths": torch.tensor([-1, 2])},
        {"block_tables": arguments["block_tables"].index_fill(1, torch.tensor([0]), 99)},
        {"block_tables": arguments["block_tables"].index_fill(1, torch.tensor([0]), -1)},
    ):
        with pytest.raises(ValueError, match="a block of it is not in the pool"):
            attended(op, arguments | change)


@OPS
def test_nothing_to_do(op: Op, draw: Draw):
    arguments = made(op, draw, prefixes=(5, 2), suffix=3)
    rows = ("q", "k", "v", "block_tables", "prefix_lengths", "cotangent")
    empty = {name: arguments[name][:0] for name in rows if name in arguments}
    assert all(result.numel() == 0 for result in attended(op, arguments | empty))
    short = {name: arguments[name][:, :, :0] for name in ("q", "k", "v", "cotangent") if name in arguments}
    assert all(result.numel() == 0 for result in attended(op, arguments | short))


@OPS
def test_calls_from_several_threads(op: Op, draw: Draw):
    arguments = made(op, draw, prefixes=(90, 31), suffix=5, width=16)
    expected = attended(op, arguments)

    def work(_: int) -> tuple[Tensor, ...]:
        with torch.no_grad():
            result = op.chosen(**arguments)(**arguments)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    with ThreadPoolExecutor(3) as pool:
        assert all(same(expected, result) for result in pool.map(work, range(12)))
