"""Random calls of every op, valid and not: each ends in a result or in an error of ours.

    python -m tests.ops.fuzz 100000 --seed 0

Arguments are drawn from the ops' own tables of rules, so that an argument cannot be forgotten, and about
two calls of three are spoiled in one or two places. Every call runs on each backend; they must agree on
whether it is refused, and on which rows are bad.
"""

from __future__ import annotations

import argparse
import inspect
import math
import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nabla_fast.errors import InputError, RowError
from nabla_fast.ops import use_backend
from nabla_fast.ops.registry import Op, all_ops
from nabla_fast.ops.registry.rules import FLOATS, TensorRule
from nabla_fast.ops.registry.schema import Parameter

BACKENDS = ("torch", "cpu")
_MOST = {"N": 5, "V": 40, "V_t": 40, "M": 3, "K": 4, "B": 3, "S": 4, "blocks": 5, "block_size": 4}


@dataclass
class Call:
    """Arguments by name, and what was spoiled of them."""

    op: Op
    arguments: dict[str, Any]
    spoiled: list[str]


# -- valid arguments -----------------------------------------------------------------------------------


class Sizes(dict):
    """Numbers for the names of axes, drawn when they are first asked for."""

    def __init__(self, rng: random.Random, tables: int):
        super().__init__()
        self._rng, self.tables = rng, tables

    def of(self, axis: str | int, place: int) -> int:
        if isinstance(axis, int):
            return axis
        key = (axis, place) if axis.endswith("_t") else axis
        if key not in self:
            least = 1 if axis in ("V", "V_t", "blocks", "block_size", "Hkv", "D", "S", "B") else 0
            self[key] = self._rng.randint(least, _MOST.get(axis, 9))
            if axis == "Hq":
                self[key] = self.of("Hkv", 0) * self._rng.randint(1, 3)
            if axis == "V_t" and not self.get("mapped"):
                self[key] = self.of("V", 0)
        return self[key]


def draw(op: Op, rng: random.Random) -> Call:
    """A valid call."""
    sizes = Sizes(rng, rng.randint(1, 2))
    sizes["mapped"] = rng.random() < 0.5
    dtype = rng.choice([torch.float32] * 3 + list(FLOATS))
    arguments: dict[str, Any] = {}
    for p in op.parameters:
        if p.default is not inspect.Parameter.empty and rng.random() < 0.4 and p.name != "token_maps":
            continue
        rule = op.table.rules.get(p.name)
        arguments[p.name] = _number(p, rng) if rule is None else _tensors(op, p, rule, sizes, dtype, rng)
    return Call(op, arguments, [])


def _tensors(op: Op, p: Parameter, rule: Any, sizes: Sizes, dtype: torch.dtype, rng: random.Random) -> Any:
    if p.types[0].endswith("?") and rng.random() < 0.3:
        return None
    if p.record:
        return p.record(
            *(_tensor(f"{p.name}.{f}", rule[f], sizes, 0, dtype, rng) for f in p.record._fields)
        )
    if p.name == "token_maps" and not sizes["mapped"]:
        return []
    if p.sequence:
        return [_tensor(p.name, rule, sizes, place, dtype, rng) for place in range(sizes.tables)]
    return _tensor(p.name, rule, sizes, 0, dtype, rng)


def _tensor(
    name: str, rule: TensorRule, sizes: Sizes, place: int, dtype: torch.dtype, rng: random.Random
) -> Tensor:
    axes = rng.choice(rule.shapes)
    shape = [sizes.of(axis, place) for axis in axes]
    if rule.dtypes == (torch.int64,):
        low, high = _range(name, sizes, place)
        return torch.randint(low, max(high, low + 1), shape)
    allowed = dtype if dtype in rule.dtypes and not rule.like else rule.dtypes[0]
    if rule.like:
        allowed = sizes.get("dtype", torch.float32)
    if name in ("z", "h", "logits"):
        sizes["dtype"] = allowed
    values = torch.randn(shape, dtype=torch.float64)
    if name in ("state.exp_avg_sq", "schedule"):
        values = values.abs() + 1e-3
    return _laid_out(values.to(allowed), rng)


