"""How the rollouts of a ``generate`` call draw: what the call says, else what the decoder says."""

from __future__ import annotations

from typing import Any

from nabla_fast.config import SamplingConfig
from nabla_fast.errors import InputError
from nabla_fast.models.generation import sampling_of, sampling_settings


def call_sampling(
    own: SamplingConfig | None, stated: dict[str, Any], generation_config: Any, model_config: Any
) -> SamplingConfig:
    """The rollouts' sampling in one call.

    A setting that the call states replaces the decoder's: one passed as an argument, or one in which the
    call's generation config differs from the model's. (One that equals the model's cannot be told from
    one that was filled in from there.)

    Args:
        own: the decoder's ``rollout_sampling``; None: the generation config's.
        stated: ``do_sample``, ``temperature``, ``top_k`` and ``top_p`` as passed, None where not.
        generation_config: the call's, filled up by transformers.
        model_config: the model's own.
    Raises:
        InputError: a setting is out of its range, or has no effect beside ``do_sample=False``.
    """
    passed = {name: value for name, value in stated.items() if value is not None}
    asked, models = sampling_settings(generation_config), sampling_settings(model_config)
    settings = dict(asked)
    if own is not None:
        settings["do_sample"] = own.temperature > 0
        settings["top_p"] = own.top_p
        if own.temperature > 0:
            settings["temperature"] = own.temperature
        if own.top_k is not None:
            settings["top_k"] = own.top_k
    settings |= {name: value for name, value in asked.items() if value != models[name]}
    settings |= passed
    if not isinstance(settings["do_sample"], bool):
        raise InputError(f"do_sample must be True or False, got {settings['do_sample']!r}")
    idle = [name for name in passed if name != "do_sample"]
    if idle and not settings["do_sample"]:
        raise InputError(
            f"{idle[0]}={passed[idle[0]]!r} has no effect on greedy rollouts: "
            "pass do_sample=True, or leave it out"
        )
    return sampling_of(settings)
