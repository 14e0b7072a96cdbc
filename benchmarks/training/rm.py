"""Training of the reward model: groups of responses to one problem, ranked pairwise.

The reward is read at the last token. While training, every earlier token of a response is labelled
too: is what is written so far the beginning of a solution? It is the same question asked earlier,
through the same head, and says where an answer goes wrong, which a label at its end does not.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from benchmarks.training.data import (
    END_ID,
    Book,
    encode_answer,
    encode_prompt,
    encode_text,
    pad_rows,
    random_solution,
)
from benchmarks.training.lm import Optimizer, config, learning_rate
from nabla_fast.demo.countdown import LARGEST_NUMBER, SMALLEST_NUMBER, Problem, check

GROUPS, POSITIVES, NEGATIVES = 16, 2, 6  # a batch: groups of responses to one problem each
SAMPLED_NEGATIVES = 4  # at most; the other negatives are corruptions
_BEGINNING_WEIGHT = 0.5
_CENTRING = 2e-3  # keeps a group's mean reward near zero; the pairwise loss leaves it free


def _common_length(a: bytes, b: bytes) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


class Beginnings:
    """Tells how far a response goes along some solution of its problem."""

    def __init__(self, answers: Iterable[str]) -> None:
        self._responses = sorted(map(encode_answer, answers))

    def common_length(self, response: bytes) -> int:
        """Length of the longest prefix that ``response`` shares with a solution.

        Token ids as bytes, the solutions with their end token: a right and complete response has
        its full length in common.
        """
        at = bisect(self._responses, response)
        # In sorted order, the longest common prefix is with a neighbour.
        neighbours = self._responses[max(0, at - 1) : at + 1]
        return max(_common_length(response, other) for other in neighbours)


@dataclass(frozen=True)
class Group:
    """A problem and responses to it, as text."""

    problem: Problem
    right: list[str]  # the policy's right samples and some reference solutions
    beginnings: Beginnings
    wrong: list[str]  # the policy's wrong samples; corruptions are drawn afresh every time
    wrong_target: list[str]  # flawless work with the right numbers that reaches another target
    wrong_numbers: list[str]  # flawless work towards the target with one or two other numbers


def build_groups(
    problems: Sequence[Problem], samples: Sequence[Sequence[str]], book: Book, seed: int
) -> list[Group]:
    """One group a problem, from the policy's samples and the enumerated solutions."""
    rng = random.Random(seed)
    groups = []
    for problem, answers in zip(problems, samples, strict=True):
        verdicts = [check(problem, answer) for answer in answers]
        by_target = book[tuple(sorted(problem.numbers))]
        references = by_target[problem.target].split(" ")
        others = [target for target in by_target if target != problem.target]
        groups.append(
            Group(
                problem=problem,
                right=[a for a, good in zip(answers, verdicts, strict=True) if good]
                + rng.sample(references, min(len(references), 8)),
                beginnings=Beginnings(references),
                wrong=[a for a, good in zip(answers, verdicts, strict=True) if not good],
                wrong_target=[
                    random_solution(by_target[target], rng)
                    for target in rng.sample(others, min(len(others), 12))
                ],
                wrong_numbers=_with_wrong_numbers(problem, book, rng, count=8),
            )
        )
    return groups


def _with_wrong_numbers(problem: Problem, book: Book, rng: random.Random, count: int) -> list[str]:
    found = []
    for _ in range(40 * count):
        numbers = list(problem.numbers)
        for i in rng.sample(range(len(numbers)), rng.choice((1, 1, 2))):
            any_number = rng.randint(SMALLEST_NUMBER, LARGEST_NUMBER)
            numbers[i] = rng.choice((any_number, rng.choice(problem.numbers)))
        changed = tuple(sorted(numbers))
        if changed != tuple(sorted(problem.numbers)) and problem.target in book[changed]:
            found.append(random_solution(book[changed][problem.target], rng))
            if len(found) == count:
                break
    return found


def _replace(text: str, characters: str, rng: random.Random) -> str:
    """One of the characters in ``text`` that are among ``characters``, replaced by another."""
    places = [i for i, c in enumerate(text) if c in characters]
    i = rng.choice(places)
    return text[:i] + rng.choice(characters.replace(text[i], "")) + text[i + 1 :]


def _digit(group: Group, answer: str, rng: random.Random) -> str:
    return _replace(answer, "0123456789", rng)


def _operator(group: Group, answer: str, rng: random.Random) -> str:
    return _replace(answer, "+-*", rng)


def _wrong_target(group: Group, answer: str, rng: random.Random) -> str:
    # The smallest numbers may reach nothing but the target.
    return rng.choice(group.wrong_target or [_digit(group, answer, rng)])


def _wrong_numbers(group: Group, answer: str, rng: random.Random) -> str:
    if not group.wrong_numbers:
        return _wrong_target(group, answer, rng)
    return rng.choice(group.wrong_numbers)


def _wrong_result(group: Group, answer: str, rng: random.Random) -> str:
    """Work towards another target, with this one written as its last result."""
    other = _wrong_target(group, answer, rng)
    return other[: other.rindex("=") + 1] + str(group.problem.target)


def _missing_step(group: Group, answer: str, rng: random.Random) -> str:
    steps = answer.split(",")
    del steps[rng.randrange(len(steps))]
    return ",".join(steps)


def _repeated_step(group: Group, answer: str, rng: random.Random) -> str:
    steps = answer.split(",")
    steps[rng.randrange(len(steps))] = rng.choice(steps)
    return ",".join(steps)


