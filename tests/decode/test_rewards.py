"""Rewards of every kind: both loops return the tokens of a naive loop over the models' own logits."""

from __future__ import annotations

import copy
import random
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from naive_rewards import NaiveReward, NaiveRewardLoop, classifier, process
from test_decoder import LMS, make_case
from tiny_models import ARCHITECTURES, VOCABULARY, causal_lm, reward_model, shared_lm, word_tokenizer
from torch import Tensor, nn

from nabla_fast import (
    ClassifierReward,
    DTOConfig,
    FunctionReward,
    NablaDecoder,
    ProcessReward,
    RewardEnsemble,
    VocabularyAlignment,
)
from nabla_fast.decode.batched.executor import Executor
from nabla_fast.decode.reference.gradient import GradientModel
from nabla_fast.decode.relaxed import Relaxed
from nabla_fast.models.labels import LabelChoice
from nabla_fast.models.process_reward import ProcessRewardModel
from nabla_fast.models.reward_sequence import RewardSequence
from nabla_fast.models.step_ends import StepEnds
from nabla_fast.results import Stats

TOKENIZER = word_tokenizer()
NAMES = {0: "helpful", 1: "safe", 2: "brief"}


class Head(nn.Module):
    """A head with a norm, two layers, a bias and a cap."""

    def __init__(self, width: int, labels: int):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, 12)
        self.outer = nn.Linear(12, labels)

    def forward(self, states: Tensor) -> Tensor:
        return 4 * torch.tanh(self.outer(torch.nn.functional.silu(self.inner(self.norm(states)))))


@cache
def several_labels(kind: str = "qwen2", head: str = "plain", seed: int = 3, vocabulary: int = VOCABULARY):
    """A random classifier with three labels."""
    model = reward_model(kind, num_labels=3, seed=seed, vocab_size=vocabulary, id2label=dict(NAMES))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if head == "rich":
            model.score = Head(model.config.hidden_size, 3).double()
            for weight in model.score.parameters():
                nn.init.normal_(weight, std=0.4)
    return model.requires_grad_(False)


@cache
def token_classifier(kind: str = "qwen2", seed: int = 5):
    """A random token classifier with two labels, whose scores vary along a text."""
    config_class, *_, shape = ARCHITECTURES[kind]
    fields = {**shape, "vocab_size": VOCABULARY, "pad_token_id": None, "initializer_range": 0.4}
    config = getattr(transformers, config_class)(**fields, num_labels=2)
    name = config_class.removesuffix("Config").removesuffix("Text") + "ForTokenClassification"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, name)(config).double().eval()
    return model.requires_grad_(False)


class Energy:
    """A score of one's own with a table of three columns: it likes neighbours to differ."""

    def __init__(self, seed: int = 7):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(VOCABULARY, 3, generator=generator, dtype=torch.float64)

    def score(self, embeddings: Tensor, response: slice) -> Tensor:
        rows = embeddings[max(0, response.start - 1) : response.stop]
        return (rows.diff(dim=0) ** 2).tanh().mean() + embeddings[-1, 0].tanh()


def length_and_sum(prompt: list[int], response: list[int]) -> float:
    return 0.1 * len(response) + 0.01 * (sum(response) * len(prompt) % 17)


def letters(prompt: str, response: str) -> float:
    return response.count("a") - 0.5 * response.count("c") + 0.01 * len(prompt)


def text_of(tokens: list[int], special: bool) -> str:
    return TOKENIZER.decode(tokens, skip_special_tokens=not special)


class Ends:
    """Ends of steps by the rule of the documents, written once more; counts responses with several."""

    def __init__(self, separator: int | str):
        self.separator, self.several = separator, 0

    def __call__(self, response: list[int]) -> list[int]:
        last = len(response) - 1
        found = {n for n, token in enumerate(response) if self.at(token)}
        if last not in found and last - 1 not in found:
            found.add(last)
        self.several += len(found) > 1
        return sorted(found)

    def at(self, token: int) -> bool:
        if isinstance(self.separator, int):
            return token == self.separator
        return TOKENIZER.decode([token]).endswith(self.separator)


SHUFFLED = VocabularyAlignment(torch.arange(VOCABULARY).flip(0) + 4)
WEIGHTS = [0.7, -1.3, 0.4]


@dataclass
class Kind:
    """A reward as the package and as the naive loop has it; both get the contexts of its members."""

    given: Any
    naive: list[NaiveReward]
    ends: Ends | None = None


