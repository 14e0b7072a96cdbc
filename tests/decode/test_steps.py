"""Steps of rollouts on fixed buffers: nothing in them waits for the host, and a replay is a fresh step."""

from __future__ import annotations

import contextlib
import importlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from recorded import NotInAGraph, Recordings, as_on_a_device
from test_batched_loop import problems
from test_decoder import TOKENIZER, make_case
from tiny_models import VOCABULARY, causal_lm, reward_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nabla_fast import DTOConfig, RowError, SamplingConfig, VocabularyAlignment
from nabla_fast.decode.batched.drafting import Drafting
from nabla_fast.decode.batched.executor import Executor
from nabla_fast.decode.batched.loop import BatchedLoop
from nabla_fast.decode.batched.requests import RollOut
from nabla_fast.decode.batched.rollout import roll_out
from nabla_fast.decode.batched.rollout_ahead import roll_out_ahead
from nabla_fast.decode.batched.steps import ENDED, StepRow, Steps, graphs
from nabla_fast.decode.draws import PhiloxDraws, PhiloxStream
from nabla_fast.decode.failures import DecodeFailure
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.reference.loop import SequentialLoop
from nabla_fast.decode.stop import StopStrings
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.models.paged_kv import BlockPool, PagedSequence, PoolExhausted
from nabla_fast.models.reader import PagedReader
from nabla_fast.ops import backend_status, use_backend
from nabla_fast.results import Stats

SAMPLING = SamplingConfig(temperature=0.8, top_k=10, top_p=0.9)
INTERPRETED = pytest.mark.skipif(
    bool(backend_status()["triton"]) or torch.cuda.is_available(), reason="needs Triton's interpreter"
)
BACKENDS = [
    ("torch", torch.float64, "llama"),
    ("torch", torch.float64, "qwen3"),
    pytest.param("triton", torch.float32, "llama", marks=INTERPRETED),
]
KERNELS = ("draw_tokens", "prefix_attention", "store_keys_values", "token_stats")


