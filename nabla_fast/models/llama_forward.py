"""The forward of Llama-type decoders without what makes a small step slow in Python.

transformers' own modules take hundreds of calls for a token of a small model. The same arithmetic is
written flat here for the layers it is known of; any other model runs through its own modules.

A half-precision checkpoint can be read by float32 arithmetic on its weights as they lie: states, keys and
values are float32, so that nothing is rounded that the checkpoint did not round.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nabla_fast.models.llama_layers import read_layers, read_norm
from nabla_fast.models.llama_native import LlamaNative, Rotation
from nabla_fast.models.paged_attention import PagedPass
from nabla_fast.ops.registry import allowed


class LlamaForward:
    """A decoder's layers, read once: take a new one when its weights may have changed.

    Attributes:
        dtype: of the states between its layers, of keys and values, and of the result.
    """

    def __init__(self, backbone: nn.Module, dtype: torch.dtype):
        """Read the weights of a backbone that ``llama_layers.can_read`` takes.

        Args:
            dtype: of the weights, or float32.
        """
        self._rotary_module = backbone.rotary_emb
        self._layers = read_layers(backbone)
        self._norm = read_norm(backbone.norm)
        self._table = backbone.embed_tokens.weight
        self.dtype = dtype
        self._rotary = self._rotary_table(1024)
        readable = dtype == torch.float32 and LlamaNative.can_read(self._layers, self._norm)
        self._native = LlamaNative(self._layers, self._norm) if readable else None

    def __call__(
        self,
        positions: Tensor,
        end: int,
        paged: PagedPass,
        *,
        ids: Tensor | None,
        embeddings: Tensor | None,
    ) -> Tensor:
        """Hidden states [B, S, H] after the last norm, in ``dtype``.

        Args:
            positions: [B, S] int64, all below
            end: a host number, so that nothing waits for the device.
            paged: the prefixes, and attention over them.
            ids: [B, S] int64, or
            embeddings: [B, S, H]; float32 ones of a half-precision model get a float32 gradient.
        """
        x = (F.embedding(ids, self._table) if embeddings is None else embeddings).to(self.dtype)
        rotation = self._cos_sin(positions, end)
        if self._native is not None and allowed("cpu"):
            return self._native(x, rotation, paged)
        flat = x.reshape(-1, x.shape[-1])
        for index, layer in enumerate(self._layers):
            heads = layer.qkv(layer.before_attention(flat)).view(*x.shape[:2], -1, layer.head_dim)
            qk, v = heads.split([layer.heads + layer.kv_heads, layer.kv_heads], dim=2)
            qk = _rotated(qk if layer.qk is None else layer.qk(qk), rotation)
            q, k = qk.split([layer.heads, layer.kv_heads], dim=2)
            attended = paged.attend(
                index, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), layer.scale, layer.window
            )
            flat = layer.output.added_to(flat, attended.transpose(1, 2).reshape(len(flat), -1))
            gate, up = layer.gate_up(layer.before_mlp(flat)).chunk(2, dim=-1)
            flat = layer.down.added_to(flat, layer.act(gate) * up)
        return self._norm(flat).view(x.shape)

    @property
    def rotary_table(self) -> Tensor:
        """cos and signed sin of the first positions; another tensor once a pass has needed more of them."""
        return self._rotary

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
        cos, sin = self._rotary_module(self._table[:1, None].to(self.dtype), positions)
        half = sin.shape[-1] // 2
        return torch.stack([cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)])


def _rotated(qk: Tensor, rotation: Rotation) -> Tensor:
    """The rotation by halves; the sign of the half that changes it stands in the table."""
    cos, sin = rotation
    return torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, -1), sin)
