"""What the probed facts of a model rest on, as a value that changes with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nabla_fast.models.replica import configs_of

_PLAIN = (bool, int, float, str, type(None))


def fingerprint(model: nn.Module) -> tuple:
    """A value that is another one after a change that probed facts may not survive.

    It has the modules of the whole model; and of those that turn tokens into embeddings and states into
    logits or scores also their weights, buffers, hooks and plain attributes.
    """
    tables = [_found(model, name) for name in ("get_input_embeddings", "get_output_embeddings")]
    tables += [getattr(model, name, None) for name in ("score", "classifier")]
    modules = tuple(model.modules())
    details: list[Any] = [modules, _attributes(model)]
    for table in tables:
        for module in table.modules() if isinstance(table, nn.Module) else ():
            details += [_attributes(module), _hooks(module)]
            for weight in [*module._parameters.values(), *module._buffers.values()]:
                details.append(None if weight is None else weight_state(weight))
    # A model may be inside another module: of PEFT, or of torch.compile.
    details += [_attributes(module) for module in modules if isinstance(module, PreTrainedModel)]
    details += [_attributes(config) for config in configs_of(model)]
    return tuple(details)


def _found(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def weight_state(weight: torch.Tensor) -> tuple:
    """A value that is another one after a tensor was changed in place, moved or replaced."""
    try:
        address = weight.data_ptr()
    except RuntimeError:  # quantized weights put together of several tensors have none
        address = 0
    version = 0 if weight.is_inference() else weight._version
    return id(weight), address, version, weight.dtype, weight.device, tuple(weight.shape)


def _hooks(module: nn.Module) -> tuple:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return (*(tuple(some.values()) for some in hooks), vars(module).get("forward"))


def _attributes(holder: Any) -> tuple:
    """Plain attributes, and dictionaries and lists of such."""
    return tuple(_plain(vars(holder)))


def _plain(attributes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in attributes.items():
        if name == "training":  # which a decode sets for a while
            continue
        if isinstance(value, _PLAIN):
            yield name, value
        elif isinstance(value, dict) and not name.startswith("_"):
            yield name, tuple((k, v) for k, v in value.items() if isinstance(v, _PLAIN))
        elif isinstance(value, (list, tuple)) and not name.startswith("_"):
            yield name, tuple(v for v in value if isinstance(v, _PLAIN))
