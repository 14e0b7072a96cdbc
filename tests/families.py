"""Tiny random models of many families of transformers, with weights large enough to matter."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 96
_TOKENS = {"vocab_size": VOCABULARY, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
_SHAPE = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GPT |= {"eos_token_id": None, "bos_token_id": None}
_STATE = {**_TOKENS, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 16,
}
_PER_LAYER = {
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
}
_MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}

# Name → (class, config class, fields).
LANGUAGE_MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0, "pad_token_id": 1},
    ),
    "bart": (
        "BartForCausalLM",
        "BartConfig",
        {
            **_TOKENS,
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "pad_token_id": 1,
            "forced_eos_token_id": None,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SHAPE),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **_TOKENS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 64,
        },
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "mistral, window 8": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 8}),
    "mistral, window 40": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 40}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_GROUPED, "head_dim": 8}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_GROUPED, "head_dim": 8, "attn_implementation": "eager"},  # others leave its cap out
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "head_dim": 8, "sliding_window": 8}),
    "phi": ("PhiForCausalLM", "PhiConfig", _GROUPED),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_GROUPED, "sliding_window": 8}),
    "phi3, long rope": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {**_GROUPED, "original_max_position_embeddings": 16, "rope_parameters": _LONG_ROPE},
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", _SHAPE),
    "falcon, alibi": ("FalconForCausalLM", "FalconConfig", {**_SHAPE, "alibi": True}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**_TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    ),
    "openai": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", _GPT),
    "mamba": ("MambaForCausalLM", "MambaConfig", _STATE),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {**_STATE, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "falcon_mamba": ("FalconMambaForCausalLM", "FalconMambaConfig", _STATE),
    "rwkv": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {**_TOKENS, "hidden_size": 32, "num_hidden_layers": 4, "rescale_every": 2, "context_length": 64},
    ),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", {**_GROUPED, "layer_types": ["conv", "full_attention"]}),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **_GROUPED,
            **_MOE,
            "head_dim": 8,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 16,
        },
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_GROUPED,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "xglm": (
        "XGLMForCausalLM",
        "XGLMConfig",
        {
            **_TOKENS,
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "pad_token_id": 1,
        },
    ),
    "gemma3n": (
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            **_GROUPED,
            **_PER_LAYER,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
            "final_logit_softcapping": 1e9,
        },
    ),
    "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig", {**_GROUPED, **_PER_LAYER, "global_head_dim": 8}),
    "xlnet": (
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    ),
    "roberta": (
        "RobertaForCausalLM",
        "RobertaConfig",
        {**_SHAPE, "is_decoder": True, "pad_token_id": 1},
    ),
}

_SHORT = {**_SHAPE, "max_position_embeddings": 34}
_SHORT_GPT = {**_GPT, "n_positions": 34}
REWARD_MODELS = {
    **{
        name: (language.replace("ForCausalLM", "ForSequenceClassification"), *spec)
        for name in ("qwen3_next", "jamba")
        for language, *spec in [LANGUAGE_MODELS[name]]
    },
    "qwen2": ("Qwen2ForSequenceClassification", "Qwen2Config", _GROUPED),
    "gpt2": ("GPT2ForSequenceClassification", "GPT2Config", _SHORT_GPT),
    "opt": (
        "OPTForSequenceClassification",
        "OPTConfig",
        {**_SHORT, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "pad_token_id": 1},
    ),
    "mpt": (
        "MptForSequenceClassification",
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 34},
    ),
    "openai": ("OpenAIGPTForSequenceClassification", "OpenAIGPTConfig", _SHORT_GPT),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**_SHORT, "pad_token_id": 1}),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", {**_SHORT, "pad_token_id": 1}),
    "bert": ("BertForSequenceClassification", "BertConfig", {**_SHORT, "pad_token_id": 0}),
    "deberta": ("DebertaForSequenceClassification", "DebertaConfig", {**_SHORT, "pad_token_id": 0}),
    "xlnet": (
        "XLNetForSequenceClassification",
        "XLNetConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    ),
    "ctrl": ("CTRLForSequenceClassification", "CTRLConfig", {**_SHORT_GPT, "dff": 48}),
    "t5": (
        "T5ForSequenceClassification",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
}


def language_model(name: str, *, dtype: torch.dtype = torch.float32, **fields) -> PreTrainedModel:
    """A random causal language model without an EOS; ``fields`` go to its config."""
    return _build(LANGUAGE_MODELS[name], dtype, fields)


def reward_model(name: str, *, dtype: torch.dtype = torch.float32, **fields) -> PreTrainedModel:
    """A random sequence classifier with one label, most with 34 positions."""
    return _build(REWARD_MODELS[name], dtype, {"num_labels": 1, **fields})


def _build(spec: tuple[str, str, dict], dtype: torch.dtype, fields: dict) -> PreTrainedModel:
    name, config, shape = spec
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, name)(getattr(transformers, config)(**{**shape, **fields}))
        with torch.no_grad():
            for path, weight in model.named_parameters():
                if weight.ndim > 1 and not path.endswith("A_log"):
                    weight.normal_(0, 0.3)
    for holder in (model.config, getattr(model, "generation_config", None)):
        if holder is not None:
            holder.eos_token_id = None
    if not hasattr(model.config, "pad_token_id"):
        pytest.skip(
            f"{name} of transformers {transformers.__version__} reads a field that its config lacks"
        )
    return model.to(dtype).eval()


def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """``count`` greedy tokens, each from one pass over everything before it."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(ids) - count :]