def _range(name: str, sizes: Sizes, place: int) -> tuple[int, int]:
    return {
        "tokens": lambda: (0, sizes.of("V", 0)),
        "token_maps": lambda: (0, sizes.of("V_t", place)),
        "block_tables": lambda: (0, sizes.of("blocks", 0)),
        "prefix_lengths": lambda: (0, sizes.of("M", 0) * sizes.of("block_size", 0) + 1),
        "slots": lambda: (-1, sizes.of("blocks", 0) * sizes.of("block_size", 0)),
        "until": lambda: (0, sizes.of("K", 0) + 1),
        "group": lambda: (0, 1),
        "state.step": lambda: (0, 1),
    }.get(name, lambda: (-(2**40), 2**40))()


def _laid_out(tensor: Tensor, rng: random.Random) -> Tensor:
    """The same numbers in one of several layouts."""
    kind = rng.random()
    if tensor.ndim < 2 or kind < 0.6:
        return tensor
    if kind < 0.75:
        return tensor.mT.contiguous().mT
    if kind < 0.9:
        return torch.nn.functional.pad(tensor, (0, 3))[..., : tensor.shape[-1]]
    return torch._neg_view(-tensor)


def _number(p: Parameter, rng: random.Random) -> Any:
    kind = p.types[0].removesuffix("?")
    if p.name == "vocabulary":
        return rng.randint(1, 40)
    if kind == "bool":
        return rng.random() < 0.5
    if kind == "SymInt":
        return rng.choice([None, 1, 3]) if p.types[0].endswith("?") else rng.randint(0, 5)
    return rng.choice([0.5, 1.0, np.float64(0.7), 1])


# -- spoiling ------------------------------------------------------------------------------------------

_ELSE = (None, "text", 3, [1.0], np.ones((2, 2)), object(), {}, float("nan"))
_NUMBERS = ("1", None, math.nan, math.inf, -1, 0, 10**30, -(2**63), 2**63, 1e-300, 1e300, [1], True)


def spoil(call: Call, rng: random.Random) -> None:
    """Change something of one argument; what comes of it may still be valid."""
    if not call.arguments:
        return
    name = rng.choice(list(call.arguments))
    value = call.arguments[name]
    if name not in call.op.table.rules:
        changed = rng.choice([*_NUMBERS, torch.tensor(1.0), np.ones(2)])
    elif rng.random() < 0.15 or value is None:
        changed = rng.choice(_ELSE)
    elif isinstance(value, Tensor):
        changed = _spoiled(value, rng)
    elif isinstance(value, list):
        changed = _in_list(value, rng)
    elif hasattr(value, "_fields"):
        field = rng.choice(value._fields)
        changed = value._replace(**{field: _spoiled(getattr(value, field), rng)})
    else:
        changed = rng.choice(_ELSE)
    call.arguments[name] = changed
    call.spoiled.append(name)


def _in_list(value: list, rng: random.Random) -> Any:
    kind = rng.random()
    if kind < 0.2:
        return value[:-1]
    if kind < 0.3:
        return [*value, *value[:1]]
    if kind < 0.4 and value:
        return value[0]
    if kind < 0.5:
        return tuple(value)
    if not value:
        return [torch.ones(2, 2)]
    place = rng.randrange(len(value))
    return [_spoiled(part, rng) if n == place else part for n, part in enumerate(value)]


def _spoiled(tensor: Any, rng: random.Random) -> Any:
    if not isinstance(tensor, Tensor):
        return rng.choice(_ELSE)
    kinds: Sequence[Callable[[], Any]] = (
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: torch.cat([tensor, tensor[:1]]) if tensor.ndim else tensor,
        lambda: tensor[..., :-1] if tensor.ndim else tensor,
        lambda: tensor.new_zeros(0),
        lambda: tensor.to(
            rng.choice([torch.int32, torch.int64, torch.complex64, torch.bool, torch.float16])
        ),
        lambda: tensor.to(rng.choice(FLOATS)),
        lambda: tensor.to("meta"),
        lambda: tensor.to_sparse(),
        lambda: torch.nested.nested_tensor([tensor]),
        lambda: tensor[:1].expand_as(tensor) if len(tensor.shape) and len(tensor) else tensor,
        lambda: tensor.numpy(),
        lambda: tensor.tolist(),
        lambda: _with_value(tensor, rng),
        lambda: _with_value(tensor, rng),
        lambda: tensor.requires_grad_() if tensor.is_floating_point() else tensor,
        lambda: torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor,
        lambda: torch._neg_view(tensor),
    )
    try:
        return rng.choice(kinds)()
    except Exception:  # PyTorch has no such tensor
        return None


