"""Countdown problems as token arrays: the training pools and the batches drawn from them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.training.tokenizer import CHARACTERS, END, PAD, ROLES, SPECIAL_TOKENS
from nabla_fast.demo.countdown import (
    FOUR_NUMBER_SHARE,
    Problem,
    Split,
    number_sets,
    reachable,
    render,
    solutions,
    split_of,
)

PAD_ID, END_ID = SPECIAL_TOKENS.index(PAD), SPECIAL_TOKENS.index(END)
USER_ID, ASSISTANT_ID = (SPECIAL_TOKENS.index(ROLES[role]) for role in ("user", "assistant"))
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(CHARACTERS)
MAX_NEW_TOKENS = 27  # the longest answer and its end token

_ID_OF = {character: len(SPECIAL_TOKENS) + i for i, character in enumerate(CHARACTERS)}
# Building batches is on the training loop's path, so texts are encoded by one bytes.translate.
_TABLE = bytes(_ID_OF.get(chr(byte), 0) for byte in range(256))


def encode_text(text: str) -> bytes:
    """Token ids of plain text as bytes (the vocabulary has fewer than 256 entries)."""
    return text.encode("ascii").translate(_TABLE)


def encode_prompt(problem: Problem) -> bytes:
    """The chat template's rendering of the problem, up to the assistant's first token."""
    return bytes([USER_ID]) + encode_text(render(problem)) + bytes([END_ID, ASSISTANT_ID])


def encode_answer(answer: str) -> bytes:
    return encode_text(answer) + bytes([END_ID])


def decode_answer(ids: Sequence[int]) -> str:
    """Text of response tokens up to the end token; special tokens become ``?``."""
    first = len(SPECIAL_TOKENS)
    ids = list(ids)
    if END_ID in ids:
        ids = ids[: ids.index(END_ID)]
    return "".join(CHARACTERS[i - first] if i >= first else "?" for i in ids)


def pad_rows(rows: Sequence[bytes], length: int | None = None) -> Tensor:
    """Rows of token ids, padded on the right. Returns [rows, length] int64."""
    length = length or max(map(len, rows))
    flat = b"".join(row.ljust(length, bytes([PAD_ID])) for row in rows)
    ids = np.frombuffer(flat, dtype=np.uint8).reshape(len(rows), length)
    return torch.from_numpy(ids.astype(np.int64))


# {sorted numbers: {target: its solutions, joined by spaces}}. One string a problem takes a fifth of
# the memory of a list of strings; ``random_solution`` takes it apart.
Book = dict[tuple[int, ...], dict[int, str]]


def _page(numbers: tuple[int, ...], splits: Sequence[Split]) -> dict[int, str]:
    return {
        target: " ".join(answers)
        for target, answers in solutions(numbers).items()
        if split_of(Problem(numbers, target)) in splits
    }


def solution_book() -> Book:
    """The solutions of all training problems; the held-out ones are left out altogether."""
    return {numbers: _page(numbers, ("lm", "rm")) for count in (3, 4) for numbers in number_sets(count)}


def problem_count() -> int:
    """Problems of all splits together."""
    return sum(len(reachable(numbers)) for count in (3, 4) for numbers in number_sets(count))


def with_held_out(book: Book, problems: Sequence[Problem]) -> Book:
    """The book with everything that the numbers of ``problems`` reach, for evaluation."""
    number_tuples = {tuple(sorted(problem.numbers)) for problem in problems}
    return book | {numbers: _page(numbers, ("lm", "rm", "held_out")) for numbers in number_tuples}


def random_solution(joined: str, rng: random.Random) -> str:
    return rng.choice(joined.split(" "))


@dataclass
class Pool:
    """All problems of some splits with three and with four numbers, each with its solutions.

    ``entries[count]`` holds (sorted numbers, target, solutions joined by spaces).
    """

    entries: dict[int, list[tuple[tuple[int, ...], int, str]]]

    @classmethod
    def of(cls, book: Book, *splits: Split) -> Pool:
        pool = cls({3: [], 4: []})
        for numbers, by_target in book.items():
            for target, joined in by_target.items():
                if split_of(Problem(numbers, target)) in splits:
                    pool.entries[len(numbers)].append((numbers, target, joined))
        return pool

    def __len__(self) -> int:
        return sum(map(len, self.entries.values()))

    def draw(self, rng: random.Random) -> tuple[Problem, str]:
        """A problem with its numbers in random order, and one of its solutions at random."""
        entries = self.entries[4 if rng.random() < FOUR_NUMBER_SHARE else 3]
        numbers, target, joined = entries[int(rng.random() * len(entries))]
        shown = list(numbers)
        rng.shuffle(shown)
        return Problem(tuple(shown), target), random_solution(joined, rng)


def lm_batch(pool: Pool, rng: random.Random, size: int) -> tuple[Tensor, Tensor]:
    """Token ids [size, L] int64 and labels [size, L] int64, -100 outside of the answers.

    ``labels[:, i]`` is the token that position ``i`` predicts.
    """
    rows, prompt_lengths = [], []
    for _ in range(size):
        problem, answer = pool.draw(rng)
        prompt = encode_prompt(problem)
        rows.append(prompt + encode_answer(answer))
        prompt_lengths.append(len(prompt))
    ids = pad_rows(rows)
    inputs, labels = ids[:, :-1], ids[:, 1:].clone()
    position = torch.arange(labels.shape[1])
    labels[position[None] < torch.tensor(prompt_lengths)[:, None] - 1] = -100
    labels[labels == PAD_ID] = -100
    return inputs, labels