def _noise(group: Group, answer: str, rng: random.Random) -> str:
    return "".join(rng.choice("0123456789+-*=,") for _ in range(rng.randint(1, 26)))


def _truncated(group: Group, answer: str, rng: random.Random) -> str:
    return answer[: rng.randrange(len(answer))]


# How an answer is spoiled, and how often.
CORRUPTIONS = {
    _wrong_target: 4,
    _wrong_numbers: 4,
    _wrong_result: 3,
    _digit: 4,
    _operator: 2,
    _missing_step: 1,
    _repeated_step: 1,
    _truncated: 1,
    _noise: 1,
}


def corrupt(group: Group, answer: str, rng: random.Random) -> bytes:
    """A wrong response made from a right one; half of the truncated ones lack the end token."""
    while True:
        (spoil,) = rng.choices(list(CORRUPTIONS), CORRUPTIONS.values())
        spoiled = spoil(group, answer, rng)
        if not check(group.problem, spoiled):
            ended = spoil is not _truncated or rng.random() < 0.5
            return encode_text(spoiled) + (bytes([END_ID]) if ended else b"")


def rm_batch(groups: Sequence[Group], rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of ``GROUPS`` groups, the right responses leading each group.

    Returns token ids [N, L] int64, the index of each row's last token [N] int64, and labels [N, L]
    float32: 1 where a response is still the beginning of a solution, 0 where not, NaN elsewhere.
    N is ``GROUPS * (POSITIVES + NEGATIVES)``. Some wrong responses of each group are corruptions, and
    the more the fewer the policy gave: a ranking learned from corruptions alone does not carry over
    to samples.
    """
    rows, last, spans = [], [], []
    for group in rng.choices(groups, k=GROUPS):
        prompt = encode_prompt(group.problem)
        responses = [encode_answer(answer) for answer in rng.choices(group.right, k=POSITIVES)]
        sampled = rng.sample(group.wrong, min(len(group.wrong), SAMPLED_NEGATIVES))
        responses += [encode_answer(answer) for answer in sampled]
        while len(responses) < POSITIVES + NEGATIVES:
            responses.append(corrupt(group, rng.choice(group.right), rng))
        for response in responses:
            rows.append(prompt + response)
            last.append(len(prompt) + len(response) - 1)
            good = len(prompt) + group.beginnings.common_length(response)
            spans.append((len(prompt), good, len(prompt) + len(response)))
    ids = pad_rows(rows)
    position = torch.arange(ids.shape[1])[None]
    start, good, end = (torch.tensor(bounds)[:, None] for bounds in zip(*spans, strict=True))
    labels = (position < good).float().masked_fill((position < start) | (position >= end), torch.nan)
    return ids, torch.tensor(last), labels


def from_language_model(lm: Qwen2ForCausalLM) -> Qwen2ForSequenceClassification:
    """A reward model with the language model's body and a fresh head."""
    model = Qwen2ForSequenceClassification(config(num_labels=1))
    model.model.load_state_dict(lm.model.state_dict())
    torch.nn.init.normal_(model.score.weight, std=0.01)
    return model


def pairwise_loss(rewards: Tensor) -> Tensor:
    """Bradley-Terry over all (right, wrong) pairs within a group. rewards: [groups, responses]."""
    right, wrong = rewards[:, :POSITIVES], rewards[:, POSITIVES:]
    margins = right[:, :, None] - wrong[:, None, :]
    return F.softplus(-margins).mean() + _CENTRING * rewards.mean(dim=1).square().mean()


def beginning_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of the labelled positions; both arguments are [N, L]."""
    labelled = ~labels.isnan()
    return F.binary_cross_entropy_with_logits(scores[labelled], labels[labelled])


def train(
    model: Qwen2ForSequenceClassification,
    groups: Sequence[Group],
    *,
    steps: int,
    peak_lr: float,
    seed: int,
    report: Callable[[int, float], None],
) -> None:
    """Minimize both losses in place; ``report`` gets the step and the pairwise one."""
    rng = random.Random(seed)
    optimizer = Optimizer(model)
    model.train()
    for step in range(steps):
        ids, last, labels = rm_batch(groups, rng)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            scores = model.score(hidden)[..., 0].float()
        rewards = scores.gather(1, last[:, None]).view(GROUPS, POSITIVES + NEGATIVES)
        ranking = pairwise_loss(rewards)
        (ranking + _BEGINNING_WEIGHT * beginning_loss(scores, labels)).backward()
        optimizer.step(learning_rate(step, steps, peak_lr))
        report(step, ranking.item())


@torch.inference_mode()
def score_rows(model: PreTrainedModel, rows: Sequence[bytes]) -> list[float]:
    """Rewards of prompt + response token ids; the last token of each row is where it is read."""
    model.eval()
    rewards: list[float] = []
    for start in range(0, len(rows), 512):
        # The model itself pools the last token that is not padding.
        rewards += model(input_ids=pad_rows(rows[start : start + 512])).logits[:, 0].tolist()
    return rewards


def score(
    model: PreTrainedModel, problems: Sequence[Problem], answers: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Rewards of complete answers (the end token is added), in the shape of ``answers``."""
    rows = [
        encode_prompt(problem) + encode_answer(answer)
        for problem, group in zip(problems, answers, strict=True)
        for answer in group
    ]
    rewards = iter(score_rows(model, rows))
    return [[next(rewards) for _ in group] for group in answers]
