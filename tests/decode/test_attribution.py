"""An error in a decode names the prompt that it concerns, also where many are decoded together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tiny_models import VOCABULARY, causal_lm, reward_model, word_tokenizer

from nabla_fast import (
    DecodingFailed,
    DTOConfig,
    ModelError,
    NablaDecoder,
    Result,
    RowError,
    SamplingConfig,
)
from nabla_fast.decode.batched.executor import Executor
from nabla_fast.decode.batched.requests import Gradient

NAN = float("nan")
GREEDY = SamplingConfig(temperature=0.0)
# Large steps and no selector: every position is descended.
CONFIG = DTOConfig(iters=3, lr=1.0, confidence_threshold=None, max_generations=4)
ROLLOUTS = replace(CONFIG, max_generations=1, rollout_sampling=GREEDY)
PROMPTS = [[5, 9, 3], [7], [20, 4, 4, 11], [6, 6], [8, 10]]
LOOPS = ("sequential", "batched")


def make(config: DTOConfig = CONFIG, loop: str = "batched", batch_size: int = 16, **fields) -> NablaDecoder:
    """A decoder of models of its own, to be spoilt."""
    lm, rm = causal_lm("qwen2", **fields), reward_model("qwen2")
    return NablaDecoder(lm, rm, word_tokenizer(), config=config, loop=loop, batch_size=batch_size)


def spoil(table: torch.nn.Module, token: int) -> None:
    with torch.no_grad():
        table.weight[token] = NAN


def unread(results: list[Result]) -> int:
    """A token that none of the prompts and results has."""
    used = {token for tokens in (*PROMPTS, *(r.token_ids for r in results)) for token in tokens}
    return next(token for token in range(3, VOCABULARY) if token not in used)


@contextmanager
def failing(*parts: str) -> Iterator[pytest.ExceptionInfo[DecodingFailed]]:
    """The block must fail with one line that has every one of ``parts``."""
    with pytest.raises(DecodingFailed) as caught:
        yield caught
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


# -- what is said ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([3], "prompt 3: x"),
        ([0, 1], "prompts 0 and 1, decoded together: x"),
        ([5, 4, 3, 0], "prompts 0 and 3 to 5, decoded together: x"),
        ([0, 1, 2, 3], "prompts 0 to 3, decoded together: x"),
        ([9, 0, 1, 4, 5, 6], "prompts 0, 1, 4 to 6 and 9, decoded together: x"),
    ],
)
def test_prompts_are_listed(prompts: list[int], said: str):
    error = DecodingFailed(prompts, [None] * 10, ValueError("x"))
    assert str(error) == f"{said} (0 of 10 prompts finished)"
    assert error.prompts == tuple(prompts)
    assert error.prompt == (prompts[0] if len(prompts) == 1 else None)


def test_rows_of_a_batch_are_left_out():
    rows = RowError("rollout", [(7, "has a NaN logit"), (9, "has a NaN logit"), (11, "has a +inf logit")])
    assert str(DecodingFailed([2], [None] * 3, rows)) == (
        "prompt 2: rollout has a NaN logit and has a +inf logit (0 of 3 prompts finished)"
    )


# -- rollouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("bad", [0, 2, 4])
def test_a_rollout_that_is_not_finite(loop: str, bad: int):
    d = make(ROLLOUTS, loop)
    prompts = [[*prompt, 23] if n == bad else prompt for n, prompt in enumerate(PROMPTS)]
    spoil(d._lm.model.embed_tokens, 23)
    with failing(f"prompt {bad}: rollout has a NaN logit") as caught:
        d.generate(prompts, max_new_tokens=1)
    assert caught.value.prompt == bad
    assert isinstance(caught.value.__cause__, RowError)


def late_failure() -> tuple[int, int, int, list[Result]]:
    """An EOS with which a rollout reads a token of its own when one before it has ended.

    Returns:
        The prompt of that rollout, the token, the EOS, and what all prompts decode.
    """
    for eos in range(3, VOCABULARY):
        results = make(ROLLOUTS, eos_token_id=eos).generate(PROMPTS, max_new_tokens=12)
        for n, result in enumerate(results):
            ended = any(len(other.token_ids) < 2 for other in results[:n])
            others = {t for m, r in enumerate(results) if m != n for t in (*PROMPTS[m], *r.token_ids)}
            own = [token for token in result.token_ids[2:-1] if token not in others]
            if ended and own:
                return n, own[0], eos, results
    raise AssertionError("no such case")


def test_a_row_is_no_prompt():
    # Where rollouts have ended, the rows of those that go on are no longer the numbers of the prompts.
    bad, token, eos, results = late_failure()
    d = make(ROLLOUTS, eos_token_id=eos)
    spoil(d._lm.model.embed_tokens, token)
    with failing(f"prompt {bad}: rollout has a NaN logit"):
        d.generate(PROMPTS, max_new_tokens=12)
    # Alone the others are what they were.
    rest = [n for n in range(len(PROMPTS)) if n != bad]
    alone = d.generate([PROMPTS[n] for n in rest], max_new_tokens=12)
    assert [r.token_ids for r in alone] == [results[n].token_ids for n in rest]


def test_results_that_were_finished_survive():
    d = make(ROLLOUTS, batch_size=2)
    expected = d.generate(PROMPTS[:4], max_new_tokens=3)
    token = unread(expected)
    spoil(d._lm.model.embed_tokens, token)
    with failing("prompt 4: rollout has a NaN logit") as caught:
        d.generate([*PROMPTS[:4], [token]], max_new_tokens=3)
    found = caught.value.results
    assert sum(result is not None for result in found) >= 3
    for result, other in zip(found, expected, strict=False):
        assert result is None or result.token_ids == other.token_ids


# -- rewards, gradients, descents ----------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_a_reward_that_is_not_finite(loop: str):
    d = make(ROLLOUTS, loop)
    spoil(d._reward_model.model.embed_tokens, 23)
    context = [([4, 23 if n == 3 else 5], [6]) for n in range(len(PROMPTS))]
    with failing("prompt 3: the reward model scores a response", "as nan") as caught:
        d.generate(PROMPTS, max_new_tokens=3, reward_context=context)
    assert caught.value.prompt == 3
    assert isinstance(caught.value.__cause__, ModelError)


def after_gradients(patch: pytest.MonkeyPatch, change: Callable[[Gradient], None], seed: int) -> None:
    """Change what gradients of the prompt with this seed ask for and get."""
    original = Executor.gradient

    def spoilt(executor, requests):
        for request in requests:
            if request.problem.seed == seed:
                change(request)
        original(executor, requests)
        for request in requests:
            if request.problem.seed == seed:
                change(request)

    patch.setattr(Executor, "gradient", spoilt)


@pytest.mark.parametrize("parameter", ["logits", "latents"])
@pytest.mark.parametrize("update", ["first", "all"])
@pytest.mark.parametrize("bad", [0, 2, 4])
def test_a_descent_that_is_not_finite(monkeypatch, parameter: str, update: str, bad: int):
    def change(request: Gradient) -> None:
        if request.gradient is not None:
            request.gradient.cotangents[0].fill_(NAN)

    after_gradients(monkeypatch, change, seed=100 + bad)
    d = make(replace(CONFIG, parameter=parameter, update=update))
    seeds = [100 + n for n in range(len(PROMPTS))]
    with failing(f"prompt {bad}: ", "NaN logit") as caught:
        d.generate(PROMPTS, seed=seeds, max_new_tokens=5)
    assert isinstance(caught.value.__cause__, RowError)


@pytest.mark.parametrize("bad", [0, 3])
def test_relaxed_tokens_that_are_not_finite(monkeypatch, bad: int):
    def change(request: Gradient) -> None:
        request.relaxed.logits[-1, 2] = NAN

    after_gradients(monkeypatch, change, seed=100 + bad)
    d = make(replace(CONFIG, relaxation="soft"))
    with failing(f"prompt {bad}: embedding_mix has a NaN logit"):
        d.generate(PROMPTS, seed=[100 + n for n in range(len(PROMPTS))], max_new_tokens=5)


def test_a_token_reader_that_fails_names_its_prompt(monkeypatch):
    d = make(ROLLOUTS)
    results = d.generate(PROMPTS, max_new_tokens=3)
    decode, read = d._loop.decode, d._tokenizer.decode

    def refusing(tokens, **options):
        if tokens == results[3].token_ids:
            raise ValueError("cannot decode")
        return read(tokens, **options)

    monkeypatch.setattr(d._tokenizer, "decode", refusing)
    # The last is there first, so that the prompt that fails is not the first that is left.
    monkeypatch.setattr(
        d._loop, "decode", lambda problems, stats: (x for x in reversed(list(decode(problems, stats))))
    )
    with failing("prompt 3: cannot decode (1 of 5"):
        d.generate(PROMPTS, max_new_tokens=3)


# -- what cannot be told -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["roll_out", "score", "gradient", "descend"])
def test_errors_of_a_whole_batch(monkeypatch, stage: str):
    error = torch.OutOfMemoryError("out of\nmemory")

    def struck(executor, requests):
        raise error

    monkeypatch.setattr(Executor, stage, struck)
    with failing("prompts 0 to 4, decoded together: out of memory (0 of 5") as caught:
        make().generate(PROMPTS, max_new_tokens=5)
    assert caught.value.prompt is None
    assert caught.value.prompts == (0, 1, 2, 3, 4)
    assert caught.value.__cause__ is error


def test_a_bad_row_that_nobody_has_alone(monkeypatch):
    original = Executor.gradient

    def struck(executor, requests):
        if len(requests) > 1:
            raise RowError("op", [(3, "is bad")])
        original(executor, requests)

    monkeypatch.setattr(Executor, "gradient", struck)
    with failing("prompts 0 to 4, decoded together: op is bad (0 of 5"):
        make(replace(CONFIG, update="all")).generate(PROMPTS, max_new_tokens=5)


def test_an_error_of_a_batch_names_those_of_the_batch(monkeypatch):
    d = make(ROLLOUTS, batch_size=2)
    original, calls = Executor.roll_out, []

    def trapped(executor, requests):
        calls.append([request.problem.prompt_ids for request in requests])
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        original(executor, requests)

    monkeypatch.setattr(Executor, "roll_out", trapped)
    with failing("out of memory") as caught:
        d.generate(PROMPTS, max_new_tokens=3)
    assert [tuple(PROMPTS[n]) for n in caught.value.prompts] == calls[1]
    finished = [n for n, result in enumerate(caught.value.results) if result is not None]
    assert finished
    assert not set(finished) & set(caught.value.prompts)


def test_a_batch_of_one_is_its_prompt(monkeypatch):
    d = make(ROLLOUTS, batch_size=1)

    def trapped(executor, requests):
        raise torch.OutOfMemoryError("out of memory")

    results = []
    with failing("prompt 1: out of memory (1 of 5 prompts finished)"):
        d.generate(
            PROMPTS,
            max_new_tokens=3,
            on_result=lambda n, result: (
                results.append(n),
                monkeypatch.setattr(Executor, "roll_out", trapped),
            ),
        )
    assert results == [0]


def test_pools_that_cannot_be_had(monkeypatch):
    d = make(batch_size=3)

    def refuse(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("nabla_fast.models.reader.BlockPool", refuse)
    with failing("prompts 0 to 2, decoded together: out of memory"):
        d.generate(PROMPTS)


@pytest.mark.parametrize("loop", LOOPS)
def test_numbers_are_those_of_the_prompts_also_after_a_new_start(loop: str):
    d = make(ROLLOUTS, loop, batch_size=2)
    token = unread(d.generate(PROMPTS[:4], max_new_tokens=3))
    stream = d.stream([*PROMPTS[:4], [token]], max_new_tokens=3)
    next(stream)
    spoil(d._lm.model.embed_tokens, token)  # a weight has changed: what is left starts over
    with failing("prompt 4: rollout has a NaN logit") as caught:
        list(stream)
    assert caught.value.prompts == (4,)
