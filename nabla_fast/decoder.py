"""The public decoder."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from nabla_fast.config import DTOConfig, SamplingConfig
from nabla_fast.decode.batched.loop import BatchedLoop
from nabla_fast.decode.batched.pools import BLOCK
from nabla_fast.decode.failures import DecodeFailure
from nabla_fast.decode.problem import Decoded, Problem
from nabla_fast.decode.prompts import Prompt, PromptReader, RewardContext
from nabla_fast.decode.reference.loop import SequentialLoop
from nabla_fast.decode.stream import ResultStream
from nabla_fast.errors import DecodingFailed, DecodingInterrupted, InputError, ModelError, one_line
from nabla_fast.integrations.generate_call import GenerateCall
from nabla_fast.integrations.transformers_generate import StreamedDecoder, decode_call
from nabla_fast.models import LanguageModel, RewardSum, VocabularyAlignment, terms_of
from nabla_fast.models.alignment import expect_tokenizer
from nabla_fast.models.boundary import probing
from nabla_fast.models.fingerprint import fingerprint, weight_state
from nabla_fast.models.frozen import frozen
from nabla_fast.models.generation import eos_ids, refuse_processors, with_own_sampling
from nabla_fast.models.given_rewards import GivenReward, expect_model
from nabla_fast.models.reward_terms import RewardSetting, RewardTerm, module_of, table_of, weighted_members
from nabla_fast.ops.checks import MOST_VOCABULARY
from nabla_fast.results import Result, Stats

# Decoders kept that differ in how rollouts draw: what calls of ``generate`` ask for seldom changes.
_MOST_OTHERS = 4


class NablaDecoder:
    """Gradient-guided decoding (∇-Reasoner) of a transformers language model.

    The models are used in evaluation mode and without weight gradients while they decode, and are left
    as they were. Threads that share models take turns.

    Args:
        lm: an ``AutoModelForCausalLM`` whose logits are a linear head on its last hidden state.
        reward_model: an ``AutoModelForSequenceClassification`` with one label; a :class:`ClassifierReward`,
            which chooses among several; a :class:`ProcessReward`, :class:`FunctionReward` or
            :class:`RewardEnsemble`; an object of your own, as :class:`DifferentiableReward` says; or None:
            then only the likelihood is descended and every proposal is accepted.
        tokenizer: the LM's, with a chat template for prompts that are text; None if all are token ids.
        reward_tokenizer: the reward model's, where it differs.
        config: a :class:`DTOConfig`.
        loop: "sequential" defines the result and runs with any model. "batched" returns the same tokens
            from far fewer token passes; :meth:`describe` says how it reads each model. "auto" is the
            batched loop where the LM allows it, else the sequential one, with a warning.
        batch_size: prompts that the batched loop decodes at once.
        max_kv_tokens: most tokens whose keys and values the batched loop holds at once, a model; None for
            no limit. Memory is taken as it is needed; a decode that needs more fails, and the error says
            how many tokens would do.
        alignment: how the reward model reads the LM's tokens, where their vocabularies differ.
    Raises:
        ModelError: a model has a feature that is not supported, which the line names.
        InputError: the vocabularies differ and there is no alignment.
    """

    _kind: type[Result] = Result  # of what it returns

    def __init__(
        self,
        lm: nn.Module,
        reward_model: GivenReward | None,
        tokenizer: Any,
        reward_tokenizer: Any = None,
        config: DTOConfig | None = None,
        *,
        loop: Literal["auto", "batched", "sequential"] = "auto",
        batch_size: int = 16,
        max_kv_tokens: int | None = None,
        alignment: VocabularyAlignment | None = None,
    ):
        self.config = DTOConfig() if config is None else config
        if loop not in ("auto", "batched", "sequential"):
            raise InputError(f"loop must be 'auto', 'batched' or 'sequential', got {loop!r}")
        if not _at_least(1, batch_size):
            raise InputError(f"batch_size must be a whole number ≥ 1, got {batch_size!r}")
        if max_kv_tokens is not None and not _at_least(BLOCK, max_kv_tokens):
            raise InputError(f"max_kv_tokens must be a whole number ≥ {BLOCK}, got {max_kv_tokens!r}")
        if max_kv_tokens is not None and loop == "sequential":
            raise InputError(
                "max_kv_tokens goes with loop='batched' or loop='auto'; the sequential loop holds no pools"
            )
        if not isinstance(self.config, DTOConfig):
            raise InputError(f"config must be a DTOConfig, got {type(self.config).__name__}")
        expect_model("lm", lm)
        _check_weights("lm", lm)
        self._members = [] if reward_model is None else list(weighted_members(reward_model))
        reward_modules = [m for given, _ in self._members if (m := module_of(given)) is not None]
        for module in reward_modules:
            _check_weights("reward_model", module)
        if tokenizer is not None:
            expect_tokenizer("tokenizer", tokenizer, "decode")
        if alignment is not None and not isinstance(alignment, VocabularyAlignment):
            raise InputError(f"alignment must be a VocabularyAlignment, got {type(alignment).__name__}")
        self._lm, self._reward_model = lm, reward_model
        self._tokenizer = tokenizer
        self._reward_tokenizer = tokenizer if reward_tokenizer is None else reward_tokenizer
        self._alignment = alignment
        self._asked_loop, self._batch_size, self._max_kv_tokens = loop, batch_size, max_kv_tokens
        self._loop: BatchedLoop | SequentialLoop
        self._terms: tuple[RewardTerm, ...] = ()
        self._warned: set[str] = set()  # reasons that a warning has named
        self._key: tuple = ()
        self._others: dict[SamplingConfig, NablaDecoder] = {}  # the last ones used with other rollouts
        self._models = [lm, *reward_modules]
        with frozen(self._models) as signals:
            signals.interruptible(self._prepare)

    @property
    def loop(self) -> Literal["batched", "sequential"]:
        """The loop in use. With ``loop="auto"`` it is chosen anew when the models' weights change."""
        return "batched" if isinstance(self._loop, BatchedLoop) else "sequential"

    def describe(self) -> dict[str, str]:
        """The loop in use, and how each model is read in it.

        Returns:
            ``{"loop": "batched" | "sequential", "lm": …, "reward_model": …}``: the class of a model and, in
            words, what its passes begin behind; of an LM also what its head is where it is no plain matrix;
            of several rewards one after another; without any, without that entry.

        Example:
            >>> print(decoder.describe()["lm"])  # doctest: +SKIP
            Qwen3NextForCausalLM, read behind a DynamicCache (states copied where sequences part)
        """
        lm_way, *ways = self._loop.ways()
        head = "" if self._head == "plain" else f" (head: {self._head})"
        described = {"loop": self.loop, "lm": f"{type(self._lm).__name__}{head}, read {lm_way}"}
        if ways:
            names = [term.reward.name for term in self._terms]
            parts = [f"{name}, read {way}" for name, way in zip(names, ways, strict=True)]
            described["reward_model"] = "; ".join(parts)
        return described

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int | Sequence[int] = 42,
        max_new_tokens: int = 1024,
        system_prompt: str | None = None,
        stop: Sequence[str] = (),
        trim_stop: bool = False,
        reward_context: Sequence[RewardContext] | None = None,
        on_result: Callable[[int, Result], None] | None = None,
        on_error: Literal["raise", "keep"] = "raise",
    ) -> list[Result]:
        """Decode prompts.

        Args:
            prompts: each a string (one user message, put through the chat template), a chat (a list of
                ``{"role", "content"}``) or a list of token ids.
            seed: of every prompt's draws, or one a prompt.
            max_new_tokens: most tokens of a response; less where a model's context ends sooner.
            system_prompt: put before strings and chats.
            stop: a response ends with the token that completes one of these; it stays in the text.
            trim_stop: it does not: the text ends before the stop string, and ``token_ids`` with the last
                token before it. The reward is that of the whole response.
            reward_context: for each prompt the reward model's own token ids before and after a response,
                instead of what its chat template gives. With several rewards: a list of such pairs, one a
                reward in order, or None where its template's is meant.
            on_result: called with (index, result) as each prompt finishes, as if between the results of
                :meth:`stream`.
            on_error: "raise" ends the decode at the first prompt that fails. "keep" gives it a result whose
                ``error`` says why, and goes on with the others.
        Returns:
            One result a prompt, in order.
        Raises:
            InputError: a prompt or option is wrong; nothing has been decoded.
            DecodingInterrupted: Ctrl-C; its ``results`` holds what was finished.
            DecodingFailed: an error in a decode, unless it is kept, or in ``on_result``; likewise.

        Example:
            >>> results = decoder.generate(prompts, on_error="keep")  # doctest: +SKIP
            >>> failed = {r.error.prompt: str(r.error) for r in results if r.error}  # doctest: +SKIP
        """
        if on_result is not None and not callable(on_result):
            raise InputError(f"on_result must be callable, got {type(on_result).__name__}")
        stream = self.stream(
            prompts,
            seed=seed,
            max_new_tokens=max_new_tokens,
            system_prompt=system_prompt,
            stop=stop,
            trim_stop=trim_stop,
            reward_context=reward_context,
            on_error=on_error,
        )
        try:
            with stream:
                for n, result in stream:
                    if on_result:
                        _call(on_result, n, result, stream.results)
            return stream.results
        except KeyboardInterrupt:  # while a prompt is decoded, in on_result, or as the stream is closed
            raise DecodingInterrupted(stream.results) from None

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int | Sequence[int] = 42,
        max_new_tokens: int = 1024,
        system_prompt: str | None = None,
        stop: Sequence[str] = (),
        trim_stop: bool = False,
        reward_context: Sequence[RewardContext] | None = None,
        on_error: Literal["raise", "keep"] = "raise",
    ) -> ResultStream:
        """Decode prompts, and hand each result over as soon as it is there.

        Between two results the models are the caller's, with their own flags; closing the stream frees
        what it holds. Arguments as of :meth:`generate`.

        Returns:
            An iterator of (index, result), in the order in which prompts finish.
        Raises:
            InputError: a prompt or option is wrong. Checked here, not when the first result is asked for.
        """
        if on_error not in ("raise", "keep"):
            raise InputError(f"on_error must be 'raise' or 'keep', got {on_error!r}")
        return self._stream(
            prompts,
            keep=on_error == "keep",
            seed=seed,
            max_new_tokens=max_new_tokens,
            system_prompt=system_prompt,
            stop=stop,
            trim_stop=trim_stop,
            reward_context=reward_context,
        )

    def _stream(self, prompts: Sequence[Prompt], *, keep: bool = False, **options: Any) -> ResultStream:
        """A stream of results.

        Args:
            keep: an error becomes the result of its prompt.
            options: as of :meth:`PromptReader.read`.
        """

        def read() -> list[Problem]:
            self._prepare()
            return self._reader.read(prompts, **options)

        with frozen(self._models) as signals:
            problems = signals.interruptible(read)
        return ResultStream(self._models, problems, partial(self._decode, keep=keep))

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Sequence[Any] = (),
        stopping_criteria: Sequence[Any] = (),
        generation_config: Any = None,
        *,
        seed: int | Sequence[int] = 42,
        reward_context: Sequence[RewardContext] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_return_sequences: int | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode for transformers: ``model.generate(**inputs, custom_generate=decoder)``.

        The call's generation config is obeyed, or refused by a field's name (``docs/transformers.md``).
        Rollouts draw by the decoder's ``rollout_sampling``; what the call says of drawing replaces that.
        transformers hands its ``tokenizer`` and ``streamer`` on to no callable: text is read by the
        decoder's tokenizer, and :meth:`with_streamer` takes a streamer.

        Args:
            model: the decoder's language model, whose ``generate`` was called.
            input_ids: [B, T] int64, prompts padded on the left.
            logits_processor, stopping_criteria, generation_config: as ``generate`` prepared them.
            seed: of all draws, or one a prompt. Return sequence r of a prompt has its seed + r·2²⁰.
            reward_context: for each prompt, as of :meth:`generate`.
            stop_strings: as ``stop`` of :meth:`generate`; they stay in the tokens.
            do_sample, temperature, top_k, top_p, num_return_sequences: as of transformers; None where the
                call does not say. Parameters of this function, so that what was said is known from what
                is a default.
            model_kwargs: what ``generate`` prepares for a forward; of it ``attention_mask`` is read,
                [B, T], 1 on a prompt and 0 on its padding.
        Returns:
            [B·R, T + n] int64: prompts and responses with their EOS, padded on the right; R is
            ``num_return_sequences``. With ``return_dict_in_generate`` a
            :class:`~nabla_fast.integrations.generate_output.NablaGenerateOutput`.
        Raises:
            InputError: something is asked for that a decode does not do, which the line names.
            DecodingInterrupted, DecodingFailed: as of :meth:`generate`.

        Example:
            >>> from nabla_fast.checkpoints import bundled, load_language_model, load_reward_model
            >>> from nabla_fast.checkpoints import load_tokenizer
            >>> lm, tokenizer = load_language_model(bundled("lm")), load_tokenizer(bundled("tokenizer"))
            >>> decoder = NablaDecoder(lm, load_reward_model(bundled("rm")), tokenizer)
            >>> chat = [{"role": "user", "content": "7 4 10 3 -> 13"}]
            >>> inputs = tokenizer.apply_chat_template(
            ...     chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ... )
            >>> tokens = lm.generate(**inputs, custom_generate=decoder, max_new_tokens=40, seed=0)
            >>> tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            '10-7=3,3*3=9,9+4=13'
        """
        call = GenerateCall(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            seed=seed,
            reward_context=reward_context,
            stop_strings=stop_strings,
            sampling={"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p},
            num_return_sequences=num_return_sequences,
            model_kwargs=model_kwargs,
        )

        def decode(sampling: SamplingConfig, rows: Sequence[Prompt], **options: Any) -> ResultStream:
            return self._rolling_out_by(sampling)._stream(rows, **options)

        return decode_call(call, self._lm, self.config.rollout_sampling, decode)

    def with_streamer(self, streamer: Any) -> StreamedDecoder:
        """This decoder as a ``custom_generate`` callable that feeds a streamer.

        ``generate(streamer=…)`` hands a streamer on to no callable, so it is given here. It gets the
        prompt, then the tokens of the answer one after another, all of them at the end: until then a
        revision may change them.

        Args:
            streamer: of transformers, with ``put`` and ``end``.
        Returns:
            A callable with the parameters of this decoder.
        Raises:
            InputError: it is no streamer.

        Example:
            >>> from transformers import TextStreamer
            >>> streamed = decoder.with_streamer(TextStreamer(tokenizer))  # doctest: +SKIP
            >>> lm.generate(**inputs, custom_generate=streamed)  # doctest: +SKIP
        """
        return StreamedDecoder(self, streamer)

    def _rolling_out_by(self, sampling: SamplingConfig) -> NablaDecoder:
        """This decoder with other rollouts: itself where they are its own; kept for the next call."""
        self._resolved = with_own_sampling(self.config, self._lm)
        if sampling == self._resolved.rollout_sampling:
            return self
        other = self._others.pop(sampling, None)
        if other is None:
            other = copy(self)
            other.config = replace(self.config, rollout_sampling=sampling)
            other._key, other._others = (), {}
        self._others[sampling] = other
        while len(self._others) > _MOST_OTHERS:
            del self._others[next(iter(self._others))]
        return other

    def _decode(self, problems: Mapping[int, Problem], *, keep: bool) -> Iterator[tuple[int, Result]]:
        """(index, result) of each problem as it is done.

        Args:
            problems: by index.
            keep: an error becomes the result of the problem that it concerns.
        Raises:
            DecodeFailure: without ``keep``, an error, with the problems it concerns.
        """
        indices, asked = list(problems), list(problems.values())
        try:
            self._prepare()
        except Exception as error:
            if not keep:
                raise DecodeFailure(indices) from error
            yield from ((index, self._failed(index, error, Stats())) for index in indices)
            return
        stats = [Stats() for _ in asked]
        decode = partial(self._loop.decode, keep=True) if keep else self._loop.decode
        with closing(decode(asked, stats)) as decoding, _renumbered(indices):
            for n, outcome in decoding:
                try:
                    result = self._result(asked[n], outcome, stats[n])
                except Exception as error:
                    if not keep:
                        raise DecodeFailure([n]) from error
                    result = self._failed(indices[n], error, stats[n])
                yield indices[n], result

    def _result(self, problem: Problem, decoded: Decoded | Exception, stats: Stats) -> Result:
        """The result of a response; an error is raised."""
        if isinstance(decoded, Exception):
            raise decoded
        reason = problem.finish_reason(decoded.tokens)
        tokens, eos = (
            (decoded.tokens[:-1], decoded.tokens[-1]) if reason == "eos" else (decoded.tokens, None)
        )
        text = None
        if reason == "stop" and problem.stop.trim:
            tokens, text = problem.stop.trimmed(tokens)
        elif self._tokenizer is not None:
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return Result(text, tokens, decoded.reward, reason, decoded.revisions, stats, eos_token_id=eos)

    def _failed(self, index: int, cause: Exception, stats: Stats) -> Result:
        """The result of a prompt whose decode failed."""
        error = DecodingFailed([index], [], cause)
        error.__cause__ = cause
        return self._kind.failed(error, stats)

    def _prepare(self) -> None:
        """Read and probe the models, again if something changed that what is known of them rests on.

        Raises:
            ModelError: a model cannot be used.
        """
        with probing(self._lm, "cannot be read"):
            refuse_processors(self._lm)
        self._resolved = with_own_sampling(self.config, self._lm)
        if self._key and self._key == self._fingerprint():
            return
        self._key = ()
        lm = LanguageModel(self._lm)
        rm: RewardSum | None = None
        if lm.vocabulary > MOST_VOCABULARY:
            raise ModelError(
                f"{type(self._lm).__name__} has {lm.vocabulary} tokens, more than {MOST_VOCABULARY}"
            )
        if self._members:
            setting = RewardSetting(lm.vocabulary, self._tokenizer, self._reward_tokenizer, self._alignment)
            rm = setting.sum_of(self._members)
            self._terms = terms_of(rm)
            self._expect_gradient(rm)
        if self.config.nll_coeff > 0:
            lm.probe_gradient()
        if self.config.reward_coeff > 0:
            for term in terms_of(rm):
                term.reward.probe_gradient()
        self._head = lm.head.describe()
        self._loop = self._chosen_loop(lm, rm)
        self._reader = PromptReader(lm, rm, self._tokenizer, self._reward_tokenizer)
        # After the probes, as some models prepare their weights in the first pass.
        self._key = self._fingerprint()

    def _expect_gradient(self, rm: RewardSum) -> None:
        """Say so where a reward has no gradient.

        Raises:
            InputError: there is none at all.
        """
        for term in rm.terms:
            if term.reward.differentiable:
                continue
            if self.config.nll_coeff == 0 and not any(term.reward.differentiable for term in rm.terms):
                raise InputError(
                    f"{term.reward.name} has no gradient and config.nll_coeff is 0, so that nothing is "
                    "descended: nll_coeff > 0 or a differentiable reward beside it is needed"
                )
            self._warn(
                f"{term.reward.name} has no gradient",
                "it judges proposals, and what is descended is the likelihood and other rewards alone",
            )

    def _fingerprint(self) -> tuple:
        tables = [table for given, _ in self._members if (table := table_of(given)) is not None]
        return (
            eos_ids(self._lm),
            self._resolved,
            *map(fingerprint, self._models),
            *map(weight_state, tables),
        )

    def _chosen_loop(self, lm: LanguageModel, rm: RewardSum | None) -> BatchedLoop | SequentialLoop:
        """The loop that was asked for; with "auto", the sequential one where the models need it.

        Raises:
            ModelError: the batched loop was asked for, and a model cannot be used with it.
        """
        if self._asked_loop != "sequential":
            try:
                loop = BatchedLoop(
                    lm, rm, self._resolved, batch_size=self._batch_size, max_kv_tokens=self._max_kv_tokens
                )
                self._warn_if_slow(loop)
                return loop
            except ModelError as error:
                if self._asked_loop == "batched":
                    raise ModelError(f"{one_line(error)}: pass loop='sequential'") from error
                limit = ", and max_kv_tokens has no effect" if self._max_kv_tokens is not None else ""
                self._warn(
                    one_line(error),
                    f"the sequential loop is used, several times slower{limit} "
                    "(loop='sequential' silences this warning)",
                )
        if not lm.reads_cached:
            self._warn(
                f"{type(lm.model).__name__} reads after no transformers cache what it reads in one pass",
                "each token reads everything before it again, which is slow",
            )
        return SequentialLoop(lm, rm, self._resolved)

    def _warn_if_slow(self, loop: BatchedLoop) -> None:
        for reason in loop.slow_ways():
            self._warn(reason, "everything is read again with each pass, which is slow")

    def _warn(self, reason: str, consequence: str) -> None:
        """Warn the caller, once for each reason."""
        if reason in self._warned:
            return
        names = [type(model).__name__ for model in self._models]
        rewards = [term.reward.name for term in self._terms]
        subject = "" if any(name in reason for name in names + rewards) else f"{' with '.join(names)}: "
        warnings.warn(
            f"{subject}{reason}: {consequence}", UserWarning, stacklevel=1 + _frames_to_the_caller()
        )
        self._warned.add(reason)


@contextmanager
def _renumbered(indices: Sequence[int]) -> Iterator[None]:
    """Errors name problems by these indices."""
    try:
        yield
    except DecodeFailure as failure:
        raise DecodeFailure([indices[n] for n in failure.problems]) from failure.__cause__


def _call(
    on_result: Callable[[int, Result], None], n: int, result: Result, results: list[Result | None]
) -> None:
    try:
        on_result(n, result)
    except Exception as error:
        raise DecodingFailed([n], results, error) from error


def _frames_to_the_caller() -> int:
    """How many frames above the function that calls this the first one outside the package is."""
    frames, frame = 0, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] == "nabla_fast":
        frames, frame = frames + 1, frame.f_back
    return frames


def _at_least(least: int, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_weights(name: str, model: nn.Module) -> None:
    if any(weight.is_inference() for weight in model.parameters()):
        raise ModelError(
            f"{name} has weights made under torch.inference_mode, through which no gradient goes: "
            "load it outside"
        )
