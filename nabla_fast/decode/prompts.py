"""Prompts as strings, chats or token ids, turned into problems."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from nabla_fast.decode.problem import Problem
from nabla_fast.decode.stop import StopStrings
from nabla_fast.errors import InputError, one_line
from nabla_fast.models import LanguageModel, Reward, RewardSum, RewardTerm, terms_of
from nabla_fast.models.function_reward import FunctionScorer

Chat = Sequence[Mapping[str, str]]
Prompt = str | Chat | Sequence[int]
Around = tuple[Sequence[int], Sequence[int]]  # tokens before and after a response
RewardContext = Around | Sequence[Around | None]  # the latter with several rewards: one each

_Ids = tuple[int, ...]

# Placeholder for a response, to see what a chat template puts after one.
_RESPONSE = "nabla response placeholder"


class PromptReader:
    """Turns prompts into problems for an LM and rewards.

    Args:
        lm, rm: the models; ``rm`` may be None.
        tokenizer: the LM's, or None if prompts are token ids.
        reward_tokenizer: of rewards that have none of their own.
    """

    def __init__(
        self, lm: LanguageModel, rm: RewardSum | Reward | None, tokenizer: Any, reward_tokenizer: Any
    ):
        self._lm, self._rewards = lm, terms_of(rm)
        self._tokenizer, self._reward_tokenizer = tokenizer, reward_tokenizer

    def read(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int | Sequence[int],
        max_new_tokens: int,
        system_prompt: str | None,
        stop: Sequence[str],
        reward_context: Sequence[RewardContext] | None,
        trim_stop: bool = False,
        eos_ids: frozenset[int] | None = None,
    ) -> list[Problem]:
        """Check and tokenize everything before anything is decoded; other arguments as of ``generate``.

        Args:
            eos_ids: tokens that end a response; None: the model's own.
        Raises:
            InputError: a prompt or an option is wrong; the line names the prompt.
        """
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Sequence):
            raise InputError(f"prompts must be a list of prompts, got {type(prompts).__name__}")
        if not _whole(max_new_tokens) or max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be a whole number ≥ 1, got {max_new_tokens!r}")
        if system_prompt is not None and not isinstance(system_prompt, str):
            raise InputError(f"system_prompt must be a string, got {type(system_prompt).__name__}")
        if system_prompt is not None:
            _check_text("system_prompt", system_prompt)
        seeds = _seeds(seed, len(prompts))
        stop_strings = StopStrings(stop, self._tokenizer, trim=trim_stop)
        if reward_context is not None:
            if not isinstance(reward_context, Sequence):
                raise InputError(
                    "reward_context must be a list of (prefix ids, suffix ids), "
                    f"got {type(reward_context).__name__}"
                )
            if len(reward_context) != len(prompts):
                raise InputError(
                    "reward_context must have one (prefix ids, suffix ids) a prompt, "
                    f"got {len(reward_context)} for {len(prompts)} prompts"
                )
        problems = []
        for n, prompt in enumerate(prompts):
            try:
                context = None if reward_context is None else reward_context[n]
                ids, chat = self._prompt(prompt, system_prompt)
                around = self._contexts(ids, chat, context)
                room = self._room(ids, around)
            except InputError as error:
                raise InputError(f"prompt {n}: {error}") from None
            length = max_new_tokens if room is None else min(max_new_tokens, room)
            (prefix, suffix), *others = around or [((), ())]
            ends = self._lm.eos_ids if eos_ids is None else eos_ids
            end = seeds[n], length, ends, stop_strings
            problems.append(Problem(ids, prefix, suffix, *end, tuple(others)))
        return problems

    def _prompt(self, prompt: Prompt, system_prompt: str | None) -> tuple[_Ids, Chat | None]:
        """The LM's prompt, and the chat that it was made of; None for token ids."""
        chat = _as_chat(prompt, system_prompt)
        if chat is None:
            ids = _checked_ids(
                prompt,
                self._lm.vocabulary,
                "token id",
                "a prompt must be a string, a chat or a list of token ids",
            )
            if not ids:
                raise InputError("the prompt is empty")
        else:
            self._expect_short(chat)
            ids = self._known(
                render_chat(self._tokenizer, chat), self._lm.vocabulary, "tokenizer", "language"
            )
            if not ids:
                raise InputError("the chat template renders nothing")
        return ids, chat

    def _contexts(
        self, ids: _Ids, chat: Chat | None, context: RewardContext | None
    ) -> list[tuple[_Ids, _Ids]]:
        """Each reward's own tokens before and after a response."""
        count = len(self._rewards)
        contexts: Sequence[Around | None] = [context] * count
        if count > 1 and context is not None:
            if not isinstance(context, Sequence) or len(context) != count:
                raise InputError(
                    f"its reward_context must have a pair (prefix, suffix), or None, for each of {count} "
                    f"rewards, got {context!r}"
                )
            contexts = context
        return [
            self._around(term, ids, chat, around)
            for term, around in zip(self._rewards, contexts, strict=True)
        ]

    def _around(
        self, term: RewardTerm, ids: _Ids, chat: Chat | None, context: Around | None
    ) -> tuple[_Ids, _Ids]:
        """A reward's own tokens before and after a response."""
        reward = term.reward
        if isinstance(reward, FunctionScorer):
            return ids, ()
        if context is not None:
            expected = "its reward_context must be a pair of lists of token ids (prefix, suffix)"
            if not isinstance(context, Sequence) or len(context) != 2:
                raise InputError(f"{expected}, got {context!r}")
            prefix, suffix = (
                _checked_ids(part, reward.vocabulary, "reward token id", expected) for part in context
            )
        elif chat is None:
            prefix, suffix = tuple(reward.read(ids)), self._tail(term)
        else:
            around = around_response(self._tokenizer_of(term), chat)
            prefix, suffix = (self._reward_ids(part, term) for part in around)
        if not prefix:
            raise InputError("the reward model's prefix is empty")
        return prefix, suffix

    def _tokenizer_of(self, term: RewardTerm) -> Any:
        return self._reward_tokenizer if term.tokenizer is None else term.tokenizer

    def _expect_short(self, chat: Chat) -> None:
        """Refuse a chat that no context has room for before its text is cut into tokens.

        That takes hundreds of bytes a character. No token has more characters than the longest one.
        """
        if self._lm.context is None or not hasattr(self._tokenizer, "get_vocab"):
            return
        characters = sum(len(message["content"]) for message in chat)
        if characters <= self._lm.context:
            return
        longest = max(map(len, self._tokenizer.get_vocab()), default=1)
        if characters > self._lm.context * longest:
            raise InputError(
                f"{characters} characters leave no room for a response in the language model's context of "
                f"{self._lm.context} tokens, the longest of which has {longest} characters"
            )

    def _tail(self, term: RewardTerm) -> _Ids:
        tokenizer = self._tokenizer_of(term)
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            return ()
        return self._reward_ids(response_tail(tokenizer), term)

    def _reward_ids(self, ids: _Ids, term: RewardTerm) -> _Ids:
        """The reward's own ids of what its tokenizer gave, which may be the LM's."""
        if self._tokenizer_of(term) is self._tokenizer:
            return tuple(term.reward.read(self._known(ids, self._lm.vocabulary, "tokenizer", "language")))
        return self._known(ids, term.reward.vocabulary, "reward tokenizer", "reward")

    @staticmethod
    def _known(ids: tuple[int, ...], vocabulary: int, tokenizer: str, model: str) -> tuple[int, ...]:
        """Ids that a tokenizer gave, if the model has a row for each: its tokenizer may know more."""
        for i in ids:
            if i >= vocabulary:
                raise InputError(
                    f"the {tokenizer} gives token {i}, beyond the {vocabulary} rows of the "
                    f"{model} model's table: "
                    f"leave the token out, or call resize_token_embeddings({i + 1}) and train its row"
                )
        return ids

    def _room(self, ids: _Ids, around: Sequence[tuple[_Ids, _Ids]]) -> int | None:
        """Tokens that fit between a prompt and the end of any model's context; None: no limit."""
        rooms = []
        models = [("language", self._lm, len(ids))]
        for term, (prefix, suffix) in zip(self._rewards, around, strict=True):
            models.append(("reward", term.reward, len(prefix) + len(suffix)))
        for name, model, used in models:
            if model.context is None:
                continue
            if used >= model.context:
                raise InputError(
                    f"{used} tokens leave no room for a response in the {name} model's context "
                    f"of {model.context}"
                )
            rooms.append(model.context - used)
        return min(rooms, default=None)