def watched_kernels(recordings: Recordings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's launchers are calls of the recordings."""
    for name in (*KERNELS, "common.vocabulary_product"):
        module = importlib.import_module(f"nabla_fast.triton_kernels.{name}")
        recordings.watch(monkeypatch, module, name.rpartition(".")[2])


def tensors_of(thing: Any, depth: int = 4) -> Iterator[Tensor]:
    """The tensors that an object of the package holds."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from tensors_of(part, depth)
    elif isinstance(thing, torch.nn.Module):
        yield from thing.parameters()
        yield from thing.buffers()
    elif depth and (is_dataclass(thing) or type(thing).__module__.startswith("nabla_fast")):
        names = [f.name for f in fields(thing)] if is_dataclass(thing) else vars(thing)
        for name in names:
            yield from tensors_of(getattr(thing, name), depth - 1)


class Text:
    """Sequences of random tokens in a pool of their own, and the rows that continue them."""

    def __init__(self, reader: PagedReader, chance: random.Random, lengths: list[int]):
        self.pool = reader.pool(blocks=24, block_size=4)
        self.sequences = [self.pool.sequence() for _ in lengths]
        self.ids = [[chance.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]
        for sequence, ids in zip(self.sequences, self.ids, strict=True):
            reader.read([sequence], [len(ids) - 1], ids=torch.tensor([ids[:-1]]), store=True)
        self.chance = chance

    def rows(self, turns: int, ends: tuple[int, ...] = ()) -> list[StepRow]:
        """Rows with room for a run; they may draw different numbers of tokens."""
        made = []
        for sequence, ids in zip(self.sequences, self.ids, strict=True):
            length, remaining = sequence.length, self.chance.randint(1, 2 * turns)
            sequence.extend(min(turns, remaining))
            stream = PhiloxStream(self.chance.randrange(2**62), len(ids))
            made.append(StepRow(ids[-1], length, remaining, sequence.blocks, ends, stream))
        return made


def taken(
    lm: LanguageModel, capture: Callable | None, lengths: list[int], turns: int, seed: int
) -> list[list[Tensor]]:
    """What two runs of steps give from the same buffers: tokens, states, and the keys in the pool."""
    reader, chance = PagedReader(lm.model), random.Random(seed)
    text = Text(reader, chance, lengths)
    steps = Steps(lm, reader, SAMPLING, text.pool, turns, capture)
    found = []
    for _ in range(2):
        bucket = steps.run(text.rows(turns, ends=(5, 9)), turns)
        kept = bucket.drawn[:turns] != ENDED
        found.append([bucket.drawn[:turns].clone(), bucket.hidden[:turns][kept], text.pool.keys.clone()])
        for sequence, ids in zip(text.sequences, text.ids, strict=True):
            ids[-1] = chance.randrange(3, VOCABULARY)
            sequence.truncate(len(ids) - 1)
    return found


@pytest.mark.parametrize(("backend", "dtype", "kind"), BACKENDS)
def test_a_recorded_step_replayed_with_other_contents_is_a_fresh_one(
    backend: str, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
):
    lm = LanguageModel(causal_lm(kind, dtype=dtype))
    lengths = [3, 9, 6] if backend == "torch" else [3, 6]
    turns, seed = (5, 7) if backend == "torch" else (2, 7)
    steps_made: list[Steps] = []
    init = Steps.__init__
    monkeypatch.setattr(Steps, "__init__", lambda self, *a: (init(self, *a), steps_made.append(self))[0])

    def known() -> Iterator[Tensor]:
        """Weights, the pool and the buckets: what stays where it is."""
        (steps,) = steps_made
        yield from tensors_of(lm.model)
        yield from tensors_of(steps._reader.passes)
        yield from (steps._pool.keys, steps._pool.values)
        for bucket in steps._buckets.values():
            yield from tensors_of(bucket)

    recordings = Recordings(known)
    with torch.no_grad(), use_backend(*dict.fromkeys((backend, "torch"))):
        expected = taken(lm, None, lengths, turns, seed)
        steps_made.clear()
        if backend == "triton":
            watched_kernels(recordings, monkeypatch)
        found = taken(lm, recordings, lengths, turns, seed)
    assert recordings.captured >= 1
    assert recordings.replayed >= turns
    for ours, fresh in zip(found, expected, strict=True):
        for a, b in zip(ours, fresh, strict=True):
            assert torch.equal(a, b)
    assert (found[0][0] != found[1][0]).any()


kept_tensor = torch.ones(3)
FAULTS = {
    "the host reads": lambda x: x * x.sum().item(),
    "a list": lambda x: x * x.tolist()[0],
    "a branch": lambda x: x if x.any() else -x,
    "a mask": lambda x: x[x > 0].sum(),
    "a write by a mask": lambda x: x.index_put_((x > 0,), torch.zeros((), dtype=x.dtype)),
    "nonzero": lambda x: x.nonzero(),
    "the host's data": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    "to the host": lambda x: x.cpu(),
    "other memory": lambda x: x + kept_tensor,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_graph_cannot_hold_is_found(fault: str):
    x = torch.tensor([1.0, -2.0, 3.0])
    with pytest.raises(NotInAGraph):
        Recordings(lambda: [x])(lambda: FAULTS[fault](x))
    assert x.tolist() == [1, -2, 3]


def test_a_recording_runs_nothing_until_it_is_replayed():
    x, y = torch.tensor([1.0, 2.0]), torch.zeros(2)

    def double() -> None:
        y.copy_(2 * x)
        x.add_(y)

    replay = Recordings(lambda: [x, y])(double)
    assert (x.tolist(), y.tolist()) == ([1, 2], [0, 0])
    x.fill_(3)
    replay()
    assert (x.tolist(), y.tolist()) == ([9, 9], [6, 6])


# -- whole decodes -------------------------------------------------------------------------------------


def made(
    n: int, count: int, loop: type, dtype: torch.dtype, changes: dict, **options: Any
) -> tuple[Any, list[Problem]]:
    """One of the loops, and random problems like case n."""
    case = make_case(n)
    lm = LanguageModel(causal_lm("llama", dtype=dtype, eos_token_id=case.eos or None))
    rm = RewardModel(reward_model("llama", dtype=dtype), VocabularyAlignment.identity())
    given = problems(case, random.Random(n), count)
    config = replace(case.config, draws="philox", rejection=True, **changes)
    return loop(lm, rm, config, **options), given


def tokens_of(loop: Any, given: list[Problem]) -> list[list[int]]:
    found = dict(loop.decode(given, [Stats() for _ in given]))
    return [found[index].tokens for index in range(len(given))]


def decoded(*arguments: Any, **options: Any) -> list[list[int]]:
    """The tokens of the problems by the loop that :func:`made` gives."""
    return tokens_of(*made(*arguments, **options))


def test_whole_decodes_through_recordings_in_float64():
    captured = replayed = 0
    with use_backend("torch"):
        for n in range(8):
            expected = decoded(n, 3, SequentialLoop, torch.float64, {})
            recordings = Recordings()
            options = {"turns": 2 + n % 4, "capture": recordings}
            loop, given = made(n, 3, BatchedLoop, torch.float64, {}, **options)
            assert tokens_of(loop, given) == expected
            assert loop._executor._steps == {}
            captured, replayed = captured + recordings.captured, replayed + recordings.replayed
    assert captured >= 8
    assert replayed >= 50


@pytest.mark.parametrize("n", [1, 4])
def test_the_same_float32_tokens_by_the_cpu_kernels(n: int):
    with use_backend("torch"):
        expected = decoded(n, 3, SequentialLoop, torch.float32, {})
    assert decoded(n, 3, BatchedLoop, torch.float32, {}, turns=4) == expected


@INTERPRETED
def test_the_same_float32_tokens_by_interpreted_kernels(monkeypatch: pytest.MonkeyPatch):
    calls: Counter[str] = Counter()
    for name in KERNELS:
        module = importlib.import_module(f"nabla_fast.triton_kernels.{name}")
        kernel = getattr(module, name)

        def counted(*args: Any, name: str = name, kernel: Callable = kernel, **options: Any) -> Any:
            calls[name] += 1
            return kernel(*args, **options)

        monkeypatch.setattr(module, name, counted)
    changes = {"parameter": "logits", "relaxation": "straight_through", "max_generations": 2, "iters": 2}
    changes |= {"confidence_threshold": None, "entropy_threshold": None, "grad_threshold": None}
    with use_backend("torch"):
        expected = decoded(3, 1, SequentialLoop, torch.float32, changes)
    recordings = Recordings()
    watched_kernels(recordings, monkeypatch)
    with use_backend("triton", "torch"):
        found = decoded(3, 1, BatchedLoop, torch.float32, changes, turns=3, capture=recordings)
    assert found == expected
    assert min(calls[name] for name in KERNELS) > 0, calls


# -- rollouts ------------------------------------------------------------------------------------------


class _Looks(TorchFunctionMode):
    """Counts how often numbers of tensors come to the host."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy, Tensor.__bool__)
        return func(*args, **(kwargs or {}))


def rollouts(lm: LanguageModel, lengths: list[int], **fields: Any) -> tuple[BlockPool, list[RollOut]]:
    pool = PagedReader(lm.model).pool(blocks=4, block_size=4)
    made = []
    for n, length in enumerate(lengths):
        problem = Problem(tuple(range(4, 7 + n)), (), (), n, length, frozenset(lm.eos_ids), StopStrings())
        stream = PhiloxStream(n, 3 + n)
        made.append(RollOut(problem, Stats(), pool.sequence(), 0, [], stream, [], **fields))
    return pool, made


@torch.no_grad()
def test_the_host_looks_once_a_run():
    lm, config = LanguageModel(causal_lm("llama", eos_token_id=None)), DTOConfig(draws="philox")
    reader = PagedReader(lm.model)
    looks = {}
    for lengths in ([16, 16], [64, 16]):
        pool, requests = rollouts(lm, lengths)
        steps = Steps(lm, reader, SAMPLING, pool, 8)
        counting = _Looks()
        run = steps.run
        inside = 0

        def counted(rows: list[StepRow], turns: int, run: Callable = run, mode: _Looks = counting) -> Any:
            nonlocal inside
            before = mode.count
            result = run(rows, turns)
            inside += mode.count - before
            return result

        steps.run = counted
        with counting:
            roll_out_ahead(lm, reader, config, steps, requests)
        looks[max(lengths)] = counting.count - inside
        assert [len(r.continuation.tokens) for r in requests] == lengths
    assert looks[64] - looks[16] == (64 - 16) // 8


class _Launches(TorchDispatchMode):
    """Counts calls that a device would have to be given work for, outside of what is set aside."""

    count = 0
    aside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (self.aside or func.is_view or "empty" in func.__name__)
        return func(*args, **(kwargs or {}))

    def set_aside(self, executor: Executor, *names: str) -> None:
        """Do not count inside these methods."""

        def apart(method: Callable, requests: Any) -> None:
            self.aside = True
            method(requests)
            self.aside = False

        for name in names:
            setattr(executor, name, partial(apart, getattr(executor, name)))


def whole_decode(count: int) -> tuple[BatchedLoop, list[Problem], list[Stats]]:
    lm = LanguageModel(causal_lm("llama", dtype=torch.float32, eos_token_id=None))
    rm = RewardModel(reward_model("llama", dtype=torch.float32), VocabularyAlignment.identity())
    config = DTOConfig(draws="philox", rollout_sampling=SAMPLING, max_generations=4)
    given = [Problem((4 + n, 5, 6), (4,), (), n, 24, frozenset(), StopStrings()) for n in range(count)]
    return BatchedLoop(lm, rm, config, turns=8), given, [Stats() for _ in given]


def test_host_reads_of_a_decode():
    """Outside of runs of steps: at most ten a problem and round, whatever is rolled out."""
    loop, given, stats = whole_decode(4)
    looks = _Looks()
    with as_on_a_device(), looks:
        list(loop.decode(given, stats))
    rounds = sum(own.rounds for own in stats)
    assert rounds >= 8
    assert looks.count <= 10 * rounds + rounds * 24 // 8


def test_launches_of_a_decode():
    """Choosing positions, rows of G, descents and redraws: at most a hundred a round, all together."""
    loop, given, stats = whole_decode(1)
    launches = _Launches()
    launches.set_aside(loop._executor, "roll_out", "score", "gradient")
    with as_on_a_device(), torch.no_grad(), launches:
        list(loop.decode(given, stats))
    assert stats[0].rounds >= 2
    assert 30 * stats[0].rounds <= launches.count <= 100 * stats[0].rounds


@torch.no_grad()
def test_a_run_that_does_not_fit_the_pool_is_taken_a_step_at_a_time():
    lm, config = LanguageModel(causal_lm("llama", eos_token_id=None)), DTOConfig(draws="philox")
    reader = PagedReader(lm.model)
    found = []
    for limit in (None, 4):
        _, requests = rollouts(lm, [5, 6])
        pool = reader.pool(blocks=4, block_size=4, limit=limit)
        ended = requests[0].problem
        for request in requests:
            # It may draw more than there is room for, and ends before that by a token that is an end.
            request.problem = replace(ended, max_new_tokens=64, prompt_ids=request.problem.prompt_ids)
            request.base = pool.sequence()
        if found:
            ends = [tokens[4] for tokens in found[0]]
            for request, end in zip(requests, ends, strict=True):
                request.problem = replace(request.problem, eos_ids=frozenset([end]))
        roll_out_ahead(lm, reader, config, Steps(lm, reader, SAMPLING, pool, 8), requests)
        found.append([request.continuation.tokens for request in requests])
    for short, long in zip(found[1], found[0], strict=True):
        assert short == long[: len(short)]
        assert len(short) <= 5


@torch.no_grad()
def test_a_full_pool_is_said():
    lm, config = LanguageModel(causal_lm("llama", eos_token_id=None)), DTOConfig(draws="philox")
    reader = PagedReader(lm.model)
    _, requests = rollouts(lm, [40, 40])
    pool = reader.pool(blocks=4, block_size=4, limit=4)
    for request in requests:
        request.base = pool.sequence()
    with pytest.raises(PoolExhausted):
        roll_out_ahead(lm, reader, config, Steps(lm, reader, SAMPLING, pool, 8), requests)
    assert pool.free_blocks == pool.blocks


@pytest.mark.parametrize("turns", [1, 3])
def test_logits_that_are_not_finite_are_of_their_problem(turns: int):
    """A token's embedding is NaN: the problem whose prompt has it is at fault, the others are decoded."""
    lm = causal_lm("llama", eos_token_id=None)
    with torch.no_grad():
        lm.get_input_embeddings().weight[7] = float("nan")
    config = DTOConfig(draws="philox", max_generations=1, rollout_sampling=SAMPLING, reward_coeff=0.0)
    given = [
        Problem(ids, (), (), 1, 6, frozenset(), StopStrings()) for ids in ((4, 5), (6, 7), (8,), (9, 10))
    ]
    loop = BatchedLoop(LanguageModel(lm), None, config, turns=turns)
    found = dict(loop.decode(given, [Stats() for _ in given], keep=True))
    assert isinstance(found[1], RowError)
    assert "row 0 has a NaN logit" in str(found[1])
    with pytest.raises(DecodeFailure) as failed:
        list(loop.decode(given, [Stats() for _ in given]))
    assert failed.value.problems == [1]


@torch.no_grad()
def test_new_weights_and_a_grown_pool_are_captured_anew():
    lm = LanguageModel(causal_lm("llama", eos_token_id=None))
    reader, chance, recordings = PagedReader(lm.model), random.Random(3), Recordings()
    with use_backend("torch"):
        text = Text(reader, chance, [5, 6])
        steps = Steps(lm, reader, SAMPLING, text.pool, 3, recordings)
        captured = []
        for change in (lambda: None, lambda: None, reader.renew, lambda: text.pool.reserve(99)):
            change()
            steps.run(text.rows(3), 3)
            captured.append(recordings.captured)
            for sequence, ids in zip(text.sequences, text.ids, strict=True):
                sequence.truncate(len(ids) - 1)
        assert captured == [1, 1, 2, 3]
        # A longer sequence needs more of the rotary table, and the former table's memory is given back.
        longer = text.pool.sequence()
        reader.read([longer], [1100], ids=torch.full((1, 1100), 5), store=True)
        steps.run(text.rows(3), 3)
        assert recordings.captured == 4


def test_what_is_read_beyond_a_stop_string_fails_nobody():
    """The token after the one that completes the string gives NaN, which nobody asks for."""
    model = causal_lm("llama", eos_token_id=None)
    lm, config = LanguageModel(model), DTOConfig(draws="philox", max_generations=1, reward_coeff=0.0)
    config = replace(config, rollout_sampling=SAMPLING)
    problem = Problem((4, 5), (), (), 0, 12, frozenset(), StopStrings())
    (first,) = tokens_of(SequentialLoop(lm, None, config), [problem])
    end = next(
        n for n in range(1, 10) if first[n] not in first[:n] and first[n + 1] not in (*first[: n + 1], 4, 5)
    )
    problem = replace(problem, stop=StopStrings((TOKENIZER.decode([first[end]]),), TOKENIZER))
    with torch.no_grad():
        model.get_input_embeddings().weight[first[end + 1]] = float("nan")
    expected = tokens_of(SequentialLoop(lm, None, config), [problem])
    for turns in (1, 2, 3, 8):
        assert tokens_of(BatchedLoop(lm, None, config, turns=turns), [problem]) == expected


@torch.no_grad()
@pytest.mark.parametrize("ahead", [False, True])
def test_forks_are_given_back_where_one_finds_no_block(ahead: bool):
    lm, config = LanguageModel(causal_lm("llama", eos_token_id=None)), DTOConfig(draws="philox")
    reader = PagedReader(lm.model)
    pool = reader.pool(blocks=4, block_size=4, limit=4)
    _, requests = rollouts(lm, [1, 1])
    for request in requests:
        request.base, request.shared = pool.sequence(), 2
        reader.read([request.base], [3], ids=torch.tensor([[4, 5, 6]]), store=True)
    pool.sequence().extend(1)  # one block is left for two copies
    steps = Steps(lm, reader, SAMPLING, pool, 8)

    def answer(some: list[RollOut]) -> None:
        if ahead:
            roll_out_ahead(lm, reader, config, steps, some)
        else:
            roll_out(lm, reader, config, PhiloxDraws(), Drafting(), some)

    with pytest.raises(PoolExhausted):
        answer(requests)
    assert pool.free_blocks == 1
    answer(requests[:1])


def test_graphs_are_captured_on_the_device_and_share_their_memory(monkeypatch: pytest.MonkeyPatch):
    """What is asked of torch.cuda, which on AMD's GPUs is ROCm's."""
    asked: list[tuple] = []

    class Graph:
        def pool(self) -> str:
            return "memory"

        def replay(self) -> None:
            asked.append(("replay",))

    @contextlib.contextmanager
    def entered(*given: Any, **options: Any) -> Iterator[None]:
        asked.append((*(type(one).__name__ for one in given), options.get("pool"), options.get("stream")))
        yield

    monkeypatch.setattr(torch.version, "hip", "6.4", raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "graph", entered)
    monkeypatch.setattr(torch.cuda, "device", entered)
    capture = graphs(torch.device("cuda", 0))
    for _ in range(2):
        capture(lambda: asked.append(("launched",)))()
    stream = "stream of cuda:0"
    once = [("device", None, None), ("Graph", None, stream), ("launched",), ("replay",)]
    assert asked == [*once, once[0], ("Graph", "memory", stream), *once[2:]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
def test_graphs_give_what_single_launches_give():
    lm = LanguageModel(causal_lm("llama", dtype=torch.float32, eos_token_id=None).cuda())
    config = DTOConfig(draws="philox", max_generations=3, rollout_sampling=SAMPLING, reward_coeff=0.0)
    given = [Problem((4 + n, 5), (), (), n, 40, frozenset(), StopStrings()) for n in range(5)]
    found = []
    for turns in (1, 8):
        loop = BatchedLoop(lm, None, config, turns=turns)
        found.append([one.tokens for _, one in sorted(loop.decode(given, [Stats() for _ in given]))])
    assert found[0] == found[1]


def test_sequences_know_their_length(monkeypatch: pytest.MonkeyPatch):
    """Of a rollout that ends in the middle of a run, the sequence has what was read and no more."""
    lm = LanguageModel(causal_lm("llama", eos_token_id=None))
    reader, config = PagedReader(lm.model), DTOConfig(draws="philox")
    with torch.no_grad():
        pool, requests = rollouts(lm, [3, 11])
        roll_out_ahead(lm, reader, config, Steps(lm, reader, SAMPLING, pool, 8), requests)
    for request in requests:
        sequence: PagedSequence = request.sequence
        count = len(request.problem.prompt_ids) + len(request.continuation.tokens)
        assert sequence.length == count - 1
        assert len(sequence.blocks) == -(-sequence.length // 4)
        assert request.stats.token_passes["lm"] == sequence.length
