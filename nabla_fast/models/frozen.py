"""Models while they decode: in evaluation mode, without weight gradients, and in one thread's hands."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from nabla_fast.errors import InputError
from nabla_fast.models.interrupts import deferred

# Seconds after which a thread that waits for its turn looks whether it has been interrupted.
_PATIENCE = 0.05


class _Hold:
    """What one thread uses, and how it was before."""

    def __init__(self, models: Sequence[nn.Module]):
        self.thread = threading.get_ident()
        self._modules = [module for model in models for module in model.modules()]
        self._parameters = [weight for model in models for weight in model.parameters()]
        configs = [config for m in self._modules if (config := getattr(m, "config", None)) is not None]
        self._configs = list({id(config): config for config in configs}.values())
        # Models that share a module or a config take turns too: flags of both are changed for a while.
        self.claims = {id(part) for part in (*self._modules, *self._configs)}
        self._flags: list[tuple[object, str, object]] = []

    def freeze(self) -> None:
        """Evaluation mode, no weight gradients; what is changed is recorded first."""
        self._flags = [
            *((module, "training", module.training) for module in self._modules),
            *((weight, "requires_grad", weight.requires_grad) for weight in self._parameters),
            *(
                (config, "_attn_implementation", config._attn_implementation)
                for config in self._configs
                if hasattr(config, "_attn_implementation")
            ),
        ]
        for module in self._modules:
            module.training = False
        for weight in self._parameters:
            weight.requires_grad_(False)

    def thaw(self) -> None:
        """Everything as it was recorded."""
        for owner, name, value in self._flags:
            if getattr(owner, name) != value:
                setattr(owner, name, value)


class _Turns:
    """The threads that use models, and those that wait."""

    def __init__(self) -> None:
        self._changed, self._holds = threading.Condition(), []

    def take(self, hold: _Hold, signals: deferred) -> None:
        """Wait until nobody else uses anything of it.

        Raises:
            InputError: this thread uses some of it already.
        """
        with self._changed:
            while others := [other for other in self._holds if other.claims & hold.claims]:
                if any(other.thread == hold.thread for other in others):
                    raise InputError("a model of this decoder is decoding already, around this very call")
                self._changed.wait(_PATIENCE)
                signals.interruptible(lambda: None)
            self._holds.append(hold)

    def give_back(self, hold: _Hold) -> None:
        """Let others have it."""
        with self._changed:
            if hold in self._holds:
                self._holds.remove(hold)
            self._changed.notify_all()

    def keep_mine(self) -> None:
        """In a forked process: the other threads have not come along, and what they used is free."""
        former, me = self._holds, threading.get_ident()
        # Another thread may have held the lock in the moment of the fork.
        self._changed, self._holds = threading.Condition(), [h for h in former if h.thread == me]
        for hold in former:
            if hold.thread != me:
                hold.thaw()


_turns = _Turns()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_turns.keep_mine)


@contextmanager
def frozen(models: Sequence[nn.Module]) -> Iterator[deferred]:
    """Evaluation mode and no weight gradients inside; the models' own flags come back afterwards.

    Threads take turns: another one that uses a model is waited for. Nothing of the caller's runs
    inside but the models themselves, so that nobody can wait for somebody who waits for him.

    Gradients of the relaxed tokens are needed inside, which a caller's inference mode would not record,
    and float32 stays what it is, which a caller's autocast would round. Tensors are made on the CPU where
    nothing else is said, whatever device the caller has made the default.

    Signals wait inside, so that Ctrl-C leaves nothing half done; long work goes through ``interruptible``
    of what is yielded:

        with frozen(models) as signals:
            result = signals.interruptible(work)

    Raises:
        InputError: this thread uses one of the models already.
    """
    with deferred() as signals:
        hold = _Hold(models)
        _turns.take(hold, signals)
        try:
            hold.freeze()
            with (
                torch.inference_mode(False),
                torch.autocast("cpu", enabled=False),
                torch.autocast("cuda", enabled=False),
                _cpu_by_default(),
            ):
                yield signals
        finally:
            try:
                hold.thaw()
            finally:
                _turns.give_back(hold)


def _cpu_by_default() -> AbstractContextManager:
    # Only where it is another one: the context costs a little with every call. A tensor is made to see, as
    # torch.get_default_device() of torch 2.9 fails once set_default_device(None) has been called.
    return nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu")
