"""The trial of one type: full decodes by both loops, and a gradient, against passes without any cache."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nabla_fast import DTOConfig, NablaDecoder, Result
from nabla_fast.decode.batched.executor import Executor
from nabla_fast.decode.batched.pools import Pools
from nabla_fast.decode.batched.requests import Gradient
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.reference.gradient import GradientModel
from nabla_fast.decode.relaxed import Relaxed
from nabla_fast.decode.stop import StopStrings
from nabla_fast.errors import DecodingFailed, ModelError, one_line
from nabla_fast.models.prefix_reading import WholeReading
from nabla_fast.models.whole_reader import OwnForward
from nabla_fast.results import Stats
from tools.families.building import build

PROMPTS = [[5, 9, 3, 14], [7, 4, 11, 50, 61, 33]]
CONTEXTS = [([7, 4, 11], [8]), ([7, 41, 11, 3], [8, 2])]
NEW_TOKENS = 36
# Seeds and learning rates: the first pair with an accepted revision is taken.
ATTEMPTS = ((42, 1.0), (1, 1.0), (42, 10.0), (1, 100.0), (2, 1.0), (3, 10.0), (4, 1.0), (5, 10.0))
# Behind a remembered state of any sequence, so that a gradient does not begin at the first token.
CUT = 30


def trial(kind: str, task: str = "lm") -> dict[str, Any]:
    """What a decode with a model of a type comes to, beside a Qwen2 model in the other role.

    Args:
        kind: the type.
        task: "lm", or "reward_model" for its sequence classifier.
    Returns:
        ``kind``, ``task``, and
        ``stage``: "build", "sequential", "batched" where it was refused there, else "done";
        ``why``: the line of the refusal;
        ``dtype``: of the trial;
        ``sequential``, ``batched``: whether the loop gives the tokens and revisions of the sequential loop
            without any cache;
        ``accepted``: revisions of these that were accepted;
        ``reads``: how the batched loop reads the model;
        ``gradient_error``: of the batched loop's gradient, relative to full recomputation.
    """
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"kind": kind, "task": task}
    try:
        model = build(kind, classifier=task == "reward_model")
    except Exception as error:
        return found | {"stage": "build", "why": f"transformers does not build it small: {_line(error)}"}
    other = build("qwen2", classifier=task == "lm")
    lm, rm = (model, other) if task == "lm" else (other, model)
    for dtype in (torch.float64, torch.float32):
        try:
            decoded = _decodes(lm.to(dtype), rm.to(dtype), task)
            return found | {"dtype": str(dtype).removeprefix("torch.")} | decoded
        except (ModelError, DecodingFailed) as error:
            refused = {"stage": "sequential", "why": one_line(error)}
    return found | refused


def _decodes(lm: nn.Module, rm: nn.Module, task: str) -> dict[str, Any]:
    for seed, rate in ATTEMPTS:
        config = DTOConfig(iters=3, lr=rate, nll_coeff=0.1, confidence_threshold=None, max_generations=8)
        sequential = NablaDecoder(lm, rm, None, config=config, loop="sequential")
        cached = _decode(sequential, seed)
        if any(revision.accepted for result in cached for revision in result.revisions):
            break
    # The same loop, each token of which reads everything before it again.
    sequential._loop._lm.__dict__["_way"] = WholeReading
    expected = _decode(sequential, seed)
    found: dict[str, Any] = {
        "sequential": _tokens(cached) == _tokens(expected),
        "accepted": sum(revision.accepted for result in expected for revision in result.revisions),
    }
    try:
        batched = NablaDecoder(lm, rm, None, config=config, loop="batched")
    except ModelError as error:
        return found | {"stage": "batched", "why": one_line(error)}
    found["reads"] = batched.describe()[task].partition(", read ")[2]
    found["batched"] = _tokens(_decode(batched, seed)) == _tokens(expected)
    found["gradient_error"] = _gradient_error(batched._loop._executor, expected[1].token_ids)
    return found | {"stage": "done"}


def _decode(decoder: NablaDecoder, seed: int) -> list[Result]:
    return decoder.generate(PROMPTS, seed=seed, max_new_tokens=NEW_TOKENS, reward_context=CONTEXTS)


def _tokens(results: Sequence[Result]) -> list[Any]:
    return [
        (r.token_ids, [(v.position, v.old_token, v.new_token, v.accepted) for v in r.revisions])
        for r in results
    ]


@torch.no_grad()
def _gradient_error(executor: Executor, response: list[int]) -> float:
    """The largest error of ∂ℒ/∂e and ∂ℒ/∂r, relative to the norms of full recomputation's."""
    lm, rm, prompt = executor.lm, executor.rm, PROMPTS[1]
    problem = Problem(prompt, *CONTEXTS[1], NEW_TOKENS, 0, frozenset(), StopStrings((), None))
    groups = Pools(executor.lm_reader, executor.reward_readers, [problem], None).groups()
    lm_base, rm_bases = groups.lm.sequence(), groups.reward_sequences()
    ids = [*prompt, *response[:-1]]
    states = executor.lm_reader.read([lm_base], [len(ids)], ids=lm.tensor(ids), store=True)
    own = [*CONTEXTS[1][0], *response]
    (rm_reader,) = executor.reward_readers
    if not isinstance(rm_reader, OwnForward):
        rm_reader.read(list(rm_bases), [len(own)], ids=lm.tensor(own), store=True)
    relaxed = Relaxed(tokens=lm.tensor(response)[0, CUT:])
    hidden = states[0, len(prompt) + CUT - 1 :][:1]
    request = Gradient(problem, Stats(), response[:CUT], hidden, lm_base, rm_bases, relaxed)
    executor.gradient([request])
    expected = GradientModel(lm, rm, executor.config).at(problem, response[:CUT], relaxed, Stats())
    pairs = zip(request.gradient.cotangents, expected.cotangents, strict=True)
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"[:200]
