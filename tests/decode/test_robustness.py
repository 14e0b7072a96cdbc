"""Callers that do more than one thing: threads, callbacks, autocast, pickles."""

from __future__ import annotations

import pickle
import threading

import pytest
import torch
from golden_data import golden_json
from tiny_models import causal_lm, reward_model

from nabla_fast import DecodingFailed, DecodingInterrupted, InputError, NablaDecoder, RowError, ops

PROMPT = golden_json("decode")[0]["prompt_ids"]


@pytest.fixture
def decoder(golden_models) -> NablaDecoder:
    return NablaDecoder(golden_models["lm"], golden_models["rm"], None, loop="batched")


def test_threads_with_the_same_models_take_turns(golden_models, decoder):
    (expected,) = decoder.generate([PROMPT], max_new_tokens=16)
    outcomes = []

    def work():
        outcomes.append(decoder.generate([PROMPT], max_new_tokens=16)[0].token_ids)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [expected.token_ids] * 4
    assert golden_models["lm"].config._attn_implementation != "nabla_paged"


def test_autocast_changes_nothing(decoder):
    (expected,) = decoder.generate([PROMPT], max_new_tokens=16)
    hidden, head = torch.randn(3, 8), torch.randn(17, 8)
    stats = ops.token_stats(hidden, head)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = decoder.generate([PROMPT], max_new_tokens=16)
        rounded = ops.token_stats(hidden, head)
    assert (found.token_ids, found.reward) == (expected.token_ids, expected.reward)
    assert all(torch.equal(a, b) for a, b in zip(stats, rounded, strict=True))


def test_a_descent_of_what_requires_grad_is_refused():
    z = torch.randn(2, 9, requires_grad=True) * 1
    with pytest.raises(InputError, match="detach what requires grad"):
        ops.dto_descent(z, torch.randn(2, 9), ops.AdamState.zeros(z), ops.cosine_schedule(3, 0.1))


class OfTwo(Exception):
    """Made of two arguments, of which a pickle gives one back."""

    def __init__(self, first: str, second: str):
        super().__init__(first + second)


@pytest.mark.parametrize(
    "error",
    [
        RowError("op", [(1, "has a NaN logit")]),
        DecodingInterrupted([None, None]),
        DecodingFailed([1], [None, None], ValueError("x")),
        DecodingFailed([0, 1], [None, None], RowError("op", [(1, "has a NaN logit")])),
        DecodingFailed([1], [None, None], OfTwo("one", "two")),
        DecodingFailed([1], [None, None], ValueError("with a lock", threading.Lock())),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_a_pickle(error):
    copy = pickle.loads(pickle.dumps(error))
    assert getattr(copy, "prompts", None) == getattr(error, "prompts", None)
    assert type(copy) is type(error)
    assert str(copy) == str(error)


@pytest.mark.parametrize("loop", ["sequential", "batched"])
def test_a_decoder_that_has_decoded_survives_a_pickle(loop):
    used = NablaDecoder(causal_lm("llama"), reward_model("llama"), None, loop=loop)
    tokens = [result.token_ids for result in used.generate([[4, 5], [6]], max_new_tokens=4)]
    again = pickle.loads(pickle.dumps(used))
    assert [result.token_ids for result in again.generate([[4, 5], [6]], max_new_tokens=4)] == tokens


def test_eos_changed_between_calls_is_followed(golden_models, decoder):
    (before,) = decoder.generate([PROMPT], max_new_tokens=16)
    config = golden_models["lm"].generation_config
    former = config.eos_token_id
    config.eos_token_id = before.token_ids[3]
    try:
        (after,) = decoder.generate([PROMPT], max_new_tokens=16)
    finally:
        config.eos_token_id = former
    assert after.finish_reason == "eos" or config.eos_token_id not in after.token_ids
    assert before.token_ids[3] not in after.token_ids


def test_on_result_must_be_callable(decoder):
    with pytest.raises(InputError, match="on_result must be callable, got int"):
        decoder.generate([PROMPT], on_result=3)


def test_weights_changed_between_calls_are_read_again():
    lm, rm = causal_lm("qwen2"), reward_model("qwen2")
    kept = NablaDecoder(lm, rm, None, loop="batched")
    kept.generate([[3, 4, 5]], max_new_tokens=4)
    with torch.no_grad():
        for model in (lm, rm):
            for name, weight in model.named_parameters():
                if "q_proj" in name or "gate_proj" in name:
                    weight.copy_(torch.randn_like(weight))
    (found,) = kept.generate([[3, 4, 5]], max_new_tokens=12)
    (expected,) = NablaDecoder(lm, rm, None, loop="batched").generate([[3, 4, 5]], max_new_tokens=12)
    assert (found.token_ids, found.reward) == (expected.token_ids, expected.reward)
