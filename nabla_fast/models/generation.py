"""What a model's generation config says of a decode: where it ends, and what must not be left out."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from nabla_fast.config import DTOConfig, SamplingConfig
from nabla_fast.errors import InputError, ModelError

# What transformers takes where a generation config says nothing of drawing.
DEFAULT_SAMPLING = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}

# What transformers would do to logits beside temperature, top-k and top-p, and the values that do nothing.
PROCESSORS: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "min_p": (0.0,),
    "top_h": (1.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "watermarking_config": (),
}


def refuse_processors(model: nn.Module) -> None:
    """Refuse a generation config that asks for more than temperature, top-k and top-p.

    Raises:
        ModelError: it names the settings.
    """
    config = getattr(model, "generation_config", None)
    asked = []
    for name, idle in PROCESSORS.items():
        value = getattr(config, name, None)
        if value is not None and value not in idle:
            asked.append((name, value, idle[0] if idle and not isinstance(idle[0], (list, dict)) else None))
    if asked:
        name, value, off = asked[0]
        raise ModelError(
            f"{type(model).__name__}'s generation config asks for "
            f"{', '.join(f'{n}={v!r}' for n, v, _ in asked)}, which a decode does not do: "
            f"set generation_config.{name} = {off!r}{' (likewise the others)' if len(asked) > 1 else ''} "
            "to decode without it"
        )


def eos_ids(model: nn.Module) -> frozenset[int]:
    """Tokens that end a response, by the generation config or else the config."""
    for config in (getattr(model, "generation_config", None), model.config):
        eos = getattr(config, "eos_token_id", None)
        if isinstance(eos, Tensor):
            eos = eos.tolist()
        if eos is not None:
            several = isinstance(eos, (list, tuple, set, frozenset))
            return frozenset(map(operator.index, eos if several else [eos]))
    return frozenset()


def sampling_settings(generation_config: Any) -> dict[str, Any]:
    """``do_sample``, ``temperature``, ``top_k`` and ``top_p`` of a generation config, defaults filled in.

    Args:
        generation_config: of transformers, or None.
    """
    said = {name: getattr(generation_config, name, None) for name in DEFAULT_SAMPLING}
    return {name: DEFAULT_SAMPLING[name] if value is None else value for name, value in said.items()}


def sampling_of(settings: dict[str, Any]) -> SamplingConfig:
    """How tokens are drawn under settings as :func:`sampling_settings` returns them.

    Raises:
        InputError: a setting is out of its range.
    """
    if not settings["do_sample"]:
        return SamplingConfig(temperature=0)
    temperature = settings["temperature"]
    if isinstance(temperature, (int, float)) and temperature <= 0:
        raise InputError(
            f"temperature must be > 0 with do_sample=True, got {temperature!r}: do_sample=False is greedy"
        )
    return SamplingConfig(temperature, settings["top_k"], settings["top_p"])


def with_own_sampling(config: DTOConfig, model: nn.Module) -> DTOConfig:
    """``config`` with what it leaves to the model's generation config taken from there.

    Raises:
        ModelError: the generation config has a value out of its range.
    """
    sampling, resampling = config.rollout_sampling, config.resample_sampling
    if sampling is not None and None not in (sampling.top_k, resampling.top_k):
        return config
    settings = sampling_settings(getattr(model, "generation_config", None))
    try:
        if sampling is None:
            sampling = sampling_of(settings)
        elif sampling.top_k is None:
            sampling = replace(sampling, top_k=settings["top_k"])
        if resampling.top_k is None:
            resampling = replace(resampling, top_k=settings["top_k"])
    except InputError as error:
        raise ModelError(f"{type(model).__name__}'s generation config: {error}") from None
    return replace(config, rollout_sampling=sampling, resample_sampling=resampling)
