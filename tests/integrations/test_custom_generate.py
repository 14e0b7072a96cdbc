"""``model.generate(custom_generate=decoder)``: the decoder's tokens, in transformers' form."""

from __future__ import annotations

import pytest
import torch
import transformers
from prompts import MOST, SAMPLINGS, decoder, expected, padded, prompts, responses, tokenizer
from tiny_models import EOS, causal_lm, reward_model, shared_lm
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from nabla_fast import (
    DecodingFailed,
    DTOConfig,
    FunctionReward,
    InputError,
    ModelError,
    NablaDecoder,
    Result,
    Sampler,
    SamplingConfig,
)
from nabla_fast.integrations.generate_call import SEED_STRIDE

pytestmark = [
    # What transformers says of its own arguments; the tests look at what comes back.
    pytest.mark.filterwarnings("ignore:.*pad_token_id.*:UserWarning"),
]

GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 10, "top_p": 0.95}


def generate(made, rows=None, *, inputs=None, **options) -> torch.Tensor:
    """Through transformers, with the options of these tests."""
    inputs = padded(prompts(3) if rows is None else rows) if inputs is None else inputs
    options = {"max_new_tokens": MOST, "seed": 5, "pad_token_id": EOS, **options}
    return shared_lm("qwen2").generate(**inputs, custom_generate=made, **options)


