"""Results as they finish: what a caller may do between two of them, and what is left when he stops."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from pool_watch import watched_pools
from tiny_models import causal_lm, reward_model, word_tokenizer
from torch import nn

from nabla_fast import (
    DecodingFailed,
    DecodingInterrupted,
    DTOConfig,
    InputError,
    NablaDecoder,
    Result,
    ResultStream,
)

CONFIG = DTOConfig(iters=2, lr=1.0, confidence_threshold=None, max_generations=4)
PROMPTS = [[5, 9, 3], [7], [20, 4, 4, 11], [6, 6]]
OPTIONS = {"seed": [1, 2, 3, 4], "max_new_tokens": 9}
LOOPS = ("sequential", "batched")


def make_decoder(loop: str, lm: nn.Module, rm: nn.Module) -> NablaDecoder:
    """A decoder of models in training mode."""
    for model in (lm, rm):
        model.train()
    rm.score.requires_grad_(False)
    return NablaDecoder(lm, rm, word_tokenizer(), config=CONFIG, loop=loop, batch_size=2)


@pytest.fixture(params=LOOPS)
def decoder(request: pytest.FixtureRequest) -> NablaDecoder:
    return make_decoder(request.param, causal_lm("qwen2"), reward_model("qwen2"))


class Hooks:
    """A decoder, and what is called in each forward of its LM."""

    def __init__(self, loop: str):
        lm = causal_lm("qwen2")
        lm.base_model.register_forward_pre_hook(lambda *_: self._callback())
        self._callback = lambda: None
        self.decoder = make_decoder(loop, lm, reward_model("qwen2"))

    @contextmanager
    def calling(self, callback: Callable[[], None]) -> Iterator[None]:
        self._callback = callback
        yield
        self._callback = lambda: None


@pytest.fixture(params=LOOPS)
def hooks(request: pytest.FixtureRequest) -> Hooks:
    return Hooks(request.param)


def flags(decoder: NablaDecoder) -> tuple:
    models = decoder._lm, decoder._reward_model
    return (
        [module.training for model in models for module in model.modules()],
        [weight.requires_grad for model in models for weight in model.parameters()],
        [model.config._attn_implementation for model in models],
    )


def outcome(result: Result) -> tuple:
    """What does not depend on which prompts are decoded together."""
    revisions = [(r.position, r.old_token, r.new_token, r.accepted) for r in result.revisions]
    return result.text, result.token_ids, round(result.reward, 9), result.finish_reason, revisions


def outcomes(results: list[Result]) -> list[tuple]:
    return [outcome(result) for result in results]


def test_results_are_those_of_generate(decoder):
    expected = decoder.generate(PROMPTS, **OPTIONS)
    stream = decoder.stream(PROMPTS, **OPTIONS)
    assert isinstance(stream, ResultStream)
    assert isinstance(stream, Iterator)
    found = dict(stream)
    assert sorted(found) == [0, 1, 2, 3]
    assert outcomes([found[n] for n in range(4)]) == outcomes(expected)
    assert all(stream.results[n] is result for n, result in found.items())
    assert next(stream, None) is None


def test_results_come_as_they_finish(hooks):
    passes = []
    with hooks.calling(lambda: passes.append(1)):
        stream = hooks.decoder.stream(PROMPTS, **OPTIONS)
        assert not passes  # nothing is decoded before the first result is asked for
        counts = [len(passes) for _ in stream]
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1]


@pytest.mark.parametrize(
    ("prompts", "options", "line"),
    [
        ("text", {}, "prompts must be a list"),
        ([[5], []], {}, "prompt 1: the prompt is empty"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens must be"),
        ([[5]], {"seed": [1, 2]}, "seed must be one number or one a prompt"),
        ([[5]], {"reward_context": []}, "reward_context must have one"),
    ],
)
def test_arguments_are_checked_at_the_call(decoder, prompts, options, line):
    before = flags(decoder)
    with pytest.raises(InputError, match=line):
        decoder.stream(prompts, **options)
    assert flags(decoder) == before


def test_between_results_the_models_are_the_callers(hooks):
    decoder = hooks.decoder
    lm, rm = decoder._lm, decoder._reward_model
    before, inside = flags(decoder), []
    assert all(before[0])
    assert not all(before[1])
    expected = decoder.generate(PROMPTS, **OPTIONS)
    assert flags(decoder) == before
    ids = torch.tensor([[5, 9, 3]])
    with hooks.calling(lambda: inside.append((lm.training, lm.lm_head.weight.requires_grad))):
        for count, (n, result) in enumerate(decoder.stream(PROMPTS, **OPTIONS)):
            assert set(inside) <= {(False, False)}
            assert inside or count > 0  # others may have been ready with the first
            assert outcome(result) == outcome(expected[n])
            assert flags(decoder) == before
            lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, pad_token_id=0)
            (lm(ids).logits.sum() + rm(ids).logits.sum()).backward()
            assert lm.lm_head.weight.grad is not None
            assert rm.score.weight.grad is None
            inside.clear()
    assert flags(decoder) == before


def test_flags_changed_between_results_stay_changed(decoder):
    stream = decoder.stream(PROMPTS, **OPTIONS)
    next(stream)
    decoder._lm.eval()
    decoder._reward_model.requires_grad_(False)
    changed = flags(decoder)
    next(stream)
    assert flags(decoder) == changed


def test_a_callers_modes_do_not_matter(decoder):
    expected = decoder.generate(PROMPTS, **OPTIONS)
    stream = decoder.stream(PROMPTS, **OPTIONS)
    found = {}
    for context in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.enable_grad(),
    ):
        with context:
            n, found_here = next(stream)
            assert torch.is_grad_enabled() == isinstance(context, torch.enable_grad | torch.autocast)
        found[n] = found_here
    assert outcomes([found[n] for n in range(4)]) == outcomes(expected)


@pytest.mark.parametrize("how", ["close", "with", "drop", "break"])
@pytest.mark.parametrize("finished", [0, 1, 2])
def test_stopping_early_frees_everything(decoder, how: str, finished: int):
    before = flags(decoder)
    with watched_pools() as watch:
        stream = decoder.stream(PROMPTS, **OPTIONS)
        if how == "break":
            for count, _ in enumerate(stream, start=1):
                if count >= finished:
                    break
        else:
            for _ in range(finished):
                next(stream)
        if how == "with":
            with stream as same:
                assert same is stream
        elif how == "close":
            stream.close()
        if how in ("with", "close"):
            assert next(stream, None) is None
            stream.close()
            assert sum(result is not None for result in stream.results) == finished
        del stream
        if how == "with":
            del same
        gc.collect()
    assert watch.all_given_back()
    assert bool(watch.made) == (decoder.loop == "batched" and (finished > 0 or how == "break"))
    assert flags(decoder) == before


def test_streams_and_calls_inside_one_another(decoder):
    expected = decoder.generate(PROMPTS, **OPTIONS)
    backwards = {**OPTIONS, "seed": OPTIONS["seed"][::-1]}
    first, second = decoder.stream(PROMPTS, **OPTIONS), decoder.stream(PROMPTS[::-1], **backwards)
    for (n, one), (m, other) in zip(first, second, strict=True):
        assert outcome(one) == outcome(expected[n])
        assert outcome(other) == outcome(expected[3 - m])
        assert outcomes(decoder.generate(PROMPTS[:1], **{**OPTIONS, "seed": 1})) == outcomes(expected[:1])


def test_weights_changed_between_results(decoder):
    lm = decoder._lm
    optimizer = torch.optim.SGD(lm.parameters(), lr=1.0)
    ids = torch.tensor([[5, 9, 3, 8, 8]])
    stream = decoder.stream(PROMPTS, **OPTIONS)
    former = decoder.generate(PROMPTS, **OPTIONS)
    seen = dict([next(stream), next(stream)])
    assert all(outcome(result) == outcome(former[n]) for n, result in seen.items())
    for _ in range(2):
        optimizer.zero_grad()
        lm(ids, labels=ids).loss.backward()
        optimizer.step()
        expected = decoder.generate(PROMPTS, **OPTIONS)
        n, result = next(stream)
        assert outcome(result) == outcome(expected[n])
        assert outcome(result) != outcome(former[n])
        seen[n] = result
    assert sorted(seen) == [0, 1, 2, 3]
    assert next(stream, None) is None


def test_what_is_under_way_goes_on_if_nothing_changed(decoder, monkeypatch):
    decode, starts = decoder._loop.decode, []

    def counted(problems, stats):
        starts.append(len(problems))
        return decode(problems, stats)

    monkeypatch.setattr(decoder._loop, "decode", counted)
    for _ in decoder.stream(PROMPTS, **OPTIONS):
        decoder._lm.train()
        decoder.stream(PROMPTS)
    assert starts == [4]


def test_weights_without_an_address(decoder):
    class Composed(nn.Parameter):
        def data_ptr(self) -> int:
            raise RuntimeError("no storage")

    expected = decoder.generate(PROMPTS, **OPTIONS)
    projection = decoder._lm.model.layers[0].self_attn.q_proj
    projection.weight = Composed(projection.weight.detach())
    found = dict(decoder.stream(PROMPTS, **OPTIONS))
    assert outcomes([found[n] for n in range(4)]) == outcomes(expected)


def test_weights_that_became_unusable(decoder):
    stream = decoder.stream(PROMPTS, **OPTIONS)
    finished, _ = next(stream)
    with torch.no_grad():
        decoder._lm.lm_head.weight.fill_(float("nan"))
    with pytest.raises(DecodingFailed, match=r"finite \(1 of 4") as caught:
        next(stream)
    assert caught.value.prompts == tuple(n for n in range(4) if n != finished)


@pytest.mark.parametrize("error", [RuntimeError("trap"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_errors_end_a_stream(hooks, error):
    decoder = hooks.decoder
    before = flags(decoder)
    expected = decoder.generate(PROMPTS, **OPTIONS)

    def trap():
        raise error

    with watched_pools() as watch:
        stream = decoder.stream(PROMPTS, **OPTIONS)
        n, _ = next(stream)
        wrapped = DecodingFailed if isinstance(error, Exception) else DecodingInterrupted
        with hooks.calling(trap), pytest.raises(wrapped, match="1 of 4 prompts finished") as caught:
            next(stream)
        assert next(stream, None) is None
    assert flags(decoder) == before
    assert caught.value.results == stream.results
    assert outcome(stream.results[n]) == outcome(expected[n])
    assert [result is None for result in stream.results].count(True) == 3
    assert watch.all_given_back()


def test_a_call_from_inside_a_decode_is_refused(hooks):
    decoder, calls = hooks.decoder, []

    def again():
        if not calls:
            calls.append(1)
            with pytest.raises(InputError, match="decoding already, around this very call"):
                next(other)
            decoder.generate(PROMPTS)

    other = decoder.stream(PROMPTS, **OPTIONS)
    with hooks.calling(again), pytest.raises(DecodingFailed, match="decoding already") as caught:
        decoder.generate(PROMPTS, **OPTIONS)
    assert isinstance(caught.value.__cause__, InputError)
    # The stream that was refused goes on.
    assert len(dict(other)) == 4


def test_threads_take_turns(hooks):
    decoder = hooks.decoder
    expected = decoder.generate(PROMPTS, **OPTIONS)
    inside, go_on = threading.Event(), threading.Event()
    found: dict[str, list[Result]] = {}
    seen: set[threading.Thread] = set()

    def wait():
        seen.add(threading.current_thread())
        if threading.current_thread() is first:
            inside.set()
            assert go_on.wait(60)

    def decode():
        found[threading.current_thread().name] = decoder.generate(PROMPTS, **OPTIONS)

    first, second = (threading.Thread(target=decode, name=name) for name in ("first", "second"))
    with hooks.calling(wait):
        first.start()
        assert inside.wait(60)
        second.start()
        second.join(0.5)
        assert seen == {first}  # which is in the middle of a pass
        go_on.set()
        for thread in (first, second):
            thread.join(60)
    assert outcomes(found["first"]) == outcomes(found["second"]) == outcomes(expected)


def test_another_thread_decodes_between_results(decoder):
    expected = decoder.generate(PROMPTS, **OPTIONS)
    found = []
    for n, result in decoder.stream(PROMPTS, **OPTIONS):
        assert outcome(result) == outcome(expected[n])
        thread = threading.Thread(target=lambda: found.append(decoder.generate(PROMPTS, **OPTIONS)))
        thread.start()
        thread.join(60)
    assert len(found) == 4
    assert all(outcomes(results) == outcomes(expected) for results in found)


def test_seconds_are_the_decodes_own(decoder):
    away, start = 0.0, time.perf_counter()
    results = []
    for _, result in decoder.stream(PROMPTS, **OPTIONS):
        results.append(result)
        time.sleep(0.5)
        away += 0.5
    elapsed = time.perf_counter() - start
    assert all(result.stats.seconds["total"] <= elapsed - away + 1e-3 for result in results)


def test_on_result_may_do_what_a_streams_caller_may(decoder):
    before = flags(decoder)
    expected = decoder.generate(PROMPTS, **OPTIONS)
    inner = []

    def on_result(n: int, result: Result) -> None:
        assert flags(decoder) == before
        assert outcome(result) == outcome(expected[n])
        inner.append(decoder.generate(PROMPTS[n : n + 1], **{**OPTIONS, "seed": n + 1})[0])
        assert outcome(inner[-1]) == outcome(result)

    assert outcomes(decoder.generate(PROMPTS, **OPTIONS, on_result=on_result)) == outcomes(expected)
    assert len(inner) == 4


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_errors_of_on_result_lose_nothing(decoder, error):
    seen = []

    def on_result(n: int, result: Result) -> None:
        seen.append(n)
        if len(seen) == 2:
            raise error

    wrapped = DecodingFailed if isinstance(error, Exception) else DecodingInterrupted
    with (
        watched_pools() as watch,
        pytest.raises(wrapped, match="2 of 4 prompts finished") as caught,
    ):
        decoder.generate(PROMPTS, **OPTIONS, on_result=on_result)
    assert [n for n, result in enumerate(caught.value.results) if result is not None] == sorted(seen)
    assert watch.all_given_back()
    if wrapped is DecodingFailed:
        assert caught.value.__cause__ is error
        assert caught.value.prompt == seen[1]


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_share_a_stream(decoder, threads: int):
    expected = decoder.generate(PROMPTS, **OPTIONS)
    stream = decoder.stream(PROMPTS, **OPTIONS)
    found: list[tuple[int, Result]] = []
    errors: list[Exception] = []

    def drain():
        try:
            found.extend(stream)
            assert next(stream, None) is None
        except Exception as error:
            errors.append(error)

    drainers = [threading.Thread(target=drain) for _ in range(threads)]
    for thread in drainers:
        thread.start()
    for thread in drainers:
        thread.join(60)
        assert not thread.is_alive()
    assert errors == []
    assert sorted(n for n, _ in found) == [0, 1, 2, 3]
    assert all(outcome(result) == outcome(expected[n]) for n, result in found)


def test_a_stream_shared_by_threads_ends_for_all_at_an_error(hooks):
    decoder = hooks.decoder

    def trap():
        raise RuntimeError("trap")

    stream = decoder.stream(PROMPTS, **OPTIONS)
    outcomes: list[object] = []

    def drain():
        try:
            outcomes.append(list(stream))
        except Exception as error:
            outcomes.append(error)

    with hooks.calling(trap):
        threads = [threading.Thread(target=drain) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [type(o) for o in outcomes].count(DecodingFailed) == 1
    assert outcomes.count([]) == 3


@pytest.mark.parametrize("who", ["the thread that decodes", "another"])
def test_a_stream_is_closed_in_the_middle_of_a_result(hooks, who: str):
    decoder = hooks.decoder
    expected = decoder.generate(PROMPTS, **OPTIONS)
    stream, closed = decoder.stream(PROMPTS, **OPTIONS), []

    def close():
        if not closed:
            closed.append(1)
            if who == "another":
                thread = threading.Thread(target=stream.close)
                thread.start()
                thread.join(60)
                assert not thread.is_alive()
            else:
                stream.close()

    with watched_pools() as watch, hooks.calling(close):
        n, result = next(stream)
        assert next(stream, None) is None
    assert closed
    assert outcome(result) == outcome(expected[n])
    assert stream.results[n] is result
    assert watch.all_given_back()
