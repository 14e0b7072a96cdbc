"""Sampling and Best-of-N: the tokens of ``generate``, the distribution of the logits, the best reward."""

from __future__ import annotations

import pickle
from dataclasses import replace

import families
import pytest
import torch
from pool_watch import watched_pools
from test_attribution import unread
from tiny_models import (
    EOS,
    VOCABULARY,
    causal_lm,
    reward_model,
    shared_lm,
    shared_reward_model,
    word_tokenizer,
)
from torch import nn

import nabla_fast
from nabla_fast import (
    Candidate,
    DecodingFailed,
    DecodingInterrupted,
    DTOConfig,
    FunctionReward,
    InputError,
    ModelError,
    NablaDecoder,
    RewardEnsemble,
    RowError,
    Sampler,
    SampleResult,
    SamplingConfig,
    Stats,
    VocabularyAlignment,
    best_of_n,
    sample,
)
from nabla_fast.checkpoints import bundled, load_language_model, load_reward_model, load_tokenizer
from nabla_fast.decode.batched.sample_loop import SampleLoop
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.sampling import filtered_probabilities
from nabla_fast.decode.stop import StopStrings
from nabla_fast.demo import countdown
from nabla_fast.models import LanguageModel, RewardModel

GREEDY = SamplingConfig(temperature=0.0)
HOT = SamplingConfig(temperature=1.5)
PROMPTS = [[5, 9, 3], [7], [20, 4, 4, 11], [6, 6], [8, 10]]


def tokens(results: list[SampleResult]) -> list[list[list[int]]]:
    return [[candidate.token_ids for candidate in result.candidates] for result in results]


# -- greedy ------------------------------------------------------------------------------------------


