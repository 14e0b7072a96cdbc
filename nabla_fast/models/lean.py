"""The forward of Llama-type decoders without what makes a small step slow in Python.

transformers' own modules take hundreds of calls for a token of a small model. The same arithmetic is
written flat here for the layers it is known of; any other model runs through its own modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nabla_fast.models.native_decoder import NativeDecoder
from nabla_fast.ops.registry import allowed

if TYPE_CHECKING:
    from nabla_fast.models.paged import Context

# Layers whose forward is: x += o(attention(norm(x))); x += down(act(gate(norm(x))) · up(norm(x))).
_LAYERS = {
    f"transformers.models.{family}.modeling_{family}.{name}DecoderLayer"
    for family, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
}
# Rotary embeddings whose frequencies do not depend on the length of the text.
_ROTARY = {"default", "linear", "llama3", "yarn"}

Rotation = tuple[Tensor, Tensor]  # cos and signed sin, [B, S, 1, D] each


def _rotated(qk: Tensor, rotation: Rotation) -> Tensor:
    """The rotation by halves; the sign of the half that changes it stands in the table."""
    cos, sin = rotation
    return torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, -1), sin)


@dataclass(frozen=True)
class Norm:
    """Root-mean-square norm over the last dimension, rounded as transformers rounds it."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@dataclass(frozen=True)