@pytest.mark.parametrize("loop", ["batched", "sequential"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_twenty_prompts_by_decoder_generate_and_pipeline(sampling, loop):
    made, rows = decoder(sampling, loop), prompts(20)
    answers = expected(made, rows)
    assert len({tuple(answer) for answer in answers}) > 5
    said = GREEDY if sampling == "greedy" else SAMPLED

    alone = [generate(made, [row]) for row in rows]
    assert [responses(tokens, len(row))[0] for tokens, row in zip(alone, rows, strict=True)] == answers
    for stated in ({}, said):
        batch = padded(rows)
        tokens = generate(made, inputs=batch, **stated)
        assert responses(tokens, batch["input_ids"].shape[1]) == answers
        assert torch.equal(tokens[:, : batch["input_ids"].shape[1]], batch["input_ids"])

    pipe = transformers.pipeline("text-generation", model=shared_lm("qwen2"), tokenizer=tokenizer())
    texts = [tokenizer().decode(row) for row in rows]
    assert [tokenizer()(text).input_ids for text in texts] == rows
    for batch_size in (1, 6):
        found = pipe(
            texts,
            custom_generate=made,
            batch_size=batch_size,
            max_new_tokens=MOST,
            seed=5,
            return_tensors=True,
            **said,
        )
        for (record,), row, answer in zip(found, rows, answers, strict=True):
            tokens = record["generated_token_ids"]
            while tokens[0] == EOS:  # the padding; no prompt begins with it
                tokens = tokens[1:]
            assert tokens[: len(row)] == row
            assert responses(torch.tensor([tokens]), len(row)) == [answer]


def test_pipelines_text_is_the_results():
    made = decoder("greedy")
    pipe = transformers.pipeline("text-generation", model=shared_lm("qwen2"), tokenizer=tokenizer())
    (record,) = pipe(
        "abcab", custom_generate=made, max_new_tokens=MOST, seed=5, do_sample=False, return_full_text=False
    )
    ids = tokenizer()("abcab").input_ids
    (result,) = made.generate([ids], max_new_tokens=MOST, seed=5)
    assert record["generated_text"] == result.text


def test_pipelines_default_of_sampling_counts_as_said():
    made = decoder("greedy")
    pipe = transformers.pipeline("text-generation", model=shared_lm("qwen2"), tokenizer=tokenizer())
    config = pipe._default_generation_config
    assert (config.do_sample, config.temperature) == (True, 0.7)
    tokens = pipe("abcab", custom_generate=made, max_new_tokens=MOST, seed=5, return_tensors=True)
    ids = tokenizer()("abcab").input_ids
    warm = made._rolling_out_by(SamplingConfig(0.7, 0, 1.0))
    found = responses(torch.tensor([tokens[0]["generated_token_ids"]]), len(ids))
    assert found == expected(warm, [ids])


def test_padding_changes_no_token():
    made, rows = decoder(), prompts(6)
    for row, answer in zip(rows, expected(made, rows), strict=True):
        tokens = generate(made, inputs=padded([row, [4] * 12]))
        assert responses(tokens[:1], 12) == [answer]


def test_no_mask_is_a_mask_of_ones():
    made = decoder()
    inputs = {"input_ids": torch.tensor([[3, 4, 5], [5, 5, 3]])}
    assert responses(generate(made, inputs=inputs), 3) == expected(made, inputs["input_ids"].tolist())


def test_the_answer_has_its_eos_and_rows_are_filled_up():
    lm, rows = causal_lm("qwen2", eos_token_id=(EOS, 11)), prompts(20)
    made = NablaDecoder(lm, reward_model("qwen2"), tokenizer(), config=decoder().config)
    results = made.generate(rows, max_new_tokens=MOST, seed=5)
    inputs = padded(rows)
    options = {"custom_generate": made, "max_new_tokens": MOST, "seed": 5, "pad_token_id": 9}
    tokens = lm.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert {result.finish_reason for result in results} == {"eos", "length"}
    longest = max(len(r.token_ids) + (r.eos_token_id is not None) for r in results)
    assert tokens.shape == (20, longest)
    for row, result in zip(tokens.tolist(), results, strict=True):
        ended = result.finish_reason == "eos"
        assert result.eos_token_id in ((EOS, 11) if ended else (None,))
        answer = result.token_ids + [result.eos_token_id] * ended
        assert row == answer + [9] * (longest - len(answer))
    unpadded = lm.generate(**inputs, **{**options, "pad_token_id": None})
    assert {row[-1] for row in unpadded.tolist() if 11 in row[-MOST:]} >= {EOS}  # the first EOS


def test_several_eos_tokens_of_the_call():
    made, rows = decoder(), prompts(20)
    plain = expected(made, rows)
    ends = sorted({answer[1] for answer in plain if len(answer) > 1})[:2]
    inputs = padded(rows)
    tokens = generate(made, inputs=inputs, eos_token_id=ends, pad_token_id=EOS)
    found = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    ended = [row for row in found if set(row) & set(ends)]
    assert ended
    for row in ended:
        first = min(row.index(end) for end in ends if end in row)
        assert set(row[first + 1 :]) <= {EOS}
    reached = shared_lm("qwen2").generation_config.eos_token_id
    assert reached == EOS  # the model's own is as it was


def test_max_length_counts_prompt_and_padding():
    made, rows = decoder(), prompts(4)
    inputs = padded(rows)
    width = inputs["input_ids"].shape[1]
    tokens = generate(made, inputs=inputs, max_new_tokens=None, max_length=width + 3)
    assert tokens.shape[1] <= width + 3
    assert responses(tokens, width) == expected(made, rows, max_new_tokens=3)


def test_what_the_call_says_of_drawing_replaces_the_decoders_and_the_rest_stays():
    made, rows = decoder(), prompts(6)
    width = padded(rows)["input_ids"].shape[1]

    def drawn(**said):
        return responses(generate(made, rows, **said), width)

    def own(*sampling):
        return expected(made._rolling_out_by(SamplingConfig(*sampling)), rows)

    assert drawn() == own(0.9, 10, 0.95) == expected(made, rows)
    assert drawn(do_sample=True) == own(0.9, 10, 0.95)
    assert drawn(do_sample=False) == own(0.0)
    assert drawn(do_sample=False) != drawn()
    assert drawn(temperature=1.7) == own(1.7, 10, 0.95) != drawn()
    assert drawn(top_k=2) == own(0.9, 2, 0.95) != drawn()
    assert drawn(top_k=0, top_p=1.0) == own(0.9, 0, 1.0)
    assert drawn(top_p=0.3) == own(0.9, 10, 0.3) != drawn()
    assert drawn(generation_config=GenerationConfig(do_sample=True, temperature=1.7)) == own(1.7, 10, 0.95)
    greedy = decoder("greedy")
    tokens = generate(greedy, rows, do_sample=True, temperature=1.3)
    # The decoder, greedy, says nothing of how else to draw but top_k=0 and top_p=1.
    assert responses(tokens, width) == own(1.3, 0, 1.0)


def test_a_setting_that_has_no_effect_is_refused():
    line = r"^temperature=0\.5 has no effect on greedy rollouts: pass do_sample=True, or leave it out$"
    with pytest.raises(InputError, match=line):
        generate(decoder(), do_sample=False, temperature=0.5)
    with pytest.raises(InputError, match=r"^top_k=5 has no effect on greedy rollouts"):
        generate(decoder("greedy"), top_k=5)
    assert generate(decoder(), do_sample=False, temperature=None, top_p=None).shape[0] == 3


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"temperature": 0.0}, r"^temperature must be > 0 with do_sample=True, got 0\.0: "),
        ({"top_k": -1}, r"^top_k must be a whole number ≥ 0"),
        ({"top_p": 1.5}, r"^top_p must be in \(0, 1\]"),
        ({"do_sample": "yes"}, r"^do_sample must be True or False, got 'yes'"),
        ({"num_return_sequences": 0}, r"^num_return_sequences must be a whole number ≥ 1, got 0"),
        ({"seed": [1, 2]}, r"^seed must be one number or one a prompt, got 2 for 3 prompts"),
        ({"seed": "x"}, r"^seed must be one number or one a prompt|^seed must be a whole number"),
        ({"reward_context": [([3], [4])]}, r"^reward_context must have one entry a prompt, got 1 for 3"),
        ({"stop_strings": [3]}, r"^stop_strings must be a string or a list of strings"),
    ],
)
def test_values_out_of_range(said, line):
    with pytest.raises(InputError, match=line):
        generate(decoder(), **said)