def generated(model: nn.Module, prompt: list[int], length: int) -> list[int]:
    """What transformers' own greedy ``generate`` adds to a prompt, without an EOS."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length, pad_token_id=0
    )
    added = output[0, len(prompt) :].tolist()
    return added[:-1] if added[-1] in LanguageModel(model).eos_ids else added


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_tied", "llama", "qwen3", "mistral", "gpt2", "gemma3"])
def test_greedy_tokens_are_those_of_generate(kind: str):
    model = shared_lm(kind)
    results = sample(model, None, PROMPTS, count=2, sampling=GREEDY, max_new_tokens=20)
    for prompt, result in zip(PROMPTS, results, strict=True):
        expected = generated(model, prompt, 20)
        assert [candidate.token_ids for candidate in result.candidates] == [expected, expected]
        assert result.token_ids == expected


# A hybrid; states in one pass; states token by token; one row at a time; nothing kept.
@pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "mamba", "rwkv", "openai", "bloom"])
@pytest.mark.filterwarnings("ignore:.*everything is read again")
def test_greedy_tokens_of_models_with_their_own_caches(name: str):
    model = families.language_model(name, dtype=torch.float64, vocab_size=VOCABULARY)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    results = sample(model, None, PROMPTS, count=2, sampling=GREEDY, max_new_tokens=10)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert [c.token_ids for c in result.candidates] == [generated(model, prompt, 10)] * 2


@pytest.mark.smoke
def test_greedy_answers_of_the_bundled_model():
    lm, tokenizer = load_language_model(bundled("lm")), load_tokenizer(bundled("tokenizer"))
    prompts = [countdown.render(problem) for problem in countdown.held_out(12, 5)]
    results = sample(lm, tokenizer, prompts, sampling=GREEDY, max_new_tokens=40)
    for prompt, result in zip(prompts, results, strict=True):
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert result.token_ids == generated(lm, ids, 40)
        assert result.text == tokenizer.decode(result.token_ids, skip_special_tokens=True)
        assert result.finish_reason == "eos"


# -- draws -------------------------------------------------------------------------------------------


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Of Pearson's chi-square test, cells of fewer than 5 expected draws taken together."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    cells = [(counts[~rare].double(), expected[~rare]), (counts[rare].sum(), expected[rare].sum())]
    statistic = sum(((seen - mean) ** 2 / mean.clamp(min=1e-9)).sum() for seen, mean in cells)
    freedom = int((~rare).sum()) - (0 if float(expected[rare].sum()) > 0 else 1)
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), statistic / 2))


def probabilities_after(prompt: list[int], sampling: SamplingConfig) -> torch.Tensor:
    logits = shared_lm("qwen2")(torch.tensor([prompt])).logits[0, -1].detach()
    return filtered_probabilities(logits, sampling)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(),
        HOT,
        SamplingConfig(0.7, 20, 0.8),
        SamplingConfig(1.3, 6),
        SamplingConfig(1.0, 0, 0.6),
    ],
    ids=str,
)
def test_first_tokens_have_the_distribution_of_the_warped_logits(sampling: SamplingConfig):
    expected = [probabilities_after(prompt, sampling) for prompt in PROMPTS]

    def fits(seed: int) -> bool:
        results = sample(
            shared_lm("qwen2"), None, PROMPTS, count=2000, sampling=sampling, seed=seed, max_new_tokens=1
        )
        for found, probabilities in zip(tokens(results), expected, strict=True):
            # A response that is empty drew the EOS.
            drawn = torch.tensor([response[0] if response else EOS for response in found])
            counts = drawn.bincount(minlength=VOCABULARY)
            assert not counts[probabilities == 0].any()
            if int((probabilities > 0).sum()) > 1 and p_value(counts, probabilities) < 1e-3:
                return False
        return True

    # The draws of a seed never change; a second one settles an unlucky first.
    assert fits(0) or fits(1)


def test_responses_are_drawn_independently():
    sampling = SamplingConfig(2.0, 3)
    probabilities = probabilities_after(PROMPTS[0], sampling)
    (result,) = sample(
        shared_lm("qwen2"), None, PROMPTS[:1], count=6000, sampling=sampling, max_new_tokens=1
    )
    drawn = torch.tensor([c.token_ids[0] if c.token_ids else EOS for c in result.candidates])
    pairs = drawn[::2] * VOCABULARY + drawn[1::2]
    counts = pairs.bincount(minlength=VOCABULARY**2)
    assert p_value(counts, torch.outer(probabilities, probabilities).flatten()) > 1e-3


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "mamba2"])
def test_a_response_depends_on_its_prompt_seed_and_number_alone(kind: str):
    model = (
        families.language_model(kind, dtype=torch.float64, vocab_size=VOCABULARY)
        if kind == "mamba2"
        else shared_lm(kind)
    )
    options = {"sampling": HOT, "max_new_tokens": 9}
    together = tokens(sample(model, None, PROMPTS, count=4, seed=[3, 1, 4, 1, 5], **options))
    assert len({tuple(response) for response in together[0]}) > 1
    for n, (prompt, seed) in enumerate(zip(PROMPTS, [3, 1, 4, 1, 5], strict=True)):
        assert tokens(sample(model, None, [prompt], count=4, seed=seed, **options)) == [together[n]]
        assert tokens(sample(model, None, [prompt], count=2, seed=seed, **options)) == [together[n][:2]]
    # A prompt's responses in parts, and prompts one after another.
    few = sample(model, None, PROMPTS, count=4, seed=[3, 1, 4, 1, 5], batch_size=3, **options)
    assert tokens(few) == together
    assert few[0].stats.rounds == 2


def problem(prompt: list[int], length: int = 9) -> Problem:
    return Problem(tuple(prompt), tuple(prompt), (4,), 7, length, frozenset({EOS}), StopStrings())


def _stats(count: int) -> list[Stats]:
    return [Stats() for _ in range(count)]


def test_the_first_response_is_the_decoders_first_rollout():
    config = DTOConfig(max_generations=1, rollout_sampling=HOT, draws="philox")
    decoder = NablaDecoder(shared_lm("qwen2"), None, None, config=config)
    rollouts = decoder.generate(PROMPTS, seed=9, max_new_tokens=12)
    results = sample(shared_lm("qwen2"), None, PROMPTS, count=2, sampling=HOT, seed=9, max_new_tokens=12)
    assert [r.token_ids for r in results] == [r.token_ids for r in rollouts]


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "hot"])
def test_steps_that_the_host_looks_at_later_draw_the_same(sampling: SamplingConfig):
    lm = LanguageModel(shared_lm("qwen2"))
    rm = RewardModel(shared_reward_model("qwen2"), VocabularyAlignment.identity())
    stop = StopStrings(["cc"], word_tokenizer())
    problems = [
        Problem(tuple(prompt), tuple(prompt), (4,), 7, length, frozenset({EOS}), stop)
        for prompt, length in zip(PROMPTS, (11, 30, 1, 8, 20), strict=True)
    ]
    found = []
    for turns in (1, 8):
        stats = [Stats() for _ in problems]
        loop = SampleLoop(lm, rm, sampling, count=3, turns=turns)
        decoded = dict(loop.decode(problems, stats))
        found.append(
            [[(d.tokens, pytest.approx(d.reward, abs=1e-9)) for d in decoded[n]] for n in range(5)]
        )
        found[-1].append([s.generated_tokens for s in stats])
    assert found[0] == found[1]


# -- ends --------------------------------------------------------------------------------------------


def test_one_token():
    results = sample(shared_lm("qwen2"), None, PROMPTS, count=3, sampling=HOT, max_new_tokens=1)
    for result in results:
        for candidate in result.candidates:
            assert candidate.finish_reason == ("length" if candidate.token_ids else "eos")
        assert result.stats.generated_tokens == 3


def test_every_end_is_named():
    tokenizer = word_tokenizer()
    results = sample(
        shared_lm("qwen2"), tokenizer, PROMPTS, count=30, sampling=HOT, max_new_tokens=12, stop=["ab"]
    )
    seen = set()
    for candidate in (c for result in results for c in result.candidates):
        seen.add(candidate.finish_reason)
        assert EOS not in candidate.token_ids
        assert candidate.text == tokenizer.decode(candidate.token_ids, skip_special_tokens=True)
        before = tokenizer.decode(candidate.token_ids[:-1], skip_special_tokens=True)
        assert "ab" not in before
        assert ("ab" in candidate.text) == (candidate.finish_reason == "stop")
        assert (len(candidate.token_ids) == 12) <= (candidate.finish_reason in ("length", "stop"))
    assert seen == {"eos", "stop", "length"}


def test_the_context_is_a_limit():
    lm = shared_lm("gpt2")  # of 64 positions, beyond which it has no embedding
    lm_ids = [5] * 60
    (result,) = sample(lm, None, [lm_ids], count=20, sampling=HOT)
    assert max(len(candidate.token_ids) for candidate in result.candidates) == 4
    with pytest.raises(InputError, match=r"^prompt 1: 64 tokens leave no room for a response"):
        sample(lm, None, [[5], [5] * 64])


# -- Best-of-N ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "bert"])
@pytest.mark.filterwarnings("ignore:.*everything is read again")
def test_the_winner_is_the_best_by_rewards_computed_anew(kind: str):
    lm, rm = shared_lm("qwen2"), shared_reward_model(kind)
    context = [([4, *prompt], [9, 8]) for prompt in PROMPTS]
    results = best_of_n(
        lm, rm, None, PROMPTS, n=6, sampling=HOT, seed=2, max_new_tokens=8, reward_context=context
    )
    own = RewardModel(rm, VocabularyAlignment.identity())
    for (prefix, suffix), result in zip(context, results, strict=True):
        rewards = []
        for candidate in result.candidates:
            end = [EOS] if candidate.finish_reason == "eos" else []
            rewards.append(float(own.score([[*prefix, *candidate.token_ids, *end, *suffix]])[0]))
        assert result.rewards == pytest.approx(rewards, abs=1e-9)
        best = result.candidates[max(range(6), key=rewards.__getitem__)]
        assert (result.token_ids, result.finish_reason) == (best.token_ids, best.finish_reason)
        assert result.reward == best.reward == max(result.rewards)
        assert result.revisions == []


def test_the_first_of_equals_wins():
    def of(*rewards: float | None) -> SampleResult:
        return SampleResult.of([Candidate(str(n), [n], r, "eos") for n, r in enumerate(rewards)], Stats())

    assert of(1.0, 3.0, 2.0, 3.0).text == "1"
    assert of(None, None).text == "0"
    assert of(-1.0, -2.0).rewards == [-1.0, -2.0]


def test_what_all_responses_share_is_read_once():
    tokenizer = word_tokenizer()
    lm, rm = shared_lm("qwen2"), shared_reward_model("qwen2")
    sampler = Sampler(lm, rm, tokenizer, count=7, sampling=HOT)
    results = sampler.generate(["ab", "cab", "b"], max_new_tokens=9)
    problems = sampler._reader.read(
        ["ab", "cab", "b"], seed=0, max_new_tokens=9, system_prompt=None, stop=(), reward_context=None
    )
    for problem, result in zip(problems, results, strict=True):
        drawn = [len(c.token_ids) + (c.finish_reason == "eos") for c in result.candidates]
        assert result.stats.generated_tokens == result.stats.llm_calls == sum(drawn)
        assert result.stats.token_passes["lm"] == len(problem.prompt_ids) + sum(drawn) - 7
        scored = sum(drawn) + 7 * len(problem.reward_suffix)
        assert result.stats.token_passes["rm"] == len(problem.reward_prefix) + scored
        assert result.stats.generations == 7
        assert set(result.stats.passes_for) == {"rollout", "score"}
        assert result.stats.seconds["rollout"] > 0 < result.stats.seconds["reward"]


@pytest.mark.smoke
def test_best_of_n_solves_more_than_the_first_sample():
    lm, rm = load_language_model(bundled("lm")), load_reward_model(bundled("rm"))
    problems = countdown.held_out(40, 3)
    prompts = [countdown.render(problem) for problem in problems]
    results = best_of_n(lm, rm, load_tokenizer(bundled("tokenizer")), prompts, seed=1, max_new_tokens=40)
    solved = [countdown.check(p, r.text) for p, r in zip(problems, results, strict=True)]
    first = [countdown.check(p, r.candidates[0].text) for p, r in zip(problems, results, strict=True)]
    assert sum(solved) > sum(first) + 5


# -- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{0}, {2}, {1, 4}, {0, 1, 2, 3, 4}], ids=str)
def test_prompts_whose_logits_are_not_finite_are_named(bad: set[int]):
    model, options = causal_lm("qwen2"), {"count": 3, "sampling": GREEDY, "max_new_tokens": 5}
    expected = sample(model, None, PROMPTS, **options)
    token = unread(expected)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    prompts = [[*prompt, token] if n in bad else prompt for n, prompt in enumerate(PROMPTS)]
    with pytest.raises(DecodingFailed, match=r"rollout has a NaN logit") as caught:
        sample(model, None, prompts, **options)
    assert set(caught.value.prompts) <= bad
    assert isinstance(caught.value.__cause__, RowError)
    results = sample(model, None, prompts, on_error="keep", **options)
    for n, result in enumerate(results):
        if n in bad:
            assert isinstance(result, SampleResult)
            assert str(result.error) == f"prompt {n}: rollout has a NaN logit"
            assert (result.candidates, result.finish_reason) == ([], "error")
        else:
            assert result.token_ids == expected[n].token_ids


@pytest.mark.parametrize("turns", [1, 8])
def test_logits_that_cease_to_be_finite_are_named(turns: int):
    model, given = causal_lm("qwen2"), [problem([5, 9, 3]), problem([7])]
    lm = LanguageModel(model)
    ((_, whole), _) = sorted(SampleLoop(lm, None, GREEDY, count=2, turns=turns).decode(given, _stats(2)))
    token = next(t for t in whole[0].tokens if t not in (EOS, 5, 9, 3))
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    loop = SampleLoop(lm, None, GREEDY, count=2, turns=turns)
    with watched_pools() as watch:
        found = dict(loop.decode(given, _stats(2), keep=True))
    assert isinstance(found[0], RowError)
    assert watch.all_given_back()


def test_a_reward_that_is_not_finite_is_named():
    lm, rm = shared_lm("qwen2"), reward_model("qwen2")
    sampler = Sampler(lm, rm, None, count=3, sampling=GREEDY)
    token = unread(sampler.generate(PROMPTS, max_new_tokens=5))
    with torch.no_grad():
        rm.model.embed_tokens.weight[token] = float("nan")
    context = [([token if n == 3 else 4], [5]) for n in range(len(PROMPTS))]
    with pytest.raises(DecodingFailed, match=r"^prompt 3: the reward model scores a response of .* as nan"):
        sampler.generate(PROMPTS, max_new_tokens=5, reward_context=context)


def test_finished_results_are_kept_on_ctrl_c():
    def interrupt(n: int, result: SampleResult) -> None:
        if n == 1:
            raise KeyboardInterrupt

    with pytest.raises(DecodingInterrupted) as caught:
        sample(
            shared_lm("qwen2"), None, PROMPTS, count=2, batch_size=2, max_new_tokens=4, on_result=interrupt
        )
    assert [result is not None for result in caught.value.results] == [True, True, False, False, False]


def test_a_limit_of_tokens_says_what_would_do():
    with pytest.raises(DecodingFailed, match=r"max_kv_tokens: the key-value pool may have 2 blocks"):
        sample(shared_lm("qwen2"), None, [[5] * 20], count=8, sampling=HOT, max_kv_tokens=32)


@pytest.mark.parametrize("turns", [1, 8])
def test_everything_held_is_given_back(turns: int):
    lm = LanguageModel(shared_lm("qwen2"))
    rm = RewardModel(shared_reward_model("qwen2"), VocabularyAlignment.identity())
    loop = SampleLoop(lm, rm, HOT, count=5, batch_size=4, turns=turns)
    given = [problem(prompt) for prompt in PROMPTS]
    with watched_pools() as watch:
        assert len(dict(loop.decode(given, _stats(5)))) == len(PROMPTS)
    assert watch.all_given_back()


def test_a_sampler_can_be_used_again_and_sent_to_another_process():
    lm, rm = causal_lm("qwen2"), reward_model("qwen2")
    sampler = Sampler(lm, rm, None, count=2, sampling=HOT)
    first = sampler.generate(PROMPTS, max_new_tokens=6)
    again = pickle.loads(pickle.dumps(sampler)).generate(PROMPTS, max_new_tokens=6)
    assert tokens(first) == tokens(again) == tokens(sampler.generate(PROMPTS, max_new_tokens=6))
    with torch.no_grad():
        lm.lm_head.weight.mul_(-1)
    assert tokens(sampler.generate(PROMPTS, max_new_tokens=6)) != tokens(first)
    assert set(sampler.describe()) == {"loop", "lm", "reward_model"}
    assert replace(first[0], error=None).to_dict()["candidates"][1]["token_ids"] == tokens(first)[0][1]


def test_nothing_to_answer():
    assert sample(shared_lm("qwen2"), None, []) == []


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"count": 0}, "count must be a whole number from 1 to 1073741824, got 0"),
        ({"count": True}, "count must be a whole number from 1 to 1073741824, got True"),
        ({"sampling": 0.7}, "sampling must be a SamplingConfig, got float"),
        ({"batch_size": 0}, "batch_size must be a whole number ≥ 1, got 0"),
        ({"max_kv_tokens": 3}, "max_kv_tokens must be a whole number ≥ 16, got 3"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number ≥ 1, got 0"),
        ({"seed": -1}, "a seed must be a whole number from 0 to 2**62 - 1, got -1"),
        ({"seed": [1]}, "seed must be one number or one a prompt, got 1 for 5 prompts"),
        ({"stop": ["x"]}, "stop strings need a tokenizer"),
        ({"on_error": "drop"}, "on_error must be 'raise' or 'keep', got 'drop'"),
        ({"on_result": 1}, "on_result must be callable, got int"),
        ({"prompts": "ab"}, "prompts must be a list of prompts, got str"),
        ({"prompts": [[5], [99]]}, "prompt 1: token id 99 at position 0 is outside the vocabulary of 24"),
        ({"prompts": ["ab"]}, "prompt 0: text needs a tokenizer; without one, pass token ids"),
        ({"lm": 1}, "lm must be a transformers model, got int"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line(options: dict, line: str):
    given = {"lm": shared_lm("qwen2"), "tokenizer": None, "prompts": PROMPTS} | options
    with pytest.raises(InputError) as caught:
        sample(**given)
    assert str(caught.value) == line


def test_best_of_n_refuses_what_is_no_reward_model():
    lm = shared_lm("qwen2")
    with pytest.raises(InputError, match=r"^best_of_n needs a reward model"):
        best_of_n(lm, None, None, PROMPTS)
    with pytest.raises(InputError, match=r"^n must be a whole number ≥ 1, got 0$"):
        best_of_n(lm, shared_reward_model("qwen2"), None, PROMPTS, n=0)
    with pytest.raises(ModelError, match=r"2 labels \(LABEL_0, LABEL_1\); a reward model has one"):
        best_of_n(lm, lm, None, PROMPTS)
    assert {"sample", "best_of_n", "Sampler"} <= set(nabla_fast.__all__)


def test_best_of_n_by_a_weighted_sum_of_rewards():
    lm, rm = shared_lm("qwen2"), shared_reward_model("qwen2")

    def shortness(prompt: list[int], response: list[int]) -> float:
        return -float(len(response))

    judges = [rm, FunctionReward(shortness, reads="tokens")]
    both = best_of_n(lm, RewardEnsemble(judges, [1.0, 0.5]), None, PROMPTS, n=4, max_new_tokens=9)
    alone = best_of_n(lm, rm, None, PROMPTS, n=4, max_new_tokens=9)
    assert tokens(both) == tokens(alone)
    for result, of_model in zip(both, alone, strict=True):
        for candidate, score in zip(result.candidates, of_model.rewards, strict=True):
            # An EOS is scored, and is no part of the answer.
            length = len(candidate.token_ids) + (candidate.finish_reason == "eos")
            assert candidate.reward == pytest.approx(score - 0.5 * length, rel=1e-5, abs=1e-5)
        assert result.reward == max(result.rewards)
    by_length = best_of_n(lm, judges[1], None, PROMPTS, n=4, max_new_tokens=9)
    assert [result.reward for result in by_length] == [max(result.rewards) for result in by_length]
