"""Rewards of all kinds for the naive loop: the models' own logits of everything, by autograd.

Like the loop it shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from naive_loop import NaiveLoop, _table
from torch import Tensor


@dataclass
class NaiveReward:
    """One term of a reward.

    Attributes:
        of: the reward, a scalar, of embeddings [S, H], the ids [S] (hard ones) and where the response is;
            with ``table`` None, of the LM's tokens of prompt and response.
        table: [V_r, H] of the reward's own tokens.
        prefix, suffix: its own ids around a response.
        token_map: [V] its id of each token of the LM.
        weight: its factor.
    """

    of: Callable[..., Tensor | float]
    table: Tensor | None = None
    prefix: Sequence[int] = ()
    suffix: Sequence[int] = ()
    token_map: Tensor | None = None
    weight: float = 1.0

    def ids(self, tokens: Sequence[int]) -> list[int]:
        return list(tokens) if self.token_map is None else self.token_map[list(tokens)].tolist()


class NaiveRewardLoop(NaiveLoop):
    """The naive loop with a weighted sum of rewards; other arguments as of :class:`NaiveLoop`."""

    def __init__(self, lm, rewards: Sequence[NaiveReward], config, prompt, **options):
        super().__init__(lm, None, config, prompt, **options)
        self.rm = self.rewards = rewards

    def loss(self, committed: list[int], y: Tensor) -> Tensor:
        self.rm = None
        loss = super().loss(committed, y)
        self.rm = self.rewards
        hard = y.argmax(dim=-1).tolist()
        for r in self.rewards:
            if r.table is None:
                continue
            before, relaxed = [*r.prefix, *r.ids(committed)], r.ids(hard)
            mapped = r.table if r.token_map is None else r.table[r.token_map]
            embeddings = torch.cat([r.table[before], y.to(r.table.dtype) @ mapped, r.table[list(r.suffix)]])
            ids = [*before, *relaxed, *r.suffix]
            span = slice(len(r.prefix), len(before) + len(relaxed))
            loss = loss - self.config.reward_coeff * r.weight * r.of(embeddings, ids, span)
        return loss

    @torch.no_grad()
    def reward(self, response: list[int]) -> float:
        total = 0.0
        for r in self.rewards:
            if r.table is None:
                total += r.weight * float(r.of(self.prompt, response))
                continue
            own = r.ids(response)
            ids = [*r.prefix, *own, *r.suffix]
            span = slice(len(r.prefix), len(r.prefix) + len(own))
            total += r.weight * float(r.of(r.table[ids], ids, span))
        return total


def classifier(model, choose: Callable[[Tensor], Tensor], **fields) -> NaiveReward:
    """A sequence classifier; ``choose`` makes a scalar of logits [labels]."""
    return NaiveReward(
        lambda embeddings, ids, span: choose(_logits(model, embeddings)[0]), _table(model), **fields
    )


def process(
    model, ends: Callable[[list[int]], list[int]], choose, reduce, causal=True, **fields
) -> NaiveReward:
    """A token classifier; ``ends`` are positions in a response, ``reduce`` makes a scalar of scores [n].

    Args:
        causal: whether a score depends on nothing after it.
    """

    # A step that two responses have in common is one number, whatever is read after it: with "min" the
    # last digit would decide between them.
    found: dict[tuple[int, ...], Tensor] = {}

    def of(embeddings, ids, span):
        logits = _logits(model, embeddings)[0]
        scores = []
        for n in ends(ids[span]):
            score = choose(logits[span.start + n])
            if causal and not embeddings.requires_grad:
                score = found.setdefault(tuple(ids[: span.start + n + 1]), score)
            scores.append(score)
        return reduce(torch.stack(scores))

    return NaiveReward(of, _table(model), **fields)


def _logits(model, embeddings: Tensor) -> Tensor:
    mask = torch.ones(1, len(embeddings), dtype=torch.int64)
    return model(inputs_embeds=embeddings[None], attention_mask=mask).logits
