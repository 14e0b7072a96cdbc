"""Tiny random models and tokenizers of several architectures, made without any download."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 24
EOS, BOS, UNKNOWN = 0, 1, 2

_SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT2_SHAPE = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_GEMMA_SHAPE = _SHAPE | {"head_dim": 8, "sliding_window": 6}
_GPT_OSS_SHAPE = _GEMMA_SHAPE | {"num_local_experts": 3, "num_experts_per_tok": 2}

# Name → (config class, class of the LM, class of the reward model, fields).
ARCHITECTURES = {
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", "Qwen2ForSequenceClassification", _SHAPE),
    "qwen2_tied": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        "Qwen2ForSequenceClassification",
        _SHAPE | {"tie_word_embeddings": True},
    ),
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        _SHAPE | {"num_key_value_heads": 1},
    ),
    "qwen3": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        "Qwen3ForSequenceClassification",
        _SHAPE | {"head_dim": 8},
    ),
    "mistral": (
        "MistralConfig",
        "MistralForCausalLM",
        "MistralForSequenceClassification",
        _SHAPE | {"sliding_window": 6},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", "GPT2ForSequenceClassification", _GPT2_SHAPE),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        "Gemma2ForSequenceClassification",
        _GEMMA_SHAPE | {"attn_logit_softcapping": 0.5},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        "Gemma3TextForSequenceClassification",
        _GEMMA_SHAPE,
    ),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", None, _GPT_OSS_SHAPE),
    "granite": ("GraniteConfig", "GraniteForCausalLM", None, _SHAPE | {"logits_scaling": 4.0}),
    "cohere": ("CohereConfig", "CohereForCausalLM", None, _SHAPE),
    "phi": ("PhiConfig", "PhiForCausalLM", "PhiForSequenceClassification", _SHAPE),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        None,
        {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2},
    ),
    "bert": (
        "BertConfig",
        None,
        "BertForSequenceClassification",
        {name: value for name, value in _SHAPE.items() if name != "num_key_value_heads"},
    ),
}


def _build(kind: str, column: int, dtype: torch.dtype, seed: int, fields: dict) -> PreTrainedModel:
    config_class, *classes, shape = ARCHITECTURES[kind]
    tokens = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "bos_token_id": BOS, "pad_token_id": None}
    fields = {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}
    config = getattr(transformers, config_class)(**{**shape, **tokens, "initializer_range": 0.4, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, classes[column])(config).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases start all alike
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def causal_lm(
    kind: str = "qwen2", *, dtype: torch.dtype = torch.float64, seed: int = 0, **fields
) -> PreTrainedModel:
    """A random language model; ``fields`` go to its config, tuples as lists."""
    return _build(kind, 0, dtype, seed, fields)


def reward_model(
    kind: str = "qwen2", *, dtype: torch.dtype = torch.float64, seed: int = 1, **fields
) -> PreTrainedModel:
    """A random sequence classifier with one label, a little narrower than the language models."""
    narrow = {} if kind in ("gpt2", "bert") else {"hidden_size": 8}
    return _build(kind, 1, dtype, seed, {"num_labels": 1, **narrow, **fields})


# The same, one of each: for tests that leave models as they are.
shared_lm = cache(causal_lm)
shared_reward_model = cache(reward_model)

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<bos>' if m['role'] == 'user' else 'b' }}{{ m['content'] }}c{% endfor %}"
    "{% if add_generation_prompt %}b{% endif %}"
)


def word_tokenizer(
    words: Sequence[str] | None = None, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """A tokenizer of ``VOCABULARY`` tokens: <eos>, <bos>, <unk> and words.

    By default the words are the strings over a, b and c in order of length, so that a text has
    several tokenizations and a stop string may end inside a token. Text is read character by character.
    """
    if words is None:
        strings = ("".join(letters) for n in (1, 2, 3) for letters in product("abc", repeat=n))
        words = [text for text, _ in zip(strings, range(VOCABULARY - 3), strict=False)]
    vocabulary = {word: n for n, word in enumerate(["<eos>", "<bos>", "<unk>", *words])}
    core = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer
