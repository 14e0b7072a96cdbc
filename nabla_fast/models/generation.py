"""What a model's generation config says of a decode: where it ends, and what must not be left out."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, nn

from nabla_fast.errors import ModelError

# What transformers would do to logits beside temperature, top-k and top-p, and the values that do nothing.
_PROCESSORS: dict[str, tuple[Any, ...]] = {
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
    for name, idle in _PROCESSORS.items():
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
