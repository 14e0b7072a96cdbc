"""Figures of the model card: accuracy of the policy, ranking by the reward model."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

import torch
from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification

from benchmarks.training.data import encode_answer, encode_prompt
from benchmarks.training.rm import Group, corrupt, score, score_rows
from benchmarks.training.sample import decode
from nabla_fast.demo.countdown import Problem, check, majority

SAMPLES = 8
CONFIDENCE_THRESHOLD = 0.97  # DTOConfig's default


def wilson(successes: int, n: int, z: float = 1.959964) -> list[float]:
    """95% Wilson interval of a share."""
    p = successes / n
    centre = p + z * z / (2 * n)
    radius = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round((centre + sign * radius) / (1 + z * z / n), 4) for sign in (-1, 1)]


def share(verdicts: Sequence[bool]) -> dict:
    """``{"accuracy", "ci95", "n"}`` of a list of verdicts, one a problem."""
    right, n = sum(verdicts), len(verdicts)
    return {"accuracy": round(right / n, 4), "ci95": wilson(right, n), "n": n}


def ranking(rewards: Sequence[Sequence[float]], verdicts: Sequence[Sequence[bool]]) -> dict:
    """How well rewards order right before wrong answers of the same problem; ties count half.

    ``auc`` averages over the problems that have both, ``pairwise_accuracy`` over all their pairs.
    """
    aucs, won, pairs = [], 0.0, 0
    for values, good in zip(rewards, verdicts, strict=True):
        right = [v for v, g in zip(values, good, strict=True) if g]
        wrong = [v for v, g in zip(values, good, strict=True) if not g]
        if right and wrong:
            wins = sum((r > w) + 0.5 * (r == w) for r in right for w in wrong)
            aucs.append(wins / (len(right) * len(wrong)))
            won, pairs = won + wins, pairs + len(right) * len(wrong)
    if not aucs:
        return {"auc": None, "pairwise_accuracy": None, "problems": 0, "pairs": 0}
    return {
        "auc": round(sum(aucs) / len(aucs), 4),
        "pairwise_accuracy": round(won / pairs, 4),
        "problems": len(aucs),
        "pairs": pairs,
    }


@torch.inference_mode()
def unsure_share(lm: Qwen2ForCausalLM, problems: Sequence[Problem], answers: Sequence[str]) -> float:
    """Share of response positions, the end token's included, with confidence at most 0.97.

    Confidence is the largest probability at temperature 1; ``answers`` are one rollout a problem.
    """
    unsure = total = 0
    for problem, answer in zip(problems, answers, strict=True):
        prompt, response = encode_prompt(problem), encode_answer(answer)
        logits = lm(input_ids=torch.tensor([list(prompt + response[:-1])])).logits[0]
        confidence = logits[len(prompt) - 1 :].softmax(dim=-1).amax(dim=-1)
        unsure += int((confidence <= CONFIDENCE_THRESHOLD).sum())
        total += len(response)
    return round(unsure / total, 4)


def evaluate_lm(lm: Qwen2ForCausalLM, problems: Sequence[Problem], seed: int) -> dict:
    """A language model's ``figures`` and the ``samples`` and ``verdicts`` they rest on.

    Samples and verdicts are lists of ``SAMPLES`` for each problem.
    """
    greedy = [answers[0] for answers in decode(lm, problems, 1)]
    sampled = decode(lm, problems, SAMPLES, seed=seed)
    verdicts = [[check(p, a) for a in group] for p, group in zip(problems, sampled, strict=True)]
    right = [check(p, a) for p, a in zip(problems, greedy, strict=True)]
    by_count = {
        str(k): share([ok for p, ok in zip(problems, right, strict=True) if len(p.numbers) == k])
        for k in sorted({len(p.numbers) for p in problems})
    }
    figures = {
        "greedy": share(right),
        "greedy_by_number_count": by_count,
        "sampled_pass_at_1": round(sum(map(sum, verdicts)) / (SAMPLES * len(problems)), 4),
        f"sampled_pass_at_{SAMPLES}": share([any(group) for group in verdicts]),
        f"self_consistency_{SAMPLES}": share(
            [check(p, majority(g) or "") for p, g in zip(problems, sampled, strict=True)]
        ),
        "distinct_answers_of_8": round(sum(len(set(g)) for g in sampled) / len(problems), 2),
        "unsure_share_greedy": unsure_share(lm, problems[:500], greedy[:500]),
        "unsure_share_sampled": unsure_share(lm, problems[:500], [g[0] for g in sampled[:500]]),
    }
    return {"figures": figures, "samples": sampled, "verdicts": verdicts}


def evaluate_rm(
    rm: Qwen2ForSequenceClassification,
    problems: Sequence[Problem],
    samples: Sequence[Sequence[str]],
    verdicts: Sequence[Sequence[bool]],
) -> dict:
    """Best-of-N by the reward model, and its ranking of the policy's samples."""
    rewards = score(rm, problems, samples)
    best = [
        good[max(range(len(values)), key=values.__getitem__)]
        for values, good in zip(rewards, verdicts, strict=True)
    ]
    by_verdict: dict[bool, list[float]] = {True: [], False: []}
    for values, good in zip(rewards, verdicts, strict=True):
        for value, ok in zip(values, good, strict=True):
            by_verdict[ok].append(value)
    return {
        f"best_of_{SAMPLES}": share(best),
        "within_problem": ranking(rewards, verdicts),
        "median_reward": {
            name: round(statistics.median(by_verdict[ok]), 2) if by_verdict[ok] else None
            for name, ok in (("right", True), ("wrong", False))
        },
    }


def evaluate_corruptions(rm: Qwen2ForSequenceClassification, groups: Sequence[Group], seed: int) -> float:
    """Share of (right answer, a corruption of it) pairs that the reward model orders rightly."""
    rng = random.Random(seed)
    rows = []
    for group in groups:
        prompt, answer = encode_prompt(group.problem), rng.choice(group.right)
        rows += [prompt + encode_answer(answer), prompt + corrupt(group, answer, rng)]
    rewards = score_rows(rm, rows)
    pairs = zip(rewards[::2], rewards[1::2], strict=True)
    return round(sum(right > wrong for right, wrong in pairs) / len(groups), 4)
