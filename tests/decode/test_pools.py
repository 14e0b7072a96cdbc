"""The pools of a decode: they grow with need, belong to one call, and get everything back."""

from __future__ import annotations

import gc
import re
from dataclasses import replace

import pytest
import torch
from pool_watch import watched_pools
from tiny_models import VOCABULARY, shared_lm, shared_reward_model

from nabla_fast import DTOConfig
from nabla_fast.decode.batched.executor import Executor
from nabla_fast.decode.batched.loop import BatchedLoop
from nabla_fast.decode.batched.pools import BLOCK
from nabla_fast.decode.failures import DecodeFailure
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.stop import StopStrings
from nabla_fast.models import LanguageModel, RewardModel, VocabularyAlignment
from nabla_fast.models.paged_kv import BlockPool, PagedSequence, PoolExhausted
from nabla_fast.results import Stats

# Large steps, no selector and several proposals at once: much is held at any time.
CONFIG = DTOConfig(iters=3, lr=1.0, confidence_threshold=None, max_generations=6)
STAGES = ("roll_out", "score", "gradient", "descend")


def problem(n: int, length: int = 24) -> Problem:
    generator = torch.Generator().manual_seed(n)
    prompt = tuple(torch.randint(3, VOCABULARY, (5 + 3 * n,), generator=generator).tolist())
    return Problem(prompt, prompt, (4,), n, length, frozenset(), StopStrings())


PROBLEMS = [problem(n) for n in range(5)]


def make_loop(config: DTOConfig = CONFIG, **options) -> BatchedLoop:
    lm = LanguageModel(shared_lm("qwen2"))
    rm = RewardModel(shared_reward_model("qwen2"), VocabularyAlignment.identity())
    return BatchedLoop(lm, rm, config, **{"batch_size": 3, "proposals": 4, **options})


def decode(loop: BatchedLoop, problems: list[Problem] = PROBLEMS):
    return loop.decode(problems, [Stats() for _ in problems])


def test_a_decode_gives_back_what_it_took_before_it_is_asked_to():
    for config in (CONFIG, replace(CONFIG, rejection=False), replace(CONFIG, relaxation="soft")):
        loop = make_loop(config)
        with watched_pools() as watch:
            assert len(dict(decode(loop))) == len(PROBLEMS)
        assert len(watch.made) == 2
        assert watch.all_given_back()
        assert watch.left == []


def test_pools_follow_what_is_held_not_what_could_be():
    loop = make_loop(batch_size=16)
    with watched_pools() as watch:
        list(decode(loop, [problem(n, length=40) for n in range(3)]))
    for pool, (_, blocks) in zip(watch.made, watch.closed, strict=True):
        assert blocks < 2 * watch.most[pool]

    # What never comes costs nothing.
    endless = [replace(problem(0), max_new_tokens=10**9, eos_ids=frozenset(range(VOCABULARY)))]
    with watched_pools() as watch:
        assert len(dict(decode(loop, endless))[0].tokens) == 1
    assert max(blocks for _, blocks in watch.closed) <= 4


def test_no_problems_need_no_pools():
    loop = make_loop()
    with watched_pools() as watch:
        assert dict(decode(loop, [])) == {}
    assert watch.made == []


def test_interleaved_decodes_do_not_meet():
    loop = make_loop()
    expected = {n: decoded.tokens for n, decoded in decode(loop)}
    backwards = PROBLEMS[::-1]
    with watched_pools() as watch:
        first, second = decode(loop), decode(loop, backwards)
        found: list[dict[int, list[int]]] = [{}, {}]
        for _ in PROBLEMS:
            for own, iteration in zip(found, (first, second), strict=True):
                index, decoded = next(iteration)
                own[index] = decoded.tokens
        assert list(first) == list(second) == []
    assert found[0] == expected
    assert found[1] == {len(PROBLEMS) - 1 - n: tokens for n, tokens in expected.items()}
    assert len(watch.made) == 4
    assert watch.all_given_back()


