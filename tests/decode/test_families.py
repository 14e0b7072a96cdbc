"""Models of many families: greedy tokens as of one pass over everything, or a refusal by name."""

from __future__ import annotations

import warnings

import families
import pytest
import torch
import transformers
from families import LANGUAGE_MODELS, REWARD_MODELS, greedy, language_model

from nabla_fast import DTOConfig, ModelError, NablaDecoder, Result, SamplingConfig

GREEDY = DTOConfig(
    max_generations=3, iters=2, lr=1.0, confidence_threshold=None, rollout_sampling=SamplingConfig(0)
)
SAMPLED = DTOConfig(max_generations=3, iters=2, lr=1.0, confidence_threshold=None)
# Long enough for the windows and for the switch of frequencies.
PROMPTS, COUNT = [[5, 9, 3, 14, 20, 7], [30, 8]], 20
# Those that the sequential loop alone reads, and why; those without float64.
SEQUENTIAL = {"phi3, long rope": "rotary embeddings of type 'longrope'"}
NARROW = {"xglm"}
UNCACHED = {"openai", "rwkv"}
OLD = transformers.__version__ < "5.1"
# Those that transformers 5.0 gives caches of their own, which are of no use here.
NOT_CACHED_BY_ALL = {"mamba", "mamba2", "falcon_mamba", "lfm2", "qwen3_next"}
REFUSED = {
    "xlnet": "is not causal",
    "roberta": "logits are not its output head times the last hidden state",
    "gemma3n": r"a second table \(model\.embed_tokens_per_layer\.weight\)",
    "gemma4": r"a second table \(model\.embed_tokens_per_layer\.weight\)",
}


def ends_in_a_greedy_rollout(model: torch.nn.Module, prompt: list[int], result: Result) -> bool:
    """Whether what follows the last token that was taken over is greedy."""
    kept = max([r.position + 1 for r in result.revisions if r.accepted], default=0)
    expected = greedy(model, prompt + result.token_ids[:kept], COUNT - kept)
    return result.token_ids[kept:] == expected


@pytest.mark.parametrize("name", [name for name in LANGUAGE_MODELS if name not in REFUSED])
def test_greedy_tokens_of_the_sequential_loop(name):
    model = language_model(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decoder = NablaDecoder(model, None, None, config=GREEDY, loop="sequential")
    said = [str(w.message) for w in caught if w.category is UserWarning and "cache" in str(w.message)]
    assert len(said) == (name in UNCACHED) or (said and name in NOT_CACHED_BY_ALL and OLD)
    assert all(type(model).__name__ in line and "\n" not in line for line in said)
    for prompt, result in zip(PROMPTS, decoder.generate(PROMPTS, max_new_tokens=COUNT), strict=True):
        assert ends_in_a_greedy_rollout(model, prompt, result)


@pytest.mark.parametrize("name", [name for name in LANGUAGE_MODELS if name not in REFUSED])
@pytest.mark.filterwarnings("ignore:.*reads .* no .*cache")
def test_the_batched_loop_gives_the_same_or_refuses_in_one_line(name):
    model = language_model(name, dtype=torch.float32 if name in NARROW else torch.float64)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products have no float64
    if name in SEQUENTIAL:
        with pytest.raises(ModelError, match=f"{type(model).__name__} has {SEQUENTIAL[name]}") as refusal:
            NablaDecoder(model, None, None, loop="batched")
        message = str(refusal.value)
        assert "loop='sequential'" in message
        assert "\n" not in message
        assert len(message) < 300
        return
    batched, sequential = (
        NablaDecoder(model, None, None, config=SAMPLED, loop=loop).generate(PROMPTS, max_new_tokens=COUNT)
        for loop in ("batched", "sequential")
    )
    for ours, theirs in zip(batched, sequential, strict=True):
        assert (ours.token_ids, ours.revisions) == (theirs.token_ids, theirs.revisions)


@pytest.mark.parametrize("loop", ["sequential", "batched", "auto"])
@pytest.mark.parametrize("name", REFUSED)
def test_language_models_that_are_refused(name, loop):
    model = language_model(name)
    with pytest.raises(ModelError, match=f"{type(model).__name__}.*{REFUSED[name]}"):
        NablaDecoder(model, None, None, loop=loop)


@pytest.mark.parametrize("name", [name for name in REWARD_MODELS if name != "t5"])
def test_rewards_are_the_models_own(name):
    lm, rm = language_model("qwen2", max_position_embeddings=128), families.reward_model(name)
    decoder = NablaDecoder(lm, rm, None, config=SAMPLED, loop="sequential")
    for prompt, result in zip(PROMPTS, decoder.generate(PROMPTS, max_new_tokens=COUNT), strict=True):
        ids = torch.tensor([prompt + result.token_ids])
        with torch.no_grad():
            own = rm(ids, attention_mask=torch.ones_like(ids)).logits.item()
        assert result.reward == pytest.approx(own, rel=1e-4, abs=1e-5)


# Positions of a response that fit behind a prompt of 22 tokens; None: no limit.
ROOM = {"qwen2": 42, "gpt2": 12, "opt": 12, "mpt": 12, "openai": 12, "roberta": 10, "mpnet": 10}
ROOM |= {"bert": 12, "deberta": 12, "xlnet": None, "ctrl": 12}


@pytest.mark.parametrize("name", ROOM)
def test_responses_end_where_the_reward_models_positions_end(name):
    """The last position is read: one more would not fit."""
    lm, rm = language_model("qwen2", max_position_embeddings=128), families.reward_model(name)
    config = DTOConfig(max_generations=1)
    decoder = NablaDecoder(lm, rm, None, config=config, loop="sequential")
    (result,) = decoder.generate([list(range(30, 52))], max_new_tokens=50)
    assert len(result.token_ids) == (ROOM[name] or 50)


@pytest.mark.parametrize("loop", ["sequential", "batched"])
@pytest.mark.parametrize(("name", "field"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings")])
def test_a_short_prompt_beside_one_that_fills_the_positions(name, field, loop):
    model = language_model(name, dtype=torch.float64, **{field: 24})
    decoder = NablaDecoder(model, None, None, config=SAMPLED, loop=loop)
    results = decoder.generate([[5] * 22, [5, 6]], max_new_tokens=100)
    assert [len(result.token_ids) for result in results] == [2, 22]
    alone = NablaDecoder(model, None, None, config=SAMPLED, loop="sequential")
    for prompt, result in zip([[5] * 22, [5, 6]], results, strict=True):
        assert alone.generate([prompt], max_new_tokens=100)[0].token_ids == result.token_ids
