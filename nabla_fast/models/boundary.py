"""Failures of a model while it is probed, told as errors of the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten
from types import TracebackType

from torch import nn

from nabla_fast.errors import InputError, ModelError, one_line


@contextmanager
def probing(model: nn.Module, fault: str) -> Iterator[None]:
    """Whatever a model raises inside becomes a ModelError: the model, ``fault``, the reason, what to do."""
    try:
        yield
    except InputError:
        raise
    except ModelError as error:
        name, said, remedy = type(model).__name__, str(error), _remedy(model)
        named = said if name in said else f"{name}: {said}"
        whole = f"{named}: {remedy}" if remedy and remedy not in said else named
        if whole == said:
            raise
        raise ModelError(whole) from error
    except Exception as error:
        remedy = _remedy(model) or "it must read input_ids and inputs_embeds as transformers' models do"
        reason = f"{shorten(one_line(error), 120, placeholder=' …')} ({struck_in(error, model)})"
        raise ModelError(f"{type(model).__name__} {fault}: {reason}; {remedy}") from error


def struck_in(error: Exception, model: nn.Module) -> str:
    """The kind of an error and the innermost module of the model that it struck in."""
    return f"{type(error).__name__} in {_where(error) or type(model).__name__}"


def _where(error: Exception) -> str | None:
    """The class of the innermost module on an error's way."""
    found: str | None = None
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            found = type(module).__name__
        trace = trace.tb_next
    return found


def adapted_model(model: nn.Module) -> nn.Module:
    """The transformers model whose layers a PEFT model has put adapters into; any other model itself.

    Raises:
        ModelError: its adapter is no part of layers, such as tokens before the text.
    """
    if not (hasattr(model, "get_base_model") and hasattr(model, "active_peft_config")):
        return model
    config = model.active_peft_config
    if config.is_prompt_learning:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ModelError(
            f"{type(model).__name__} has an adapter of type {kind}, virtual tokens before the text, which "
            "is not read: adapters inside layers are, such as LoRA"
        )
    active = getattr(model, "active_adapters", None) or list(model.peft_config)
    for adapter in active if isinstance(active, list) else [active]:
        config = model.peft_config[adapter]
        kind = getattr(config.peft_type, "value", config.peft_type)
        if getattr(config, "alora_invocation_tokens", None) or kind == "XLORA":
            raise ModelError(
                f"{type(model).__name__} has an adapter {adapter} whose weights depend on the text "
                f"({kind if kind == 'XLORA' else 'aLoRA'}), which is not read"
            )
    return model.get_base_model()


# Fields of weights that quantize what they are multiplied with, as torchao's.
_OF_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "input_quant_func")


def refuse_unreadable_weights(model: nn.Module) -> None:
    """Refuse models whose weights cannot be read, or let no gradient through.

    Raises:
        ModelError: it names the module.
    """
    name = type(model).__name__
    for path, weight in model.named_parameters():
        if weight.is_meta:
            raise ModelError(
                f"{name} has weights on the meta device, {path} first (offloaded, or never loaded): "
                "load them to the CPU or a GPU"
            )
        if any(getattr(weight, field, None) is not None for field in _OF_ACTIVATIONS):
            raise ModelError(
                f"{name} rounds activations while it runs, {path} first ({type(weight).__name__}): no "
                "gradient goes through; weight-only quantization is read"
            )
    for path, module in model.named_modules():
        if _quantized(module):
            raise ModelError(
                f"{name} has quantized layers through which no gradient goes, {path} first "
                f"({type(module).__name__}): dequantize them, or load the model without quantization"
            )


def _quantized(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own quantized ones, which have no backward."""
    room = type(module).__module__
    return room.startswith("torch.") and ".quantized" in room and not room.startswith("torch.ao.nn.qat")


def _remedy(model: nn.Module) -> str | None:
    """What to do about a model that is known to need something done."""
    if "Peft" in type(model).__name__ or hasattr(model, "merge_and_unload"):
        return "pass what its merge_and_unload() returns, in which the adapter is merged"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "an encoder-decoder cannot be used, pass a decoder-only model"
    return None
