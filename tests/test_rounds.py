"""Rounds of a small problem: the ops by hand, the sequential loop's choices, and what a graph replays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_decoder import TOKENIZER
from tiny_models import shared_lm, shared_reward_model
from torch import Tensor

from nabla_fast import DTOConfig, SamplingConfig, VocabularyAlignment
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.sequential import SequentialLoop
from nabla_fast.errors import InputError, RowError
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.ops import (
    AdamState,
    GumbelNoise,
    backend_status,
    cosine_schedule,
    draw_tokens,
    dto_descent,
    dto_descent_latents,
    lm_logits,
    onehot_grad,
    onehot_grad_norm,
    synchronize,
    token_stats,
    use_backend,
)
from nabla_fast.results import Stats
from nabla_fast.rounds import Outcome, Round, _Eager, _flat, _Graph
from nabla_fast.stop import StopStrings

POSITIONS, VOCABULARY, WIDTHS = 6, 61, (12, 9)
MODES = pytest.mark.parametrize(
    ("parameter", "relaxation"),
    [(p, r) for p in ("logits", "latents") for r in ("straight_through", "gumbel")],
)


def config_of(parameter: str = "logits", relaxation: str = "straight_through", **more: Any) -> DTOConfig:
    settings = {"iters": 8, "lr": 0.05, "nll_coeff": 0.1, "confidence_threshold": None} | more
    return DTOConfig(parameter=parameter, relaxation=relaxation, **settings)


class Given:
    """Random inputs of a round over n positions, of a head and two tables."""

    def __init__(
        self,
        seed: int,
        n: int = POSITIONS,
        vocabulary: int = VOCABULARY,
        widths: tuple[int, ...] = WIDTHS,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        width = widths[0]
        self.head, self.tables = normal(vocabulary, width), [normal(vocabulary, w) for w in widths]
        self.rollout, self.hard = (3 * width**-0.5 * normal(n, width) for _ in range(2))
        self.cotangents = [normal(n, w) for w in widths]
        wide = torch.promote_types(dtype, torch.float32)
        self.exponentials = (
            torch.empty(1, vocabulary, dtype=wide).exponential_(generator=generator).to(device)
        )
        self.noise = GumbelNoise(
            torch.full((n,), 5, device=device), torch.arange(40, 40 + n, device=device)
        )

    def arguments(self, config: DTOConfig, count: int | None = None) -> dict[str, Any]:
        """Of ``begin``, for the first ``count`` positions."""
        noise = GumbelNoise(*(key[:count] for key in self.noise))
        return {
            "rollout": self.rollout[:count],
            "hard": self.hard[:count],
            "cotangents": [cotangent[:count] for cotangent in self.cotangents],
            "exponentials": self.exponentials,
            "noise": noise if config.relaxation == "gumbel" else None,
        }

    def round(self, config: DTOConfig, positions: int = POSITIONS, **options: Any) -> Round:
        return Round(
            config, self.head, self.tables, positions=positions, dtype=self.rollout.dtype, **options
        )

    def at(self, position: int) -> tuple[Tensor, list[Tensor]]:
        """What ``go_on`` is given, as if the models had run again."""
        part = slice(position, position + 1)
        return self.hard[part], [cotangent[part] for cotangent in self.cotangents]


def by_hand(
    given: Given,
    config: DTOConfig,
    position: int,
    steps: int | None = None,
    since: tuple[Tensor, AdamState] | None = None,
) -> tuple[Tensor, ...]:
    """(hard token, flipped, drawn token, logits, parameter, state) of one position, op by op."""
    hidden, cotangents = given.at(position)
    rollout = given.rollout[position : position + 1]
    grad = onehot_grad(cotangents, given.tables, hidden, given.head, nll_coeff=config.nll_coeff)
    latents = config.parameter == "latents"
    if since is None:
        wide = torch.promote_types(rollout.dtype, torch.float32)
        parameter = rollout.to(wide, copy=True) if latents else lm_logits(rollout, given.head)
        state = AdamState.zeros(parameter)
    else:
        parameter, state = since[0].clone(), AdamState(*(tensor.clone() for tensor in since[1]))
    noise = GumbelNoise(*(key[position : position + 1] for key in given.noise))
    options = {
        "until": torch.full_like(state.step, config.iters if steps is None else steps),
        "tau": config.tau,
        "noise": noise if config.relaxation == "gumbel" else None,
    }
    schedule = cosine_schedule(config.iters, config.lr, min_ratio=config.min_lr_ratio).to(grad.device)
    if latents:
        descent = dto_descent_latents(parameter, given.head, grad, state, schedule, **options)
    else:
        descent = dto_descent(parameter, grad, state, schedule, **options)
    z = lm_logits(parameter, given.head) if latents else parameter
    sampling = config.resample_sampling
    token = draw_tokens(
        z,
        given.exponentials,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )
    return descent.token, descent.flipped, token, z, parameter, *state


def is_by_hand(outcome: Outcome, expected: tuple[Tensor, ...]) -> None:
    ours = outcome.hard, outcome.flipped, outcome.token, outcome.logits, outcome.parameter, *outcome.state
    for name, a, b in zip(
        ("hard", "flipped", "token", "z", "parameter", "m", "v", "step"), ours, expected, strict=True
    ):
        assert torch.equal(a, b), name


# -- by hand -----------------------------------------------------------------------------------------


@MODES
def test_a_round_is_its_ops_by_hand(parameter: str, relaxation: str):
    config = config_of(parameter, relaxation, tau=0.8)
    given = Given(1)
    rounds = given.round(config)
    for start in (0, 3):
        outcome = rounds.begin(**given.arguments(config), start=start)
        assert outcome.found.item()
        assert outcome.position.item() == start
        is_by_hand(outcome, by_hand(given, config, start))


@MODES
def test_after_a_flip_it_goes_on_with_a_new_gradient(parameter: str, relaxation: str):
    config, flips = config_of(parameter, relaxation, iters=30, lr=0.2), 0
    for seed in range(4):
        given, renewed = Given(seed), Given(seed + 100)
        renewed.head, renewed.tables, renewed.noise = given.head, given.tables, given.noise
        renewed.exponentials = given.exponentials
        rounds = given.round(config)
        outcome = rounds.begin(**given.arguments(config))
        if not outcome.flipped.item() or outcome.state.step.item() == config.iters:
            continue
        flips += 1
        before = outcome.copy()
        expected = by_hand(renewed, config, 0, since=(before.parameter, before.state))
        is_by_hand(rounds.go_on(*renewed.at(0)), expected)
        # And again from the copy, some steps at a time.
        half = int(before.state.step) + 1
        part = rounds.go_on(*renewed.at(0), since=before, until=half)
        assert part.state.step.item() == half
        is_by_hand(part, by_hand(renewed, config, 0, half, since=(before.parameter, before.state)))
    assert flips


def test_the_first_position_that_meets_all_thresholds():
    chosen, given = [], Given(3)
    stats = token_stats(given.rollout, given.head)
    norms = onehot_grad_norm(given.cotangents, given.tables, given.hard, given.head, nll_coeff=0.1)
    confidence, entropy, norm = (
        float(values.median()) for values in (stats.confidence, stats.entropy, norms)
    )
    for c in (None, confidence):
        for e in (None, entropy):
            for g in (None, norm, 1e9):
                config = config_of(confidence_threshold=c, entropy_threshold=e, grad_threshold=g)
                meets = torch.ones(POSITIONS, dtype=torch.bool)
                meets &= stats.confidence <= (2.0 if c is None else c)
                meets &= stats.entropy >= (0.0 if e is None else e)
                meets &= norms >= (0.0 if g is None else g)
                rounds = given.round(config)
                for start in (0, 2):
                    expected = [n for n in meets.nonzero().flatten().tolist() if n >= start]
                    outcome = rounds.begin(**given.arguments(config), start=start)
                    assert outcome.found.item() == bool(expected)
                    if expected:
                        assert outcome.position.item() == expected[0]
                        is_by_hand(outcome, by_hand(given, config, expected[0]))
                    else:
                        assert outcome.state.step.item() == 0
                        assert not outcome.flipped.item()
                    chosen.append(expected[0] if expected else None)
    assert None in chosen
    assert len(set(chosen)) >= 3


def test_shorter_trajectories_after_longer_ones():
    config = config_of(confidence_threshold=0.5)
    given = Given(4)
    shared, own = given.round(config), given.round(config, positions=2)
    shared.begin(**given.arguments(config))
    long = given.arguments(config)
    long["rollout"] = torch.full_like(given.rollout, torch.nan)
    with pytest.raises(RowError, match="row 0 has a NaN"):
        shared.begin(**long)
    # Neither what was longer nor what was bad is left.
    ours, theirs = (rounds.begin(**given.arguments(config, 2)) for rounds in (shared, own))
    assert all(torch.equal(a, b) for a, b in zip(_flat(ours), _flat(theirs), strict=True))
    nowhere = shared.begin(**given.arguments(config, 2), start=2)
    assert not nowhere.found.item()


def test_a_bad_row_is_named_though_there_are_fewer_than_the_round_holds():
    given = Given(4)
    arguments = given.arguments(config_of(confidence_threshold=0.5), 2)
    arguments["rollout"] = arguments["rollout"].clone()
    arguments["rollout"][0] = torch.nan
    with pytest.raises(RowError) as error:
        given.round(config_of(confidence_threshold=0.5)).begin(**arguments)
    assert [row for row, _ in error.value.rows] == [0]


def test_parameters_and_inputs_that_require_grad():
    config, given = config_of(), Given(5)
    expected = given.round(config).begin(**given.arguments(config))
    given.head = torch.nn.Parameter(given.head)
    given.tables = [torch.nn.Parameter(table) for table in given.tables]
    rounds, arguments = given.round(config), given.arguments(config)
    arguments["rollout"] = arguments["rollout"].requires_grad_()
    outcome = rounds.begin(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(_flat(outcome), _flat(expected), strict=True))
    assert not any(tensor.requires_grad for tensor in _flat(outcome))
    rounds.go_on(*given.at(int(outcome.position)))


def test_a_table_of_another_vocabulary():
    config, given = config_of(grad_threshold=1e-6), Given(6)
    expected = given.round(config).begin(**given.arguments(config)).copy()
    order = torch.randperm(VOCABULARY)
    given.tables[1] = given.tables[1][order]
    maps = [None, order.argsort()]
    outcome = given.round(config, token_maps=maps).begin(**given.arguments(config))
    assert all(torch.equal(a, b) for a, b in zip(_flat(outcome), _flat(expected), strict=True))


def test_a_draw_of_each_position():
    config = config_of()
    given = Given(5)
    rows = torch.empty(POSITIONS, VOCABULARY, dtype=torch.float64)
    rows.exponential_(generator=torch.Generator().manual_seed(1))
    rounds = given.round(config, draws=POSITIONS)
    drawn = set()
    for start in range(POSITIONS):
        token = rounds.begin(**given.arguments(config) | {"exponentials": rows}, start=start).token
        given.exponentials = rows[start : start + 1]
        assert torch.equal(token, by_hand(given, config, start)[2])
        drawn.add(token.item())
    assert len(drawn) > 1


def test_an_outcome_is_overwritten_and_its_copy_is_not():
    config = config_of()
    given = Given(6)
    rounds = given.round(config)
    first = rounds.begin(**given.arguments(config))
    copy = first.copy()
    second = rounds.begin(**given.arguments(config), start=4)
    assert first.position.item() == second.position.item() == 4
    assert copy.position.item() == 0
    is_by_hand(copy, by_hand(given, config, 0))


# -- the loop ----------------------------------------------------------------------------------------


class Watched(SequentialLoop):
    """The sequential loop, with what it chose and drew."""

    def __init__(self, *models: Any):
        super().__init__(*models)
        self.chosen, self.drawn = [], []

    def _first_selected(self, problem, committed, current, stats):
        position = super()._first_selected(problem, committed, current, stats)
        self.chosen.append((list(committed), current, position))
        return position

    def _resample(self, problem, committed, current, stats):
        token = super()._resample(problem, committed, current, stats)
        self.drawn.append((list(committed), current, token))
        return token


@MODES
def test_the_choices_and_draws_of_the_sequential_loop(parameter: str, relaxation: str):
    config = config_of(
        parameter,
        relaxation,
        iters=12,
        lr=0.3,
        nll_coeff=0.5,
        confidence_threshold=0.9,
        grad_threshold=1e-3,
        max_generations=3,
        rollout_sampling=SamplingConfig(temperature=0.0),
        resample_sampling=SamplingConfig(0.9, 12, 0.95),
    )
    lm = LanguageModel(shared_lm("qwen2", eos_token_id=None))
    rm = RewardModel(shared_reward_model("qwen2"), VocabularyAlignment.identity())
    problem = Problem((5, 9, 4), (3,), (6,), 77, 6, frozenset(), StopStrings((), TOKENIZER))
    loop = Watched(lm, rm, config)
    stats = Stats()
    dict(loop.decode([problem], [stats]))
    assert loop.drawn
    tables = loop._gradients._tables
    rounds = Round(
        config,
        lm.head,
        [table.rows for table in tables],
        token_maps=[table.token_map for table in tables],
        positions=6,
    )
    flips = 0

    def begun(committed: list[int], current: Any) -> Outcome:
        gradient = loop._gradients.hard(problem, committed, current.hard, Stats())
        # The draws of the first position, for the calls that ask for it.
        generator = torch.Generator().manual_seed(problem.seed + len(committed))
        q = torch.empty(1, lm.vocabulary, dtype=lm.head.dtype).exponential_(generator=generator)
        return rounds.begin(current.hidden, gradient.hidden, gradient.cotangents, q, noise=current.noise)

    with torch.no_grad():
        for committed, current, position in loop.chosen:
            outcome = begun(committed, current)
            assert outcome.found.item() == (position is not None)
            assert position is None or outcome.position.item() == position
        for committed, current, token in loop.drawn:
            outcome, tokens = begun(committed, current), current.hard.clone()
            assert outcome.position.item() == 0
            while outcome.state.step.item() < config.iters:
                flips += 1
                assert outcome.flipped.item()
                tokens[0] = outcome.hard
                renewed = loop._gradients.hard(problem, committed, tokens, Stats())
                outcome = rounds.go_on(renewed.hidden[:1], [c[:1] for c in renewed.cotangents])
            assert outcome.token.item() == token
    assert flips


# -- graphs ------------------------------------------------------------------------------------------


class FakeGraph(_Eager):
    """What replays without a device: the function itself, counted, warmed up as a graph is."""

    made: list[FakeGraph]

    def __init__(self, function: Any, device: torch.device):
        super().__init__(self._counted, device)
        self.function, self.replays = function, 0
        function()
        FakeGraph.made.append(self)

    def _counted(self) -> None:
        self.replays += 1
        self.function()


def test_every_call_replays_one_graph_of_two_recorded_once(monkeypatch: pytest.MonkeyPatch):
    FakeGraph.made = []
    monkeypatch.setattr(Round, "_records", lambda self: True)
    monkeypatch.setattr(_Graph, "record", FakeGraph)
    config = config_of(iters=30, lr=0.2)
    given, other = Given(7), Given(8)
    other.head, other.tables = given.head, given.tables
    rounds = given.round(config)
    # What a recording's own runs leave is gone when the first replay ends.
    is_by_hand(rounds.begin(**given.arguments(config)), by_hand(given, config, 0))
    addresses = [tensor.data_ptr() for tensor in _flat(rounds.outcome)]
    before = rounds.outcome.copy()
    since = before.parameter, before.state
    is_by_hand(rounds.go_on(*given.at(1)), by_hand(_shifted(given), config, 0, since=since))
    is_by_hand(rounds.begin(**other.arguments(config)), by_hand(other, config, 0))
    assert [graph.replays for graph in FakeGraph.made] == [2, 1]
    assert [tensor.data_ptr() for tensor in _flat(rounds.outcome)] == addresses


def _shifted(given: Given) -> Given:
    """The same, but for the G of position 0, which is that of position 1."""
    shifted = Given(7)
    shifted.hard = given.hard.roll(-1, 0)
    shifted.cotangents = [cotangent.roll(-1, 0) for cotangent in given.cotangents]
    return shifted


@MODES
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(backend_status()["triton"] is not None, reason="no Triton")
def test_replays_are_the_ops_run_one_by_one(parameter: str, relaxation: str):
    config = config_of(
        parameter, relaxation, iters=10, lr=0.2, confidence_threshold=0.99, grad_threshold=1e-3
    )
    sizes = {"n": 9, "vocabulary": 1031, "widths": (64, 48), "dtype": torch.float32, "device": "cuda"}
    problems = [Given(seed, **sizes) for seed in range(3)]
    for problem in problems[1:]:
        problem.head, problem.tables = problems[0].head, problems[0].tables
    recorded, plain = (problems[0].round(config, positions=12) for _ in range(2))
    plain._records = lambda: False
    with use_backend("triton", "torch"):
        for problem in (*problems, problems[0]):
            ours, theirs = (r.begin(**problem.arguments(config)) for r in (recorded, plain))
            _equal(ours, theirs)
            ours, theirs = (r.go_on(*problem.at(2)) for r in (recorded, plain))
            _equal(ours, theirs)
        synchronize()
    assert all(isinstance(part, _Graph) for part in recorded._replays.values())
    assert all(isinstance(part, _Eager) for part in plain._replays.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(backend_status()["triton"] is not None, reason="no Triton")
def test_a_bad_row_in_a_replay_is_reported_and_the_next_is_none_the_worse():
    config = config_of()
    given = Given(1, dtype=torch.float32, device="cuda")
    rounds = given.round(config)
    with use_backend("triton", "torch"):
        good = rounds.begin(**given.arguments(config)).copy()
        synchronize()
        bad = given.arguments(config)
        bad["rollout"] = given.rollout.clone()
        bad["rollout"][2, 1] = torch.nan
        rounds.begin(**bad)
        with pytest.raises(RowError, match="row 2 has a NaN logit"):
            synchronize()
        _equal(rounds.begin(**given.arguments(config)), good)
        synchronize()


def _equal(ours: Outcome, theirs: Outcome) -> None:
    for field, a, b in zip(
        (*Outcome._fields[:-1], "m", "v", "step"), _flat(ours), _flat(theirs), strict=True
    ):
        assert torch.equal(a, b), field


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relaxation": "soft"}, "the relaxation 'soft' has a new G at every step"),
        ({"update": "all"}, "update='all' moves more than one position"),
    ],
)
def test_configs_it_has_no_round_for(change: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message) as error:
        Given(1).round(replace(config_of(), **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollout": torch.zeros(7, 12, dtype=torch.float64)}, "7 positions, but it was made for 1 to 6"),
        ({"rollout": torch.zeros(0, 12, dtype=torch.float64)}, "0 positions"),
        ({"hard": torch.zeros(6, 12)}, "hard must be torch.float64"),
        ({"cotangents": []}, "one cotangent a table is needed, got 0 for 2"),
        ({"exponentials": torch.ones(2, VOCABULARY, dtype=torch.float64)}, "exponentials must be"),
        ({"start": 7}, "start must be in 0..6"),
        ({"until": 9}, "until must be in 0..8"),
        ({"noise": GumbelNoise(torch.zeros(6).long(), torch.zeros(6).long())}, "noise belongs to"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, Any], message: str):
    config, given = config_of(), Given(1)
    rounds = given.round(config)
    with pytest.raises(InputError, match=message) as error:
        rounds.begin(**given.arguments(config) | change)
    assert "\n" not in str(error.value)


def test_nothing_to_go_on_with():
    given = Given(1)
    with pytest.raises(InputError, match="begin one"):
        given.round(config_of()).go_on(*given.at(0))
