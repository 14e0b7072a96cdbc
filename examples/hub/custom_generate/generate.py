"""Gradient-guided decoding in place of ``generate``, as transformers loads it from a model hub."""

from __future__ import annotations

import copy

from nabla_fast import InputError, NablaDecoder

# Arguments of `generate` that a decode has no use for.
UNUSED = ("assistant_model", "assistant_tokenizer", "negative_prompt_ids", "negative_prompt_attention_mask")


def generate(
    model,
    inputs=None,
    generation_config=None,
    *,
    reward_model=None,
    tokenizer=None,
    reward_tokenizer=None,
    dto_config=None,
    alignment=None,
    loop="auto",
    streamer=None,
    stop_strings=None,
    **kwargs,
):
    """Decode prompts of token ids.

    Args:
        model: the language model, whose ``generate`` was called.
        inputs, generation_config, streamer, stop_strings: as of ``model.generate``.
        reward_model: an ``AutoModelForSequenceClassification`` with one label or any other reward of
            nabla_fast; None: the likelihood alone is descended, and every proposal is accepted.
        tokenizer: the language model's; stop strings and the reward model's chat template need one.
        reward_tokenizer, alignment, loop: as of ``nabla_fast.NablaDecoder``.
        dto_config: a ``nabla_fast.DTOConfig``; None: its defaults.
        kwargs: as of ``model.generate``; ``seed`` and ``reward_context`` as of ``NablaDecoder.__call__``.
    Returns:
        As of ``model.generate``: [B, T + n] int64, or an output with ``sequences``.
    Raises:
        InputError: something is asked for that a decode does not do, which the line names.

    Example:
        model.generate(
            **tokenizer(prompts, return_tensors="pt", padding=True), custom_generate=REPOSITORY,
            trust_remote_code=True, reward_model=reward_model, tokenizer=tokenizer, max_new_tokens=256,
        )
    """
    for name in UNUSED:
        if kwargs.pop(name, None) is not None:
            raise InputError(f"{name}: a decode does not use it, leave it out")
    if generation_config is not None and generation_config.stop_strings is not None:
        # In a config, transformers would ask for a tokenizer that it hands on to no callable.
        generation_config = copy.deepcopy(generation_config)
        stop_strings = generation_config.stop_strings if stop_strings is None else stop_strings
        generation_config.stop_strings = None
    decoder = NablaDecoder(
        model, reward_model, tokenizer, reward_tokenizer, dto_config, loop=loop, alignment=alignment
    )
    return model.generate(
        inputs,
        generation_config,
        custom_generate=decoder if streamer is None else decoder.with_streamer(streamer),
        stop_strings=stop_strings,
        **kwargs,
    )
