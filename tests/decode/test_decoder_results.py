"""What a decode returns: determinism, prompts of every kind, ends of a response, revisions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import BOS, EOS, causal_lm, reward_model, shared_lm, shared_reward_model, word_tokenizer

from nabla_fast import DTOConfig, NablaDecoder, Result, Revision, SamplingConfig, Stats

# Large steps and no selector: most positions are proposals.
CONFIG = DTOConfig(iters=4, lr=1.0, confidence_threshold=None, max_generations=4)
GREEDY = SamplingConfig(temperature=0.0)
PROMPTS = [[5, 9, 3], [7], [20, 4, 4, 11]]
TOKENIZER = word_tokenizer()


def decoder(config: DTOConfig = CONFIG, *, eos=(EOS,), **options) -> NablaDecoder:
    lm = shared_lm("qwen2", eos_token_id=eos or None)
    options = {"reward_model": shared_reward_model("qwen2"), "tokenizer": TOKENIZER, **options}
    return NablaDecoder(lm, config=config, loop="sequential", **options)


def outcome(result: Result) -> tuple:
    """Everything but times and memory."""
    stats = replace(result.stats, seconds={}, peak_bytes=None)
    return result.text, result.token_ids, result.reward, result.finish_reason, result.revisions, stats


def outcomes(results: list[Result]) -> list[tuple]:
    return [outcome(result) for result in results]


def text_of(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


# -- determinism -------------------------------------------------------------------------------------


@pytest.mark.parametrize("relaxation", ["straight_through", "gumbel", "soft"])
def test_same_seed_same_result(relaxation):
    config = replace(CONFIG, relaxation=relaxation)
    first = decoder(config).generate(PROMPTS, seed=3, max_new_tokens=6)
    again = decoder(config)
    assert outcomes(again.generate(PROMPTS, seed=3, max_new_tokens=6)) == outcomes(first)
    assert outcomes(again.generate(PROMPTS, seed=3, max_new_tokens=6)) == outcomes(first)


def test_seeds_matter():
    answers = [decoder().generate([PROMPTS[0]], seed=s, max_new_tokens=6)[0].token_ids for s in range(4)]
    assert any(answer != answers[0] for answer in answers)


def test_prompts_do_not_affect_one_another():
    d, seeds = decoder(), [1, 2, 3]
    batch = outcomes(d.generate(PROMPTS, seed=seeds, max_new_tokens=6))
    singles = [
        outcome(d.generate([p], seed=s, max_new_tokens=6)[0]) for p, s in zip(PROMPTS, seeds, strict=True)
    ]
    backwards = outcomes(d.generate(PROMPTS[::-1], seed=seeds[::-1], max_new_tokens=6))
    assert batch == singles
    assert batch == backwards[::-1]


def test_one_seed_is_every_prompts_seed():
    same = decoder().generate([PROMPTS[0]] * 2, seed=7, max_new_tokens=6)
    assert outcome(same[0]) == outcome(same[1])
    assert outcomes(decoder().generate([PROMPTS[0]] * 2, seed=[7, 7], max_new_tokens=6)) == outcomes(same)


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = decoder().generate(PROMPTS, max_new_tokens=6)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert outcomes(decoder().generate(PROMPTS, max_new_tokens=6)) == outcomes(first)


# -- rollouts alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(0.9, 10, 0.9)])
def test_one_generation_is_a_plain_rollout(sampling):
    config = replace(CONFIG, max_generations=1, rollout_sampling=sampling)
    (result,) = decoder(config, eos=()).generate([PROMPTS[0]], seed=5, max_new_tokens=8)
    assert len(result.token_ids) == 8
    assert result.revisions == []
    assert (result.stats.gradient_passes, result.stats.generations, result.stats.rejections) == (0, 1, 0)
    assert result.stats.llm_calls == 8
    assert result.reward is not None
    if sampling is GREEDY:
        ids = torch.tensor([PROMPTS[0]])
        lm = shared_lm("qwen2", eos_token_id=None)
        theirs = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert result.token_ids == theirs[0, 3:].tolist()


def test_greedy_rollouts_take_no_draws():
    """With greedy rollouts and greedy resampling (top-k of 1) no seed matters."""
    config = replace(CONFIG, rollout_sampling=GREEDY, resample_sampling=SamplingConfig(1.0, 1))
    answers = [outcomes(decoder(config).generate(PROMPTS, seed=s, max_new_tokens=6)) for s in (1, 2)]
    assert answers[0] == answers[1]
    assert any(revisions for *_, revisions, _ in answers[0])


# -- prompts -----------------------------------------------------------------------------------------


def test_system_prompt_reaches_both_models():
    system = {"role": "system", "content": "ca"}
    user = {"role": "user", "content": "abc"}
    read = [4, 5, 3, 5, BOS, 3, 4, 5, 5, 4]  # "b" "ca" "c", "<bos>" "abc" "c", "b"
    assert TOKENIZER.decode(read) == "bcac<bos>abccb"
    d, options = decoder(), {"seed": 4, "max_new_tokens": 6}
    by_ids = d.generate([read], reward_context=[(read, [5])], **options)  # "c" follows a response
    assert outcomes(d.generate(["abc"], system_prompt="ca", **options)) == outcomes(by_ids)
    assert outcomes(d.generate([[user]], system_prompt="ca", **options)) == outcomes(by_ids)
    assert outcomes(d.generate([[system, user]], **options)) == outcomes(by_ids)
    assert outcomes(d.generate(["abc"], **options)) != outcomes(by_ids)


def test_chats_of_several_turns():
    chat = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "a"},
    ]
    ids = [BOS, 3, 4, 5, 4, 5, 5, BOS, 3, 5, 4]
    d = decoder()
    by_ids = d.generate([ids], reward_context=[(ids, [5])], max_new_tokens=6)
    assert outcomes(d.generate([chat], max_new_tokens=6)) == outcomes(by_ids)


def test_the_reward_model_has_its_own_template():
    theirs = word_tokenizer(
        chat_template="aa{% for m in messages %}{{ m['content'] }}b{% endfor %}"
        "{% if add_generation_prompt %}cc{% endif %}"
    )
    d = decoder(reward_tokenizer=theirs)
    ours, prefix = [BOS, 3, 4, 5, 4], [3, 3, 3, 4, 4]  # "<bos>" "ab" "c" "b"; "aa" "ab" "b"
    by_ids = d.generate([ours], reward_context=[(prefix, [4])], max_new_tokens=6)
    assert outcomes(d.generate(["ab"], max_new_tokens=6)) == outcomes(by_ids)


def test_a_doubled_bos_becomes_one():
    template = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    d = decoder(tokenizer=word_tokenizer(chat_template=template))
    by_ids = d.generate([[BOS, 3, 4]], reward_context=[([BOS, 3, 4], [])], max_new_tokens=6)
    assert outcomes(d.generate(["ab"], max_new_tokens=6)) == outcomes(by_ids)


def test_token_ids_may_be_tensors():
    by_list = decoder().generate([PROMPTS[0]], max_new_tokens=4)
    assert outcomes(decoder().generate([torch.tensor(PROMPTS[0])], max_new_tokens=4)) == outcomes(by_list)


def test_no_prompts_no_results():
    assert decoder().generate([]) == []


def test_without_a_tokenizer_there_is_no_text():
    (result,) = decoder(tokenizer=None).generate([PROMPTS[0]], max_new_tokens=4)
    assert result.text is None
    assert result.token_ids


# -- the end of a response ---------------------------------------------------------------------------


@pytest.mark.parametrize("eos", [(6,), (EOS, 4, 9, 13, 17)])
def test_eos_ends_a_response_and_is_left_out(eos):
    results = decoder(eos=eos).generate(PROMPTS * 3, seed=list(range(9)), max_new_tokens=9)
    assert {result.finish_reason for result in results} == {"eos", "length"}
    for result in results:
        assert not set(result.token_ids) & set(eos)
        assert result.finish_reason == "eos" or len(result.token_ids) == 9
        assert result.text == text_of(result.token_ids)


def test_the_reward_model_reads_the_eos():
    config = replace(CONFIG, max_generations=1)
    results = decoder(config, eos=(6,)).generate(
        PROMPTS, max_new_tokens=30, reward_context=[(PROMPTS[0], [8])] * 3
    )
    ended = [result for result in results if result.finish_reason == "eos"]
    assert ended
    for result in ended:
        ids = torch.tensor([[*PROMPTS[0], *result.token_ids, 6, 8]])
        with torch.no_grad():
            expected = shared_reward_model("qwen2")(ids, attention_mask=torch.ones_like(ids)).logits.item()
        assert result.reward == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("stop", ["aba", ["cab", "bbb"], ["ccc", "ab"]])
def test_stop_strings_end_a_response(stop):
    strings = [stop] if isinstance(stop, str) else stop
    results = decoder(eos=()).generate(PROMPTS * 4, seed=list(range(12)), max_new_tokens=9, stop=stop)
    stopped = [result for result in results if result.finish_reason == "stop"]
    assert stopped
    for result in results:
        before = text_of(result.token_ids[:-1])
        assert not any(string in before for string in strings)
        assert any(string in result.text for string in strings) == (result in stopped)
    # Some stop strings are put together by several tokens.
    assert any(
        all(string not in text_of([token]) for token in result.token_ids for string in strings)
        for result in stopped
    )


def test_max_new_tokens_and_the_context_bound_the_length():
    (result,) = decoder(eos=()).generate([PROMPTS[0]], max_new_tokens=5)
    assert (len(result.token_ids), result.finish_reason) == (5, "length")
    long = [3] * 60
    config = replace(CONFIG, max_generations=2)
    context = [([4] * 58, [5])]  # the reward model's 64 tokens leave 5, the LM's 4
    (result,) = decoder(config, eos=()).generate([long], max_new_tokens=50, reward_context=context)
    assert (len(result.token_ids), result.finish_reason) == (4, "length")
    context = [([4] * 61, [5])]
    (result,) = decoder(config, eos=()).generate([long], max_new_tokens=50, reward_context=context)
    assert (len(result.token_ids), result.finish_reason) == (2, "length")


# -- conditions at their edge ------------------------------------------------------------------------


def test_an_equal_reward_is_no_improvement():
    rm = reward_model("qwen2")
    with torch.no_grad():
        rm.score.weight.zero_()
    results = decoder(replace(CONFIG, nll_coeff=1.0), reward_model=rm).generate(PROMPTS, max_new_tokens=6)
    revisions = [revision for result in results for revision in result.revisions]
    assert revisions
    assert not any(revision.accepted for revision in revisions)


def test_a_position_at_the_thresholds_is_selected():
    """Certain of every token, the LM has confidence 1 and entropy 0; without a loss the gradient is 0."""
    lm = causal_lm("qwen2", eos_token_id=None)
    with torch.no_grad():
        lm.lm_head.weight.mul_(1e4)
    selectors = {"confidence_threshold": 1.0, "entropy_threshold": 0.0, "grad_threshold": 0.0}
    config = DTOConfig(iters=2, nll_coeff=0.0, reward_coeff=0.0, **selectors)
    decoder = NablaDecoder(lm, None, None, config=config, loop="sequential")
    (result,) = decoder.generate([PROMPTS[0]], max_new_tokens=4)
    assert result.stats.gradient_passes == 2 * 4  # at each position one to select, one to descend


# -- revisions and callbacks -------------------------------------------------------------------------


@pytest.mark.parametrize("rejection", [True, False])
def test_revisions_agree_with_tokens(rejection):
    config = replace(CONFIG, rejection=rejection, max_generations=6)
    results = decoder(config).generate(PROMPTS * 2, seed=list(range(6)), max_new_tokens=8)
    assert any(result.revisions for result in results)
    for result in results:
        tokens = result.token_ids + [EOS] * (result.finish_reason == "eos")
        positions = [revision.position for revision in result.revisions]
        assert positions == sorted(set(positions))
        assert result.stats.generations == 1 + len(result.revisions)
        assert result.stats.rejections == sum(not revision.accepted for revision in result.revisions)
        current = None
        for revision in result.revisions:
            assert revision.new_token != revision.old_token
            kept = revision.new_token if revision.accepted else revision.old_token
            assert tokens[revision.position] == kept
            if not rejection:
                assert revision.accepted
                assert revision.reward_before is revision.reward_after is None
                continue
            assert revision.accepted == (revision.reward_after > revision.reward_before)
            assert current in (None, revision.reward_before)
            current = revision.reward_after if revision.accepted else revision.reward_before
        assert current in (None, result.reward)


def test_without_a_reward_model_every_proposal_is_accepted():
    results = decoder(replace(CONFIG, nll_coeff=1.0), reward_model=None).generate(PROMPTS, max_new_tokens=6)
    revisions = [revision for result in results for revision in result.revisions]
    assert revisions
    assert all(revision.accepted for revision in revisions)
    assert {result.reward for result in results} == {None}


def test_results_are_handed_over_as_they_finish():
    seen = []
    results = decoder().generate(
        PROMPTS, max_new_tokens=4, on_result=lambda n, result: seen.append((n, result))
    )
    assert seen == list(enumerate(results))


def test_a_result_is_ready_for_json():
    (result,) = decoder().generate(["ab"], max_new_tokens=6)
    restored = json.loads(json.dumps(result.to_dict()))
    assert restored["token_ids"] == result.token_ids
    assert restored["stats"]["token_passes"] == result.stats.token_passes
    assert len(restored["revisions"]) == len(result.revisions)


@pytest.mark.parametrize(
    ("before", "after", "accepted", "reason"),
    [
        (0.5, 0.75, True, "accepted: its reward 0.75 is above 0.5"),
        (0.5, 0.5, False, "rejected: its reward 0.5 is not above 0.5"),
        (0.5, -1.25, False, "rejected: its reward -1.25 is not above 0.5"),
        (None, None, True, "accepted: there is no rejection step"),
    ],
)
def test_a_revision_says_why(before, after, accepted, reason):
    revision = Revision.judged(3, 7, 9, before, after)
    assert revision.accepted == accepted
    assert revision.reason == reason
    result = Result("a", [1], after, "eos", [revision], Stats())
    assert result.to_dict()["revisions"][0]["reason"] == reason
