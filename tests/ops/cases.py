"""Inputs of every op: the table CASES, and the random numbers that fill it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops import AdamState, GumbelNoise, cosine_schedule

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
WHOLE = 151_937  # a vocabulary of today's size, odd


class Draw:
    """Random inputs on the CPU, the same for every device."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = F32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator)

    def logits(self, rows: int, vocabulary: int, dtype: torch.dtype = F32, masked: float = 0.0) -> Tensor:
        """[N, V], a share of the tokens masked, at least one of each row not."""
        logits = self.normal(rows, vocabulary, dtype=dtype, scale=3.0)
        mask = self.uniform(rows, vocabulary) < masked
        mask[torch.arange(rows), self.integers(0, vocabulary, rows)] = False
        return logits.masked_fill(mask, -torch.inf)

    def noise(self, rows: int) -> GumbelNoise:
        """Keys over the whole range of int64."""
        return GumbelNoise(self.integers(-(2**63), 2**63 - 1, rows), self.integers(0, 2**63 - 1, rows))

    def tables(self, vocabulary: int, tables: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
        return [self.normal(vocabulary, width, dtype=dtype) for width, dtype in tables]


@dataclass(frozen=True)
class Case:
    """A named kind of input: ``make(draw)`` returns the op's arguments by name."""

    name: str
    make: Callable[[Draw], dict[str, Any]]
    large: bool = False  # too slow for an interpreter


def strided(tensor: Tensor) -> Tensor:
    """The same matrix with a gap after each row."""
    rows, columns = tensor.shape
    wide = tensor.new_zeros(rows, columns + 3)
    wide[:, 1 : columns + 1] = tensor
    return wide[:, 1 : columns + 1]


# -- mixes -------------------------------------------------------------------------------------------


def _mix_options(
    draw: Draw, rows: int, vocabulary: int, tau: float, noise: bool, direct: bool
) -> dict[str, Any]:
    return {
        "tau": tau,
        "noise": draw.noise(rows) if noise else None,
        "direct": draw.normal(rows, vocabulary) if direct else None,
    }


def embedding_mix(
    draw: Draw,
    rows: int,
    vocabulary: int,
    tables: Sequence[tuple[int, torch.dtype]] = ((16, F32),),
    dtype: torch.dtype = F32,
    masked: float = 0.0,
    transposed: bool = False,
    gaps: bool = False,
    tau: float = 1.0,
    noise: bool = False,
    direct: bool = False,
    hidden: int = 0,
    **hard: bool,
) -> dict[str, Any]:
    """Arguments of embedding_mix, or of linear_embedding_mix if ``hidden`` is its width."""
    arguments: dict[str, Any] = {}
    if hidden:
        arguments["hidden"] = draw.normal(rows, hidden, dtype=dtype, scale=3 * hidden**-0.5)
        arguments["head"] = draw.normal(vocabulary, hidden, dtype=tables[0][1])
    else:
        arguments["logits"] = draw.logits(rows, vocabulary, dtype, masked)
    arguments["tables"] = draw.tables(vocabulary, tables)
    if transposed or gaps:
        relaid = strided if gaps else (lambda tensor: tensor.T.contiguous().T)
        for name in ("hidden", "head", "logits"):
            if name in arguments:
                arguments[name] = relaid(arguments[name])
        arguments["tables"] = [relaid(table) for table in arguments["tables"]]
    return arguments | _mix_options(draw, rows, vocabulary, tau, noise, direct) | hard


def mix_backward(draw: Draw, rows: int, **sizes: Any) -> dict[str, Any]:
    """The same without ``hard``, and with the cotangents of every mix."""
    arguments = embedding_mix(draw, rows, **sizes)
    cotangents = [draw.normal(rows, table.shape[1], dtype=table.dtype) for table in arguments["tables"]]
    return {"cotangents": cotangents} | arguments


_MIXES: dict[str, dict[str, Any]] = {
    "two tables": {"rows": 5, "vocabulary": 257, "tables": ((24, F32), (17, F32))},
    "one token": {"rows": 3, "vocabulary": 1},
    "two tokens": {"rows": 3, "vocabulary": 2, "direct": True},
    "one row": {"rows": 1, "vocabulary": 4099, "tables": ((33, F32), (3, F32)), "direct": True},
    "masked": {"rows": 4, "vocabulary": 515, "masked": 0.9, "direct": True},
    "noise": {"rows": 3, "vocabulary": 4099, "noise": True, "direct": True, "tau": 0.7},
    "cold": {"rows": 4, "vocabulary": 257, "tau": 0.1, "direct": True},
    "hot": {"rows": 4, "vocabulary": 257, "tau": 10.0, "noise": True},
    "bf16": {"rows": 3, "vocabulary": 1021, "dtype": BF16, "tables": ((40, BF16), (24, BF16))},
    "fp16": {"rows": 3, "vocabulary": 1021, "dtype": F16, "tables": ((40, F16), (24, F16))},
    "dtypes": {"rows": 7, "vocabulary": 515, "tables": ((40, BF16), (8, F32), (12, F16)), "noise": True},
    "float64": {"rows": 3, "vocabulary": 257, "dtype": F64, "tables": ((16, F64), (9, F32))},
    "transposed": {"rows": 5, "vocabulary": 257, "transposed": True},
    "gaps": {"rows": 5, "vocabulary": 257, "gaps": True},
    "whole vocabulary": {"rows": 2, "vocabulary": WHOLE, "noise": True, "direct": True},
}


def _mix_cases(recipe: Callable[..., dict[str, Any]], backward: bool, **more: Any) -> list[Case]:
    modes = {"": {}} if backward else {", hard": {"hard": True}, ", soft": {"hard": False}}
    return [
        Case(name + suffix, partial(recipe, **sizes, **mode, **more), large=sizes["vocabulary"] == WHOLE)
        for name, sizes in _MIXES.items()
        for suffix, mode in modes.items()
        if not (more and "masked" in sizes)  # a finite head masks nothing
    ]


# -- statistics and one-hot gradients ----------------------------------------------------------------


def masked_by_head(draw: Draw, hidden: Tensor, head: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The same where a share of the head's rows, not the last one, gives logits of −inf.

    The first column of the hidden states becomes positive, and that of those rows −inf.
    """
    hidden[:, 0] = hidden[:, 0].abs() + 0.125
    mask = draw.uniform(len(head)) < share
    mask[-1] = False
    head[:, 0].masked_fill_(mask, -torch.inf)
    return hidden, head


def token_stats(
    draw: Draw,
    rows: int,
    vocabulary: int,
    dtype: torch.dtype = F32,
    masked: float = 0.0,
    tau: float = 1.0,
    gaps: bool = False,
    scale: float = 1.0,
    hidden: int = 0,
    head: torch.dtype = F32,
) -> dict[str, Any]:
    if hidden:
        states = draw.normal(rows, hidden, dtype=dtype, scale=3 * scale * hidden**-0.5)
        matrix = draw.normal(vocabulary, hidden, dtype=head)
        if masked:
            states, matrix = masked_by_head(draw, states, matrix, masked)
        if gaps:
            states, matrix = strided(states), strided(matrix)
        return {"rows": states, "head": matrix, "tau": tau}
    logits = draw.logits(rows, vocabulary, dtype, masked) * scale
    return {"rows": strided(logits) if gaps else logits, "tau": tau}


_STATS: dict[str, dict[str, Any]] = {
    "one token": {"rows": 3, "vocabulary": 1},
    "two tokens": {"rows": 5, "vocabulary": 2},
    "odd": {"rows": 5, "vocabulary": 257},
    "one row": {"rows": 1, "vocabulary": 4099},
    "masked": {"rows": 4, "vocabulary": 515, "masked": 0.95},
    "cold": {"rows": 6, "vocabulary": 4099, "tau": 0.1},
    "hot": {"rows": 6, "vocabulary": 4099, "tau": 10.0},
    "peaked": {"rows": 6, "vocabulary": 257, "scale": 30.0},
    "flat": {"rows": 6, "vocabulary": 257, "scale": 1e-3},
    "equal": {"rows": 2, "vocabulary": 1021, "scale": 0.0},
    "bf16": {"rows": 5, "vocabulary": 4099, "dtype": BF16},
    "fp16": {"rows": 5, "vocabulary": 4099, "dtype": F16, "masked": 0.5},
    "float64": {"rows": 3, "vocabulary": 257, "dtype": F64},
    "gaps": {"rows": 5, "vocabulary": 4099, "gaps": True},
    "head": {"rows": 5, "vocabulary": 1021, "hidden": 33},
    "bf16 head": {"rows": 3, "vocabulary": 257, "hidden": 32, "head": BF16, "tau": 0.7},
    "bf16 hidden states": {"rows": 3, "vocabulary": 257, "hidden": 32, "dtype": BF16, "head": BF16},
    "masked by the head": {"rows": 9, "vocabulary": 515, "hidden": 20, "masked": 0.9},
    "peaked by the head": {"rows": 6, "vocabulary": 257, "hidden": 33, "scale": 30.0},
    "gaps with a head": {"rows": 17, "vocabulary": 1021, "hidden": 19, "gaps": True},
    "whole vocabulary": {"rows": 3, "vocabulary": WHOLE, "masked": 0.01},
}


def onehot_grad(
    draw: Draw,
    rows: int,
    vocabulary: int,
    tables: Sequence[tuple[int, torch.dtype]] = ((16, F32),),
    hidden: int = 16,
    head: torch.dtype = F32,
    nll_coeff: float = 1e-3,
    cotangents: float = 1.0,
    small: torch.dtype | None = None,
    masked: float = 0.0,
    gaps: bool = False,
    maps: Sequence[int | None] = (),
) -> dict[str, Any]:
    """``small``: the dtype of cotangents and hidden states, instead of their tables'; ``maps``: rows of
    each table that has other ones than the vocabulary, and a map."""
    counts = [vocabulary if count is None else count for count in maps or [None] * len(tables)]
    matrices = [draw.tables(count, [table])[0] for count, table in zip(counts, tables, strict=True)]
    token_maps = [None if count is None else draw.integers(0, count, vocabulary) for count in maps]
    gradients = [
        draw.normal(rows, width, dtype=small or dtype, scale=cotangents) for width, dtype in tables
    ]
    states = draw.normal(rows, hidden, dtype=small or head, scale=3 * hidden**-0.5)
    matrix = draw.normal(vocabulary, hidden, dtype=head)
    if masked:
        states, matrix = masked_by_head(draw, states, matrix, masked)
    if gaps:
        gradients, matrices = ([strided(t) for t in tensors] for tensors in (gradients, matrices))
        states, matrix = strided(states), strided(matrix)
    return {
        "cotangents": gradients,
        "tables": matrices,
        "hidden": states,
        "head": matrix,
        "nll_coeff": nll_coeff,
        "token_maps": token_maps,
    }


_ONEHOT: dict[str, dict[str, Any]] = {
    "two tables": {"rows": 5, "vocabulary": 257, "tables": ((24, F32), (17, F32)), "hidden": 33},
    "one token": {"rows": 3, "vocabulary": 1},
    "two tokens": {"rows": 3, "vocabulary": 2},
    "one row": {"rows": 1, "vocabulary": 4099, "tables": ((1, F32),)},
    "seventeen rows": {"rows": 17, "vocabulary": 257},
    "likelihood alone": {"rows": 3, "vocabulary": 1021, "nll_coeff": 1.0, "cotangents": 0.0},
    "no likelihood": {"rows": 3, "vocabulary": 1021, "nll_coeff": 0.0},
    "bf16": {"rows": 3, "vocabulary": 515, "tables": ((24, BF16), (8, BF16)), "hidden": 32, "head": BF16},
    "fp16": {"rows": 3, "vocabulary": 515, "tables": ((24, F16), (8, F32)), "hidden": 32, "head": F16},
    "float64": {"rows": 3, "vocabulary": 257, "tables": ((16, F64),), "head": F64},
    "bf16 tables": {"rows": 9, "vocabulary": 515, "tables": ((24, BF16),), "head": BF16, "small": F32},
    "masked": {"rows": 9, "vocabulary": 515, "masked": 0.9, "nll_coeff": 0.5},
    "gaps": {"rows": 18, "vocabulary": 515, "tables": ((7, F32), (24, F32)), "gaps": True},
    "mapped": {"rows": 9, "vocabulary": 257, "tables": ((24, BF16), (17, F32)), "maps": (None, 61)},
    "both mapped": {
        "rows": 5,
        "vocabulary": 515,
        "tables": ((24, BF16), (8, BF16)),
        "head": BF16,
        "maps": (700, 1),
        "gaps": True,
    },
    "whole vocabulary": {"rows": 2, "vocabulary": WHOLE, "hidden": 8, "tables": ((8, F32),)},
}


def lm_logits(
    draw: Draw,
    rows: int,
    vocabulary: int,
    hidden: int = 33,
    dtype: torch.dtype = F32,
    head: torch.dtype = F32,
    gaps: bool = False,
) -> dict[str, Any]:
    states, matrix = draw.normal(rows, hidden, dtype=dtype), draw.normal(vocabulary, hidden, dtype=head)
    return {"hidden": strided(states) if gaps else states, "head": strided(matrix) if gaps else matrix}


_LOGITS: dict[str, dict[str, Any]] = {
    "odd": {"rows": 5, "vocabulary": 257},
    "one token": {"rows": 3, "vocabulary": 1, "hidden": 1},
    "one row": {"rows": 1, "vocabulary": 4099, "hidden": 64},
    "many rows": {"rows": 67, "vocabulary": 515, "hidden": 16},
    "narrow": {"rows": 6, "vocabulary": 1021, "hidden": 7},
    "gaps": {"rows": 7, "vocabulary": 515, "gaps": True},
    "bf16 head": {"rows": 5, "vocabulary": 1021, "hidden": 40, "head": BF16},
    "bf16": {"rows": 6, "vocabulary": 257, "dtype": BF16, "head": BF16},
    "fp16": {"rows": 6, "vocabulary": 257, "dtype": F16, "head": F16},
    "float64": {"rows": 3, "vocabulary": 257, "dtype": F64, "head": F64},
    "whole vocabulary": {"rows": 2, "vocabulary": WHOLE, "hidden": 8},
}


def nll_grad(draw: Draw, rows: int, vocabulary: int, scale: float = 1.0, **options: Any) -> dict[str, Any]:
    arguments = lm_logits(draw, rows, vocabulary, **options)
    arguments["hidden"] = arguments["hidden"] * scale
    return {**arguments, "tokens": draw.integers(0, vocabulary, rows)}


_NLLS = _LOGITS | {
    "peaked": {"rows": 9, "vocabulary": 257, "scale": 8.0},
    "flat": {"rows": 9, "vocabulary": 257, "scale": 1e-3},
    "several segments": {"rows": 65, "vocabulary": 8192 * 2 + 77, "hidden": 20},
}


# -- descents ----------------------------------------------------------------------------------------


def adam_state(draw: Draw, shape: tuple[int, int], taken: int, dtype: torch.dtype = F32) -> AdamState:
    """The state of rows that have taken 0 to ``taken`` steps."""
    step = draw.integers(0, taken + 1, shape[0])
    begun = (step > 0)[:, None].to(dtype)
    first = draw.normal(*shape, dtype=dtype, scale=1e-2) * begun
    return AdamState(first, (first + draw.normal(*shape, dtype=dtype, scale=1e-2) * begun).square(), step)


def tight(draw: Draw, logits: Tensor, gap: float) -> Tensor:
    """``logits`` whose largest two differ by 0 to ``gap``."""
    top = logits.topk(min(2, logits.shape[1]), dim=-1)
    second = top.values[:, -1:]
    return logits.scatter(1, top.indices[:, :1], second + gap * draw.uniform(len(logits), 1))


def against(logits: Tensor, grad: Tensor) -> Tensor:
    """``grad`` with a push from the largest logit to the second."""
    top = logits.topk(min(2, logits.shape[1]), dim=-1).indices
    push = torch.zeros_like(grad).scatter(1, top[:, -1:], -3.0)
    return grad + push.scatter(1, top[:, :1], 3.0)


def dto_descent(
    draw: Draw,
    rows: int,
    vocabulary: int,
    dtype: torch.dtype = F32,
    grad: torch.dtype = F32,
    iters: int = 20,
    lr: float = 0.01,
    masked: float = 0.0,
    tau: float = 1.0,
    gap: float = 0.4,
    offset: float = 0.0,
    noise: bool = False,
    taken: int = 0,
    until: bool = False,
    group: bool = False,
    by_row: bool = False,
    hidden: int = 0,
    head: torch.dtype = F32,
) -> dict[str, Any]:
    """Arguments of dto_descent, or of dto_descent_latents if ``hidden`` is its width."""
    schedule = cosine_schedule(iters, lr, min_ratio=0.1)
    gradient = draw.normal(rows, vocabulary, dtype=grad) + offset
    arguments: dict[str, Any]
    if hidden:
        arguments = {
            "h": draw.normal(rows, hidden, dtype=dtype, scale=3 * hidden**-0.5),
            "head": draw.normal(vocabulary, hidden, dtype=head),
        }
    else:
        arguments = {"z": tight(draw, draw.logits(rows, vocabulary, dtype, masked), gap)}
        gradient = against(arguments["z"], gradient)
    return arguments | {
        "grad": gradient,
        "state": adam_state(draw, (rows, hidden or vocabulary), taken, dtype),
        "schedule": schedule * (1 + draw.uniform(rows, 1).double()) if by_row else schedule,
        "until": draw.integers(0, iters + 1, rows) if until else None,
        "group": torch.arange(rows) % 3 if group else None,
        "tau": tau,
        "noise": draw.noise(rows) if noise else None,
    }


_DESCENTS: dict[str, dict[str, Any]] = {
    "odd": {"rows": 8, "vocabulary": 257},
    "one token": {"rows": 2, "vocabulary": 1},
    "two tokens": {"rows": 5, "vocabulary": 2},
    "one row": {"rows": 1, "vocabulary": 4099},
    "masked": {"rows": 5, "vocabulary": 515, "masked": 0.9},
    "noise": {"rows": 5, "vocabulary": 257, "noise": True, "tau": 0.7, "lr": 0.1},
    "cold": {"rows": 5, "vocabulary": 257, "tau": 0.1},
    "hot": {"rows": 5, "vocabulary": 257, "tau": 10.0},
    "under way": {"rows": 6, "vocabulary": 257, "taken": 20},
    "until": {"rows": 7, "vocabulary": 257, "until": True},
    "groups": {"rows": 11, "vocabulary": 257, "group": True},
    "a schedule a row": {"rows": 5, "vocabulary": 257, "by_row": True, "taken": 10},
    "a hundred steps": {"rows": 3, "vocabulary": 257, "iters": 100, "gap": 3.0},
    "no step": {"rows": 3, "vocabulary": 257, "iters": 0},
    "far from zero": {"rows": 5, "vocabulary": 257, "offset": 1000.0},
    "bf16 gradient": {"rows": 5, "vocabulary": 257, "grad": BF16},
    "float64": {"rows": 5, "vocabulary": 257, "dtype": F64, "grad": F64},
    "whole vocabulary": {"rows": 2, "vocabulary": WHOLE, "iters": 5},
}


# What is the same for logits and for latents in an interpreted backend, which takes long for each.
_ROW_ALONE = ("cold", "hot", "under way", "a hundred steps", "far from zero", "bf16 gradient")


def _cases(
    recipe: Callable[..., dict[str, Any]], table: dict[str, dict[str, Any]], **more: Any
) -> list[Case]:
    return [
        Case(name, partial(recipe, **sizes, **more), large=sizes["vocabulary"] == WHOLE)
        for name, sizes in table.items()
    ]


def gumbel_noise(draw: Draw, rows: int, vocabulary: int) -> dict[str, Any]:
    return {"noise": draw.noise(rows), "vocabulary": vocabulary}


_NOISES: dict[str, dict[str, Any]] = {
    "one token": {"rows": 3, "vocabulary": 1},
    "two tokens": {"rows": 3, "vocabulary": 2},
    "odd": {"rows": 5, "vocabulary": 257},
    "one row": {"rows": 1, "vocabulary": 4099},
    "whole vocabulary": {"rows": 2, "vocabulary": WHOLE},
}

# -- draws -------------------------------------------------------------------------------------------


def draw_tokens(draw: Draw, rows: int, vocabulary: int, dtype: torch.dtype = F32, **options: Any):
    return {
        "logits": draw.logits(rows, vocabulary, dtype),
        "exponentials": -draw.uniform(rows, vocabulary).to(dtype).clamp(1e-6).log() + 1e-6,
        **options,
    }


_DRAWS: dict[str, dict[str, Any]] = {
    "all": {"rows": 5, "vocabulary": 257},
    "filtered": {"rows": 5, "vocabulary": 4099, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "top-p": {"rows": 3, "vocabulary": 257, "top_p": 0.5},
    "one token": {"rows": 2, "vocabulary": 1, "top_k": 3},
    "float64": {"rows": 3, "vocabulary": 257, "dtype": F64, "top_k": 7},
}

# -- attention ---------------------------------------------------------------------------------------


def prefix_attention(
    draw: Draw,
    prefixes: Sequence[int],
    suffix: int,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 8,
    block_size: int = 4,
    window: int | None = None,
    dtype: torch.dtype = F32,
    pool: torch.dtype | None = None,
) -> dict[str, Any]:
    """Arguments of prefix_attention: prefixes of these lengths in shuffled blocks among others."""
    batch, most = len(prefixes), max(1, *(-(-length // block_size) for length in prefixes))
    blocks = batch * most + 3
    shape = (blocks, block_size, kv_heads, width)
    order = draw.uniform(blocks).argsort()[: batch * most]
    return {
        "q": draw.normal(batch, heads, suffix, width, dtype=dtype),
        "k": draw.normal(batch, kv_heads, suffix, width, dtype=dtype),
        "v": draw.normal(batch, kv_heads, suffix, width, dtype=dtype),
        "key_pool": draw.normal(*shape, dtype=pool or dtype),
        "value_pool": draw.normal(*shape, dtype=pool or dtype),
        "block_tables": order.view(batch, most),
        "prefix_lengths": torch.tensor(prefixes),
        "scale": width**-0.5,
        "window": window,
    }


def attention_backward(draw: Draw, **sizes: Any) -> dict[str, Any]:
    """The same with the cotangent of the output."""
    arguments = prefix_attention(draw, **sizes)
    q = arguments["q"]
    return {"cotangent": draw.normal(*q.shape, dtype=q.dtype)} | arguments


_ATTENTIONS: dict[str, dict[str, Any]] = {
    "ragged": {"prefixes": (0, 5, 9), "suffix": 3},
    "one token": {"prefixes": (7,), "suffix": 1},
    "no prefix": {"prefixes": (0, 0), "suffix": 5},
    "full blocks": {"prefixes": (8, 4), "suffix": 2},
    "one head": {"prefixes": (3, 1), "suffix": 4, "heads": 1, "kv_heads": 1},
    "no groups": {"prefixes": (3, 6), "suffix": 4, "heads": 3, "kv_heads": 3},
    "odd width": {"prefixes": (3, 6), "suffix": 4, "width": 5, "block_size": 3},
    "window": {"prefixes": (2, 11), "suffix": 5, "window": 4},
    "window of one": {"prefixes": (2, 11), "suffix": 3, "window": 1},
    "bf16": {"prefixes": (0, 5, 9), "suffix": 3, "dtype": BF16},
    "fp16": {"prefixes": (5, 9), "suffix": 3, "dtype": F16},
    "bf16 pool": {"prefixes": (5, 9), "suffix": 3, "pool": BF16},
    "float64": {"prefixes": (5, 9), "suffix": 3, "dtype": F64},
}


CASES: dict[str, list[Case]] = {
    "lm_logits": _cases(lm_logits, _LOGITS),
    "nll_grad": _cases(nll_grad, _NLLS),
    "gumbel_noise": _cases(gumbel_noise, _NOISES),
    "draw_tokens": _cases(draw_tokens, _DRAWS),
    "embedding_mix": _mix_cases(embedding_mix, backward=False),
    "embedding_mix_backward": _mix_cases(mix_backward, backward=True),
    "linear_embedding_mix": _mix_cases(embedding_mix, backward=False, hidden=24),
    "linear_embedding_mix_backward": _mix_cases(mix_backward, backward=True, hidden=24),
    "token_stats": _cases(token_stats, _STATS),
    "onehot_grad": _cases(onehot_grad, _ONEHOT),
    "onehot_grad_norm": _cases(onehot_grad, _ONEHOT),
    "dto_descent": _cases(dto_descent, _DESCENTS),
    "dto_descent_latents": [
        *(
            replace(case, large=case.large or case.name in _ROW_ALONE)
            for case in _cases(dto_descent, _DESCENTS, hidden=24)
            if case.name != "masked"
        ),
        Case("bf16 head", partial(dto_descent, rows=4, vocabulary=257, hidden=24, head=BF16)),
    ],
    "prefix_attention": [Case(n, partial(prefix_attention, **s)) for n, s in _ATTENTIONS.items()],
    "prefix_attention_backward": [
        Case(n, partial(attention_backward, **s)) for n, s in _ATTENTIONS.items()
    ],
}
