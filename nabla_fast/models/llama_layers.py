"""The layers of Llama-type decoders: which ones are known, and their weights as plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nabla_fast.models.head_rows import is_plain
from nabla_fast.ops import lm_logits

# Where transformers' own hooks are from, which stay on a model that was once asked for hidden states and
# only look at what passes.
_CAPTURING = "transformers.utils.output_capturing"

# Layers whose forward is: x += o(attention(norm(x))); x += down(act(gate(norm(x))) · up(norm(x))).
_LAYERS = {
    f"transformers.models.{family}.modeling_{family}.{name}DecoderLayer"
    for family, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
}
# Rotary embeddings whose frequencies do not depend on the length of the text.
_ROTARY = {"default", "linear", "llama3", "yarn"}


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
    """One linear layer, or several of the same input side by side.

    Of float32 inputs and half-precision weights the product is float32's on the weights' own numbers, which
    are widened a few rows at a time.
    """

    weights: list[Tensor]
    biases: list[Tensor | None]

    @classmethod
    def of(cls, *modules: nn.Linear) -> Linear:
        return cls([module.weight for module in modules], [module.bias for module in modules])

    def __call__(self, x: Tensor) -> Tensor:
        parts = [_linear(x, w, b) for w, b in zip(self.weights, self.biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + self(x)."""
        if self.biases[0] is None and x.dtype == self.weights[0].dtype:
            return torch.addmm(residual, x, self.weights[0].t())
        return residual + self(x)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype == weight.dtype:
        return F.linear(x, weight, bias)
    product = lm_logits(x, weight)
    return product if bias is None else product + bias


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
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(getattr(hook, "__module__", None) != _CAPTURING for hook in hooks):
            return False
        if hasattr(module, "_hf_hook"):
            return False
        if "forward" in vars(module):
            return False
    return _is_norm(backbone.norm) and all(map(_is_known, layers))


def read_layers(backbone: nn.Module) -> list[Layer]:
    """The layers of a backbone for which :func:`can_read` holds."""
    return [_layer(layer) for layer in backbone.layers]


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
    return all(map(_is_norm, norms)) and all(
        type(module) is nn.Linear and is_plain(module.weight) for module in linears
    )


def read_norm(module: nn.Module) -> Norm:
    """The weight and epsilon of an RMS norm."""
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
        before_attention=read_norm(layer.input_layernorm),
        qkv=Linear.of(attention.q_proj, attention.k_proj, attention.v_proj),
        qk=qk,
        output=Linear.of(attention.o_proj),
        before_mlp=read_norm(layer.post_attention_layernorm),
        gate_up=Linear.of(mlp.gate_proj, mlp.up_proj),
        act=mlp.act_fn,
        down=Linear.of(mlp.down_proj),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        window=window,
    )
