"""Logits processors and stopping criteria that ``generate`` hands over: obeyed, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nabla_fast.errors import InputError

# Processors of drawing, and the field of the generation config that each is made of.
_DRAWING = {
    "TemperatureLogitsWarper": "temperature",
    "TopKLogitsWarper": "top_k",
    "TopPLogitsWarper": "top_p",
}


def refuse_processors(processors: Sequence[Any], generation_config: Any) -> None:
    """Refuse processors that are not what the generation config says of drawing.

    Args:
        processors: a ``LogitsProcessorList``.
        generation_config: with ``do_sample``, ``temperature``, ``top_k`` and ``top_p``.
    Raises:
        InputError: it names the processor's class.
    """
    for processor in processors:
        name = type(processor).__name__
        field = _DRAWING.get(name)
        # One that the caller made stands in the list in place of the generation config's own.
        said = generation_config.do_sample and getattr(generation_config, field or "", None)
        if field is None or not said or getattr(processor, field, None) != said:
            raise InputError(
                f"logits_processor has a {name}, which a decode does not run: leave it out"
                + (f", or pass {field}" if field else "")
            )


@dataclass(frozen=True)
class Criteria:
    """Where a response ends, by stopping criteria.

    Attributes:
        max_length: most tokens of prompt and response; None where no criterion says.
        eos_ids: tokens that end a response.
        stop_strings: strings that end one.
    """

    max_length: int | None
    eos_ids: list[int]
    stop_strings: tuple[str, ...]

    @classmethod
    def read(cls, criteria: Sequence[Any]) -> Criteria:
        """
        Args:
            criteria: a ``StoppingCriteriaList``.
        Raises:
            InputError: one says something else than where a response ends; it is named.
        """
        max_length, eos, strings = None, [], []
        for criterion in criteria:
            name = type(criterion).__name__
            if name == "MaxLengthCriteria":
                max_length = min(criterion.max_length, max_length or criterion.max_length)
            elif name == "EosTokenCriteria":
                eos += _ids(criterion.eos_token_id)
            elif name == "StopStringCriteria":
                strings += criterion.stop_strings
            else:
                raise InputError(
                    f"stopping_criteria has a {name}, which a decode does not ask: a response ends by "
                    "max_length, max_new_tokens, eos_token_id and stop_strings"
                )
        return cls(max_length, list(dict.fromkeys(eos)), tuple(strings))


def _ids(eos: Any) -> Iterator[int]:
    """Whole numbers of a tensor, a number or a list."""
    if isinstance(eos, Tensor):
        eos = eos.flatten().tolist()
    yield from map(int, eos if isinstance(eos, (list, tuple, set)) else [eos])