def render_chat(tokenizer: Any, chat: Chat, name: str = "tokenizer") -> tuple[int, ...]:
    """Token ids of a chat up to where the assistant's response begins, a doubled BOS made one.

    Args:
        name: what messages call the tokenizer.
    Raises:
        InputError: there is no tokenizer or chat template, or either refuses the chat.
    """
    return _ids(tokenizer, _rendered(tokenizer, chat, name, add_generation_prompt=True), name)


def around_response(
    tokenizer: Any, chat: Chat, name: str = "reward tokenizer"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids before and after the assistant's response to a chat, as the template writes it whole.

    The chat is rendered once with a placeholder for the response: what a template writes before a
    finished response may differ from what it writes for one to come, its generation prompt.

    Args:
        name: what messages call the tokenizer.
    Raises:
        InputError: as of :func:`render_chat`; or the template does not show the response once, as it is.
    """
    text = _rendered(tokenizer, [*chat, {"role": "assistant", "content": _RESPONSE}], name)
    before, *after = text.split(_RESPONSE)
    if len(after) != 1:
        shown = "drops the assistant's response" if not after else "shows the assistant's response twice"
        raise InputError(f"the {name}'s chat template {shown}: pass reward_context")
    return _ids(tokenizer, before, name), _ids(tokenizer, after[0], name)


def response_tail(tokenizer: Any) -> tuple[int, ...]:
    """Token ids that a chat template puts after an assistant's response.

    Raises:
        InputError: as of :func:`around_response`.
    """
    return around_response(tokenizer, [{"role": "user", "content": "x"}])[1]


def _rendered(tokenizer: Any, chat: Chat, name: str, **options: bool) -> str:
    if tokenizer is None:
        raise InputError(f"text needs a {name}; without one, pass token ids")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"the {name} has no chat template; set its chat_template or pass token ids")
    try:
        return tokenizer.apply_chat_template(list(chat), tokenize=False, **options)
    except Exception as error:  # templates raise their own errors for roles they do not know
        raise InputError(f"the {name}'s chat template refuses the chat: {one_line(error)}") from error


def _ids(tokenizer: Any, text: str, name: str) -> tuple[int, ...]:
    try:
        ids = tokenizer(text, add_special_tokens=False).input_ids
    except Exception as error:  # tokenizers raise their own errors for text they cannot read
        raise InputError(f"the {name} cannot read the text: {one_line(error)}") from error
    bos = getattr(tokenizer, "bos_token_id", None)
    return tuple(ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids)


def _as_chat(prompt: Prompt, system_prompt: str | None) -> Chat | None:
    """A string or chat as messages; None for token ids."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError("the prompt is empty")
        _check_text("the prompt", prompt)
        return [*system, {"role": "user", "content": prompt}]
    if isinstance(prompt, Sequence) and prompt and all(isinstance(message, Mapping) for message in prompt):
        for m, message in enumerate(prompt):
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise InputError(f"message {m} must have a 'role' and a 'content' string")
            _check_text(f"message {m}", message["content"])
        if not any(message["content"].strip() for message in prompt):
            raise InputError("the prompt is empty")
        if system and any(message["role"] == "system" for message in prompt):
            raise InputError("the chat has a system message of its own beside system_prompt")
        return [*system, *prompt]
    if system:
        raise InputError("system_prompt goes with strings and chats, not with token ids")
    return None


def _check_text(name: str, text: str) -> None:
    """Text is Unicode: half a surrogate pair, which a JSON escape can make, is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} has {text[error.start]!r} at character {error.start}, half a surrogate pair"
        ) from None


def _checked_ids(ids: Any, vocabulary: int, name: str, expected: str) -> tuple[int, ...]:
    given = type(ids).__name__
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise InputError(f"{expected}, got {given}")
    ids = [_plain_id(i) for i in ids]
    if None in ids:
        raise InputError(f"{expected}, got {given}")
    for position, i in enumerate(ids):
        if not 0 <= i < vocabulary:
            raise InputError(f"{name} {i} at position {position} is outside the vocabulary of {vocabulary}")
    return tuple(ids)


def _plain_id(value: object) -> int | None:
    """A whole number of Python's, NumPy's or PyTorch's; None for anything else."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        return None
    if getattr(value, "ndim", 0):  # an array of one number would do as an index
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * max(count, 1)
    for s in seeds:
        if not _whole(s) or not 0 <= s < 2**62:
            raise InputError(f"a seed must be a whole number from 0 to 2**62 - 1, got {s!r}")
    if isinstance(seed, Sequence) and len(seeds) != count:
        raise InputError(f"seed must be one number or one a prompt, got {len(seeds)} for {count} prompts")
    return seeds


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
