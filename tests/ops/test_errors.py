"""What ops refuse, and how they say it: one line, naming the argument or the row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nabla_fast.errors import BackendUnavailable, InputError, RowError
from nabla_fast.ops import (
    AdamState,
    GumbelNoise,
    cosine_schedule,
    dto_descent,
    dto_descent_latents,
    embedding_mix,
    gumbel_noise,
    linear_embedding_mix,
    onehot_grad,
    onehot_grad_norm,
    synchronize,
    token_stats,
    use_backend,
)
from nabla_fast.ops.checks import expect_one_device
from nabla_fast.ops.registry import Op
from nabla_fast.ops.rows import row_status

from .harness import backend_parameters

ROWS, VOCABULARY, HIDDEN, WIDTH = 6, 37, 4, 3

# -- bad rows ----------------------------------------------------------------------------------------

REASONS = {
    "has a NaN logit": torch.nan,
    "has a +inf logit": torch.inf,
    "has no finite logit": -torch.inf,
}


def logits_with(bad: dict[int, str]) -> Tensor:
    """[N, V] logits with the given rows spoilt: one token of a row, or all for the last reason."""
    logits = torch.randn(ROWS, VOCABULARY)
    for row, reason in bad.items():
        where = slice(None) if REASONS[reason] == -torch.inf else VOCABULARY - 1 - row
        logits[row, where] = REASONS[reason]
    return logits


def hidden_with(bad: dict[int, str]) -> tuple[Tensor, Tensor]:
    """Hidden states and a positive head whose product has the given bad rows; it overflows for ±inf."""
    hidden, head = torch.randn(ROWS, HIDDEN), torch.rand(VOCABULARY, HIDDEN) + 5
    for row, reason in bad.items():
        value = REASONS[reason]
        hidden[row] = value if math.isnan(value) else math.copysign(3e38, value)
    return hidden, head


def of_logits(op: Op, logits: Tensor) -> None:
    table = torch.randn(VOCABULARY, WIDTH)
    if op.name == "embedding_mix":
        embedding_mix(logits, [table], hard=True)
        embedding_mix(logits, [table], hard=False)
    elif op.name == "dto_descent":
        dto_descent(logits, torch.randn_like(logits), AdamState.zeros(logits), cosine_schedule(2, 0.01))
    else:
        token_stats(logits)


def of_hidden(op: Op, hidden: Tensor, head: Tensor) -> None:
    table = torch.randn(VOCABULARY, WIDTH)
    if op.name == "linear_embedding_mix":
        linear_embedding_mix(hidden, head, [table])
    elif op.name == "dto_descent_latents":
        grad = torch.randn(ROWS, VOCABULARY)
        dto_descent_latents(hidden, head, grad, AdamState.zeros(hidden), cosine_schedule(2, 0.01))
    else:
        token_stats(hidden, head)


def rows_refused(op: Op, backend: str, call: Callable[[], None]) -> list[tuple[int, str]]:
    """The rows that a call on a backend names, none if it passes; skips where it has no such kernel."""
    try:
        with use_backend(backend):
            call()
            synchronize()
        return []
    except BackendUnavailable as unavailable:
        pytest.skip(str(unavailable))
    except RowError as raised:
        error = raised
    assert error.op == op.name
    assert str(error).startswith(f"{op.name}: row {error.rows[0][0]} {error.rows[0][1]}")
    assert "\n" not in str(error)
    return error.rows


LOGITS_OPS = backend_parameters("embedding_mix", "dto_descent", "token_stats")
HIDDEN_OPS = backend_parameters("linear_embedding_mix", "dto_descent_latents", "token_stats")
BAD_ROWS = st.dictionaries(st.integers(0, ROWS - 1), st.sampled_from(list(REASONS)), max_size=ROWS)


@pytest.mark.parametrize(("op", "backend"), LOGITS_OPS)
@given(bad=BAD_ROWS)
@settings(deadline=None, max_examples=25)
def test_bad_rows_of_logits_are_named(op: Op, backend: str, bad: dict[int, str]):
    logits = logits_with(bad)
    assert rows_refused(op, backend, lambda: of_logits(op, logits)) == sorted(bad.items())


@pytest.mark.parametrize(("op", "backend"), HIDDEN_OPS)
@given(bad=BAD_ROWS)
@settings(deadline=None, max_examples=25)
def test_bad_rows_of_hidden_states_are_named(op: Op, backend: str, bad: dict[int, str]):
    hidden, head = hidden_with(bad)
    assert rows_refused(op, backend, lambda: of_hidden(op, hidden, head)) == sorted(bad.items())


@pytest.mark.parametrize(("op", "backend"), LOGITS_OPS)
def test_one_bad_token_far_into_a_long_row(op: Op, backend: str):
    for reason in ("has a NaN logit", "has a +inf logit"):
        for token in (0, 15, 8191, 33_336):
            logits = torch.full((1, 33_337), -torch.inf)
            logits[0, 20] = 1.0
            logits[0, token] = REASONS[reason]
            if op.name == "token_stats":
                refused = rows_refused(op, backend, lambda z=logits: token_stats(z))
            elif op.name == "embedding_mix":
                table = torch.zeros(33_337, 1)
                refused = rows_refused(op, backend, lambda z=logits, t=table: embedding_mix(z, [t]))
            else:
                state, schedule = AdamState.zeros(logits), cosine_schedule(1, 0.01)
                refused = rows_refused(
                    op,
                    backend,
                    lambda z=logits, s=state, r=schedule: dto_descent(z, torch.zeros_like(z), s, r),
                )
            assert refused == [(0, reason)]


def test_a_descent_that_is_refused_has_moved_nothing():
    z = logits_with({1: "has a NaN logit"})
    before, state = z.clone(), AdamState.zeros(z)
    with pytest.raises(RowError):
        dto_descent(z, torch.randn_like(z), state, cosine_schedule(2, 0.01))
    assert torch.equal(z.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))
    assert not any(tensor.any() for tensor in state)


def test_a_nan_outweighs_the_rest():
    row = torch.tensor([[torch.nan, torch.inf, -torch.inf], [torch.inf, -torch.inf, 0.0]])
    with pytest.raises(RowError) as error:
        token_stats(row)
    assert error.value.rows == [(0, "has a NaN logit"), (1, "has a +inf logit")]


def test_many_bad_rows_make_one_short_line():
    with pytest.raises(RowError) as error:
        token_stats(torch.full((1000, 2), torch.nan))
    assert len(error.value.rows) == 1000
    assert len(str(error.value)) < 200
    assert str(error.value).endswith("and 996 more rows")


def test_row_status_of_all_kinds():
    rows = torch.tensor([[0.0, -torch.inf], [torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf] * 2])
    assert row_status(rows).tolist() == [0, 1, 2, 3]
    assert row_status(rows).dtype == torch.int32


# -- bad arguments -----------------------------------------------------------------------------------


def good(op: str) -> dict[str, Any]:
    """Arguments that pass, before a test spoils one."""
    logits, hidden = torch.randn(ROWS, VOCABULARY), torch.randn(ROWS, HIDDEN)
    head, tables = torch.randn(VOCABULARY, HIDDEN), [torch.randn(VOCABULARY, WIDTH) for _ in range(2)]
    keys = torch.arange(ROWS)
    mix = {
        "tables": tables,
        "tau": 1.0,
        "noise": GumbelNoise(keys, keys),
        "direct": torch.randn_like(logits),
    }
    moves = {
        "grad": torch.randn_like(logits),
        "schedule": cosine_schedule(3, 0.01),
        "tau": 1.0,
        "noise": GumbelNoise(keys, keys),
        "until": torch.full((ROWS,), 3),
        "group": torch.zeros(ROWS, dtype=torch.int64),
    }
    onehot = {
        "cotangents": [torch.randn(ROWS, WIDTH) for _ in tables],
        "tables": tables,
        "hidden": hidden,
        "head": head,
        "nll_coeff": 0.1,
    }
    return {
        "gumbel_noise": {"noise": GumbelNoise(keys, keys), "vocabulary": VOCABULARY},
        "embedding_mix": {"logits": logits, **mix},
        "linear_embedding_mix": {"hidden": hidden, "head": head, **mix},
        "token_stats": {"rows": logits, "tau": 1.0},
        "token_stats of hidden states": {"rows": hidden, "head": head, "tau": 1.0},
        "dto_descent": {"z": logits, "state": AdamState.zeros(logits), **moves},
        "dto_descent_latents": {"h": hidden, "head": head, "state": AdamState.zeros(hidden), **moves},
        "onehot_grad": onehot,
        "onehot_grad_norm": onehot,
    }[op]


OPS: dict[str, Callable[..., Any]] = {
    "gumbel_noise": gumbel_noise,
    "embedding_mix": embedding_mix,
    "linear_embedding_mix": linear_embedding_mix,
    "token_stats": token_stats,
    "token_stats of hidden states": token_stats,
    "dto_descent": dto_descent,
    "dto_descent_latents": dto_descent_latents,
    "onehot_grad": onehot_grad,
    "onehot_grad_norm": onehot_grad_norm,
}


def refuses(op: str, match: str, **spoilt: Any) -> None:
    """The op says one line that matches and begins with its name."""
    with pytest.raises(InputError, match=match) as error:
        OPS[op](**good(op) | spoilt)
    message = str(error.value)
    assert message.startswith(f"{op.split()[0]}: ")
    assert "\n" not in message
    assert len(message) < 250


def ops_with(*arguments: str) -> list[str]:
    return [op for op in OPS if all(argument in good(op) for argument in arguments)]


@pytest.mark.parametrize("op", OPS)
def test_good_arguments_pass(op: str):
    OPS[op](**good(op))


@pytest.mark.parametrize("op", ops_with("tau"))
@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan])
def test_tau(op: str, tau: float):
    refuses(op, "tau must be positive and finite", tau=tau)


MATRICES = [
    (op, name)
    for op in OPS
    for name in ("logits", "rows", "z", "hidden", "h", "head", "grad", "direct")
    if name in good(op)
]


@pytest.mark.parametrize(("op", "name"), MATRICES)
def test_matrices(op: str, name: str):
    tensor = good(op)[name]
    refuses(op, f"{name} must be a float tensor", **{name: tensor[0]})
    refuses(op, f"{name} must be a float tensor", **{name: tensor[None]})
    refuses(op, f"{name} must be a float tensor .* got torch.int64", **{name: tensor.long()})


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, name in MATRICES if name in ("head", "grad", "direct")]
)
def test_matrices_of_another_width(op: str, name: str):
    refuses(op, rf"{name} must be a float tensor \[.*{ROWS}|{HIDDEN}", **{name: good(op)[name][:, 1:]})


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, name in MATRICES if name in ("grad", "direct")]
)
def test_matrices_of_another_height(op: str, name: str):
    refuses(op, rf"{name} must be a float tensor \[{ROWS}, {VOCABULARY}\]", **{name: good(op)[name][1:]})


@pytest.mark.parametrize("op", ops_with("tables"))
def test_tables(op: str):
    tables = good(op)["tables"]
    refuses(op, "at least one embedding table", tables=[])
    refuses(
        op, rf"tables\[1\] must be a float tensor \[{VOCABULARY}, M\]", tables=[tables[0], tables[1][1:]]
    )
    refuses(op, r"tables\[0\] must be a float tensor", tables=[tables[0].long(), tables[1]])
    refuses(op, r"tables\[1\] must be a float tensor", tables=[tables[0], tables[1][0]])


@pytest.mark.parametrize("op", ops_with("cotangents"))
def test_cotangents(op: str):
    first, second = good(op)["cotangents"]
    refuses(op, "one cotangent a table is needed, got 1 for 2", cotangents=[first])
    refuses(
        op,
        rf"cotangents\[1\] must be a float tensor \[{ROWS}, {WIDTH}\]",
        cotangents=[first, second[:, 1:]],
    )
    refuses(
        op, rf"cotangents\[0\] must be a float tensor \[{ROWS}, {WIDTH}\]", cotangents=[first[1:], second]
    )


@pytest.mark.parametrize("op", ops_with("noise"))
def test_noise_keys(op: str):
    keys = torch.arange(ROWS)
    for seed, position, name in (
        (keys.int(), keys, "seed"),
        (keys, keys.float(), "position"),
        (keys, keys[1:], "position"),
        (keys[:, None], keys, "seed"),
        (keys[0], keys[0], "seed"),
    ):
        refuses(op, rf"noise\.{name} must be int64 \[", noise=GumbelNoise(seed, position))


@pytest.mark.parametrize("op", [op for op in ops_with("noise") if op != "gumbel_noise"])
def test_noise_of_another_number_of_rows(op: str):
    keys = torch.arange(ROWS + 1)
    refuses(op, rf"noise\.seed must be int64 \[{ROWS}\]", noise=GumbelNoise(keys, keys))


def wide(vocabulary: int, width: int | None = None) -> Tensor:
    """[1, V], or [V, width], of a single number of memory."""
    return torch.zeros(1, 1).expand(*((1, vocabulary) if width is None else (vocabulary, width)))


def with_vocabulary(op: str, vocabulary: int) -> dict[str, Any]:
    """Arguments of one row over a vocabulary, without its memory."""
    arguments = {
        name: value for name, value in good(op).items() if name not in ("noise", "direct", "until", "group")
    }
    shapes = {
        "logits": wide(vocabulary),
        "z": wide(vocabulary),
        "grad": wide(vocabulary),
        "head": wide(vocabulary, HIDDEN),
        "tables": [wide(vocabulary, WIDTH)] * 2,
        "hidden": torch.zeros(1, HIDDEN),
        "h": torch.zeros(1, HIDDEN),
        "rows": torch.zeros(1, HIDDEN) if "head" in arguments else wide(vocabulary),
        "cotangents": [torch.zeros(1, WIDTH)] * 2,
        "vocabulary": vocabulary,
    }
    arguments |= {name: value for name, value in shapes.items() if name in arguments}
    if op == "gumbel_noise":
        arguments["noise"] = GumbelNoise(
            torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        )
    return arguments


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("vocabulary", [0, 2**20 + 1])
def test_vocabulary(op: str, vocabulary: int):
    arguments = with_vocabulary(op, vocabulary)
    with pytest.raises(
        InputError, match=f"(1 to 1048576 tokens, got {vocabulary})|at least one column"
    ) as error:
        OPS[op](**arguments)
    assert "\n" not in str(error.value)


def test_the_largest_vocabulary_there_may_be():
    stats = token_stats(wide(2**20))
    assert float(stats.entropy) == pytest.approx(20 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("op", ops_with("state"))
def test_state(op: str):
    state = good(op)["state"]
    refuses(op, "state.step must be int64", state=state._replace(step=state.step.int()))
    refuses(op, "state.step must be int64", state=state._replace(step=state.step[1:]))
    refuses(op, "state.exp_avg must be", state=state._replace(exp_avg=state.exp_avg[:, 1:]))
    refuses(op, "state.exp_avg_sq must be", state=state._replace(exp_avg_sq=state.exp_avg_sq.double()))


@pytest.mark.parametrize("op", ops_with("schedule"))
def test_schedule(op: str):
    schedule = good(op)["schedule"]
    refuses(op, "schedule must be float64", schedule=schedule.float())
    refuses(op, "schedule must be float64", schedule=schedule[0])
    refuses(op, "schedule must be float64", schedule=schedule.expand(ROWS - 1, 3))


@pytest.mark.parametrize("op", ops_with("until", "group"))
def test_until_and_group(op: str):
    rows = torch.zeros(ROWS, dtype=torch.int64)
    refuses(op, "until exceeds the 3 steps", until=rows + 4)
    refuses(op, "until must be int64", until=rows.int())
    refuses(op, "group must be int64", group=rows[1:])
    refuses(op, "group numbers must not be negative", group=rows - 1)


def test_tensors_on_different_devices():
    with pytest.raises(InputError, match="on different devices: cpu, meta"):
        expect_one_device("token_stats", torch.zeros(1), None, torch.zeros(1, device="meta"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in MATRICES if name != "rows"])
def test_one_tensor_on_another_device(op: str, name: str):
    refuses(op, "tensors are on different devices: cpu, cuda:0", **{name: good(op)[name].cuda()})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bad_rows_on_a_device_are_named_at_the_next_synchronization():
    logits = torch.zeros(3, 5, device="cuda")
    logits[1, 2] = torch.nan
    token_stats(logits)
    with pytest.raises(RowError, match="row 1 has a NaN logit"):
        synchronize()
    synchronize()
