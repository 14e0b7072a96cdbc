"""Features of models that small probes do not see, and failures of probes."""

from __future__ import annotations

import re
import warnings

import pytest
import tiny_models
import torch
from families import language_model, reward_model
from torch import nn
from transformers.cache_utils import DynamicSlidingWindowLayer

from nabla_fast import DTOConfig, InputError, ModelError, NablaDecoder, SamplingConfig, VocabularyAlignment
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.models.paged_attention import PagedPass
from nabla_fast.models.prefix_reading import WholeReading
from nabla_fast.models.reader import PagedReader

GREEDY = DTOConfig(max_generations=1, rollout_sampling=SamplingConfig(0))
PROMPT = [5, 9, 3]
SMALL = {"initializer_range": 0.01}


def greedy(decoder: NablaDecoder) -> list[int]:
    return decoder.generate([PROMPT], max_new_tokens=6)[0].token_ids


def of_class(model: nn.Module, name: str, forward) -> nn.Module:
    """The model as one of a derived class with another forward."""
    model.__class__ = type(name, (type(model),), {"forward": forward})
    return model


def changed_logits(change):
    def forward(self, *given, **named):
        output = type(self).__base__.forward(self, *given, **named)
        output.logits = change(output.logits)
        return output

    return forward


# -- heads and scores --------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, SMALL], ids=["large weights", "small weights"])
def test_a_soft_cap_that_no_config_names_is_noticed(fields):
    capped = changed_logits(lambda logits: 30 * torch.tanh(logits / 30))
    model = of_class(tiny_models.causal_lm("qwen2", **fields), "Capped", capped)
    with pytest.raises(ModelError, match="Capped: logits are not its output head times"):
        LanguageModel(model)


@pytest.mark.parametrize(
    "change", [torch.tanh, lambda x: 1.02 * x, lambda x: x.clamp(max=50.0)], ids=["tanh", "scale", "bound"]
)
def test_a_score_that_is_changed_after_its_head_is_left_to_the_model(change):
    model = of_class(tiny_models.reward_model("qwen2", **SMALL), "Changed", changed_logits(change))
    rm = RewardModel(model, VocabularyAlignment.identity())
    assert not rm.scores_last
    ids = torch.tensor([PROMPT])
    own = model(ids, attention_mask=torch.ones_like(ids)).logits.item()
    assert float(rm.score([PROMPT])[0]) == pytest.approx(own, rel=1e-12)


