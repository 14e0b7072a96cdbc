"""Ctrl-C at any line of a decode: the decoder, the models and the finished results outlive it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import FrameType

import pytest
import torch
from tiny_models import causal_lm, reward_model

from nabla_fast import DecodingFailed, DecodingInterrupted, DTOConfig, NablaDecoder

CONFIG = DTOConfig(iters=2, lr=1.0, confidence_threshold=None, max_generations=2)
PROMPTS = [[5, 9, 3], [7]]
OPTIONS = {"seed": [1, 2], "max_new_tokens": 2}
# Where Python runs between two results: this package, and what its blocks go through.
FILES = (
    "nabla_fast",
    "contextlib.py",
    "threading.py",
    "_contextlib.py",
    "grad_mode.py",
    "autocast_mode.py",
)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


class Case:
    """A decoder of models with mixed flags, and one way to decode with it."""

    def __init__(self, loop: str, relaxation: str, how: str):
        self.models = causal_lm("qwen2").train(), reward_model("qwen2").train()
        for model in self.models:
            for weight in list(model.parameters())[::2]:
                weight.requires_grad_(False)
        config = replace(CONFIG, relaxation=relaxation)
        self.decoder = NablaDecoder(*self.models, None, config=config, loop=loop, batch_size=1)
        self.how, self.seen = how, []
        self.before, self.expected = self.state(), self.tokens()

    def tokens(self) -> list[list[int]]:
        return [result.token_ids for result in self.decoder.generate(PROMPTS, **OPTIONS)]

    def run(self, on_error: str = "raise") -> None:
        """Decode; ``seen`` has the prompts whose results have been handed over."""
        self.seen.clear()
        options = {**OPTIONS, "on_error": on_error}
        if self.how == "generate":
            self.decoder.generate(PROMPTS, on_result=lambda n, _: self.seen.append(n), **options)
        else:
            self.seen.extend(n for n, _ in self.decoder.stream(PROMPTS, **options))

    def state(self) -> tuple:
        """All that a decode changes for a while."""
        return (
            [module.training for model in self.models for module in model.modules()],
            [weight.requires_grad for model in self.models for weight in model.parameters()],
            [model.config._attn_implementation for model in self.models],
            [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")],
            signal.getsignal(signal.SIGINT),
        )


class Lines:
    """Counts the lines that run, and sends a signal before the n-th; none with n = 0."""

    def __init__(self, n: int = 0, times: int = 1, number: int = signal.SIGINT):
        self.n, self.times, self.number, self.count = n, times, number, 0
        self.first: dict[tuple[str, int], int] = {}
        self.last: dict[tuple[str, int], int] = {}

    def run(self, work: Callable[[], None]) -> None:
        former = sys.gettrace()
        sys.settrace(self._enter)
        try:
            work()
        finally:
            sys.settrace(former)

    def _enter(self, frame: FrameType, event: str, argument: object) -> Callable | None:
        name = frame.f_code.co_filename
        return self._line if any(part in name for part in FILES) and "tests" not in name else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Callable:
        if event == "line":
            self.count += 1
            if not self.n:
                line = frame.f_code.co_filename, frame.f_lineno
                self.first.setdefault(line, self.count)
                self.last[line] = self.count
            if self.n <= self.count < self.n + self.times and self.n:
                signal.raise_signal(self.number)
        return self._line

    def moments(self) -> list[int]:
        """The first and the last time that each line ran."""
        return sorted({*self.first.values(), *self.last.values()})


def interrupt(case: Case, n: int, times: int = 1) -> None:
    """Interrupt the n-th line of a decode, and check that nothing has come of it."""
    with pytest.raises(KeyboardInterrupt) as caught:
        Lines(n, times).run(case.run)
    assert case.state() == case.before, n
    if isinstance(caught.value, DecodingInterrupted):
        finished = {m for m, result in enumerate(caught.value.results) if result is not None}
        assert set(case.seen) <= finished, n
    else:
        # Before anything was decoded; or with a stream, whose owner has it, between two results.
        assert not case.seen or case.how == "stream", n
    assert case.tokens() == case.expected, n


WAYS = [
    pytest.param(loop, relaxation, how, id=f"{loop}-{relaxation}-{how}")
    for loop in ("sequential", "batched")
    for relaxation in ("straight_through", "soft")
    for how in ("generate", "stream")
]


def moments_of(case: Case) -> list[int]:
    lines = Lines()
    lines.run(case.run)
    moments = lines.moments()
    assert len(moments) > 500, "the trace saw too little"
    return moments


@pytest.mark.parametrize(("loop", "relaxation", "how"), WAYS)
def test_an_interrupt_leaves_everything_as_it_was(loop: str, relaxation: str, how: str):
    case = Case(loop, relaxation, how)
    moments = moments_of(case)
    start = WAYS.index(next(way for way in WAYS if way.values == (loop, relaxation, how)))
    # Every way has lines of its own.
    for n in moments[start * 10 :: len(moments) // 12]:
        interrupt(case, n)


@pytest.mark.slow
@pytest.mark.parametrize(("loop", "relaxation", "how"), WAYS)
def test_an_interrupt_at_every_line(loop: str, relaxation: str, how: str):
    case = Case(loop, relaxation, how)
    for n in moments_of(case):
        interrupt(case, n)


@pytest.mark.parametrize("loop", ["sequential", "batched"])
def test_interrupts_in_a_row(loop: str):
    """An impatient user: what gives everything back is not interrupted either."""
    case = Case(loop, "straight_through", "generate")
    moments = moments_of(case)
    for n in moments[:: len(moments) // 12]:
        try:
            Lines(n, times=200).run(case.run)
        except KeyboardInterrupt:
            sys.settrace(None)
        assert case.state()[:4] == case.before[:4], n
        assert case.tokens() == case.expected, n


class OutOfTime(BaseException):
    """What code that catches every ``Exception`` lets pass."""


@pytest.fixture(params=[TimeoutError, OutOfTime])
def time_limit(request: pytest.FixtureRequest) -> Iterator[type[BaseException]]:
    """What the handler of SIGALRM raises."""

    def ring(*_: object) -> None:
        raise request.param

    former = signal.signal(signal.SIGALRM, ring)
    yield request.param
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert signal.getsignal(signal.SIGALRM) is ring
    signal.signal(signal.SIGALRM, former)


def test_a_time_limit(time_limit: type[BaseException]):
    def for_long() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            case.run()

    case = Case("batched", "straight_through", "generate")
    for seconds in (0.002, 0.01, 0.02, 0.04):
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with pytest.raises(time_limit):
            for_long()
        assert case.state() == case.before
        assert case.tokens() == case.expected


def ring_at(case: Case, n: int, error: type[BaseException], keep: bool = False) -> None:
    """Let the time be over at the n-th line, and check that nothing else has come of it."""
    with pytest.raises((error, DecodingFailed)) as caught:
        Lines(n, number=signal.SIGALRM).run(partial(case.run, on_error="keep" if keep else "raise"))
    if caught.traceback[-1].name == "_call":  # of on_result, where any error fails the decode
        assert type(caught.value.__cause__) is error, n
    else:
        assert type(caught.value) is error, n
    assert case.state() == case.before, n
    assert case.tokens() == case.expected, n


@pytest.mark.parametrize("time_limit", [TimeoutError], indirect=True)
@pytest.mark.parametrize(("loop", "relaxation", "how"), WAYS)
def test_a_time_limit_is_no_failure_of_a_prompt(
    loop: str, relaxation: str, how: str, time_limit: type[BaseException]
):
    case = Case(loop, relaxation, how)
    moments = moments_of(case)
    for n in moments[WAYS.index(next(w for w in WAYS if w.values == (loop, relaxation, how))) :: 200]:
        ring_at(case, n, time_limit, keep=n % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("time_limit", [TimeoutError], indirect=True)
@pytest.mark.parametrize("loop", ["sequential", "batched"])
def test_a_time_limit_at_every_line(loop: str, time_limit: type[BaseException]):
    case = Case(loop, "straight_through", "generate")
    for n in moments_of(case):
        ring_at(case, n, time_limit, keep=n % 2 == 0)


def test_a_time_limit_while_models_are_probed(time_limit: type[BaseException]):
    """Probes catch whatever a model raises, and take it for the model's own."""
    models = causal_lm("qwen2"), reward_model("qwen2")
    make = partial(NablaDecoder, *models, None, config=CONFIG)
    lines = Lines()
    lines.run(make)
    moments = lines.moments()
    for n in moments[:: len(moments) // 40]:
        with pytest.raises(time_limit) as caught:
            Lines(n, number=signal.SIGALRM).run(make)
        assert type(caught.value) is time_limit, n


def test_who_catches_everything_does_not_lose_a_signal(time_limit: type[BaseException]):
    """Nor do those that come later wait for the end of what is going on."""

    def catches_all(*_: object) -> None:
        for number in (signal.SIGALRM, signal.SIGINT):
            try:
                signal.raise_signal(number)
            except BaseException as error:
                caught.append(type(error))

    case, caught = Case("batched", "straight_through", "generate"), []
    hook = case.models[0].model.register_forward_pre_hook(catches_all)
    with pytest.raises(KeyboardInterrupt):  # the last one
        case.run()
    hook.remove()
    assert len(caught) >= 4
    assert all(error is KeyboardInterrupt for error in caught[1::2])
    assert not any(issubclass(error, (Exception, KeyboardInterrupt)) for error in caught[::2])
    assert case.state() == case.before
    assert case.tokens() == case.expected


def test_a_stream_goes_on_after_a_time_limit(time_limit: type[BaseException]):
    case = Case("sequential", "straight_through", "generate")
    with case.decoder.stream(PROMPTS, **OPTIONS) as stream:
        next(stream)
        hook = case.models[0].model.register_forward_pre_hook(
            lambda *_: signal.raise_signal(signal.SIGALRM)
        )
        with pytest.raises(time_limit):
            next(stream)
        hook.remove()
        assert [result.token_ids for _, result in stream] == case.expected[1:]
    assert [result.token_ids for result in stream.results] == case.expected


def test_who_waits_for_a_turn_can_be_interrupted():
    case = Case("sequential", "straight_through", "generate")
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        if threading.current_thread() is other:
            inside.set()
            assert go_on.wait(60)

    hook = case.models[0].model.register_forward_pre_hook(wait)
    other = threading.Thread(target=case.tokens)
    other.start()
    assert inside.wait(60)
    alarm = threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
    alarm.start()
    with pytest.raises(KeyboardInterrupt):
        case.tokens()
    go_on.set()
    other.join(60)
    hook.remove()
    assert case.state() == case.before
    assert case.tokens() == case.expected
