"""A decoder as the ``custom_generate`` callable of transformers' ``generate``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nabla_fast.config import SamplingConfig
from nabla_fast.decode.stream import ResultStream
from nabla_fast.errors import DecodingInterrupted, InputError
from nabla_fast.integrations.generate_call import GenerateCall, asked_by
from nabla_fast.integrations.generate_output import NablaGenerateOutput, output_of, sequences_of
from nabla_fast.integrations.generate_sampling import call_sampling
from nabla_fast.models.boundary import adapted_model
from nabla_fast.results import Result


def decode_call(
    call: GenerateCall, lm: nn.Module, own: SamplingConfig | None, decode: Callable[..., ResultStream]
) -> Tensor | NablaGenerateOutput:
    """The result of a ``generate`` call.

    Args:
        call: its arguments.
        lm: the decoder's language model.
        own: the decoder's ``rollout_sampling``.
        decode: gives a stream of results of (rollout sampling, prompts), with options as of
            :meth:`PromptReader.read`.
    Returns:
        As of :meth:`NablaDecoder.__call__`.
    Raises:
        InputError, DecodingInterrupted, DecodingFailed: as of that method.
    """
    # generate of a PEFT model is that of the model inside.
    if call.model is not lm and call.model is not adapted_model(lm):
        raise InputError(
            f"the decoder was made for another {type(lm).__name__}: "
            "call generate on the model that it was made for"
        )
    asked = asked_by(call)
    models = getattr(lm, "generation_config", None)
    stream = decode(
        call_sampling(own, call.sampling, call.generation_config, models),
        asked.prompts,
        seed=asked.seeds,
        max_new_tokens=asked.max_new_tokens,
        system_prompt=None,
        stop=asked.stop,
        reward_context=asked.reward_context,
        eos_ids=frozenset(asked.eos_ids),
    )
    try:
        with stream:
            for _ in stream:
                pass
    except KeyboardInterrupt:
        raise DecodingInterrupted(stream.results) from None
    results: list[Result] = stream.results
    sequences = sequences_of(asked.input_ids, results, asked.pad_token_id)
    if call.generation_config.return_dict_in_generate:
        return output_of(sequences, results)
    return sequences


class StreamedDecoder:
    """A decoder that feeds a streamer: what :meth:`NablaDecoder.with_streamer` returns.

    Args:
        decoder: a :class:`NablaDecoder`, called as a ``custom_generate`` callable.
        streamer: of transformers, with ``put`` and ``end``. It gets the prompts [N, T], then for each
            position of the responses one token a row, [N], and the end.
    Raises:
        InputError: it is no streamer.
    """

    def __init__(self, decoder: Callable[..., Any], streamer: Any):
        for name in ("put", "end"):
            if not callable(getattr(streamer, name, None)):
                raise InputError(
                    f"streamer must have the methods put and end, as transformers' streamers do, "
                    f"got {type(streamer).__name__}"
                )
        self._decoder, self._streamer = decoder, streamer
        # generate looks here for the names of arguments that it hands on.
        self.__signature__ = inspect.signature(decoder)

    def __call__(self, model: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As of :meth:`NablaDecoder.__call__`; the streamer has its end then."""
        self._streamer.put(input_ids.cpu())
        try:
            output = self._decoder(model, input_ids, *args, **kwargs)
            sequences = output if isinstance(output, Tensor) else output.sequences
            for tokens in sequences[:, input_ids.shape[1] :].T.cpu():
                self._streamer.put(tokens)
        finally:
            self._streamer.end()  # whoever reads from it in another thread waits for that
        return output
