"""Every part of the batched loop alone changes no token, whatever the others do."""

from __future__ import annotations

import functools
import random
from collections import Counter
from dataclasses import fields, replace

import pytest
from test_batched_loop import REWARD_MODELS, problems
from test_decoder import LMS, make_case
from tiny_models import shared_lm, shared_reward_model

from nabla_fast import SamplingConfig, VocabularyAlignment
from nabla_fast.decode.batched.accelerations import Accelerations
from nabla_fast.decode.batched.drafting import Drafting
from nabla_fast.decode.batched.loop import BatchedLoop
from nabla_fast.decode.batched.problem_state import ProblemState
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.results import Stats

NAMES = [field.name for field in fields(Accelerations)]
DRAFTED = 16  # random problems whose drafts get random lengths


def decode(n: int, accelerations: Accelerations, greedy: bool | None = None) -> tuple[list, list[Stats]]:
    case, chance = make_case(n), random.Random(n)
    lm = LanguageModel(shared_lm(LMS[n % len(LMS)], eos_token_id=case.eos or None))
    name = REWARD_MODELS[n % len(REWARD_MODELS)]
    rm = None if name is None else RewardModel(shared_reward_model(name), VocabularyAlignment.identity())
    given = problems(case, chance, chance.choice([1, 3]))
    config = case.config
    if greedy:
        config = replace(config, rollout_sampling=SamplingConfig(temperature=0))
    stats = [Stats() for _ in given]
    loop = BatchedLoop(lm, rm, config, batch_size=chance.choice([1, 16]), accelerations=accelerations)
    found = dict(loop.decode(given, stats))
    return [(found[i].tokens, found[i].reward, found[i].revisions) for i in sorted(found)], stats


@functools.cache
def decode_with_all(n: int, greedy: bool | None = None) -> tuple[list, list[Stats]]:
    """The same with every acceleration, for tests that compare it with something else."""
    return decode(n, Accelerations(), greedy)


def assert_same(ours: list, theirs: list) -> None:
    for (tokens, reward, revisions), (tokens_, reward_, revisions_) in zip(ours, theirs, strict=True):
        assert tokens == tokens_
        assert reward == pytest.approx(reward_, abs=1e-9)
        assert [(r.position, r.new_token, r.accepted) for r in revisions] == [
            (r.position, r.new_token, r.accepted) for r in revisions_
        ]


@pytest.mark.parametrize("name", NAMES)
def test_each_switched_off_alone(name):
    seen: Counter[str] = Counter()
    for n in range(12):
        ours, with_it = decode_with_all(n)
        theirs, without = decode(n, Accelerations(**{name: False}))
        assert_same(ours, theirs)
        for a, b in zip(with_it, without, strict=True):
            assert a.generations == b.generations
            seen["passes"] += sum(b.token_passes.values()) - sum(a.token_passes.values())
            seen["gradients"] += b.gradient_passes - a.gradient_passes
            seen["speculated"] += b.speculated
    if name == "gradient_store":
        assert seen["gradients"] > 0
    if name in ("gradient_store", "frozen_prefix", "batching"):
        assert seen["passes"] > 0
    if name == "speculation":
        assert seen["speculated"] == 0


@pytest.mark.parametrize("greedy", [False, True])
def test_drafts_of_any_length(monkeypatch, greedy):
    # Without drafts the tokens are the same, as test_each_switched_off_alone has it.
    expected = [decode_with_all(n, greedy)[0] for n in range(DRAFTED)]
    chance = random.Random(0)
    monkeypatch.setattr(Drafting, "width", lambda self, matched: chance.randrange(7))
    drafted = hits = 0
    for n, theirs in enumerate(expected):
        ours, stats = decode(n, Accelerations(), greedy)
        assert_same(ours, theirs)
        drafted += sum(s.drafted for s in stats)
        hits += sum(s.draft_hits for s in stats)
    assert drafted > hits > 0


def test_drafts_follow_what_they_gain():
    drafting = Drafting()
    assert drafting.width(True) == drafting.width(False) == 0
    for _ in range(40):
        drafting.saw(True, True)
    assert drafting.width(True) > 3
    assert drafting.width(False) == 0
    for _ in range(80):
        drafting.saw(True, False)
    assert drafting.width(True) == 0
    assert Drafting(enabled=False).width(True) == 0


def test_passes_are_counted_once_for_what_they_served():
    total: Counter[str] = Counter()
    for n in range(24):
        _, stats = decode_with_all(n)
        for own in stats:
            assert sum(own.passes_for.values()) == sum(own.token_passes.values())
            assert min(own.passes_for.values()) >= 0
            assert (own.passes_for.get("discarded", 0) > 0) == (own.speculated > 0)
            assert own.wasted_tokens <= own.generated_tokens
            total.update(own.passes_for)
    assert total.keys() == {"rollout", "score", "gradient", "flip", "discarded"}
    assert min(total.values()) > 0


def straight_through(n: int, **changes) -> tuple[BatchedLoop, list]:
    """A case's models and problems under a configuration whose gradients are of hard tokens."""
    case, chance = make_case(n), random.Random(n)
    lm = LanguageModel(shared_lm(LMS[n % len(LMS)], eos_token_id=case.eos or None))
    rm = RewardModel(shared_reward_model("qwen2"), VocabularyAlignment.identity())
    settings = {"relaxation": "straight_through", "update": "first", "max_generations": 6} | changes
    config = replace(case.config, **settings)
    return BatchedLoop(lm, rm, config, proposals=1), problems(case, chance, 2)


def test_greedy_rollouts_without_flips_take_one_gradient_a_trajectory():
    trajectories = 0
    for n in range(24):
        loop, given = straight_through(n, rollout_sampling=SamplingConfig(0), lr=1e-9, iters=2)
        stats = [Stats() for _ in given]
        for index, decoded in loop.decode(given, stats):
            accepted = sum(revision.accepted for revision in decoded.revisions)
            # A trajectory none of whose positions is selected asks for none, the last one for instance.
            assert stats[index].gradient_passes <= 1 + accepted
            assert "flip" not in stats[index].passes_for
            if decoded.revisions:
                assert stats[index].gradient_passes >= 1 + sum(r.accepted for r in decoded.revisions[:-1])
            trajectories += stats[index].gradient_passes
    assert trajectories > 20


def test_sampled_rollouts_take_one_gradient_a_distinct_sequence(monkeypatch):
    asked: list[tuple] = []
    original = ProblemState._gradients

    def recording(self, wanted, purpose="gradient"):
        for offset, relaxed in wanted:
            before = self._response + self._current.tokens[:offset]
            asked.append((self._problem.seed, *before, *relaxed.tokens.tolist()))
        return original(self, wanted, purpose)

    monkeypatch.setattr(ProblemState, "_gradients", recording)
    total = 0
    for n in range(60):
        # Without acceptance there is one trajectory, and its store is never emptied.
        loop, given = straight_through(n, rollout_sampling=SamplingConfig(1.5), lr=0.3)
        stats = [Stats() for _ in given]
        decoded = dict(loop.decode(given, stats))
        if not any(r.accepted for d in decoded.values() for r in d.revisions):
            assert sum(s.gradient_passes for s in stats) == len(set(asked))
            total += len(set(asked))
        asked.clear()
    assert total > 20
