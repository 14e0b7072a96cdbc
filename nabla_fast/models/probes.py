"""What probes of a model read, and how closely results must agree."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nabla_fast.errors import ModelError
from nabla_fast.models.context import stated_context
from nabla_fast.models.replica import short_sighted
from nabla_fast.models.tables import table_rows

_TOKENS = 16
WIDE = (torch.float32, torch.float64)


def probe_length(config: Any) -> int:
    """How many tokens a probe reads: 16, or less where the context is short."""
    context = stated_context(config)
    # A third is left, as some models' positions do not start at 0.
    return _TOKENS if context is None else max(2, min(_TOKENS, context * 2 // 3))


@torch.no_grad()
def probe_ids(model: nn.Module, count: int, seed: int = 0) -> list[int]:
    """``count`` token ids that are like most others.

    None is one that the config gives a role, such as padding, or one whose embedding is not finite: a
    decode names the prompt that reads such a token.
    """
    roles = set()
    for name, value in vars(model.config.get_text_config()).items():
        if name.endswith(("token_id", "token_index")):
            roles |= set(value) if isinstance(value, (list, tuple, set)) else {value}
    vocabulary, draw = table_rows(model), random.Random(seed)
    drawn = [token for token in draw.choices(range(vocabulary), k=64 * count) if token not in roles]
    tokens = torch.tensor(drawn, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    finite = model.get_input_embeddings()(tokens).isfinite().all(dim=-1).tolist()
    ids = [token for token, good in zip(drawn, finite, strict=True) if good]
    return ids[:count] if len(ids) >= count else [n % vocabulary for n in range(count)]


def looking_far(model: nn.Module, count: int) -> nn.Module:
    """The model; a replica with shorter windows where ``count`` tokens do not reach beyond its own."""
    return short_sighted(model, max(2, count // 3)) or model


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Whether results agree within what rounding of the model's dtype explains.

    By their norms: single numbers of half-precision states differ by several percent of the largest.
    """
    ours, theirs = ours.detach().double(), theirs.detach().double()
    share = 1e-4 if dtype in WIDE else 8e-2
    return ours.shape == theirs.shape and bool((ours - theirs).norm() <= share * theirs.norm())


def with_states(
    under: nn.Module, head: nn.Module, states: Tensor, run: Callable[[], Tensor]
) -> Tensor | None:
    """What ``run`` returns where the head of a replica gets other states.

    Args:
        under: the replica's backbone, which gives the states where it is called; else
        head: gets them.
        states: [B, S, H].
    Returns:
        None if nothing calls either.
    """
    used = []

    def given(_: nn.Module, __: Any, output: Any) -> Any:
        used.append(under)
        if isinstance(output, tuple):
            return (states, *output[1:])
        output.last_hidden_state = states
        return output

    def taken(_: nn.Module, inputs: tuple) -> tuple:
        if not used:
            used.append(head)
            return (states, *inputs[1:])
        return inputs

    # Dictionaries of their own: a replica shares the model's.
    under._forward_hooks = OrderedDict(under._forward_hooks)
    head._forward_pre_hooks = OrderedDict(head._forward_pre_hooks)
    handles = under.register_forward_hook(given), head.register_forward_pre_hook(taken)
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    return result if used else None


def probe_gradient(model: nn.Module, embeddings: Tensor, run: Callable[[Tensor], Tensor]) -> None:
    """Compare a gradient with differences that a small step makes.

    A layer that has no backward leaves its part out without a word. Only smooth models can be compared so,
    in float32 or float64: differences of steps of two sizes have to agree with one another first.

    Args:
        embeddings: [1, S, H].
        run: what the model returns for embeddings [B, S, H], [B, …], differentiable.
    Raises:
        ModelError: there is no gradient, it is not finite, or it is another one than the differences.
    """
    name = type(model).__name__
    generator = torch.Generator().manual_seed(0)

    def random_like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")

    step = random_like(embeddings).to(embeddings) * embeddings.std()
    with torch.enable_grad():
        read = embeddings.detach().clone().requires_grad_()
        output = run(read.clone())  # some scale in place what they are given
        weights = random_like(output).to(output)
        if not output.requires_grad:
            raise ModelError(f"{name} gives no gradient of its input embeddings")
        (gradient,) = torch.autograd.grad((output * weights).sum(), read, allow_unused=True)
    if gradient is None or not gradient.isfinite().all():
        raise ModelError(f"{name} gives no gradient of its input embeddings, or one that is not finite")
    if embeddings.dtype not in WIDE:
        return
    slope = float((gradient.double() * step.double()).sum())

    sizes = (1e-2, -1e-2, 2.5e-3, -2.5e-3)
    with torch.no_grad():
        outputs = run(torch.cat([embeddings + size * step for size in sizes])).double()
    sums = [float((part * weights[0].double()).sum()) for part in outputs]
    large, small = ((sums[n] - sums[n + 1]) / (2 * sizes[n]) for n in (0, 2))
    smooth = abs(large - small) <= 0.05 * max(abs(large), abs(small))
    if smooth and abs(small - slope) > 0.2 * max(abs(small), abs(slope)):
        raise ModelError(
            f"{name} has a gradient of its input embeddings that is not its slope ({slope:.3g} where a "
            f"small step gives {small:.3g}): some layer lets no gradient through"
        )