class Adapter(nn.Module):
    """A head with a low-rank part beside its weight, as LoRA puts on."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.scale = base, 1.0
        self.delta = nn.Parameter(torch.zeros_like(base.weight))

    weight = property(lambda self: self.base.weight)

    def forward(self, hidden):
        return self.base(hidden) + self.scale * (hidden @ self.delta.T)


@pytest.mark.parametrize("put_on", ["before", "after"])
@pytest.mark.parametrize("loop", ["sequential", "batched"])
def test_an_adapter_on_the_head_that_changes_after_construction(loop, put_on):
    model = language_model("qwen2")
    expected = greedy(NablaDecoder(model, None, None, config=GREEDY, loop=loop))
    if put_on == "before":
        model.lm_head = Adapter(model.lm_head)
    decoder = NablaDecoder(model, None, None, config=GREEDY, loop=loop)
    if put_on == "after":
        model.lm_head = Adapter(model.lm_head)
    assert greedy(decoder) == expected  # it adds nothing yet
    with torch.no_grad():
        model.lm_head.delta.normal_()
    with pytest.raises(ModelError, match="logits are not its output head times"):
        greedy(decoder)
    model.lm_head.scale = 0.0
    assert greedy(decoder) == expected


@pytest.mark.parametrize("loop", ["sequential", "batched"])
def test_a_hook_that_changes_the_embeddings_after_construction(loop):
    model = language_model("gpt2")
    decoder = NablaDecoder(model, None, None, config=GREEDY, loop=loop)
    before = greedy(decoder)
    model.get_input_embeddings().register_forward_hook(lambda _, __, rows: -2 * rows)
    after = greedy(decoder)
    ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert after == ids[0, len(PROMPT) :].tolist()
    assert after != before


def test_a_gradient_that_a_layer_leaves_out_is_noticed():
    model = tiny_models.causal_lm("qwen2")
    for layer in model.model.layers:
        of_class(layer.mlp, "Detached", lambda self, x: type(self).__base__.forward(self, x.detach()))
    with pytest.raises(ModelError, match="some layer lets no gradient through"):
        NablaDecoder(model, None, None)
    config = DTOConfig(nll_coeff=0.0, max_generations=1)  # of which nothing is asked
    assert NablaDecoder(model, None, None, config=config, loop="sequential").generate([PROMPT])


# -- windows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [6, 40])
@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_a_paged_pass_that_overlooks_a_window_is_noticed(kind, window, monkeypatch):
    attend = PagedPass.attend

    def overlooking(self, *arguments, **options):
        return attend(self, *arguments[:-1], None, **options)

    model = tiny_models.causal_lm(kind, sliding_window=window).requires_grad_(False)
    PagedReader(model)
    monkeypatch.setattr(PagedPass, "attend", overlooking)
    with pytest.raises(ModelError, match="reads something else after a paged prefix"):
        PagedReader(model)


@pytest.mark.parametrize("name", ["mistral, window 8", "mistral, window 40"])
def test_a_cache_that_is_wrong_beyond_a_window_is_not_used(name, monkeypatch):
    model = language_model(name)
    assert LanguageModel(model).reads_cached
    update = DynamicSlidingWindowLayer.update

    def confusing(self, keys, values, *rest, **named):
        full = self.get_seq_length() >= self.sliding_window
        keys, values = update(self, keys, values, *rest, **named)
        return keys, values.roll(1, dims=-2) if full else values

    monkeypatch.setattr(DynamicSlidingWindowLayer, "update", confusing)
    assert not LanguageModel(model).reads_cached


# -- ways of reading after a prefix ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["qwen2", "mistral, window 8", "lfm2", "mamba", "openai", "phi3, long rope"]
)
def test_every_way_of_reading_gives_the_states_of_one_pass(name):
    model = language_model(name, dtype=torch.float64)
    reading = LanguageModel(model).prefix_reading()
    ids, others = torch.randint(3, 90, (2, 30)).tolist()
    forked = [*ids[:9], *others[9:]]
    pieces = [ids[:4], ids[:5], ids[:9], [*ids[:2], 7, 8], ids[:14], forked[:15], forked, forked[:16], ids]
    for piece in pieces:
        state, read = reading.last_state(piece)
        with torch.no_grad():
            whole = model.base_model(input_ids=torch.tensor([piece]), use_cache=False)
        torch.testing.assert_close(state, whole.last_hidden_state[0, -1:], rtol=1e-5, atol=1e-5)
        assert 1 <= read <= len(piece)


def test_what_sequences_have_in_common_is_read_once_where_the_model_allows():
    counts = {}
    for name in ("qwen2", "lfm2", "openai"):
        reading = LanguageModel(language_model(name)).prefix_reading()
        pieces = (PROMPT * 3, [*PROMPT * 3, 7], [*PROMPT * 2, 8, 8])
        counts[name] = [reading.last_state(piece)[1] for piece in pieces]
        assert isinstance(reading, WholeReading) == (counts[name] == [9, 10, 8])
    # The cache of transformers 5.0 for LFM2 is of no use.
    assert counts.pop("lfm2") in ([9, 1, 8], [9, 10, 8])
    assert counts == {"qwen2": [9, 1, 2], "openai": [9, 10, 8]}


# -- failures ----------------------------------------------------------------------------------------


def without_embeddings(self, input_ids=None, attention_mask=None, **_):
    return type(self).__base__.forward(self, input_ids=input_ids, attention_mask=attention_mask)


def failing(self, *_, **__):
    raise RuntimeError("no\nsuch\nluck" + 400 * "!")


@pytest.mark.parametrize("forward", [without_embeddings, failing])
@pytest.mark.parametrize("loop", ["sequential", "batched", "auto"])
@pytest.mark.parametrize("which", ["lm", "rm"])
def test_whatever_a_model_raises_becomes_a_refusal_by_name(which, loop, forward):
    models = {"lm": tiny_models.causal_lm("llama"), "rm": tiny_models.reward_model("llama")}
    of_class(models[which].model, "Odd", forward)
    with pytest.raises(ModelError) as refusal:
        NablaDecoder(models["lm"], models["rm"], None, loop=loop)
    message = str(refusal.value)
    assert message.startswith(type(models[which]).__name__)
    assert "Odd" in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("loop", ["sequential", "batched"])
def test_models_that_return_tuples_decode_as_others_do(loop):
    found = []
    for return_dict in (True, False):
        lm = tiny_models.causal_lm("qwen2", return_dict=return_dict)
        rm = tiny_models.reward_model("qwen2", return_dict=return_dict)
        decoder = NablaDecoder(lm, rm, None, loop=loop)
        found.append(decoder.generate([PROMPT], max_new_tokens=6)[0].token_ids)
        assert lm.config.return_dict is return_dict
    assert found[0] == found[1]


@pytest.mark.parametrize("loop", ["sequential", "batched"])
@pytest.mark.parametrize("layers", [{nn.Linear}, {"model.layers.0.mlp.up_proj"}], ids=["all", "one"])
def test_quantized_layers_are_refused(layers, loop):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their deprecation
        model = torch.ao.quantization.quantize_dynamic(language_model("qwen2"), layers)
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM has quantized layers .*dequantize"):
        NablaDecoder(model, None, None, loop=loop)


def test_weights_that_are_not_there_are_refused():
    lm, rm = language_model("qwen2"), reward_model("qwen2")
    lm.model.layers[1].to("meta")
    with pytest.raises(
        ModelError, match=r"Qwen2ForCausalLM has weights on the meta device, model\.layers\.1"
    ):
        NablaDecoder(lm, None, None)
    with pytest.raises(ModelError, match=r"Qwen2ForSequenceClassification has weights on the meta device"):
        NablaDecoder(language_model("qwen2"), rm.to("meta"), None)


class PeftModel(nn.Module):
    """A model around another one, under whose name a backbone is not to be found."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.base_model, self.config = model, model.config

    def forward(self, **given):
        return self.base_model(**given)

    def merge_and_unload(self):
        return self.base_model

    def get_input_embeddings(self):
        return self.base_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.base_model.get_output_embeddings()