def test_the_models_generation_config_where_the_decoder_leaves_it_to_it():
    lm, rows = causal_lm("qwen2"), prompts(6)
    lm.generation_config.update(do_sample=True, temperature=1.3, top_k=7, top_p=0.9)
    own = NablaDecoder(lm, None, None, config=DTOConfig(rollout_sampling=None, iters=3))
    said = NablaDecoder(
        lm, None, None, config=DTOConfig(rollout_sampling=SamplingConfig(1.3, 7, 0.9), iters=3)
    )
    answers = expected(said, rows)
    assert expected(own, rows) == answers
    inputs = padded(rows)
    options = {"max_new_tokens": MOST, "seed": 5, "pad_token_id": EOS}
    for made in (own, said):
        tokens = lm.generate(**inputs, custom_generate=made, **options)
        assert responses(tokens, inputs["input_ids"].shape[1]) == answers

    lm.generation_config.update(do_sample=False)  # noticed at the next decode
    greedy = NablaDecoder(lm, None, None, config=DTOConfig(rollout_sampling=SamplingConfig(0.0), iters=3))
    assert expected(own, rows) == expected(greedy, rows) != answers
    lm.generation_config.update(do_sample=None, temperature=None)
    assert expected(own, rows) == expected(greedy, rows)  # transformers' default


@pytest.mark.parametrize("field", ["rollout_sampling", "resample_sampling"])
@pytest.mark.parametrize("top_k", [2, None])
def test_top_k_of_the_models_generation_config(field, top_k):
    lm, rows = causal_lm("qwen2"), prompts(8)
    lm.generation_config.top_k = top_k
    left = NablaDecoder(lm, None, None, config=DTOConfig(iters=3, **{field: SamplingConfig(1.1, None)}))
    said = DTOConfig(iters=3, **{field: SamplingConfig(1.1, 50 if top_k is None else top_k)})
    assert expected(left, rows) == expected(NablaDecoder(lm, None, None, config=said), rows)
    if top_k:
        all_kept = DTOConfig(iters=3, **{field: SamplingConfig(1.1, 0)})
        assert expected(left, rows) != expected(NablaDecoder(lm, None, None, config=all_kept), rows)


def test_a_generation_config_out_of_range_is_the_models_fault():
    lm = causal_lm("qwen2")
    lm.generation_config.do_sample, lm.generation_config.temperature = True, float("inf")
    with pytest.raises(ModelError, match=r"^Qwen2ForCausalLM's generation config: temperature must be"):
        NablaDecoder(lm, None, None, config=DTOConfig(rollout_sampling=None))


