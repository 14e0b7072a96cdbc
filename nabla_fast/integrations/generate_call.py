"""What ``model.generate`` of transformers hands to a decoder, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from nabla_fast.errors import InputError
from nabla_fast.integrations.generate_sequences import Criteria, refuse_processors
from nabla_fast.integrations.generation_fields import refuse_fields
from nabla_fast.integrations.model_kwargs import prompts_of

# Distance between the seeds of two return sequences: more than the tokens of a response, whose position t
# draws from seed + t; and less than 2³², as torch's generator on the CPU reads the low 32 bits of a seed.
SEED_STRIDE = 2**20


@dataclass(frozen=True)
class GenerateCall:
    """One call of ``generate``, as :meth:`NablaDecoder.__call__` takes it.

    Attributes:
        model, input_ids, logits_processor, stopping_criteria, generation_config, seed, reward_context,
            stop_strings, num_return_sequences, model_kwargs: as of that method.
        sampling: ``do_sample``, ``temperature``, ``top_k`` and ``top_p``, None where the call says nothing.
    """

    model: nn.Module
    input_ids: Tensor  # [B·r, T] int64; r is the generation config's num_return_sequences
    logits_processor: Sequence[Any]
    stopping_criteria: Sequence[Any]
    generation_config: Any
    seed: int | Sequence[int] = 42
    reward_context: Sequence[Any] | None = None
    stop_strings: str | Sequence[str] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    num_return_sequences: int | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """What a call asks of a decode.

    Attributes:
        input_ids: [N, T] int64, a row a response.
        prompts: token ids of each row without its padding.
        seeds: one a row.
        reward_context: one a row, or None.
        max_new_tokens: most tokens of a response.
        eos_ids: tokens that end one, in the generation config's order.
        stop: strings that end one.
        pad_token_id: what fills rows up; None where there is no such token.
    """

    input_ids: Tensor
    prompts: list[list[int]]
    seeds: list[int]
    reward_context: list[Any] | None
    max_new_tokens: int
    eos_ids: list[int]
    stop: tuple[str, ...]
    pad_token_id: int | None


def asked_by(call: GenerateCall) -> Asked:
    """Read a call, and refuse what a decode does not do.

    Raises:
        InputError: the line names the argument or field.
    """
    if call.generation_config is None:
        raise InputError(
            "generation_config is missing: a decoder is called by model.generate(custom_generate=decoder)"
        )
    refuse_fields(call.generation_config)
    refuse_processors(call.logits_processor, call.generation_config)
    criteria = Criteria.read(call.stopping_criteria)
    prompts = prompts_of(call.input_ids, call.model_kwargs)

    # Prompts come repeated as the generation config says; an argument of the call is read here alone.
    given = call.generation_config.num_return_sequences or 1
    count = given if call.num_return_sequences is None else call.num_return_sequences
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InputError(f"num_return_sequences must be a whole number ≥ 1, got {count!r}")
    rows = [row for row in range(0, len(prompts), given) for _ in range(count)]
    found = len(prompts) // given

    length = call.input_ids.shape[1]
    max_length = call.generation_config.max_length if criteria.max_length is None else criteria.max_length
    if max_length <= length:
        raise InputError(
            f"max_length must be more than the {length} tokens of padded prompts, got {max_length}"
        )
    eos = criteria.eos_ids
    stop = (*_strings(call.stop_strings), *criteria.stop_strings)
    pad = _pad_token(call.generation_config, eos)
    if pad is None and stop and len(rows) > 1:
        raise InputError(
            "pad_token_id is None, and rows that stop strings end differ in length: set one to fill them up"
        )
    return Asked(
        call.input_ids[rows],
        [prompts[row] for row in rows],
        _seeds(call.seed, found, count),
        _each(call.reward_context, "reward_context", found, count),
        max_length - length,
        eos,
        stop,
        pad,
    )


def _strings(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple; what is none is refused where they are read."""
    if given is None:
        return ()
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Sequence) or not all(isinstance(text, str) for text in given):
        raise InputError(f"stop_strings must be a string or a list of strings, got {given!r}")
    return tuple(given)


def _pad_token(generation_config: Any, eos: list[int]) -> int | None:
    """The generation config's, else the first EOS, as transformers has it."""
    pad = generation_config.pad_token_id
    if pad is None:
        return eos[0] if eos else None
    return int(pad)


def _seeds(seed: int | Sequence[int], found: int, count: int) -> list[int]:
    """One seed for each of ``count`` responses to each of ``found`` prompts."""
    if not isinstance(seed, Sequence):
        seed = [seed] * found
    if len(seed) != found:
        raise InputError(f"seed must be one number or one a prompt, got {len(seed)} for {found} prompts")
    for own in seed:
        if not isinstance(own, int) or isinstance(own, bool):
            raise InputError(f"seed must be a whole number or a list of them, got {own!r}")
    return [own + r * SEED_STRIDE for own in seed for r in range(count)]


def _each(given: Sequence[Any] | None, name: str, found: int, count: int) -> list[Any] | None:
    """An argument with one entry a prompt, for each of ``count`` responses to it."""
    if given is None:
        return None
    if not isinstance(given, Sequence) or len(given) != found:
        got = len(given) if isinstance(given, Sequence) else type(given).__name__
        raise InputError(f"{name} must have one entry a prompt, got {got} for {found} prompts")
    return [own for own in given for _ in range(count)]