@pytest.mark.parametrize("loop", ["sequential", "batched"])
def test_models_with_adapters_around_them_say_what_to_do(loop):
    with pytest.raises(ModelError, match=r"PeftModel.*merge_and_unload\(\)"):
        NablaDecoder(PeftModel(language_model("qwen2")), None, None, loop=loop)


@pytest.mark.parametrize("loop", ["sequential", "batched"])
def test_encoder_decoders_are_refused(loop):
    with pytest.raises(ModelError, match=r"T5ForSequenceClassification .*encoder-decoder"):
        NablaDecoder(language_model("qwen2"), reward_model("t5"), None, loop=loop)


def test_states_that_depend_on_later_tokens_are_refused():
    model = language_model("llama")
    of_class(model.model, "Averaging", averaging)
    with pytest.raises(ModelError, match="is not causal"):
        LanguageModel(model)


def averaging(self, *given, **named):
    output = type(self).__base__.forward(self, *given, **named)
    output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(dim=1, keepdim=True)
    return output


def test_a_hint_names_an_alignment_that_is_taken():
    lm = language_model("qwen2")
    wide, narrow = (reward_model("qwen2", vocab_size=size) for size in (128, 64))
    with pytest.raises(InputError, match=r"truncated\(96\)") as hint:
        NablaDecoder(lm, wide, None)
    (count,) = re.findall(r"truncated\((\d+)\)", str(hint.value))
    NablaDecoder(lm, wide, None, alignment=VocabularyAlignment.truncated(int(count)))
    with pytest.raises(InputError, match="from_tokenizers") as hint:
        NablaDecoder(lm, narrow, None)
    assert "truncated" not in str(hint.value)


@pytest.mark.parametrize("loop", ["sequential", "batched"])
def test_another_default_device_changes_nothing(loop):
    lm, rm = tiny_models.shared_lm("qwen2"), tiny_models.shared_reward_model("qwen2")

    def decode() -> list[int]:
        decoder = NablaDecoder(lm, rm, None, loop=loop)
        return decoder.generate([PROMPT, [7, 4]], max_new_tokens=6)[1].token_ids

    expected = decode()
    with torch.device("meta"):
        assert decode() == expected