class Linear:
    """One linear layer, or several of the same input side by side."""

    weights: list[Tensor]
    biases: list[Tensor | None]

    @classmethod
    def of(cls, *modules: nn.Linear) -> Linear:
        return cls([module.weight for module in modules], [module.bias for module in modules])

    def __call__(self, x: Tensor) -> Tensor:
        parts = [F.linear(x, w, b) for w, b in zip(self.weights, self.biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + self(x)."""
        if self.biases[0] is None:
            return torch.addmm(residual, x, self.weights[0].t())
        return residual + self(x)


@dataclass(frozen=True)
class Layer:
    """The weights of one layer and what its forward needs to know of them."""

    before_attention: Norm
    qkv: Linear
    qk: Norm | None
    output: Linear
    before_mlp: Norm
    gate_up: Linear
    act: Callable[[Tensor], Tensor]
    down: Linear
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None


class LeanBackbone:
    """A decoder's layers, read once: take a new one when its weights may have changed."""

    def __init__(self, backbone: nn.Module):
        """Read the weights of a backbone for which :meth:`can_read` holds."""
        self._rotary_module = backbone.rotary_emb
        self._layers = [_layer(layer) for layer in backbone.layers]
        self._norm = _norm(backbone.norm)
        self._table = backbone.embed_tokens.weight
        self._rotary = self._rotary_table(1024)
        readable = NativeDecoder.can_read(self._layers, self._norm)
        self._native = NativeDecoder(self._layers, self._norm) if readable else None

    @staticmethod
    def can_read(backbone: nn.Module) -> bool:
        """Whether a backbone is one whose forward is known here, with nothing hooked into it."""
        layers = getattr(backbone, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            return False
        if any(f"{type(m).__module__}.{type(m).__name__}" not in _LAYERS for m in layers):
            return False
        if getattr(getattr(backbone, "rotary_emb", None), "rope_type", None) not in _ROTARY:
            return False
        if len(layers) != backbone.config.num_hidden_layers:
            return False
        embedding = getattr(backbone, "embed_tokens", None)
        if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
            return False
        if len({p.device for p in backbone.parameters()} | {p.dtype for p in backbone.parameters()}) != 2:
            return False
        for module in backbone.modules():
            if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
                return False
            if "forward" in vars(module):
                return False
        return _is_norm(backbone.norm) and all(map(_is_known, layers))

    def __call__(
        self,
        positions: Tensor,
        end: int,
        context: Context,
        *,
        ids: Tensor | None,
        embeddings: Tensor | None,
    ) -> Tensor:
        """Hidden states [B, S, H] after the last norm.

        Args:
            positions: [B, S] int64, all below
            end: a host number, so that nothing waits for the device.
            context: the prefixes, and attention over them.
            ids: [B, S] int64, or
            embeddings: [B, S, H].
        """
        x = F.embedding(ids, self._table) if embeddings is None else embeddings
        rotation = self._cos_sin(positions, end)
        if self._native is not None and allowed("cpu") and context.pool.keys.dtype == torch.float32:
            return self._native(x, rotation, context)
        flat = x.reshape(-1, x.shape[-1])
        for index, layer in enumerate(self._layers):
            heads = layer.qkv(layer.before_attention(flat)).view(*x.shape[:2], -1, layer.head_dim)
            qk, v = heads.split([layer.heads + layer.kv_heads, layer.kv_heads], dim=2)
            qk = _rotated(qk if layer.qk is None else layer.qk(qk), rotation)
            q, k = qk.split([layer.heads, layer.kv_heads], dim=2)
            attended = context.attend(
                index, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), layer.scale, layer.window
            )
            flat = layer.output.added_to(flat, attended.transpose(1, 2).reshape(len(flat), -1))
            gate, up = layer.gate_up(layer.before_mlp(flat)).chunk(2, dim=-1)
            flat = layer.down.added_to(flat, layer.act(gate) * up)
        return self._norm(flat).view(x.shape)

    def _cos_sin(self, positions: Tensor, end: int) -> Rotation:
        """[B, S, 1, D] each."""
        length = self._rotary.shape[1]
        if end > length:
            self._rotary = self._rotary_table(max(end, 2 * length))
        cos, sin = self._rotary[:, positions]
        return cos[:, :, None], sin[:, :, None]

    @torch.no_grad()
    def _rotary_table(self, length: int) -> Tensor:
        """cos and signed sin [2, length, D] of positions 0..length−1."""
        positions = torch.arange(length, device=self._table.device)[None]
        cos, sin = self._rotary_module(self._table[:1, None], positions)
        half = sin.shape[-1] // 2
        return torch.stack([cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)])


def _own(layer: nn.Module, name: str) -> str:
    """The qualified name of a part that is defined beside its layer."""
    family = type(layer).__name__.removesuffix("DecoderLayer")
    return f"{type(layer).__module__}.{family}{name}"


def _is(module: nn.Module | None, name: str) -> bool:
    return f"{type(module).__module__}.{type(module).__name__}" == name


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is the RMS norm of one of the known families."""
    family = type(module).__module__.rpartition(".")[0]
    return type(module).__name__.endswith("RMSNorm") and any(family in layer for layer in _LAYERS)


def _is_known(layer: nn.Module) -> bool:
    """Whether every part of a layer is the one it is made with."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if not _is(attention, _own(layer, "Attention")) or not _is(mlp, _own(layer, "MLP")):
        return False
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    linears = [getattr(attention, f"{name}_proj", None) for name in "qkvo"]
    linears += [getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down")]
    return all(map(_is_norm, norms)) and all(type(module) is nn.Linear for module in linears)


def _norm(module: nn.Module) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _layer(layer: nn.Module) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    config = attention.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    qk = None
    if hasattr(attention, "q_norm"):
        weights = [attention.q_norm.weight.expand(heads, -1), attention.k_norm.weight.expand(kv_heads, -1)]
        qk = Norm(torch.cat(weights), attention.q_norm.variance_epsilon)
    if hasattr(attention, "sliding_window"):
        window = attention.sliding_window
    else:
        window = config.sliding_window if config.model_type == "mistral" else None
    return Layer(
        before_attention=_norm(layer.input_layernorm),
        qkv=Linear.of(attention.q_proj, attention.k_proj, attention.v_proj),
        qk=qk,
        output=Linear.of(attention.o_proj),
        before_mlp=_norm(layer.post_attention_layernorm),
        gate_up=Linear.of(mlp.gate_proj, mlp.up_proj),
        act=mlp.act_fn,
        down=Linear.of(mlp.down_proj),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        window=window,
    )