def _with_value(tensor: Tensor, rng: random.Random) -> Tensor:
    """One element is an extreme number."""
    changed = tensor.detach().clone()
    if changed.numel():
        extremes = (
            (math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0, 1e-40)
            if changed.is_floating_point()
            else (-1, -(2**63), 2**63 - 1, 10**6, 77)
        )
        with_one = changed.view(-1) if changed.is_contiguous() else changed.flatten()
        with_one[rng.randrange(changed.numel())] = rng.choice(extremes)
        changed = with_one.view(changed.shape)
    return changed


# -- the rule ------------------------------------------------------------------------------------------


def verdict(call: Call, backend: str) -> str:
    """ "computed", or the kind of error of ours.

    Raises:
        AssertionError: another error, or a message that is no line with the op's name.
    """
    arguments = {name: _copied(value) for name, value in call.arguments.items()}
    try:
        with use_backend(backend, "torch"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.op(**arguments)
    except RowError:
        return "RowError"
    except InputError as error:
        if "\n" in str(error) or not str(error).startswith(call.op.name):
            raise AssertionError(f"not a line with the op's name: {error}") from None
        return "InputError"
    except Exception:
        raise AssertionError(traceback.format_exc()) from None
    return "computed"


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.is_meta or value.layout is not torch.strided or value.is_nested:
            return value
        if value.requires_grad:
            return value.detach().clone().requires_grad_()
        return (
            torch._neg_view(_same_layout(torch._neg_view(value))) if value.is_neg() else _same_layout(value)
        )
    if isinstance(value, (list, tuple)):
        parts = [_copied(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _same_layout(tensor: Tensor) -> Tensor:
    if tensor.numel() == 0 or 0 in tensor.stride():
        return tensor.clone() if tensor.numel() == 0 else tensor
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.as_strided((extent,), (1,)).clone()
    return memory.as_strided(tensor.shape, tensor.stride())


def run(count: int, seed: int, ops: Sequence[str] = ()) -> Counter:
    """Random calls; how many had which verdict.

    Raises:
        AssertionError: a call that breaks the rule; it is described.
    """
    rng = random.Random(seed)
    chosen = [op for name, op in sorted(all_ops().items()) if not ops or name in ops]
    seen: Counter = Counter()
    for number in range(count):
        torch.manual_seed(rng.randrange(2**31))
        call = draw(rng.choice(chosen), rng)
        for _ in range(rng.choice([0, 1, 1, 1, 2, 2])):
            spoil(call, rng)
        try:
            verdicts = {backend: verdict(call, backend) for backend in BACKENDS}
            assert len(set(verdicts.values())) == 1, f"backends disagree: {verdicts}"
        except AssertionError as error:
            raise AssertionError(
                f"call {number} of seed {seed}: {call.op.name}, spoiled {call.spoiled}\n"
                f"{_described(call.arguments)}\n{error}"
            ) from None
        seen[call.op.name, verdicts["torch"]] += 1
    return seen


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.is_nested:
            return "nested"
        return f"{value.dtype} {list(value.shape)} {value.layout} {value.device}"
    if isinstance(value, dict):
        return "\n".join(f"  {name}: {_described(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(_described, value))})"
    return repr(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--op", nargs="+", default=())
    arguments = parser.parse_args()
    seen = run(arguments.count, arguments.seed, arguments.op)
    for (name, said), count in sorted(seen.items()):
        print(f"{name:32s} {said:10s} {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