def _process(model: str, reduce: str, separator: int | str = "c", **choice) -> Kind:
    chosen = {
        "label": lambda logits: logits[choice.get("label", 0)],
        "weights": lambda logits: logits[1] - logits[0],
        "probability": lambda logits: logits.softmax(dim=-1)[choice.get("label", 0)],
    }
    key = next(name for name in ("probability", "weights", "label") if name in choice)
    reduced = {"min": torch.amin, "mean": torch.mean, "last": lambda scores: scores[-1]}[reduce]
    network, ends = token_classifier(model), Ends(separator)
    return Kind(
        ProcessReward(network, separator, reduce, **choice),
        [process(network, ends, chosen[key], reduced, causal=model != "bert")],
        ends,
    )


def _ensemble() -> Kind:
    wide = several_labels("llama", vocabulary=VOCABULARY + 4)
    inner = _process("qwen2", "min", label=1)
    members = [
        ClassifierReward(wide, "safe", alignment=SHUFFLED),
        RewardEnsemble([Energy(), inner.given], [2.0, 1.0]),
        FunctionReward(length_and_sum, reads="tokens"),
        ClassifierReward(several_labels("bert"), 0),
    ]
    return Kind(
        RewardEnsemble(members, [0.8, 0.5, -0.3, -0.6]),
        [
            classifier(wide, lambda logits: logits[1], token_map=SHUFFLED.token_map, weight=0.8),
            NaiveReward(lambda e, ids, span: Energy().score(e, span), Energy().table, weight=1.0),
            replace(inner.naive[0], weight=0.5),
            NaiveReward(length_and_sum, weight=-0.3),
            classifier(several_labels("bert"), lambda logits: logits[0], weight=-0.6),
        ],
        inner.ends,
    )


def _weighted(logits: Tensor) -> Tensor:
    return (logits * torch.tensor(WEIGHTS, dtype=logits.dtype)).sum()


KINDS: dict[str, Callable[[], Kind]] = {
    "a label": lambda: Kind(
        ClassifierReward(several_labels(), 2), [classifier(several_labels(), lambda logits: logits[2])]
    ),
    "a label by name, rich head": lambda: Kind(
        ClassifierReward(several_labels(head="rich"), "safe"),
        [classifier(several_labels(head="rich"), lambda logits: logits[1])],
    ),
    "weights, rich head": lambda: Kind(
        ClassifierReward(several_labels("llama", "rich"), weights=WEIGHTS),
        [classifier(several_labels("llama", "rich"), _weighted)],
    ),
    "weights, own forward": lambda: Kind(
        ClassifierReward(several_labels("bert"), weights=dict(zip(NAMES.values(), WEIGHTS, strict=True))),
        [classifier(several_labels("bert"), _weighted)],
    ),
    "a probability": lambda: Kind(
        ClassifierReward(several_labels("gpt2"), 0, probability=True),
        [classifier(several_labels("gpt2"), lambda logits: logits.softmax(dim=-1)[0])],
    ),
    "an energy": lambda: Kind(
        Energy(), [NaiveReward(lambda e, ids, span: Energy().score(e, span), Energy().table)]
    ),
    "a function of tokens": lambda: Kind(
        FunctionReward(length_and_sum, reads="tokens"), [NaiveReward(length_and_sum)]
    ),
    "a function of text": lambda: Kind(
        FunctionReward(letters),
        [NaiveReward(lambda p, r: letters(text_of(p, True), text_of(r, False)))],
    ),
    "steps, min": lambda: _process("qwen2", "min", label=1),
    "steps, mean": lambda: _process("llama", "mean", weights=[-1.0, 1.0]),
    "steps, last": lambda: _process("qwen2", "last", 5, label=0, probability=True),
    "steps, another head": lambda: _process("gpt2", "mean", label=1),
    "steps, an encoder": lambda: _process("bert", "min", label=0),
    "an ensemble": _ensemble,
}


def contexts_of(kind: Kind, chance: random.Random) -> tuple[list, list[NaiveReward]]:
    """Random contexts of the members, and the naive rewards with them."""
    contexts, naive = [], []
    for term in kind.naive:
        if term.table is None:
            contexts.append(None)
            naive.append(term)
            continue
        prefix = [chance.randrange(3, len(term.table)) for _ in range(chance.randint(1, 5))]
        suffix = [chance.randrange(3, len(term.table)) for _ in range(chance.randint(0, 2))]
        contexts.append((prefix, suffix))
        naive.append(replace(term, prefix=prefix, suffix=suffix))
    return contexts, naive


