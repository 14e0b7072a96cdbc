"""The harness itself: the results it accepts and the mistakes it notices."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_fast.ops.registry import Op

from .dto_descent.cases import DTO_DESCENT
from .dto_descent_latents.cases import DTO_DESCENT_LATENTS
from .embedding_mix.cases import EMBEDDING_MIX
from .harness import Arguments, Results, check, poisoned, run, run_body
from .inputs import Case, Draw
from .shared.descents import descent_arguments
from .token_stats.cases import TOKEN_STATS

STATS, MIX, DESCENT, LATENTS = (
    tested.op for tested in (TOKEN_STATS, EMBEDDING_MIX, DTO_DESCENT, DTO_DESCENT_LATENTS)
)
TESTED = {
    tested.op.name: tested for tested in (TOKEN_STATS, EMBEDDING_MIX, DTO_DESCENT, DTO_DESCENT_LATENTS)
}


FLIPPING = Case("flipping", partial(descent_arguments, rows=9, vocabulary=257, gap=0.05))


def case_of(op: Op, name: str) -> Case:
    return TESTED[op.name].case(name)


def passes(op: Op, case: str | Case, draw: Draw, compute: Callable[[Arguments], Results]) -> bool:
    try:
        check(op, case_of(op, case) if isinstance(case, str) else case, draw, "cpu", compute)
    except pytest.fail.Exception:
        return False
    return True


def test_accepts_another_summation_order(draw: Draw):
    def backwards(arguments: Arguments) -> Results:
        logits, tables = arguments["logits"].flip(1), [table.flip(0) for table in arguments["tables"]]
        return run_body(MIX, arguments | {"logits": logits, "tables": tables})

    assert passes(MIX, "two tables, soft", draw, backwards)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda name, value: value * (1 + 1e-5),
        lambda name, value: torch.where(torch.arange(len(value)) == 1, torch.nan, value),
        lambda name, value: torch.full_like(value, torch.inf),
        lambda name, value: value.roll(1, 0),
    ],
    ids=["off by 1e-5", "NaN", "inf", "rows mixed up"],
)
@pytest.mark.parametrize("name", ["logsumexp", "confidence", "entropy"])
def test_notices_one_wrong_result(name: str, wrong: Callable[[str, Tensor], Tensor], draw: Draw):
    def compute(arguments: Arguments) -> Results:
        results = run_body(STATS, arguments)
        return results | {name: wrong(name, results[name])}

    assert not passes(STATS, "odd", draw, compute)


def test_notices_another_token(draw: Draw):
    def compute(arguments: Arguments) -> Results:
        results = run_body(STATS, arguments)
        return results | {"argmax": (results["argmax"] + 1) % arguments["rows"].shape[1]}

    assert not passes(STATS, "odd", draw, compute)


def test_notices_inputs_rounded_too_far(draw: Draw):
    # 2⁻¹⁷: what two bf16 terms keep of a float32 hidden state.
    def rounded(tensor: Tensor) -> Tensor:
        high = tensor.bfloat16().float()
        return high + (tensor - high).bfloat16().float()

    def compute(arguments: Arguments) -> Results:
        return run_body(STATS, arguments | {"rows": rounded(arguments["rows"])})

    assert not passes(STATS, "head", draw, compute)


def test_notices_a_descent_that_stops_late(draw: Draw):
    def compute(arguments: Arguments) -> Results:
        results = run_body(DESCENT, arguments)
        late = results["flipped"] & (results["state_step"] < 20)
        return results | {"state_step": results["state_step"] + late}

    assert not passes(DESCENT, FLIPPING, draw, compute)


def test_a_tie_that_rounding_decides_is_no_error():
    # Two tokens an infinitesimal apart in a product of float32 numbers.
    hidden = torch.tensor([[1.0, 1.0]])
    head = torch.tensor([[1.0, 1e-8], [1.0, 2e-8], [0.0, 0.0]])

    def compute(arguments: Arguments) -> Results:
        results = run_body(STATS, arguments)
        return results | {"argmax": 1 - results["argmax"]}

    case = Case("tie", lambda draw: {"rows": hidden, "head": head, "tau": 1.0})
    check(STATS, case, Draw(0), "cpu", compute)


def test_memory_nobody_wrote_is_poison():
    with poisoned():
        made = [torch.empty(3), torch.empty_like(torch.ones(3)), torch.ones(3).new_empty(3)]
        assert all(tensor.isnan().all() for tensor in made)
        assert (torch.empty(3, dtype=torch.int64) < -(2**62)).all()


def test_notices_a_changed_argument(draw: Draw, monkeypatch: pytest.MonkeyPatch):
    body = STATS._backends["torch"]

    def spoil(rows: Tensor, head: Tensor | None, **options: Any):
        rows[0, 0] += 1
        return body.run(rows, head, **options)

    monkeypatch.setitem(STATS._backends, "torch", type(body)(spoil, body.refuses))
    with pytest.raises(AssertionError, match="changed its argument rows"):
        run(STATS, "torch", case_of(STATS, "odd").make(draw))


def test_notices_a_gradient_that_is_not_centred(draw: Draw, monkeypatch: pytest.MonkeyPatch):
    def naive(p: Tensor, grad: Tensor, token: Tensor, tau: float) -> Tensor:
        return p * (grad - (p * grad).sum(dim=-1, keepdim=True)) / tau

    def compute(arguments: Arguments) -> Results:
        with monkeypatch.context() as patch:
            # By its module: the package has the op itself under that name.
            module = importlib.import_module("nabla_fast.ops.dto_descent_latents")
            patch.setattr(module, "softmax_gradient", naive)
            return run_body(LATENTS, arguments)

    assert not passes(LATENTS, "far from zero", draw, compute)
