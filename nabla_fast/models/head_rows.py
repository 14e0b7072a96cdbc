"""Rows of a head's weight that no plain tensor holds: dequantized, or with low-rank adapters added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from nabla_fast.errors import ModelError


class HeadRows(Protocol):
    """W [V, H], read some rows at a time.

    Attributes:
        shape: (V, H).
        dtype: of W.
        device: where W is.
        kind: what it is, in words.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    kind: str

    def tile(self, rows: slice) -> Tensor:
        """Rows of W [n, H], floating point, without a graph."""


class QuantizedRows:
    """The rows of a weight-only quantized tensor that knows slices and ``dequantize()``, as torchao's."""

    def __init__(self, weight: Tensor):
        self._weight = weight
        self.shape, self.dtype, self.device = tuple(weight.shape), weight.dtype, weight.device
        self.kind = type(weight).__name__

    @torch.no_grad()
    def tile(self, rows: slice) -> Tensor:
        return self._weight[rows].dequantize().to(self.dtype)


class AdaptedRows:
    """Rows of W + Σ sᵢ·BᵢAᵢ over the active adapters of a PEFT LoRA layer, in float32 (or float64).

    What is active, and all weights, are looked up with each tile.
    """

    kind = "LoRA"

    def __init__(self, layer: nn.Module, base: Callable[[slice], Tensor], name: str):
        self._layer, self._base, self._name = layer, base, name
        weight = layer.base_layer.weight
        self.shape, self.dtype, self.device = tuple(weight.shape), weight.dtype, weight.device

    @torch.no_grad()
    def tile(self, rows: slice) -> Tensor:
        layer = self._layer
        tile = self._base(rows)
        if layer.merged or layer.disable_adapters:
            return tile
        _refuse_variants(layer, self._name)  # another adapter may be the active one by now
        tile = tile.to(torch.promote_types(tile.dtype, torch.float32))
        for name in layer.active_adapters:
            if name in layer.lora_A:
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                tile = tile + layer.scaling[name] * (b[rows].to(tile.dtype) @ a.to(tile.dtype))
        return tile


def is_plain(weight: object) -> bool:
    """Whether a weight is a tensor that kernels can read: none put together of others."""
    return isinstance(weight, Tensor) and type(weight).__torch_dispatch__ is Tensor.__torch_dispatch__


def head_rows(head: nn.Module, name: str) -> HeadRows | None:
    """How the rows of a head's weight are read; None for a plain tensor.

    Args:
        head: the module that gives the logits.
        name: the model's, for messages.
    Raises:
        ModelError: it is packed or adapted in a way that is not known; the line says which.
    """
    if hasattr(head, "base_layer"):
        if not all(hasattr(part, "weight") for part in getattr(head, "lora_A", {None: None}).values()):
            raise ModelError(
                f"{name} has an adapter on its output head ({type(head).__module__}) that is not read: "
                "LoRA is; merge others by merge_and_unload()"
            )
        if not (head.merged or head.disable_adapters):
            _refuse_variants(head, name)
        weight = head.base_layer.weight
        if is_plain(weight):
            return AdaptedRows(head, lambda rows: weight[rows].detach(), name)
        return AdaptedRows(head, _quantized(weight, name).tile, name)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or is_plain(weight):
        return None
    return _quantized(weight, name)


def _quantized(weight: Tensor, name: str) -> QuantizedRows:
    kind = type(weight).__name__
    try:
        rows = QuantizedRows(weight)
        tile = rows.tile(slice(0, 2))
        good = type(tile) is Tensor and tile.is_floating_point() and tile.shape[1] == weight.shape[1]
    except Exception as error:
        raise ModelError(
            f"{name} has an output head packed as {kind}, whose rows cannot be read apart "
            f"({type(error).__name__}): load it without quantization, or leave the head out of it"
        ) from error
    if not good:
        raise ModelError(f"{name} has an output head packed as {kind}, which gives no rows [n, H]")
    return rows


def _refuse_variants(layer: nn.Module, name: str) -> None:
    """Refuse active adapters that are more than s·BA."""
    for adapter in layer.active_adapters:
        variant = (getattr(layer, "lora_variant", None) or {}).get(adapter)
        kind = type(variant).__name__ if variant is not None else None
        if (getattr(layer, "use_dora", None) or {}).get(adapter):
            kind = "DoRA"
        if (getattr(layer, "lora_bias", None) or {}).get(adapter):
            kind = "a LoRA bias"
        if kind:
            raise ModelError(
                f"{name} has a LoRA variant on its output head ({kind}, adapter {adapter}): "
                "merge it by merge_and_unload()"
            )
