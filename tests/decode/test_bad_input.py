"""What is wrong is said in one line: what was given, what was expected, and where."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import (
    VOCABULARY,
    causal_lm,
    reward_model,
    shared_lm,
    shared_reward_model,
    word_tokenizer,
)

from nabla_fast import (
    DecodingFailed,
    DecodingInterrupted,
    DTOConfig,
    InputError,
    ModelError,
    NablaDecoder,
    RowError,
    SamplingConfig,
    VocabularyAlignment,
)
from nabla_fast.models.paged_kv import PoolExhausted

TOKENIZER = word_tokenizer()
PROMPT = [5, 9, 3]


def decoder(lm="qwen2", rm="qwen2", tokenizer=TOKENIZER, **options) -> NablaDecoder:
    lm = shared_lm(lm) if isinstance(lm, str) else lm
    rm = shared_reward_model(rm) if isinstance(rm, str) else rm
    return NablaDecoder(lm, rm, tokenizer, **{"loop": "sequential", **options})


class refused:
    """The block must raise ``error`` with one line that has every one of ``parts``."""

    def __init__(self, error: type[BaseException], *parts: str):
        self.parts = parts
        self.context = pytest.raises(error)

    def __enter__(self) -> pytest.ExceptionInfo:
        self.info = self.context.__enter__()
        return self.info

    def __exit__(self, *exception: Any) -> bool:
        caught = self.context.__exit__(*exception)
        if caught:
            message = str(self.info.value)
            assert "\n" not in message
            assert len(message) < 300
            missing = [part for part in self.parts if part not in message]
            assert not missing, f"{message!r} does not say {missing}"
        return caught


# -- settings ----------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
BAD_SETTINGS = {
    "parameter": ["logit", None, 1],
    "update": ["last", None, ["first"]],
    "relaxation": ["hard", ""],
    "schedule": ["step", None, 1],
    "weight_decay": [-0.1, NAN, INF, None],
    "gumbel_scale": [-1, NAN, 2.0, None],
    "draws": ["numpy", None, True],
    "iters": [0, -1, 2.0, True, None, 1_000_001],
    "lr": [0, -0.1, NAN, INF, "0.1", None],
    "min_lr_ratio": [-0.1, 1.1, NAN, None],
    "warmup_steps": [-1, 21, 0.5, True],
    "tau": [0, -1, INF, NAN, 1e-300, 1e300],
    "reward_coeff": [-1, NAN, INF, None],
    "nll_coeff": [-1e-9, NAN, "1"],
    "confidence_threshold": [-0.1, 1.5, NAN, "0.9"],
    "entropy_threshold": [-1, INF, NAN],
    "grad_threshold": [-1, NAN, "x"],
    "max_generations": [0, -3, 1.5, None, True],
    "rejection": [None, "yes", 1, 0],
    "rollout_sampling": [(0.7, 20, 0.8), {}, 0.7],
    "resample_sampling": [None, (0.7, 20, 0.8)],
}
BAD_SAMPLING = {
    "temperature": [NAN, INF, "1", None, 1e-40],
    "top_k": [-1, 1.5, "x", True],
    "top_p": [0, -0.1, 1.1, NAN, None],
}


def pairs(table: dict[str, list]) -> list:
    return [pytest.param(name, value, id=f"{name}={value!r}") for name in table for value in table[name]]


@pytest.mark.parametrize(("name", "value"), pairs(BAD_SETTINGS))
def test_config(name, value):
    with refused(InputError, name, "must be", repr(value)):
        DTOConfig(**{name: value})


def test_every_setting_is_tried():
    assert set(BAD_SETTINGS) == set(DTOConfig.names())


@pytest.mark.parametrize(("name", "value"), pairs(BAD_SAMPLING))
def test_sampling_config(name, value):
    with refused(InputError, name, "must be", repr(value)):
        SamplingConfig(**{name: value})


def test_settings_that_are_at_the_edge_are_taken():
    DTOConfig(
        iters=1,
        min_lr_ratio=0,
        warmup_steps=1,
        reward_coeff=0,
        nll_coeff=0,
        confidence_threshold=0,
        entropy_threshold=0,
        grad_threshold=0,
        max_generations=1,
        rollout_sampling=SamplingConfig(-1.0, 0, 1),
    )
    DTOConfig(min_lr_ratio=1, confidence_threshold=1.0, warmup_steps=20)


def test_config_is_no_dict():
    with refused(InputError, "config", "DTOConfig", "dict"):
        decoder(config={"iters": 3})


# -- prompts and options -----------------------------------------------------------------------------

USER = {"role": "user", "content": "ab"}
BAD_PROMPTS = {
    "": ["empty"],
    " \n": ["empty"],
    (): ["empty"],
    (5, VOCABULARY): [f"token id {VOCABULARY}", "position 1", f"vocabulary of {VOCABULARY}"],
    (-1,): ["token id -1", "position 0"],
    (1.5,): ["token ids"],
    (True,): ["token ids"],
    b"abc": ["token ids", "bytes"],
    7: ["token ids", "int"],
    None: ["token ids", "NoneType"],
}
BAD_CHATS = [
    ([], ["empty"]),
    ([{"role": "user", "content": ""}], ["empty"]),
    ([{"role": "user"}], ["message 0", "content"]),
    ([USER, {"content": "a"}], ["message 1", "role"]),
    ([{"role": "user", "content": ["ab"]}], ["message 0", "content"]),
]


@pytest.mark.parametrize(("prompt", "parts"), BAD_PROMPTS.items(), ids=map(repr, BAD_PROMPTS))
def test_prompt(prompt, parts):
    with refused(InputError, "prompt 1", *parts):
        decoder().generate([PROMPT, prompt])


@pytest.mark.parametrize(("chat", "parts"), BAD_CHATS, ids=repr)
def test_chat(chat, parts):
    with refused(InputError, "prompt 1", *parts):
        decoder().generate([PROMPT, chat])


@pytest.mark.parametrize("prompts", ["ab", b"ab", None, 7, {"role": "user", "content": "ab"}], ids=repr)
def test_prompts_are_a_list(prompts):
    with refused(InputError, "prompts", "list", type(prompts).__name__):
        decoder().generate(prompts)


BAD_OPTIONS = [
    ({"max_new_tokens": 0}, ["max_new_tokens", "0"]),
    ({"max_new_tokens": 2.0}, ["max_new_tokens", "2.0"]),
    ({"max_new_tokens": None}, ["max_new_tokens", "None"]),
    ({"seed": -1}, ["seed", "-1"]),
    ({"seed": 2**63}, ["seed", str(2**63)]),
    ({"seed": 1.5}, ["seed", "1.5"]),
    ({"seed": None}, ["seed", "None"]),
    ({"seed": True}, ["seed", "True"]),
    ({"seed": [1, 2]}, ["seed", "2", "1 prompt"]),
    ({"seed": ["1"]}, ["seed", "'1'"]),
    ({"stop": [""]}, ["stop"]),
    ({"stop": ""}, ["stop"]),
    ({"stop": [3]}, ["stop", "3"]),
    ({"stop": 3}, ["stop", "3"]),
    ({"stop": None}, ["stop", "None"]),
    ({"system_prompt": 3}, ["system_prompt", "int"]),
    ({"reward_context": []}, ["reward_context", "0", "1 prompt"]),
    ({"reward_context": [([3], []), ([3], [])]}, ["reward_context", "2", "1 prompt"]),
    ({"reward_context": 5}, ["reward_context", "int"]),
    ({"reward_context": [5]}, ["prompt 0", "reward_context", "pair"]),
    ({"reward_context": [([3],)]}, ["prompt 0", "reward_context", "pair"]),
    ({"reward_context": ["ab"]}, ["prompt 0", "reward_context", "token ids"]),
    ({"reward_context": [([3], None)]}, ["prompt 0", "reward_context", "NoneType"]),
    ({"reward_context": [([], [3])]}, ["prompt 0", "reward", "prefix", "empty"]),
    ({"reward_context": [([3, 99], [3])]}, ["prompt 0", "reward", "99", "position 1", "24"]),
]


@pytest.mark.parametrize(("options", "parts"), BAD_OPTIONS, ids=repr)
def test_option(options, parts):
    with refused(InputError, *parts):
        decoder().generate(["ab"], **options)


def test_system_prompt_beside_token_ids_or_a_system_message():
    with refused(InputError, "prompt 0", "system_prompt", "token ids"):
        decoder().generate([PROMPT], system_prompt="a")
    with refused(InputError, "prompt 0", "system_prompt", "system message"):
        decoder().generate([[{"role": "system", "content": "b"}, USER]], system_prompt="a")


def test_nothing_is_decoded_when_a_later_prompt_is_wrong():
    seen = []
    with refused(InputError, "prompt 2"):
        decoder().generate(["ab", "b", ""], on_result=lambda n, _: seen.append(n))
    assert seen == []


@pytest.mark.parametrize(
    ("prompt", "context", "parts"),
    [
        ([3] * 64, ([3], []), ["64 tokens", "language model", "context of 64"]),
        ([3] * 70, ([3], []), ["70 tokens", "language model", "context of 64"]),
        ([3], ([3] * 60, [4] * 5), ["65 tokens", "reward model", "context of 64"]),
    ],
    ids=["full", "over", "reward model"],
)
def test_prompt_longer_than_a_context(prompt, context, parts):
    with refused(InputError, "prompt 0", *parts):
        decoder().generate([prompt], reward_context=[context])


# -- tokenizers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alignment", 3),
        ("alignment", torch.arange(24)),
        ("tokenizer", object()),
        ("tokenizer", "gpt2"),
        ("reward_tokenizer", "gpt2"),
    ],
)
def test_tokenizers_and_alignments_of_another_type(name: str, value: object):
    with refused(InputError, f"{name} must be a ", type(value).__name__):
        decoder(**{name: value})


def test_alignment_of_no_tokenizers():
    with refused(InputError, "tokenizer must be a transformers tokenizer, got str"):
        VocabularyAlignment.from_tokenizers("x", word_tokenizer())
    with refused(InputError, "reward_tokenizer must be a transformers tokenizer, got NoneType"):
        VocabularyAlignment.from_tokenizers(word_tokenizer(), None)


def test_missing_tokenizer_and_chat_template():
    with refused(InputError, "prompt 0", "tokenizer"):
        decoder(tokenizer=None).generate(["ab"])
    with refused(InputError, "stop", "tokenizer"):
        decoder(tokenizer=None).generate([PROMPT], stop=["a"])
    bare = word_tokenizer(chat_template=None)
    with refused(InputError, "prompt 0", "chat template"):
        decoder(tokenizer=bare).generate(["ab"])
    with refused(InputError, "prompt 0", "reward", "chat template"):
        decoder(reward_tokenizer=bare).generate(["ab"])


def test_chat_template_that_refuses_or_drops():
    refuses = word_tokenizer(chat_template="{{ raise_exception('no\nsuch\nrole') }}")
    with refused(InputError, "prompt 0", "chat template refuses", "role"):
        decoder(tokenizer=refuses, rm=None).generate(["ab"])
    drops = word_tokenizer(chat_template="{{ messages[0]['content'] }}")
    with refused(InputError, "prompt 0", "response", "reward_context"):
        decoder(reward_tokenizer=drops).generate(["ab"])


def test_vocabularies_of_different_size():
    wide = reward_model("qwen2", vocab_size=VOCABULARY + 3)
    with refused(InputError, "24", "27", "from_tokenizers", "truncated"):
        decoder(rm=wide)


def test_different_vocabularies_of_one_size():
    other = word_tokenizer([f"w{n}" for n in range(VOCABULARY - 3)])
    with refused(InputError, "tokenizer", "reward_tokenizer", "different vocabularies", "from_tokenizers"):
        decoder(reward_tokenizer=other)


# -- models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "parts"),
    [
        ("t5", {}, ["T5ForConditionalGeneration", "encoder-decoder"]),
    ],
    ids=["encoder-decoder"],
)
def test_language_model(kind, fields, parts):
    with refused(ModelError, *parts):
        decoder(lm=causal_lm(kind, **fields), rm=None)


def test_models_of_the_wrong_kind():
    with refused(ModelError, "Qwen2Model", "output head"):
        decoder(lm=shared_lm("qwen2").model)
    with refused(ModelError, "Qwen2ForSequenceClassification", "3 labels", "num_labels=1"):
        decoder(rm=reward_model("qwen2", num_labels=3))
    with refused(ModelError, "Qwen2ForCausalLM", "label"):
        decoder(rm=shared_lm("qwen2"))
    with refused(ModelError, "Qwen2ForCausalLM", "[1, 5, 24]", "one sequence"):
        decoder(rm=causal_lm("qwen2", num_labels=1))
    with refused(InputError, "lm", "str"):
        NablaDecoder("a-model", None, None)
    with refused(InputError, "reward_model", "str"):
        NablaDecoder(shared_lm("qwen2"), "a-model", None)


@pytest.mark.parametrize("value", [0, 15, -16, 1.5, True, "64"])
def test_a_limit_of_keys_and_values(value):
    with refused(InputError, "max_kv_tokens", "whole number ≥ 16", repr(value)):
        decoder(loop="batched", max_kv_tokens=value)
    with refused(InputError, "max_kv_tokens", "loop='batched'"):
        decoder(max_kv_tokens=64)


def test_models_of_inference_mode():
    with torch.inference_mode():
        lm = causal_lm("llama")
    with refused(ModelError, "inference_mode"):
        decoder(lm=lm)


def test_models_that_are_not_finite():
    lm, rm = causal_lm("qwen2"), reward_model("qwen2")
    with torch.no_grad():
        lm.model.layers[1].mlp.down_proj.weight[0, 0] = NAN
        rm.score.weight[0, 0] = INF
    with refused(ModelError, "Qwen2ForCausalLM", "finite"):
        decoder(lm=lm)
    with refused(ModelError, "Qwen2ForSequenceClassification", "finite"):
        decoder(rm=rm)


# -- while decoding ----------------------------------------------------------------------------------

CONFIG = DTOConfig(iters=2, lr=1.0, confidence_threshold=None, max_generations=3)


@pytest.mark.parametrize("relaxation", ["straight_through", "soft"])
def test_nan_logits(relaxation):
    lm = causal_lm("qwen2")
    d = decoder(lm=lm, config=replace(CONFIG, relaxation=relaxation))
    with torch.no_grad():
        lm.model.norm.weight[3] = NAN
    with refused(DecodingFailed, "prompt 0", "NaN logit", "0 of 2") as error:
        d.generate([PROMPT, PROMPT], max_new_tokens=4)
    assert isinstance(error.value.__cause__, RowError)


@pytest.mark.parametrize("value", [NAN, INF])
def test_rewards_that_are_not_finite(value):
    rm = reward_model("qwen2")
    d = decoder(rm=rm, config=replace(CONFIG, max_generations=1))
    with torch.no_grad():
        rm.model.norm.weight[3] = value
    with refused(DecodingFailed, "prompt 0", "reward model", "tokens") as error:
        d.generate([PROMPT], max_new_tokens=4)
    assert re.search(r"nan|-?inf", str(error.value))


def test_too_few_keys_and_values():
    d = decoder(loop="batched", max_kv_tokens=32)
    with refused(DecodingFailed, "max_kv_tokens", "2 blocks of 16 tokens", "(48 tokens) would do") as error:
        d.generate([PROMPT] * 3, max_new_tokens=4)
    assert isinstance(error.value.__cause__, PoolExhausted)


class Trap:
    """Raises ``error`` at the next forward of a model, once set."""

    def __init__(self, model, error: BaseException):
        self.error, self.set = error, False
        self.handle = model.base_model.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        if self.set:
            raise self.error


@pytest.mark.parametrize("which", ["lm", "rm"])
def test_interrupt(which):
    models = {"lm": causal_lm("qwen2").train(), "rm": reward_model("qwen2").train()}
    d = decoder(**models, config=CONFIG)
    first = d.generate([PROMPT], max_new_tokens=4)[0]
    trap = Trap(models[which], KeyboardInterrupt())
    with refused(DecodingInterrupted, "1 of 3") as error:
        d.generate([PROMPT] * 3, max_new_tokens=4, on_result=lambda *_: setattr(trap, "set", True))
    assert isinstance(error.value, KeyboardInterrupt)
    finished = error.value.results
    assert finished[0].token_ids == first.token_ids
    assert finished[1:] == [None, None]
    assert models["lm"].training
    assert models["rm"].model.layers[0].training

    trap.handle.remove()
    assert d.generate([PROMPT], max_new_tokens=4)[0].token_ids == first.token_ids


@pytest.mark.parametrize("which", ["lm", "rm"])
def test_error_in_the_second_prompt(which):
    models = {"lm": causal_lm("qwen2"), "rm": reward_model("qwen2")}
    d = decoder(**models, config=CONFIG)
    trap = Trap(models[which], RuntimeError("out of\nmemory"))
    with refused(DecodingFailed, "prompt 1", "out of memory", "1 of 3") as error:
        d.generate([PROMPT] * 3, max_new_tokens=4, on_result=lambda *_: setattr(trap, "set", True))
    assert error.value.prompt == 1
    assert error.value.__cause__ is trap.error
    assert [result is None for result in error.value.results] == [False, True, True]
