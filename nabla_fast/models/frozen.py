"""Models while they decode: in evaluation mode, without weight gradients, and in one thread's hands."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from nabla_fast.errors import InputError

# The threads that hold models: flags are changed for a while, which two at once would mix up.
_holders: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_released = threading.Condition()


@contextmanager
def frozen(models: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode and no weight gradients inside; the models' own flags come back afterwards.

    Threads take turns: another one that holds a model is waited for. Nothing of the caller's runs
    inside but the models themselves, so that nobody can wait for somebody who waits for him.

    Gradients of the relaxed tokens are needed inside, which a caller's inference mode would not record,
    and float32 stays what it is, which a caller's autocast would round.

    Raises:
        InputError: this thread holds one of the models already.
    """
    with _turn(models):
        modes = [(module, module.training) for model in models for module in model.modules()]
        flags = [(p, p.requires_grad) for model in models for p in model.parameters()]
        try:
            for module, _ in modes:
                module.training = False
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            with (
                torch.inference_mode(False),
                torch.autocast("cpu", enabled=False),
                torch.autocast("cuda", enabled=False),
            ):
                yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, required in flags:
                parameter.requires_grad_(required)


@contextmanager
def _turn(models: Sequence[nn.Module]) -> Iterator[None]:
    me = threading.get_ident()
    with _released:
        while holders := {_holders[model] for model in models if model in _holders}:
            if me in holders:
                raise InputError("a model of this decoder is decoding already, around this very call")
            _released.wait()
        for model in models:
            _holders[model] = me
    try:
        yield
    finally:
        with _released:
            for model in models:
                _holders.pop(model, None)
            _released.notify_all()
