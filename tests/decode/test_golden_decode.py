"""The decode loop against traces of the official release, token for token."""

from __future__ import annotations

import pytest
from golden_data import golden_json

from nabla_fast import DTOConfig, NablaDecoder, Result, SamplingConfig, VocabularyAlignment
from nabla_fast.decode.prompts import PromptReader
from nabla_fast.models import LanguageModel, RewardModel

EOS = 0


def _cases() -> list:
    """All traces with the LM each was made with, named so that one can be run alone."""
    return [
        pytest.param(lm, case, id=f"{file}-{n:02}-{case['name']}-{case['param']}-{case['seed']}")
        for file, lm in (("decode", "lm"), ("decode_edge", "lm_edge"))
        for n, case in enumerate(golden_json(file))
    ]


def _config(case: dict) -> DTOConfig:
    return DTOConfig(
        parameter=case["param"],
        update=case.get("update", "first"),
        iters=case["iters"],
        lr=case["lr"],
        reward_coeff=case["reward_coeff"],
        nll_coeff=case["nll_coeff"],
        confidence_threshold=case["confidence_threshold"],
        entropy_threshold=case.get("entropy_threshold"),
        grad_threshold=case["grad_threshold"],
        max_generations=case["max_generations"],
        rejection=case.get("rejection", True),
        rollout_sampling=SamplingConfig(**case["rollout"]),
        resample_sampling=SamplingConfig(**case["resample"]),
    )


def _decode(case: dict, lm, rm, prompts: list, **options) -> Result:
    tokenizer = options.pop("tokenizer", None)
    decoder = NablaDecoder(lm, rm, tokenizer, config=_config(case), loop="sequential")
    (result,) = decoder.generate(
        prompts, seed=case["seed"], max_new_tokens=case["max_new_tokens"], **options
    )
    return result


@pytest.mark.parametrize(("lm", "case"), _cases())
def test_trace(lm, case, golden_models):
    models = golden_models[lm], golden_models["rm"]
    context = [(case["rm_prefix_ids"], case["rm_suffix_ids"])]
    result = _decode(case, *models, [case["prompt_ids"]], reward_context=context)

    expected = case["token_ids"]
    assert result.token_ids == (expected[:-1] if expected[-1:] == [EOS] else expected)
    assert result.stats.generations == case["generations"]
    assert result.stats.rejections == case["rejections"]
    if "llm_calls" in case:
        assert result.stats.llm_calls == case["llm_calls"]
    scored = [(r.reward_after, r.reward_before) for r in result.revisions if r.reward_after is not None]
    assert len(scored) == len(case["rewards"])
    for ours, theirs in zip(scored, case["rewards"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_there_are_144_traces():
    assert len(_cases()) == 48 + 96


@pytest.mark.parametrize("lm", ["lm", "lm_edge"])
def test_the_chat_template_gives_the_golden_ids(lm, golden_models, tokenizer):
    reader = PromptReader(
        LanguageModel(golden_models[lm]),
        RewardModel(golden_models["rm"], VocabularyAlignment.identity()),
        tokenizer,
        tokenizer,
    )
    options = {"seed": 1, "max_new_tokens": 8, "system_prompt": None, "stop": (), "reward_context": None}
    for case in golden_json("decode") + golden_json("decode_edge"):
        (problem,) = reader.read([case["prompt"]], **options)
        assert list(problem.prompt_ids) == case["prompt_ids"]
        assert list(problem.reward_prefix) == case["rm_prefix_ids"]
        assert list(problem.reward_suffix) == case["rm_suffix_ids"]


def test_a_string_decodes_as_its_ids_do(golden_models, tokenizer):
    case = golden_json("decode")[0]
    models = golden_models["lm"], golden_models["rm"]
    by_string = _decode(case, *models, [case["prompt"]], tokenizer=tokenizer)
    assert by_string.token_ids == case["token_ids"]
    assert by_string.text == tokenizer.decode(case["token_ids"])
