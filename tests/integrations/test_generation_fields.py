"""Every field of the installed release's GenerationConfig: obeyed as documented, or refused by name."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import transformers
from prompts import MOST, decoder, padded, prompts
from tiny_models import EOS, causal_lm, shared_lm
from transformers import CompileConfig, GenerationConfig, WatermarkingConfig

from nabla_fast import InputError, NablaDecoder
from nabla_fast.integrations.generation_fields import OBEYED, refuse_fields
from nabla_fast.models.generation import DEFAULT_SAMPLING

ROOT = Path(__file__).resolve().parents[2]

# A value of each field that a decode does not obey, of any release that is supported.
REFUSED = {
    "assistant_confidence_threshold": 0.9,
    "assistant_early_exit": 1,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 3,
    "bad_words_ids": [[3]],
    "begin_suppress_tokens": [4],
    "cache_config": {"nbits": 4},
    "cache_implementation": "dynamic",
    "compile_config": CompileConfig(),
    "constraints": [1],
    "continuous_batching_config": {"a": 1},
    "decoder_start_token_id": 3,
    "disable_compile": True,
    "diversity_penalty": 0.5,
    "dola_layers": "low",
    "early_stopping": True,
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.2,
    "epsilon_cutoff": 1e-3,
    "eta_cutoff": 1e-3,
    "exponential_decay_length_penalty": (3, 1.5),
    "force_words_ids": [[3]],
    "forced_bos_token_id": 3,
    "forced_eos_token_id": 0,
    "guidance_scale": 1.5,
    "is_assistant": True,
    "length_penalty": 2.0,
    "low_memory": True,
    "max_cache_len": 64,
    "max_matching_ngram_size": 2,
    "max_time": 3.0,
    "min_length": 6,
    "min_new_tokens": 2,
    "min_p": 0.1,
    "no_repeat_ngram_size": 2,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "num_beam_groups": 2,
    "num_beams": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_logits": True,
    "output_scores": True,
    "penalty_alpha": 0.6,
    "prefill_chunk_size": 2,
    "prompt_lookup_num_tokens": 2,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 1.2,
    "sequence_bias": [[[3], 2.0]],
    "speculation_type": "dflash",
    "suppress_tokens": [4],
    "target_lookbehind": 3,
    "token_healing": True,
    "top_h": 0.5,
    "typical_p": 0.9,
    "use_cache": False,
    "use_mtp": True,
    "watermarking_config": WatermarkingConfig(),
}

# A value of each field that a decode obeys, beside the options of `called`; each makes other tokens.
CHANGES = {
    "bos_token_id": {"bos_token_id": 6},  # where there are no inputs
    "do_sample": {"do_sample": False},
    "eos_token_id": {"eos_token_id": [EOS, 11]},
    "max_length": {"max_new_tokens": None, "max_length": 9},
    "max_new_tokens": {"max_new_tokens": 3},
    "num_return_sequences": {"num_return_sequences": 2},
    "pad_token_id": {"eos_token_id": [EOS, 11], "pad_token_id": 9},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "stop_strings": {"stop_strings": ["a"]},
    "temperature": {"temperature": 3.0},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.2},
}

# What a config says of itself.
METADATA = {"transformers_version"}

FIELDS = sorted(name for name in vars(GenerationConfig()) if not name.startswith("_"))


def called(*, made=None, **options):
    """``generate`` of three prompts, or of none."""
    inputs = {} if "bos_token_id" in options else padded(prompts(5))
    options = {"max_new_tokens": MOST, "pad_token_id": EOS, **options}
    output = shared_lm("qwen2").generate(
        **inputs, custom_generate=decoder() if made is None else made, seed=5, **options
    )
    return output if isinstance(output, dict) else output.tolist()


def test_the_tables_name_every_field_and_no_other():
    assert set(CHANGES) == OBEYED
    assert not set(CHANGES) & set(REFUSED)
    strangers = set(FIELDS) - set(CHANGES) - set(REFUSED) - METADATA
    # A release newer than these tables may bring fields; the test below sees them refused.
    known = tuple(map(int, transformers.__version__.split(".")[:2])) <= (5, 24)
    assert not (known and strangers), strangers


@pytest.mark.parametrize("name", [name for name in FIELDS if name in CHANGES])
def test_a_field_that_is_obeyed_changes_the_result(name):
    base = {"bos_token_id": {"bos_token_id": 7}, "pad_token_id": {"eos_token_id": [EOS, 11]}}.get(name, {})
    assert called(**CHANGES[name]) != called(**base)


@pytest.mark.filterwarnings("ignore")  # of deprecated fields, by transformers
@pytest.mark.parametrize("name", [n for n in FIELDS if n not in CHANGES and n not in METADATA])
@pytest.mark.parametrize("way", ["argument", "generation config"])
def test_any_other_field_is_refused_by_name(name, way):
    value = REFUSED.get(name, "a value that nobody knows")
    said = {name: value}
    if way == "generation config":
        said = {"generation_config": GenerationConfig(**said)}
    before = copy.deepcopy(shared_lm("qwen2").generation_config)
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        called(**said)
    # transformers' own refusal, before it calls, writes a name in words.
    assert name in str(caught.value).replace("token healing", "token_healing")
    assert "\n" not in str(caught.value) or not isinstance(caught.value, InputError)
    assert shared_lm("qwen2").generation_config == before


def test_the_refusal_names_fields_values_and_what_to_pass():
    line = (
        r"^the generation config asks for repetition_penalty=1\.2, which a decode does not do: "
        r"pass repetition_penalty=1\.0$"
    )
    with pytest.raises(InputError, match=line):
        called(repetition_penalty=1.2)
    with pytest.raises(
        InputError, match=r"num_beams=2.*length_penalty=2\.0|length_penalty=2\.0.*num_beams=2"
    ):
        called(num_beams=2, length_penalty=2.0)


@pytest.mark.parametrize("value", [1, "chatml", False, [], {"a": 2}])
def test_fields_that_nobody_knows_are_refused(value):
    config = GenerationConfig()
    config.brand_new = value
    with pytest.raises(InputError, match=r"asks for brand_new=.*pass brand_new=None$"):
        called(generation_config=config)
    config.brand_new = None
    assert called(generation_config=config) == called()


def test_a_field_of_the_models_own_config_is_refused_too():
    lm = causal_lm("qwen2")
    made = NablaDecoder(lm, None, None)
    lm.generation_config.length_penalty = 0.5
    with pytest.raises(InputError, match=r"length_penalty=0\.5"):
        lm.generate(**padded(prompts(2)), custom_generate=made, max_new_tokens=2)


def test_values_that_ask_for_nothing():
    idle = {
        "repetition_penalty": 1,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "typical_p": 1.0,
        "guidance_scale": 1,
        "early_stopping": False,
        "use_cache": True,
        "output_scores": False,
        "renormalize_logits": False,
        "length_penalty": 1.0,
    }
    assert called(**idle) == called()
    refuse_fields(GenerationConfig())
    config = GenerationConfig()
    config.repetition_penalty = True
    with pytest.raises(InputError, match="repetition_penalty=True"):
        refuse_fields(config)


def test_defaults_of_drawing_are_transformers():
    filled = GenerationConfig._get_default_generation_params()
    assert {name: filled[name] for name in DEFAULT_SAMPLING} == DEFAULT_SAMPLING


def test_the_page_names_every_field():
    page = (ROOT / "docs" / "transformers.md").read_text()
    table = page.split("<!-- fields: obeyed -->")[1].split("\n\n")[0]
    assert {name for name in (*CHANGES, *REFUSED) if f"`{name}`" in table} == set(CHANGES)