class Trap:
    """Raises ``error`` at the ``count``-th call of a method of the executor, before, in or behind it."""

    def __init__(self, patch: pytest.MonkeyPatch, stage: str, when: str, count: int, error: BaseException):
        original, calls = getattr(Executor, stage), 0

        def trapped(executor, requests):
            nonlocal calls
            calls += 1
            if calls == count and when == "before":
                raise error
            if calls == count and when == "in":
                with pytest.MonkeyPatch.context() as inner:
                    # Whatever the stage has forked is held while a model reads.
                    readers = [executor.lm_reader, *executor.reward_readers]
                    for reader in readers:
                        inner.setattr(reader, "read", self._raise)
                    inner.setattr("nabla_fast.decode.batched.executor.hard_descent_", self._raise)
                    original(executor, requests)
            original(executor, requests)
            if calls == count and when == "behind":
                raise error

        self.error = error
        patch.setattr(Executor, stage, trapped)

    def _raise(self, *_, **__):
        raise self.error


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("when", ["before", "in", "behind"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError("trap"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_whatever_strikes_everything_is_given_back(monkeypatch, stage, when, count, error):
    loop = make_loop()
    trap = Trap(monkeypatch, stage, when, count, error)
    with watched_pools() as watch, pytest.raises((DecodeFailure, KeyboardInterrupt)) as caught:
        list(decode(loop))
    assert trap.error in (caught.value, caught.value.__cause__)
    assert len(watch.made) == 2
    assert watch.all_given_back()
    # So that the test asks for something: but for the very first rollouts, something was held.
    assert watch.left or (stage, count, when != "behind") == ("roll_out", 1, True)
    # The traceback keeps the pools alive, but not their memory.
    assert all(pool.keys.nbytes == 0 for pool in watch.made)


def test_a_reward_that_is_not_finite_gives_everything_back():
    loop = make_loop()
    score, calls = loop._executor.score, 0

    def spoilt(requests):
        nonlocal calls
        score(requests)
        calls += 1
        requests[0].reward = float("nan") if calls == 2 else requests[0].reward

    loop._executor.score = spoilt
    with watched_pools() as watch, pytest.raises(DecodeFailure) as caught:
        list(decode(loop))
    assert "as nan" in str(caught.value.__cause__)
    assert watch.all_given_back()


@pytest.mark.parametrize("finished", [0, 1, 3])
@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_caller_who_stops_gets_everything_back(finished: int, how: str):
    iteration = decode(make_loop())
    with watched_pools() as watch:
        for _ in range(finished):
            next(iteration)
        if how == "close":
            iteration.close()
        else:
            del iteration
            gc.collect()
    assert len(watch.made) == (2 if finished else 0)
    assert watch.all_given_back()


def test_a_limit_that_suffices_changes_no_token():
    expected = {n: decoded.tokens for n, decoded in decode(make_loop())}
    loop = make_loop(max_kv_tokens=100 * BLOCK)
    with watched_pools() as watch:
        assert {n: decoded.tokens for n, decoded in decode(loop)} == expected
    assert all(pool.limit == 0 for pool in watch.made)  # closed
    assert all(blocks <= 100 for _, blocks in watch.closed)


def test_a_limit_that_does_not_suffice_is_named():
    loop = make_loop(max_kv_tokens=5 * BLOCK + 3)
    with watched_pools() as watch, pytest.raises(DecodeFailure) as caught:
        list(decode(loop))
    assert isinstance(caught.value.__cause__, PoolExhausted)
    message = str(caught.value.__cause__)
    assert re.search(r"^max_kv_tokens: .* 5 blocks of 16 tokens, .* \(\d+ tokens\) would do", message)
    assert watch.all_given_back()
    assert max(blocks for _, blocks in watch.closed) <= 5


def test_an_interrupt_inside_the_pool_gives_everything_back(monkeypatch):
    for name in ("copy", "_grow"):
        loop = make_loop()
        with pytest.MonkeyPatch.context() as patch, watched_pools() as watch:
            original, calls = getattr(BlockPool, name), 0

            def struck(pool, *arguments, original=original):
                nonlocal calls
                calls += 1
                if calls == 2:
                    raise KeyboardInterrupt
                original(pool, *arguments)

            patch.setattr(BlockPool, name, struck)
            with pytest.raises(KeyboardInterrupt):
                list(decode(loop))
        assert watch.all_given_back(), name


def test_the_watch_sees_a_leak(monkeypatch):
    # The tests above rest on it.
    loop = make_loop()
    monkeypatch.setattr(PagedSequence, "free", lambda self: None)
    with watched_pools() as watch:
        list(decode(loop))
    assert watch.left
    assert not watch.all_given_back()