def test_sampler_takes_what_is_left_to_the_model():
    lm, rows = causal_lm("qwen2"), prompts(4)
    lm.generation_config.top_k = 3
    left, said = (Sampler(lm, None, None, count=3, sampling=SamplingConfig(1.1, k)) for k in (None, 3))
    options = {"max_new_tokens": 5}
    tokens = [
        [c.token_ids for r in s.generate(rows, **options) for c in r.candidates] for s in (left, said)
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("way", ["argument", "generation config"])
def test_return_sequences_are_decodes_with_seeds_of_their_own(way):
    made, rows = decoder(), prompts(2)
    if way == "argument":
        said = {"num_return_sequences": 3}
    else:
        config = GenerationConfig(do_sample=True, temperature=0.9, num_return_sequences=3)
        said = {"generation_config": config}
    tokens = generate(made, rows, **said)
    repeated = [row for row in rows for _ in range(3)]
    seeds = [5 + r * SEED_STRIDE for _ in rows for r in range(3)]
    assert tokens.shape[0] == 6
    answers = responses(tokens, 3)
    assert answers == expected(made, repeated, seed=seeds)
    assert len(set(map(tuple, answers))) > 2
    both = generate(
        made,
        rows,
        generation_config=GenerationConfig(do_sample=True, temperature=0.9, num_return_sequences=3),
        num_return_sequences=2,
    )
    assert responses(both, 3) == [answers[n] for n in (0, 1, 3, 4)]


def test_seeds_and_reward_contexts_of_each_prompt():
    made, rows = decoder(), prompts(3)
    contexts = [([3, 4], [5]), ([6], []), ([7, 8, 9], [4])]
    tokens = generate(made, rows, seed=[1, 2, 3], reward_context=contexts, num_return_sequences=2)
    repeated = [row for row in rows for _ in range(2)]
    answers = expected(
        made,
        repeated,
        seed=[own + r * SEED_STRIDE for own in (1, 2, 3) for r in (0, 1)],
        reward_context=[own for own in contexts for _ in (0, 1)],
    )
    assert responses(tokens, max(map(len, rows))) == answers


def test_return_dict():
    made, rows = decoder(), prompts(3)
    output = generate(made, rows, return_dict_in_generate=True)
    results = made.generate(rows, max_new_tokens=MOST, seed=5)
    assert torch.equal(output.sequences, generate(made, rows))
    assert isinstance(output, transformers.generation.GenerateDecoderOnlyOutput)
    assert [type(result) for result in output.results] == [Result] * 3
    assert [r.token_ids for r in output.results] == [r.token_ids for r in results]
    assert output.rewards.tolist() == pytest.approx([r.reward for r in results], abs=1e-9)
    assert output["sequences"] is output.sequences
    assert output.scores is None
    alone = NablaDecoder(shared_lm("qwen2"), None, None)
    assert generate(alone, rows, return_dict_in_generate=True).rewards is None


def test_return_dict_through_a_pipeline():
    pipe = transformers.pipeline("text-generation", model=shared_lm("qwen2"), tokenizer=tokenizer())
    options = {"max_new_tokens": MOST, "seed": 5, "do_sample": False, "return_dict_in_generate": True}
    made = decoder("greedy")
    ((record,), _) = pipe(["abcab", "ca"], custom_generate=made, batch_size=2, **options)
    (plain,) = pipe("abcab", custom_generate=made, max_new_tokens=MOST, seed=5, do_sample=False)
    assert record["generated_text"] == plain["generated_text"]


def stop_criterion(*strings: str) -> transformers.StopStringCriteria:
    """transformers' own criterion; it cannot be made with a tokenizer that knows three letters alone."""
    criterion = object.__new__(transformers.StopStringCriteria)
    criterion.stop_strings = strings
    return criterion


def test_stop_strings():
    made, rows = decoder(), prompts(20)
    plain = expected(made, rows)
    stops = expected(made, rows, stop=["ca", "bb"])
    assert plain != stops
    width = padded(rows)["input_ids"].shape[1]
    assert responses(generate(made, rows, stop_strings=["ca", "bb"]), width) == stops
    one = expected(made, rows, stop=["ca"])
    assert responses(generate(made, rows, stop_strings="ca"), width) == one
    criteria = StoppingCriteriaList([stop_criterion("ca", "bb")])
    assert responses(generate(made, rows, stopping_criteria=criteria), width) == stops
    # transformers asks for a tokenizer that it would hand on to nobody.
    with pytest.raises(ValueError, match="stop strings"):
        generate(made, rows, generation_config=GenerationConfig(stop_strings=["ca"]))


def test_stop_strings_need_a_token_that_fills_rows_up():
    lm = causal_lm("qwen2", eos_token_id=None)
    made = NablaDecoder(lm, None, tokenizer())
    options = {"custom_generate": made, "max_new_tokens": 4, "stop_strings": "c"}
    with pytest.raises(InputError, match=r"^pad_token_id is None, and rows that stop strings end differ"):
        lm.generate(**padded(prompts(2)), **options)
    assert lm.generate(**padded(prompts(2)), **options, pad_token_id=1).shape[0] == 2
    assert lm.generate(**padded(prompts(1)), **options).shape[0] == 1


class Biased(transformers.LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Early(transformers.StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        return torch.ones(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"logits_processor": LogitsProcessorList([Biased()])}, "^logits_processor has a Biased"),
        (
            {"prefix_allowed_tokens_fn": lambda *_: [3]},
            "^logits_processor has a PrefixConstrainedLogitsProcessor",
        ),
        (
            {"logits_processor": LogitsProcessorList([transformers.TemperatureLogitsWarper(0.3)])},
            "^logits_processor has a TemperatureLogitsWarper, which a decode does not run: .* temperature$",
        ),
        (
            {
                "logits_processor": LogitsProcessorList([transformers.TopKLogitsWarper(3)]),
                "generation_config": GenerationConfig(do_sample=True, top_k=5),
            },
            "^logits_processor has a TopKLogitsWarper, which a decode does not run: .*pass top_k",
        ),
        ({"stopping_criteria": StoppingCriteriaList([Early()])}, "^stopping_criteria has a Early"),
        ({"max_time": 3.0}, "max_time=3.0, which a decode does not do"),
        ({"token_type_ids": torch.ones(3, 4, dtype=torch.long)}, "token_type_ids"),
        ({"inputs_embeds": torch.zeros(3, 4, 16, dtype=torch.float64)}, "inputs_embeds"),
        ({"position_ids": torch.arange(7, 11).expand(3, -1)}, "^position_ids must count the tokens"),
        ({"logits_to_keep": 2}, "^generate was given logits_to_keep, which a decode does not read"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_a_decode_does_not_do_is_refused_by_name(said, line):
    with pytest.raises(ValueError, match=line):
        generate(decoder(), inputs=padded([[3, 4, 5, 3]] * 3), **said)


def test_criteria_of_the_callers_own_are_obeyed():
    made, rows = decoder(), prompts(4)
    width = padded(rows)["input_ids"].shape[1]
    shorter = StoppingCriteriaList([transformers.MaxLengthCriteria(width + 2)])
    tokens = generate(made, rows, stopping_criteria=shorter)
    assert responses(tokens, width) == expected(made, rows, max_new_tokens=2)


def test_arguments_that_say_what_a_decode_does_anyway():
    made, rows = decoder(), prompts(3)
    inputs = padded(rows)
    counted = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    tokens = generate(made, inputs=inputs | {"position_ids": counted}, past_key_values=DynamicCache())
    assert torch.equal(tokens, generate(made, rows))


def test_a_cache_that_holds_tokens_is_refused():
    lm, ids = shared_lm("qwen2"), torch.tensor([[3, 4, 5, 3]])
    cache = lm(ids[:, :2], past_key_values=DynamicCache()).past_key_values
    with pytest.raises(ValueError, match="holds tokens already, and a decode keeps its own cache"):
        generate(decoder(), inputs={"input_ids": ids}, past_key_values=cache)


@pytest.mark.parametrize(
    ("mask", "line"),
    [
        ([[1, 1, 1], [1, 1, 0]], "prompt 1 has padding after its first token: pad on the left"),
        ([[1, 0, 1], [1, 1, 1]], "prompt 0 has padding after its first token"),
        ([[1, 1, 1], [0, 0, 0]], "prompt 1 is all padding"),
        ([[1, 2, 1], [1, 1, 1]], "must hold 0 and 1 alone"),
    ],
)
def test_masks_that_are_no_padding_on_the_left(mask, line):
    inputs = {"input_ids": torch.full((2, 3), 4), "attention_mask": torch.tensor(mask)}
    with pytest.raises(InputError, match=rf"^attention_mask.*{line}"):
        generate(decoder(), inputs=inputs)


def test_a_prompt_of_bos_where_there_are_no_inputs():
    made = decoder()
    options = {"max_new_tokens": MOST, "seed": 5, "pad_token_id": EOS}
    for bos in (1, 6):
        tokens = shared_lm("qwen2").generate(custom_generate=made, bos_token_id=bos, **options)
        assert tokens[0, 0] == bos
        assert responses(tokens, 1) == expected(made, [[bos]])


def test_another_model():
    with pytest.raises(
        InputError, match=r"^the decoder was made for another Qwen2ForCausalLM: call generate on"
    ):
        causal_lm("qwen2").generate(**padded(prompts(1)), custom_generate=decoder(), max_new_tokens=2)


def test_a_call_without_generate():
    with pytest.raises(InputError, match=r"^generation_config is missing: a decoder is called by model"):
        decoder()(shared_lm("qwen2"), torch.tensor([[3]]))


def test_an_error_in_a_decode():
    def struck(*_):
        raise OSError("disk full")

    with pytest.warns(UserWarning, match="has no gradient"):
        made = NablaDecoder(shared_lm("qwen2"), FunctionReward(struck), tokenizer())
    with pytest.raises(DecodingFailed, match="disk full"):
        generate(made)


def test_models_are_left_as_they_were_and_gradients_are_off_for_nobody():
    lm = causal_lm("qwen2").train()
    made = NablaDecoder(lm, reward_model("qwen2"), tokenizer())
    lm.generate(**padded(prompts(2)), custom_generate=made, max_new_tokens=3)
    assert lm.training
    assert all(weight.requires_grad and weight.grad is None for weight in lm.parameters())
    assert torch.is_grad_enabled()


def test_decoders_for_other_samplings_are_kept_and_dropped():
    made = NablaDecoder(shared_lm("qwen2"), None, None)
    first = made._rolling_out_by(SamplingConfig(0.5))
    assert made._rolling_out_by(SamplingConfig(0.5)) is first
    assert made._rolling_out_by(made.config.rollout_sampling) is made
    for n in range(1, 9):
        made._rolling_out_by(SamplingConfig(n))
    assert len(made._others) <= 4
    assert made._rolling_out_by(SamplingConfig(0.5)) is not first


def test_sampler_is_a_callable_too():
    made = Sampler(shared_lm("qwen2"), reward_model("qwen2"), tokenizer(), count=4)
    rows = prompts(3)
    results = made.generate(rows, max_new_tokens=MOST, seed=5)
    output = generate(made, rows, return_dict_in_generate=True)
    answers = responses(output.sequences, max(map(len, rows)))
    assert answers == [r.token_ids for r in results]
    assert [len(r.candidates) for r in output.results] == [4, 4, 4]
    hot = generate(made, rows, temperature=3.0, top_k=0, top_p=1.0, return_dict_in_generate=True)
    assert hot.results[0].rewards != output.results[0].rewards


class Recorder(transformers.generation.streamers.BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        self.parts.append(value.tolist())

    def end(self):
        self.ended += 1


def test_a_streamer_gets_prompt_and_tokens():
    made, rows = decoder(), prompts(3)
    recorder = Recorder()
    inputs = padded(rows)
    tokens = generate(made.with_streamer(recorder), inputs=inputs)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(tokens, generate(made, rows))
    assert recorder.parts[0] == inputs["input_ids"].tolist()
    assert recorder.parts[1:] == tokens[:, width:].T.tolist()
    assert recorder.ended == 1
    ours = generate(made.with_streamer(Recorder()), rows, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(ours.sequences, generate(made, rows, do_sample=False))


def test_a_streamer_of_text(capsys):
    made = decoder("greedy")
    streamer = transformers.TextStreamer(tokenizer(), skip_prompt=True, skip_special_tokens=True)
    tokens = generate(made.with_streamer(streamer), [[3, 4, 5]])
    text = tokenizer().decode(tokens[0, 3:], skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == text


def test_a_streamer_has_its_end_after_an_error():
    recorder = Recorder()
    with pytest.raises(InputError, match="max_time"):
        generate(decoder().with_streamer(recorder), max_time=1.0)
    assert recorder.ended == 1


def test_what_is_no_streamer():
    with pytest.raises(InputError, match=r"^streamer must have the methods put and end.* got str$"):
        decoder().with_streamer("stdout")


def test_a_decoder_without_a_tokenizer():
    made = NablaDecoder(shared_lm("qwen2"), None, None)
    assert generate(made).shape[0] == 3
    with pytest.raises(InputError, match="stop strings need a tokenizer"):
        generate(made, stop_strings="a")


def test_generate_of_a_model_with_adapters():
    peft = pytest.importorskip("peft")
    inner = causal_lm("qwen2", eos_token_id=EOS)
    model = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["lm_head", "v_proj"])).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    model = model.double()
    made = NablaDecoder(model, None, tokenizer(), config=DTOConfig(rollout_sampling=SamplingConfig(0)))
    rows = prompts(3)
    inputs = padded(rows)
    tokens = model.generate(
        **inputs, custom_generate=made, max_new_tokens=MOST, seed=5, pad_token_id=EOS, do_sample=False
    )
    answers = [result.token_ids for result in made.generate(rows, seed=5, max_new_tokens=MOST)]
    assert [
        row[: len(a)]
        for row, a in zip(responses(tokens, inputs["input_ids"].shape[1]), answers, strict=True)
    ] == answers
