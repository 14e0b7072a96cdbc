"""Fields of a generation config: a decode obeys some, and refuses others that ask for something."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from nabla_fast.errors import InputError
from nabla_fast.models.generation import DEFAULT_SAMPLING, PROCESSORS

# Fields that a decode obeys, or that transformers has obeyed before it calls.
OBEYED = frozenset(
    {
        *DEFAULT_SAMPLING,
        "max_length",
        "max_new_tokens",
        "eos_token_id",
        "pad_token_id",
        "bos_token_id",
        "stop_strings",
        "num_return_sequences",
        "return_dict_in_generate",
    }
)

# Fields that ask for nothing where they are False, though their default is None.
_OFF = frozenset(
    {
        "disable_compile",
        "is_assistant",
        "low_memory",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "renormalize_logits",
        "token_healing",
        "use_mtp",
    }
)

# Where a config came from; it asks for nothing.
_METADATA = frozenset({"transformers_version"})


def refuse_fields(generation_config: Any) -> None:
    """Refuse a generation config that asks for what a decode does not do.

    A field that is not known here, of a newer release or of the caller's own, is refused where it has a
    value: it cannot be left out unnoticed.

    Raises:
        InputError: it names the fields and their values.
    """
    defaults = _defaults()
    asked = []
    for name, value in vars(generation_config).items():
        if name.startswith("_") or name in OBEYED or name in _METADATA or value is None:
            continue
        idle = (*defaults.get(name, ()), *PROCESSORS.get(name, ()), *((False,) if name in _OFF else ()))
        if not any(_same(value, other) for other in idle):
            asked.append((name, value, defaults[name][0] if name in defaults else None))
    if asked:
        name, _, off = asked[0]
        said = ", ".join(f"{field}={value!r}" for field, value, _ in asked)
        raise InputError(
            f"the generation config asks for {said}, which a decode does not do: "
            f"pass {name}={off!r}{' (likewise the others)' if len(asked) > 1 else ''}"
        )


def _same(value: Any, idle: Any) -> bool:
    """Whether a value is one that asks for nothing; 1 is 1.0, and neither is True."""
    if isinstance(value, bool) != isinstance(idle, bool):
        return False
    return isinstance(value, (type(idle), int, float)) and value == idle


def _defaults() -> dict[str, tuple[Any, ...]]:
    """Values that a field has where nobody sets it, in the installed release."""
    found: dict[str, tuple[Any, ...]] = {}
    filled = getattr(GenerationConfig, "_get_default_generation_params", dict)()
    for values in (vars(GenerationConfig()), filled):
        for name, value in values.items():
            if value is not None:
                found[name] = (*found.get(name, ()), value)
    return found
