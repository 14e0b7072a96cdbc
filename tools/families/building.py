"""Tiny random models of any type that transformers has, from its config class alone."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCABULARY = 96
CAUSAL_LMS: dict[str, str] = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CLASSIFIERS: dict[str, str] = dict(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
TYPES = {"lm": CAUSAL_LMS, "reward_model": CLASSIFIERS}

# Fields of configs that hold a size, and a small one; a config gets those that it has.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("d_inner", "n_inner", "dff", "dim_ff", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("dense_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("context_length", "max_sequence_length", "decoder_max_position_embeddings"), 128),
    **dict.fromkeys(("head_dim", "global_head_dim", "d_kv", "v_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "index_head_dim", "swa_v_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_dim"), 16),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "mamba_n_groups", "n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("lru_width", "attention_hidden_size"), 32),
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    "index_n_heads": 32,  # with few of them many keys tie at a score of 0, and which is taken is undefined
    "index_topk": 4,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "max_window_layers": 1,
}
_DERIVED = ("head_dim", "num_key_value_heads")
# What a type needs beside that, as transformers cannot make a small model of it otherwise.
_SSD = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
_GEMMA4 = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8, "global_head_dim": 8}
_GEMMA4 |= {"num_kv_shared_layers": 0}
_QWEN4 = {"hc_lowrank": 8, "indexer_n_heads": 32, "indexer_kv_heads": 1, "indexer_head_dim": 8}
_QWEN4 |= {"indexer_budget": 8, "indexer_compress_ratio": 4}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**_SSD, "attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"num_hash_layers": 0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {**_SSD, "mamba_d_ssm": 64},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4.text_config": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "gemma4_unified.text_config": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_SSD, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp"]},
    "qwen4_exp": _QWEN4,
    "qwen4_exp_text": _QWEN4,
    # Of states as narrow as these, logits would be multiplied by 8.
    "minicpm3": {"dim_model_base": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 16],
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 8,
    },
    "zamba": {
        # The first hybrid layer's attention is every hybrid layer's.
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def build(kind: str, *, classifier: bool = False, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random model of a type, of two layers where its config says how many.

    Args:
        kind: a key of :data:`CAUSAL_LMS` or :data:`CLASSIFIERS`.
        classifier: a sequence classifier with one label, not a language model.
        dtype: of its weights.
    Raises:
        Exception: whatever transformers raises where it does not build.
    """
    name = (CLASSIFIERS if classifier else CAUSAL_LMS)[kind]
    model_class = getattr(transformers, name)
    config = small_config(model_class.config_class or CONFIG_MAPPING[kind], kind)
    if classifier:
        config.num_labels = 1
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        config._attn_implementation = "eager"  # transformers' others leave the cap out
    torch.manual_seed(0)
    model = model_class(config)
    spread(model)
    # What a checkpoint's generation config asks for is no matter of the model's.
    model.generation_config = GenerationConfig(eos_token_id=None)
    for holder in (model.config, model.config.get_text_config()):
        with suppress(Exception):  # some configs insist on a number
            holder.eos_token_id = None
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products have no float64
    return model.to(dtype).eval()


def small_config(config_class: type[PretrainedConfig], kind: str) -> PretrainedConfig:
    """The smallest config of a class that still has what the class is about."""
    default = config_class()
    fields = _fields(default)
    for name, part in list(vars(default).items()):
        if isinstance(part, PretrainedConfig):
            fields[name] = small_config(type(part), f"{kind}.{name}")
    fields |= _OVERRIDES.get(kind, {})
    if "layers_block_type" in fields:  # another name of the same
        fields.pop("layer_types", None)
    return config_class(**fields)


def _fields(default: PretrainedConfig) -> dict[str, Any]:
    accepted = set(inspect.signature(type(default).__init__).parameters) | set(vars(default))
    fields: dict[str, Any] = {}
    for name, size in _SIZES.items():
        known = _value(default, name)
        # A field that is off remains off, but where the size of a head would follow from it.
        if name in accepted and (type(known) in (int, float) or (known is None and name in _DERIVED)):
            fields[name] = size
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    types = _value(default, "layer_types")
    target = (getattr(type(default), "attribute_map", None) or {}).get("layer_types", "layer_types")
    if types and not isinstance(getattr(type(default), target, None), property):
        kinds = list(dict.fromkeys(types))
        fields["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        if "num_hidden_layers" in fields:
            fields["num_hidden_layers"] = len(fields["layer_types"])
    for token, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
        if _value(default, name) is not None:
            fields[name] = token
    return fields


def _value(config: PretrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # some fields have a value for each layer alone
        return 1


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Weights so large that every layer matters."""
    for path, weight in model.named_parameters():
        if weight.ndim > 1 and weight.is_floating_point() and not path.endswith("A_log"):
            weight.normal_(0, 0.2)
