"""What a generation config says: where a response ends, and settings that may not be left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import causal_lm, shared_lm

from nabla_fast import ModelError, NablaDecoder
from nabla_fast.models.generation import eos_ids

PROCESSORS = {
    "repetition_penalty": 1.1,
    "no_repeat_ngram_size": 2,
    "min_length": 3,
    "min_new_tokens": 2,
    "bad_words_ids": [[3]],
    "suppress_tokens": [4],
    "begin_suppress_tokens": [4],
    "forced_eos_token_id": 0,
    "sequence_bias": [[[3], 2.0]],
    "exponential_decay_length_penalty": (3, 1.5),
    "min_p": 0.1,
    "typical_p": 0.9,
    "epsilon_cutoff": 1e-3,
    "eta_cutoff": 1e-3,
    "guidance_scale": 1.5,
}
IDLE = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "guidance_scale": 1.0,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.9,
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_are_refused_by_name(name):
    model = causal_lm("qwen2")
    setattr(model.generation_config, name, PROCESSORS[name])
    with pytest.raises(ModelError, match=rf"Qwen2ForCausalLM.*{name}=.*generation_config\.{name} = "):
        NablaDecoder(model, None, None)


def test_processors_that_are_set_after_construction():
    model = causal_lm("qwen2")
    decoder = NablaDecoder(model, None, None)
    model.generation_config.repetition_penalty = 1.2
    with pytest.raises(ModelError, match=r"repetition_penalty=1\.2"):
        decoder.generate([[5, 9]], max_new_tokens=2)
    model.generation_config.repetition_penalty = 1.0
    assert decoder.generate([[5, 9]], max_new_tokens=2)[0].token_ids is not None


def test_settings_that_do_nothing_or_that_the_decoder_has_itself():
    model = causal_lm("qwen2")
    for name, value in IDLE.items():
        setattr(model.generation_config, name, value)
    NablaDecoder(model, None, None)


@pytest.mark.parametrize(
    "eos", [np.int64(7), torch.tensor(7), torch.tensor([7]), [torch.tensor(7)], (7,), {7}], ids=repr
)
def test_eos_ids_of_any_kind_of_number(eos):
    model = causal_lm("qwen2")
    model.generation_config.eos_token_id = eos
    assert eos_ids(model) == {7}


@pytest.mark.parametrize("loop", ["sequential", "batched"])
def test_prompts_of_any_kind_of_number(loop):
    decoder = NablaDecoder(shared_lm("qwen2"), None, None, loop=loop)
    prompts = [
        [5, 9, 3],
        np.array([5, 9, 3]),
        torch.tensor([5, 9, 3]),
        [np.int64(5), np.int32(9), torch.tensor(3)],
    ]
    first, *others = (result.token_ids for result in decoder.generate(prompts, max_new_tokens=4))
    assert all(tokens == first for tokens in others)
    assert all(type(token) is int for token in first)
