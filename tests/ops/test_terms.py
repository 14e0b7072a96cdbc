"""Float32 states as three bfloat16 terms, and the kernels that multiply them with bfloat16 tables."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nabla_fast.ops import backend_status

from .harness import DEVICES
from .inputs import BF16, F16, Draw, strided

if why := backend_status()["triton"]:
    pytest.skip(why, allow_module_level=True)

from nabla_fast.triton_kernels.common import presets, scratch, terms
from nabla_fast.triton_kernels.common.products import in_terms, operands
from nabla_fast.triton_kernels.common.vocabulary_product import vocabulary_product
from nabla_fast.triton_kernels.onehot_grad import onehot_grad, onehot_grad_norm
from nabla_fast.triton_kernels.token_stats import token_stats

DEVICE = torch.device(DEVICES[-1])  # interpreted where there is no GPU
LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("width", [1, 64, 65, 1100])
@pytest.mark.parametrize("layout", [lambda t: t, lambda t: t.T.contiguous().T, strided])
def test_terms_hold_every_bit(width: int, layout: Callable[[Tensor], Tensor], draw: Draw):
    # Down to where the last bit is one that bfloat16 has.
    state = draw.normal(5, width) * 2.0 ** draw.integers(-80, 100, 5, width)
    state[0, 0], state[1, 0], state[2, 0] = LARGEST, -LARGEST, 1 - 2.0**-24
    parts = terms.terms_of(layout(state.to(DEVICE))).cpu()
    assert parts.dtype == BF16
    assert parts.shape == (3, 5, -(-width // 64) * 64)
    assert torch.equal(parts[:, :, :width].double().sum(dim=0), state.double())
    assert (parts[:, :, width:] == 0).all()


def test_what_is_not_finite_is_one_term():
    state = torch.tensor([[torch.inf, -torch.inf, torch.nan, -0.0, 2.0**-140]]).to(DEVICE)
    high, middle, low = terms.terms_of(state).float().cpu()[:, 0, :5]
    assert high[:2].tolist() == [torch.inf, -torch.inf]
    assert high[2].isnan()
    assert middle[:3].tolist() == low[:3].tolist() == [0, 0, 0]
    assert (high + middle + low)[3:].abs().max() <= 2.0**-133


def test_no_rows():
    assert terms.terms_of(torch.empty(0, 7, device=DEVICE)).shape == (3, 0, 64)


def test_which_operands_are_split():
    def of(*pairs: tuple[torch.dtype, torch.dtype]) -> str:
        states = [torch.empty(2, 3, dtype=state) for state, _ in pairs]
        tables = [torch.empty(4, 3, dtype=table) for _, table in pairs]
        kind = operands(states, tables)
        assert operands(in_terms(states, tables), tables) == kind
        return kind

    single = torch.float32
    assert of((BF16, BF16), (F16, F16)) == "half"
    assert of((single, BF16), (BF16, BF16)) == "split"
    assert of((single, BF16), (single, single)) == "float32"
    assert of((single, F16)) == of((single, BF16), (F16, F16)) == "float32"


def test_a_step_does_not_leave_the_padding():
    kinds = [
        config
        for entry in json.loads(presets.PATH.read_text()).values()
        for kernel, kinds in entry["kernels"].items()
        if kernel.startswith("vocabulary")
        for config in kinds.values()
    ]
    assert all(terms.STEP % config["DEPTH"] == 0 for config in kinds)


def calls(draw: Draw, rows: int, vocabulary: int) -> dict[str, Callable[[slice], list[Tensor]]]:
    """By name, what a call on some of the rows returns: two tables, whose widths no step divides."""
    hidden, head = draw.normal(rows, 70).to(DEVICE), draw.normal(vocabulary, 70, dtype=BF16).to(DEVICE)
    cotangents = [draw.normal(rows, width).to(DEVICE) for width in (33, 64)]
    tables = [draw.normal(vocabulary, width, dtype=BF16).to(DEVICE) for width in (33, 64)]

    def gradient(op: Callable) -> Callable[[slice], list[Tensor]]:
        return lambda part: list(op([c[part] for c in cotangents], tables, hidden[part], head, 1e-3, []))

    return {
        "product": lambda part: [vocabulary_product([hidden[part]], [head])],
        "statistics": lambda part: list(token_stats(hidden[part], head, 0.7)),
        "gradient": gradient(onehot_grad),
        "norms": gradient(onehot_grad_norm),
    }


NAMES = pytest.mark.parametrize("name", calls(Draw(0), 1, 2))


# Three tiles of the tables in the interpreter, the last of which has none beside it.
@NAMES
def test_a_row_does_not_depend_on_those_beside_it(name: str, draw: Draw):
    call = calls(draw, 37, 515)[name]
    whole = call(slice(None))
    # From the start of a tile on: numpy, which multiplies for the interpreter, has an order for each place.
    for part in (slice(0, 1), slice(16, 20), slice(32, 37)):
        for ours, wanted in zip(call(part), whole, strict=True):
            assert torch.equal(ours, wanted[part])


@NAMES
def test_rows_in_parts_are_the_same_rows(name: str, draw: Draw, monkeypatch: pytest.MonkeyPatch):
    call = calls(draw, 37, 515)[name]
    whole = call(slice(None))
    monkeypatch.setattr(scratch, "BYTES", 60_000)
    assert len(list(scratch.row_blocks(37, terms.row_bytes(70), scratch.share(8)))) > 1
    for ours, wanted in zip(call(slice(None)), whole, strict=True):
        assert torch.equal(ours, wanted)
