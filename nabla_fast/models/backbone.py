"""Passes through a transformers model, with the arguments that its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nabla_fast.errors import ModelError

# Names under which forwards take a cache, by release of transformers and kind of model.
_CACHES = ("cache", "past_key_values", "cache_params")


class Forward:
    """One module's forward: what it takes and returns."""

    def __init__(self, module: nn.Module):
        self.module = module
        parameters = _parameters(module)
        self._names = set(parameters)
        self._open = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self.cache_name = next((name for name in _CACHES if name in parameters), None)

    def names(self, name: str) -> bool:
        """Whether an argument is one of the forward's own, not one that is only let through."""
        return name in self._names

    def takes(self, name: str) -> bool:
        """Whether an argument can be passed."""
        return self._open or name in self._names

    def __call__(self, **arguments: Any) -> Any:
        """The output; arguments that are None or that the forward does not take are left out."""
        given = {k: v for k, v in arguments.items() if v is not None and self.takes(k)}
        return self.module(**given)

    def logits(self, **arguments: Any) -> Tensor:
        """The logits of a model with a head."""
        return self._part("logits", arguments)

    def states(self, **arguments: Any) -> Tensor:
        """The last hidden states [B, S, H] of a model without a head."""
        return self._part("last_hidden_state", arguments)

    def _part(self, name: str, arguments: dict[str, Any]) -> Tensor:
        part = getattr(self(**arguments), name, None)
        if not isinstance(part, Tensor):
            raise ModelError(f"{type(self.module).__name__} returns no {name}")
        return part


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What a forward takes; of one that hands everything on to a decoder, what that takes."""
    parameters = inspect.signature(module.forward).parameters
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    decoder = getattr(module, "decoder", None)
    if isinstance(decoder, nn.Module) and all(p.kind in open_ended for p in parameters.values()):
        return inspect.signature(decoder.forward).parameters
    return parameters


def backbone(model: nn.Module) -> nn.Module:
    """The part of a transformers model under its head.

    Raises:
        ModelError: there is none.
    """
    under = model.base_model
    if under is model and hasattr(model, "get_decoder"):
        under = model.get_decoder()  # some name it otherwise than they say
    if under is model:
        under = getattr(model, "model", model)
    if under is model or not isinstance(under, nn.Module):
        raise ModelError(f"{type(model).__name__} does not expose a backbone under its output head")
    return under
