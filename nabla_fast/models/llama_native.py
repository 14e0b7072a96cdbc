"""The flat forward's pass, and its backward, as calls into the C++ extension: on the CPU.

States, keys and values are float32. The weights of linear layers are read in the dtype in which they lie,
and a product is float32's on their own numbers, so that a bfloat16 or float16 checkpoint gives what a
float32 copy of it would, without the copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.activations import SiLUActivation

from nabla_fast._native import loading as native_loading
from nabla_fast.models.llama_layers import Layer, Linear, Norm
from nabla_fast.models.paged_attention import PagedPass
from nabla_fast.ops.prefix_attention import prefix_attention_backward_native

Rotation = tuple[Tensor, Tensor]  # cos and signed sin, [B, S, 1, D] each

# Said aloud: the caller may have set another default.
_FLOATS = {"dtype": torch.float32, "device": "cpu"}
_LANES = 16  # widths that the extension takes are multiples of it
# Dtypes of weights, by the extension's names.
_WEIGHT_TYPES = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}


class LlamaNative:
    """Decoder layers whose weights the extension reads where they lie."""

    def __init__(self, layers: list[Layer], norm: Norm):
        """Take layers for which :meth:`can_read` holds."""
        first = layers[0]
        self._layers = layers
        self._weights: list[Tensor] = []  # alive as long as their addresses are held
        self._width, self._row = norm.weight.shape[0], (first.heads + 2 * first.kv_heads) * first.head_dim
        self._q_width, self._dim = first.heads * first.head_dim, first.head_dim
        self._decoder = native_loading.extension().Decoder(
            self._width,
            first.heads,
            first.kv_heads,
            first.head_dim,
            self._inner(first),
            getattr(native_loading.extension().WeightType, _WEIGHT_TYPES[norm.weight.dtype]),
            self._vector(norm.weight),
            norm.eps,
            [self._fields(layer) for layer in layers],
        )

    @staticmethod
    def can_read(layers: list[Layer], norm: Norm) -> bool:
        """Whether the extension is there and takes layers like these."""
        first = layers[0]
        widths = (norm.weight.shape[0], first.head_dim, LlamaNative._inner(first))
        return (
            native_loading.available()
            and norm.weight.dtype in _WEIGHT_TYPES
            and norm.weight.device.type == "cpu"
            and all(width % _LANES == 0 for width in widths)
            and first.head_dim <= native_loading.MOST_HEAD_DIM
            and all(type(layer.act) in (torch.nn.SiLU, SiLUActivation) for layer in layers)
            and all(LlamaNative._shape(layer) == LlamaNative._shape(first) for layer in layers)
        )

    @staticmethod
    def _inner(layer: Layer) -> int:
        return layer.down.weights[0].shape[1]

    @staticmethod
    def _shape(layer: Layer) -> tuple[int, ...]:
        return layer.heads, layer.kv_heads, layer.head_dim, LlamaNative._inner(layer)

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self._weights.append(tensor.detach().contiguous())
        return self._weights[-1].data_ptr()

    def _vector(self, tensor: Tensor | None) -> int:
        """The address of a norm's weight or a bias in float32: of a half-precision one, that of a copy."""
        return self._address(None if tensor is None else tensor.detach().float())

    def _linears(self, linear: Linear) -> list[tuple[int, int]]:
        pairs = zip(linear.weights, linear.biases, strict=True)
        return [(self._address(weight), self._vector(bias)) for weight, bias in pairs]

    def _fields(self, layer: Layer) -> dict[str, Any]:
        fields = dict(zip("qkv", self._linears(layer.qkv), strict=True))
        fields["gate"], fields["up"] = self._linears(layer.gate_up)
        (fields["output"],) = self._linears(layer.output)
        (fields["down"],) = self._linears(layer.down)
        return fields | {
            "attention_norm": self._vector(layer.before_attention.weight),
            "attention_eps": layer.before_attention.eps,
            "qk_norm": self._vector(None if layer.qk is None else layer.qk.weight),
            "qk_eps": 0.0 if layer.qk is None else layer.qk.eps,
            "mlp_norm": self._vector(layer.before_mlp.weight),
            "mlp_eps": layer.before_mlp.eps,
            "scale": layer.scale,
            "window": layer.window or 0,
        }

    def __call__(self, x: Tensor, rotation: Rotation, paged: PagedPass) -> Tensor:
        """Hidden states [B, S, H] after the last norm of embeddings [B, S, H]; differentiable once."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Differentiable.apply(x, self, rotation, paged)
        return self.forward(x, rotation, paged, keep=False)[0]

    def forward(
        self, x: Tensor, rotation: Rotation, paged: PagedPass, *, keep: bool
    ) -> tuple[Tensor, tuple]:
        """Hidden states, and what :meth:`backward` takes if ``keep``."""
        batch, suffix, width = x.shape
        x = x.detach().clone(memory_format=torch.contiguous_format)
        memory = torch.empty(self._decoder.memory(batch * suffix, keep), **_FLOATS)
        states = torch.empty(batch, suffix, width, **_FLOATS)
        cos, sin = (part.contiguous() for part in rotation)
        pool, slots = paged.pool, paged.slots
        given = native_loading.extension().DecoderPass(
            batch,
            suffix,
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            pool.keys.data_ptr(),
            pool.values.data_ptr(),
            pool.blocks,
            pool.block_size,
            paged.tables.data_ptr(),
            paged.tables.shape[1],
            paged.lengths.data_ptr(),
            0 if slots is None else slots.data_ptr(),
            memory.data_ptr(),
            keep,
            states.data_ptr(),
            torch.get_num_threads(),
        )
        status = self._decoder.forward(given)
        if status:
            raise ValueError(native_loading.extension().status_string(status))
        return states, (given, memory, cos, sin)

    def backward(self, cotangent: Tensor, paged: PagedPass, kept: tuple) -> Tensor:
        """∂/∂x [B, S, H]; the prefixes and the weights are constants."""
        given, memory, *_ = kept
        batch, suffix, _ = cotangent.shape
        dx = cotangent.clone(memory_format=torch.contiguous_format)
        d_attended = torch.empty(batch, suffix, self._q_width // self._dim, self._dim, **_FLOATS)
        self._decoder.backward_norm(given, dx.data_ptr())
        for index in range(len(self._layers) - 1, -1, -1):
            layer = self._layers[index]
            self._decoder.backward_mlp(given, index, dx.data_ptr(), d_attended.data_ptr())
            start = self._decoder.qkv_offset(given, index)
            qkv = memory[start : start + batch * suffix * self._row].view(batch, suffix, -1, self._dim)
            heads = qkv.transpose(1, 2).split([layer.heads, layer.kv_heads, layer.kv_heads], dim=1)
            parts = prefix_attention_backward_native(
                d_attended.transpose(1, 2),
                *heads,
                paged.pool.keys[index],
                paged.pool.values[index],
                paged.tables,
                paged.lengths,
                scale=layer.scale,
                window=layer.window,
            )
            d_qkv = torch.cat([part.transpose(1, 2) for part in parts], dim=2)
            self._decoder.backward_qkv(given, index, d_qkv.data_ptr(), dx.data_ptr())
        return dx


class _Differentiable(torch.autograd.Function):
    """A pass as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decoder: LlamaNative, rotation: Rotation, paged: PagedPass) -> Tensor:
        states, kept = decoder.forward(x, rotation, paged, keep=True)
        ctx.arguments = (decoder, paged, kept)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None, None]:
        decoder, paged, kept = ctx.arguments
        return decoder.backward(cotangent, paged, kept), None, None, None
