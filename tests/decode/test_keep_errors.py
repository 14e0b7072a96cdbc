"""A prompt that fails: it alone is named, and with ``on_error="keep"`` the others finish."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from pool_watch import watched_pools
from test_attribution import LOOPS, NAN, PROMPTS, ROLLOUTS, after_gradients, make, spoil, unread
from tiny_models import causal_lm, word_tokenizer

from nabla_fast import DecodingFailed, InputError, ModelError, NablaDecoder, Result, RowError
from nabla_fast.decode.batched.executor import Executor

STAGES = ("roll_out", "score", "gradient", "descend")
SEEDS = [100 + n for n in range(len(PROMPTS))]
OPTIONS = {"seed": SEEDS, "max_new_tokens": 5}


def outcome(result: Result) -> tuple:
    return result.text, result.token_ids, result.reward, result.finish_reason


def check(results: list[Result], expected: list[Result], bad: set[int]) -> None:
    """The bad ones have an error that names them; the others are what they would have been."""
    assert {n for n, result in enumerate(results) if result.error} == bad
    for n, (result, other) in enumerate(zip(results, expected, strict=True)):
        if n in bad:
            assert isinstance(result.error, DecodingFailed)
            assert result.error.prompt == n
            assert str(result.error).startswith(f"prompt {n}: ")
            assert result.error.__cause__ is not None
            assert outcome(result) == (None, [], None, "error")
        else:
            assert result.token_ids == other.token_ids
            assert result.reward == pytest.approx(other.reward, abs=1e-9)
            assert result.finish_reason == other.finish_reason


def strike(monkeypatch: pytest.MonkeyPatch, stage: str, bad: set[int], error: Exception) -> list[int]:
    """Let every batch fail that has a request of a bad prompt; the sizes of those that did."""
    original, struck, seeds = getattr(Executor, stage), [], {SEEDS[n] for n in bad}

    def striking(executor, requests):
        if any(request.problem.seed in seeds for request in requests):
            struck.append(len(requests))
            raise error
        original(executor, requests)

    monkeypatch.setattr(Executor, stage, striking)
    return struck


# -- kept --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("bad", [{0}, {2}, {1, 4}, {0, 1, 2, 3, 4}], ids=str)
def test_a_rollout_that_is_not_finite(loop: str, bad: set[int]):
    d = make(ROLLOUTS, loop, batch_size=3)
    expected = d.generate(PROMPTS, **OPTIONS)
    token = unread(expected)
    spoil(d._lm.model.embed_tokens, token)
    prompts = [[token] if n in bad else prompt for n, prompt in enumerate(PROMPTS)]
    results = d.generate(prompts, **OPTIONS, on_error="keep")
    check(results, expected, bad)
    assert all(isinstance(results[n].error.__cause__, RowError) for n in bad)


@pytest.mark.parametrize("stage", ["roll_out", "score", "gradient"])
@pytest.mark.parametrize("bad", [{0}, {3}, {1, 2}], ids=str)
def test_an_error_of_a_batch_is_traced_to_its_prompt(monkeypatch, stage: str, bad: set[int]):
    d = make()
    expected = d.generate(PROMPTS, **OPTIONS)
    struck = strike(monkeypatch, stage, bad, ValueError("struck"))
    with watched_pools() as watch:
        results = d.generate(PROMPTS, **OPTIONS, on_error="keep")
    check(results, expected, bad)
    assert max(struck) > 1  # it struck several together at first
    assert watch.all_given_back()
    assert all(isinstance(results[n].error.__cause__, ValueError) for n in bad)


def test_a_descent_that_is_not_finite(monkeypatch):
    d = make()
    expected = d.generate(PROMPTS, **OPTIONS)

    def change(request) -> None:
        if request.gradient is not None:
            request.gradient.cotangents[0].fill_(NAN)

    after_gradients(monkeypatch, change, seed=SEEDS[2])
    check(d.generate(PROMPTS, **OPTIONS, on_error="keep"), expected, {2})


def test_an_error_of_a_batch_that_nobody_has_alone(monkeypatch):
    """Memory that does not suffice for all at once: they are answered one after another."""
    d = make()
    expected = d.generate(PROMPTS, **OPTIONS)
    for stage in STAGES:
        original = getattr(Executor, stage)

        def striking(executor, requests, original=original):
            if len({id(getattr(request, "problem", request)) for request in requests}) > 1:
                raise torch.OutOfMemoryError("out of memory")
            original(executor, requests)

        monkeypatch.setattr(Executor, stage, striking)
    check(d.generate(PROMPTS, **OPTIONS, on_error="keep"), expected, set())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_reward_that_is_not_finite(loop: str):
    d = make(ROLLOUTS, loop)
    expected = d.generate(PROMPTS, **OPTIONS, reward_context=[([4, 5], [6])] * len(PROMPTS))
    token = unread(expected)
    spoil(d._reward_model.model.embed_tokens, token)
    context = [([4, token if n == 3 else 5], [6]) for n in range(len(PROMPTS))]
    results = d.generate(PROMPTS, **OPTIONS, reward_context=context, on_error="keep")
    check(results, expected, {3})
    assert isinstance(results[3].error.__cause__, ModelError)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_text_that_cannot_be_decoded(monkeypatch, loop: str):
    d = make(ROLLOUTS, loop)
    expected = d.generate(PROMPTS, **OPTIONS)
    read = d._tokenizer.decode

    def refusing(tokens, **options):
        if tokens == expected[1].token_ids:
            raise ValueError("cannot decode")
        return read(tokens, **options)

    monkeypatch.setattr(d._tokenizer, "decode", refusing)
    bad = {n for n, result in enumerate(expected) if result.token_ids == expected[1].token_ids}
    check(d.generate(PROMPTS, **OPTIONS, on_error="keep"), expected, bad)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_prompts_that_wait_are_decoded_after_those_that_failed(monkeypatch, batch_size: int):
    d = make(batch_size=batch_size)
    expected = d.generate(PROMPTS, **OPTIONS)
    strike(monkeypatch, "roll_out", {0, 1}, ValueError("struck"))
    check(d.generate(PROMPTS, **OPTIONS, on_error="keep"), expected, {0, 1})


def test_pools_that_cannot_be_had(monkeypatch):
    d = make()

    def refuse(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("nabla_fast.models.reader.BlockPool", refuse)
    results = d.generate(PROMPTS, on_error="keep")
    assert [result.error.prompt for result in results] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_stream_yields_errors_among_its_results(loop: str):
    d = make(ROLLOUTS, loop)
    spoil(d._lm.model.embed_tokens, 23)
    prompts = [[23] if n == 1 else prompt for n, prompt in enumerate(PROMPTS)]
    stream = d.stream(prompts, max_new_tokens=1, on_error="keep")
    found = dict(stream)
    assert [n for n in range(5) if found[n].error] == [1]
    assert [found[n] for n in range(5)] == stream.results
    seen = []
    d.generate(prompts, max_new_tokens=1, on_error="keep", on_result=lambda n, r: seen.append((n, r.error)))
    assert sorted(n for n, _ in seen) == [0, 1, 2, 3, 4]
    assert [n for n, error in seen if error] == [1]


@pytest.mark.parametrize("loop", LOOPS)
def test_weights_that_became_unusable(loop: str):
    d = make(ROLLOUTS, loop)
    stream = d.stream(PROMPTS, max_new_tokens=3, on_error="keep")
    n, first = next(stream)
    with torch.no_grad():
        d._lm.lm_head.weight.fill_(NAN)
    rest = dict(stream)
    assert first.error is None
    assert sorted(rest) == sorted(set(range(5)) - {n})
    assert all(result.error.prompt == m for m, result in rest.items())


def test_a_kept_error_can_be_written_and_sent():
    d = make(ROLLOUTS)
    spoil(d._lm.model.embed_tokens, 23)
    (result,) = d.generate([[23]], max_new_tokens=1, on_error="keep")
    line = "prompt 0: rollout has a NaN logit"
    assert json.loads(json.dumps(result.to_dict()))["error"] == line
    assert str(pickle.loads(pickle.dumps(result)).error) == line
    # Nothing of the decode lives on in it.
    error = result.error.__cause__
    frames, traceback = [], error.__traceback__
    while traceback:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    held = [value for frame in frames for value in frame.f_locals.values()]
    assert not any(isinstance(value, torch.Tensor) for value in held)


def test_results_without_an_error_say_so():
    (result,) = make(ROLLOUTS).generate([[5]], max_new_tokens=2)
    assert result.error is None
    assert result.to_dict()["error"] is None


# -- raised ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["roll_out", "score", "gradient"])
@pytest.mark.parametrize("bad", [0, 2, 4])
def test_the_prompt_at_fault_is_named_alone(monkeypatch, stage: str, bad: int):
    strike(monkeypatch, stage, {bad}, ValueError("struck"))
    with pytest.raises(DecodingFailed, match=f"^prompt {bad}: struck") as caught:
        make().generate(PROMPTS, **OPTIONS)
    assert caught.value.prompts == (bad,)


def test_a_refused_prompt_is_not_kept():
    """It is an argument that is wrong, which is told before anything is decoded."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    for loop in LOOPS:
        d = make(ROLLOUTS, loop)
        decoder = NablaDecoder(d._lm, d._reward_model, tokenizer, loop=loop)
        for on_error in ("raise", "keep"):
            with pytest.raises(InputError, match=r"^prompt 1: the tokenizer gives token 24, beyond"):
                decoder.generate(["b", "b<|new|>c"], on_error=on_error)


@pytest.mark.parametrize("value", ["ignore", None, True, 0])
def test_on_error_is_one_of_two(value: object):
    with pytest.raises(InputError, match="on_error must be 'raise' or 'keep', got"):
        NablaDecoder(causal_lm("qwen2"), None, None).generate([[5]], on_error=value)