def compare(name: str, n: int, seen: Counter) -> None:
    case, kind, chance = make_case(n), KINDS[name](), random.Random(n)
    config = replace(
        case.config,
        nll_coeff=max(case.config.nll_coeff, 1e-3),
        reward_coeff=max(case.config.reward_coeff, 1.0),
        max_generations=6,
    )
    lm = shared_lm(LMS[n % len(LMS)], eos_token_id=case.eos or None)
    contexts, naive = contexts_of(kind, chance)
    options = case.options | {"max_new_tokens": max(4, case.options["max_new_tokens"])}
    reference = NaiveRewardLoop(
        lm, naive, config, case.prompt, eos=case.eos, tokenizer=TOKENIZER, **options
    )
    expected = reference.decode()
    for loop in ("sequential", "batched"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            decoder = NablaDecoder(lm, kind.given, TOKENIZER, config=config, loop=loop)
        given = [contexts if len(contexts) > 1 else contexts[0] or ([3], [])]
        (result,) = decoder.generate([case.prompt], reward_context=given, **options)
        ended = bool(expected.tokens) and expected.tokens[-1] in case.eos
        assert result.token_ids == (expected.tokens[:-1] if ended else expected.tokens)
        ours = [(r.position, r.old_token, r.new_token, r.accepted) for r in result.revisions]
        assert ours == expected.proposals
        scored = [(r.reward_after, r.reward_before) for r in result.revisions if r.reward_after is not None]
        for pair, rewards in zip(scored, expected.rewards, strict=True):
            assert pair == pytest.approx(rewards, abs=1e-9)
        assert result.reward == pytest.approx(reference.reward(expected.tokens), abs=1e-9)
        judged = [r for r in result.revisions if r.reward_after is not None]
        seen[f"accepted, {loop}"] += sum(r.accepted for r in judged)
        seen[f"rejected, {loop}"] += sum(not r.accepted for r in judged)
    if kind.ends is not None:
        seen["several steps"] += kind.ends.several


# Every relaxation with both parameters and both updates, one of each.
CASES = (0, 3, 5, 6, 8, 11)


@pytest.mark.parametrize(
    "cases", [CASES, pytest.param(range(12, 60), marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize("name", KINDS)
def test_tokens_are_those_of_the_naive_loop(name, cases):
    seen: Counter[str] = Counter()
    for n in cases:
        compare(name, n, seen)
    assert len(seen) == (4 if KINDS[name]().ends is None else 5), seen
    assert min(seen.values()) >= len(cases) // 4, seen


def test_equals_by_a_step_that_they_have_in_common_stay_equals():
    """The smallest score is that of the first step, before the token that is replaced: a tie, no gain."""
    seen: Counter[str] = Counter()
    compare("steps, min", 37, seen)
    assert seen["rejected, batched"] == seen["rejected, sequential"] == 1
    assert seen["accepted, batched"] == seen["accepted, sequential"] == 0


@pytest.mark.parametrize(("kind", "causal"), [("qwen2", True), ("gpt2", True), ("bert", False)])
def test_steps_are_remembered_where_nothing_after_them_matters(kind, causal):
    model, ends = token_classifier(kind), StepEnds(frozenset([5]))
    choice = LabelChoice(label=0)
    rm = ProcessRewardModel(model, VocabularyAlignment.identity(), choice, ends, "last")
    memory: dict[tuple[int, ...], float] = {}
    first, second = (RewardSequence([3, 4], [7, 5, *rest], []) for rest in ([8, 9], [9, 5, 6]))
    for sequence in (first, second):
        rm.reward(sequence, memory=memory)
    ends_of_steps = [(3, 4, 7, 5), (3, 4, 7, 5, 8, 9), (3, 4, 7, 5, 9, 5)]
    assert list(memory) == (ends_of_steps if causal else [])
    if causal:
        memory[ends_of_steps[2]] = 2.5
        assert float(rm.reward(second, memory=memory)) == 2.5
        assert float(rm.reward(second)) != 2.5
        third = RewardSequence([3, 4], [7, 5, 9, 5, 6, 6, 5], [])
        assert rm.scored_positions(third) == [3, 5, 8]
        assert rm.scored_positions(third, memory) == [8]
        assert rm.scored_positions(second, memory) == [5]  # something has to be read


# -- gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("relaxation", ["straight_through", "soft"])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_autograd_over_everything(name, relaxation, monkeypatch):
    """Every gradient that a batched decode asks for, against the sequential one and autograd."""
    kind, chance, seen = KINDS[name](), random.Random(1), []
    config = DTOConfig(
        iters=3, lr=1.0, nll_coeff=0.2, reward_coeff=1.5, tau=0.7, relaxation=relaxation,
        confidence_threshold=None, max_generations=4,
    )  # fmt: skip
    lm, prompt = shared_lm("qwen2", eos_token_id=None), [5, 9, 3, 14]
    contexts, naive = contexts_of(kind, chance)
    served = Executor.gradient

    def watched(executor: Executor, requests: list) -> None:
        # Soft descent goes on in the logits that it asks with.
        asked = [
            Relaxed(
                *(None if part is None else part.clone() for part in (r.relaxed.tokens, r.relaxed.logits)),
                tau=0.7,
            )
            for r in requests
        ]
        served(executor, requests)
        seen.extend(zip([executor] * len(requests), requests, asked, strict=True))

    monkeypatch.setattr(Executor, "gradient", watched)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        decoder = NablaDecoder(lm, kind.given, TOKENIZER, config=config, loop="batched")
    given = [contexts if len(contexts) > 1 else contexts[0] or ([3], [])]
    decoder.generate([prompt] * 2, reward_context=given * 2, seed=[1, 2], max_new_tokens=7)
    loop = NaiveRewardLoop(lm, naive, config, prompt)
    assert len(seen) >= 4
    for executor, request, relaxed in seen:
        if relaxation == "soft":
            y = torch.softmax(relaxed.logits.double() / config.tau, dim=-1)
        else:
            y = torch.nn.functional.one_hot(relaxed.tokens, VOCABULARY).double()
        expected = loop.onehot_grad(request.response, y)
        torch.testing.assert_close(request.gradient.rows(len(y)), expected, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(request.gradient.norms(), expected.norm(dim=-1), atol=1e-9, rtol=1e-9)
        sequential = GradientModel(executor.lm, executor.rm, config)
        with torch.no_grad():
            again = sequential.at(request.problem, request.response, relaxed, Stats())
        torch.testing.assert_close(again.rows(len(y)), expected, atol=1e-9, rtol=1e-9)


def test_each_member_of_an_ensemble_moves_the_gradient():
    """Left out of the sum, every member with a gradient changes G."""
    kind = _ensemble()
    naive = contexts_of(kind, random.Random(1))[1]
    lm, config = shared_lm("qwen2", eos_token_id=None), DTOConfig()
    y = torch.nn.functional.one_hot(torch.tensor([4, 5, 9, 5, 7]), VOCABULARY).double()
    whole = NaiveRewardLoop(lm, naive, config, [5, 9]).onehot_grad([], y)
    for n, term in enumerate(naive):
        rest = NaiveRewardLoop(lm, naive[:n] + naive[n + 1 :], config, [5, 9]).onehot_grad([], y)
        assert torch.equal(rest, whole) == (term.table is None)


# -- float32 -----------------------------------------------------------------------------------------


def in_dtype(given: Any, dtype: torch.dtype) -> Any:
    """A copy of a reward, its models and tables in another dtype."""
    if isinstance(given, RewardEnsemble):
        return RewardEnsemble([in_dtype(member, dtype) for member in given.members], given.weights)
    if isinstance(given, (ClassifierReward, ProcessReward)):
        return replace(given, model=copy.deepcopy(given.model).to(dtype))
    given = copy.copy(given)
    if isinstance(given, Energy):
        given.table = given.table.to(dtype)
    return given


@pytest.mark.parametrize("name", ["weights, rich head", "an energy", "steps, min", "an ensemble"])
def test_float32(name):
    """The same tokens from both loops; a mismatch is settled in float64, where none is allowed."""
    config = DTOConfig(iters=3, lr=1.0, confidence_threshold=None, max_generations=6)
    accepted = mismatches = 0
    for seed in range(3):
        for dtype in (torch.float32, torch.float64):
            lm, given = causal_lm("llama", dtype=dtype, seed=seed), in_dtype(KINDS[name]().given, dtype)
            results = {}
            for loop in ("sequential", "batched"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    decoder = NablaDecoder(lm, given, TOKENIZER, config=config, loop=loop)
                results[loop] = decoder.generate(
                    [[5, 9, 3], [7, 4], [11, 20, 6]], max_new_tokens=8, seed=seed
                )
            ours, theirs = ([r.token_ids for r in results[loop]] for loop in ("batched", "sequential"))
            accepted += sum(v.accepted for r in results["batched"] for v in r.revisions)
            if ours == theirs:
                break
            assert dtype == torch.float32, f"seed {seed} differs in float64"
            mismatches += 1
    assert accepted >= 2
    assert mismatches <= 1
