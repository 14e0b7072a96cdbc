"""A second set of modules over the weights of a model, with configs of its own."""

from __future__ import annotations

import copy
import functools
from contextlib import suppress
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

# Endings of the names under which configs and modules keep how far attention looks back.
_WINDOWS = ("window", "window_size", "attention_chunk_size", "local_attention")


def replica(model: nn.Module) -> nn.Module:
    """A model of the same weights and hooks whose configs and attributes may be changed.

    Parameters are the same objects, hooks the same dictionaries: what happens to them later happens to
    both. Modules, buffers' names, configs and plain attributes are the replica's own. Compiled modules are
    replaced by what they were compiled of.

    Run the model itself before its replica: some models prepare their weights in the first pass.
    """
    model = _plain(model)
    copies = {id(module): object.__new__(type(module)) for module in model.modules()}
    memo: dict[int, Any] = {}
    for module in model.modules():
        attributes = {name: _copied(value, copies, memo) for name, value in vars(module).items()}
        attributes["_modules"] = {
            name: None if child is None else copies[id(_plain(child))]
            for name, child in module._modules.items()
        }
        attributes["_buffers"] = dict(module._buffers)
        attributes["_compiled_call_impl"] = None
        vars(copies[id(module)]).update(attributes)
    return copies[id(model)]


def _plain(module: nn.Module) -> nn.Module:
    """What a module was compiled of; itself if it was not."""
    return getattr(module, "_orig_mod", module)


def _copied(value: Any, copies: dict[int, nn.Module], memo: dict[int, Any]) -> Any:
    """An attribute as the replica has it: what leads back to a module leads to its copy."""
    if isinstance(value, PretrainedConfig):
        return copy.deepcopy(value, memo)
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, MethodType) and id(value.__self__) in copies:
        return MethodType(value.__func__, copies[id(value.__self__)])
    if isinstance(value, functools.partial):
        arguments = [_copied(argument, copies, memo) for argument in value.args]
        rebound = functools.partial(_copied(value.func, copies, memo), *arguments, **value.keywords)
        vars(rebound).update(vars(value))
        return rebound
    if isinstance(value, FunctionType) and value.__closure__:
        if id(value) not in memo:
            memo[id(value)] = value  # for functions that hold each other
            memo[id(value)] = _rebound(value, copies, memo)
        return memo[id(value)]
    if type(value) in (list, tuple) and any(isinstance(part, nn.Module) for part in value):
        return type(value)(_copied(part, copies, memo) for part in value)
    return value


def _rebound(function: FunctionType, copies: dict[int, nn.Module], memo: dict[int, Any]) -> FunctionType:
    """A function, such as a forward put around a module's own, that holds copies where it holds modules.

    What else it holds, a counter say, remains in common.
    """
    cells = []
    for cell in function.__closure__:
        try:
            held = cell.cell_contents
        except ValueError:  # nothing as yet
            cells.append(cell)
            continue
        # Lists are left out: what a function counts with must remain its own.
        leads_back = isinstance(held, (nn.Module, FunctionType, MethodType, functools.partial))
        copied = _copied(held, copies, memo) if leads_back else held
        cells.append(cell if copied is held else CellType(copied))
    if all(ours is theirs for ours, theirs in zip(cells, function.__closure__, strict=True)):
        return function
    rebound = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    rebound.__kwdefaults__ = function.__kwdefaults__
    vars(rebound).update(vars(function))
    return rebound


def returning_names(model: nn.Module) -> nn.Module:
    """The model; a replica where its config asks for tuples, which many models fail to read themselves."""
    if getattr(getattr(model, "config", None), "return_dict", True) is not False:
        return model
    # Itself first, as some models prepare their weights in the first pass and remember it.
    with suppress(Exception), torch.no_grad():
        model(
            input_ids=torch.zeros(
                1, 2, dtype=torch.int64, device=model.get_input_embeddings().weight.device
            )
        )
    copied = replica(model)
    for config in configs_of(copied):
        config.return_dict = True
    return copied


def short_sighted(model: nn.Module, window: int) -> nn.Module | None:
    """A replica that looks back at most ``window`` tokens where the model's attention has windows.

    A few tokens show there what a text longer than the window shows in the model.

    Returns:
        None where the model has no window longer than that.
    """
    if not _windows(model, window):
        return None
    copied = replica(model)
    for attributes, name in _windows(copied, window):
        attributes[name] = window
    return copied


def _windows(model: nn.Module, longest: int) -> list[tuple[dict[str, Any], str]]:
    """Windows longer than that: the attributes of modules and configs that hold them, and their names."""
    holders = [vars(holder) for holder in (*model.modules(), *configs_of(model))]
    return [
        (attributes, name)
        for attributes in holders
        for name, value in attributes.items()
        if name.endswith(_WINDOWS) and type(value) is int and value > longest
    ]


def configs_of(model: nn.Module) -> list[PretrainedConfig]:
    """All configs that a model's modules hold."""
    configs: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        for value in vars(module).values():
            _add_config(value, configs)
    return list(configs.values())


def _add_config(value: Any, configs: dict[int, PretrainedConfig]) -> None:
    """Add a config, if it is one, and those within it."""
    if isinstance(value, PretrainedConfig) and id(value) not in configs:
        configs[id(value)] = value
        for part in list(vars(value).values()):
            _add_config(part, configs)
