"""More rows than any tile has, and one more than tiles of them: every Triton kernel that takes rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from nabla_fast.ops import (
    backend_status,
    dto_descent,
    dto_descent_latents,
    embedding_mix,
    gumbel_noise,
    linear_embedding_mix,
    onehot_grad,
    onehot_grad_norm,
    token_stats,
)
from nabla_fast.ops.embedding_mix import embedding_mix_backward
from nabla_fast.ops.linear_embedding_mix import linear_embedding_mix_backward
from nabla_fast.ops.registry import Op

from .harness import check, drawn_on, home, run
from .inputs import BF16, F32, Case, Draw
from .shared.descents import descent_arguments
from .shared.mixes import backward_arguments, mix_arguments
from .shared.onehot import onehot_arguments
from .token_stats.cases import stats_arguments

if why := backend_status()["triton"]:
    pytest.skip(why, allow_module_level=True)

ROWS = 513
TABLES = ((33, BF16), (17, BF16))

CALLS: dict[str, tuple[Op, Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "soft": (embedding_mix, mix_arguments, {"tables": TABLES, "hard": False, "tau": 0.7}),
    "hard": (embedding_mix, mix_arguments, {"tables": TABLES, "hard": True}),
    "backward": (
        embedding_mix_backward,
        backward_arguments,
        {"tables": TABLES, "direct": True, "tau": 0.7},
    ),
    "linear, soft": (linear_embedding_mix, mix_arguments, {"tables": TABLES, "hidden": 35, "hard": False}),
    "linear, backward": (
        linear_embedding_mix_backward,
        backward_arguments,
        {"tables": TABLES, "hidden": 35},
    ),
    "statistics": (token_stats, stats_arguments, {"dtype": BF16, "tau": 0.7}),
    "statistics of states": (token_stats, stats_arguments, {"hidden": 35, "head": BF16}),
    "gradient": (
        onehot_grad,
        onehot_arguments,
        {"tables": TABLES, "hidden": 35, "head": BF16, "small": F32},
    ),
    "norms": (
        onehot_grad_norm,
        onehot_arguments,
        {"tables": TABLES, "hidden": 35, "head": BF16, "small": F32},
    ),
    "descent": (dto_descent, descent_arguments, {"iters": 2, "tau": 0.7}),
    "descent of states": (dto_descent_latents, descent_arguments, {"iters": 2, "hidden": 24}),
}


# What an interpreter takes less than half a minute for.
QUICK = ("hard", "backward", "statistics of states")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CALLS]
)
def test_a_row_more_than_tiles_hold(name: str, draw: Draw):
    op, arguments, sizes = CALLS[name]
    case = Case(name, partial(arguments, rows=ROWS, vocabulary=131, **sizes))
    device = home("triton")
    with drawn_on(device):
        check(op, case, draw, device, partial(run, op, "triton"))


def test_noise_of_many_rows(draw: Draw):
    device = home("triton")
    with drawn_on(device):
        case = Case("noise", lambda draw: {"noise": draw.noise(ROWS), "vocabulary": 131})
        check(gumbel_noise, case, draw, device, partial(run, gumbel_noise, "triton"))
