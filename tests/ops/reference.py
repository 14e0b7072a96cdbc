"""The formulas, written once more and in another way: autograd and torch.optim."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def relaxed_onehot(z: Tensor, tau: float, hard: bool) -> Tensor:
    """y [N, V]: softmax(z/τ), or onehot(argmax z) with its Jacobian."""
    p = torch.softmax(z / tau, dim=-1)
    if not hard:
        return p
    onehot = torch.nn.functional.one_hot(z.argmax(dim=-1), z.shape[-1]).to(z.dtype)
    return onehot + (p - p.detach())


def mix_loss(
    z: Tensor,
    tables: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    direct: Tensor | None,
    tau: float,
    hard: bool,
) -> Tensor:
    """The loss whose gradients with respect to mixes and one-hot are the given ones."""
    y = relaxed_onehot(z, tau, hard)
    loss = sum(((y @ table) * cotangent).sum() for table, cotangent in zip(tables, cotangents, strict=True))
    return loss if direct is None else loss + (y * direct).sum()


class AdamRun:
    """Rows of logits, or of hidden states under a head, moved by torch.optim.Adam in float64."""

    def __init__(
        self,
        parameter: Tensor,
        schedule: Tensor,
        *,
        head: Tensor | None = None,
        tau: float = 1.0,
        noise: Tensor | None = None,
    ):
        self._rows = [row.clone().requires_grad_() for row in parameter.double()]
        self._optimizers = [torch.optim.Adam([row], lr=0.0) for row in self._rows]
        self._schedule = schedule.expand(len(self._rows), -1)
        self._head = None if head is None else head.double()
        self._tau = tau
        self._noise = noise
        self._taken = 0

    @property
    def parameter(self) -> Tensor:
        """[N, D] now."""
        return torch.stack([row.detach() for row in self._rows])

    @property
    def tokens(self) -> Tensor:
        """[N] hard tokens now."""
        return self._logits(self.parameter).argmax(dim=-1)

    def moments(self, name: str) -> Tensor:
        """[N, D] ``exp_avg`` or ``exp_avg_sq``."""
        return torch.stack([o.state[r][name] for o, r in zip(self._optimizers, self._rows, strict=True)])

    def step(self, grad: Tensor) -> None:
        """One step of every row along the loss ⟨grad, softmax(z/τ)⟩."""
        z = self._logits(torch.stack(self._rows))
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        mix_loss(z, [], [], grad.double(), self._tau, hard=False).backward()
        for optimizer, lr in zip(self._optimizers, self._schedule[:, self._taken].tolist(), strict=True):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        self._taken += 1

    def _logits(self, parameter: Tensor) -> Tensor:
        z = parameter if self._head is None else parameter @ self._head.T
        return z if self._noise is None else z + self._noise


def philox_4x32_10(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox-4x32-10 in Python integers, from the paper's figure."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c
