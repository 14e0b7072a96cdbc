"""Cases of the descents: K steps on rows whose hard token leads by enough that none moves.

Versions change the parameter and Adam's moments in place, as the ops do; the case puts them back between
runs, untimed.
"""

from __future__ import annotations

import torch
from torch import Tensor

import nabla_fast.ops as ops
from nabla_fast.bench.kernel_cases.case import (
    Case,
    Outputs,
    Versions,
    name_of,
    normal,
    normal_table,
    terms_of,
)
from nabla_fast.bench.kernel_cases.in_place import (
    Products,
    adam_step_,
    products_alone,
    row_blocks,
    softmax_gradient_,
)

_LR = 0.01
_CHECKED_STEPS = 4  # of the latents, in float64


def dto_descent(n: int, v: int, steps: int, device: torch.device) -> Case:
    """On logits [N, V]."""

    def prepare() -> Versions:
        start = normal(n, v, dtype=torch.float32, device=device, scale=3.0)
        grad = normal(n, v, dtype=torch.float32, device=device)
        top = start.max(dim=-1, keepdim=True)
        # A row's logits move by the sum of the rates at most, 0.12.
        start.scatter_(1, top.indices, top.values + 1.0)
        return _logits_versions(start, grad, steps)

    return Case(
        "dto_descent",
        f"N={n} V={v} K={steps}",
        "float32",
        12 * n * v,
        20 * n * v * steps,
        prepare,
    )


def _logits_versions(start: Tensor, grad: Tensor, steps: int) -> Versions:
    schedule = _schedule(steps, start.device)
    rates = schedule.tolist()
    parameter = _Parameter(start)

    def ours() -> Outputs:
        ops.dto_descent(parameter.value, grad, parameter.state, schedule)
        return [parameter.value]

    def naive() -> Outputs:
        z, first, second = parameter.tensors
        for step, rate in enumerate(rates, start=1):
            p = torch.softmax(z, dim=-1)
            centred = grad - grad.gather(1, z.argmax(dim=-1, keepdim=True))
            dz = p * (centred - (p * centred).sum(dim=-1, keepdim=True))
            z, first, second = _adam_step(z, first, second, dz, step, rate)
        return [parameter.set(z, first, second)]

    blocks = list(row_blocks(*start.shape, start.device))
    p, centred, work = torch.empty(3, blocks[0].stop, start.shape[1], device=start.device)

    def eager() -> Outputs:
        for rows in blocks:
            count = rows.stop - rows.start
            block = [tensor[rows] for tensor in parameter.tensors]
            _descend_(*block, grad[rows], rates, p[:count], centred[:count], work[:count])
        return [parameter.value]

    def in_float64() -> Outputs:
        z = start.double()
        state = ops.AdamState.zeros(z)
        ops.dto_descent(z, grad.double(), state, schedule)
        _expect_all_steps(state, steps)
        return [z]

    return Versions(ours, naive, eager, in_float64, parameter.reset, in_place=True)


def _descend_(
    z: Tensor,
    first: Tensor,
    second: Tensor,
    grad: Tensor,
    rates: list[float],
    p: Tensor,
    centred: Tensor,
    work: Tensor,
) -> None:
    token = z.max(dim=-1, keepdim=True).indices
    torch.sub(grad, grad.gather(1, token), out=centred)
    for step, rate in enumerate(rates, start=1):
        torch.softmax(z, dim=-1, out=p)
        mean = torch.mul(p, centred, out=work).sum(dim=-1, keepdim=True)
        adam_step_(z, torch.sub(centred, mean, out=work).mul_(p), (first, second), step, rate)
        if not torch.equal(z.max(dim=-1, keepdim=True).indices, token):
            return


def dto_descent_latents(
    n: int, v: int, h: int, steps: int, dtype: torch.dtype, device: torch.device
) -> Case:
    """On hidden states [N, H] under a head [V, H]."""

    def prepare() -> Versions:
        start = normal(n, h, dtype=torch.float32, device=device, scale=3.0)
        head = normal_table(v, h, dtype, device)
        grad = normal(n, v, dtype=torch.float32, device=device)
        # Every coordinate moves by up to 0.12, and the hard token's logit by the sum of |w| times that:
        # 2.6 at H = 896. It leads by twice as much.
        row = head[(start @ head.T.to(start.dtype)).argmax(dim=-1)].float()
        start += 0.25 * row.abs().sum(dim=-1, keepdim=True) * row / row.square().sum(dim=-1, keepdim=True)
        versions = _latents_versions(start, head, grad, steps)
        few = min(steps, _CHECKED_STEPS)
        if few == steps:
            return versions
        checked = _latents_versions(start, head, grad, few)
        return Versions(
            versions.ours,
            versions.naive,
            versions.eager,
            versions.in_float64,
            versions.reset,
            in_place=True,
            products=versions.products,
            checked=checked,
            checked_as=f"K={few}",
        )

    return Case(
        "dto_descent_latents",
        f"N={n} V={v} H={h} K={steps}",
        name_of(dtype),
        steps * v * h * dtype.itemsize,
        4 * n * v * h * steps,
        prepare,
        terms_of(dtype),
    )


def _latents_versions(start: Tensor, head: Tensor, grad: Tensor, steps: int) -> Versions:
    schedule = _schedule(steps, start.device)
    rates = schedule.tolist()
    parameter = _Parameter(start)

    def ours() -> Outputs:
        ops.dto_descent_latents(parameter.value, head, grad, parameter.state, schedule)
        return [parameter.value]

    def naive() -> Outputs:
        (h, first, second), wide = parameter.tensors, head.float()
        for step, rate in enumerate(rates, start=1):
            z = h @ wide.T
            p = torch.softmax(z, dim=-1)
            centred = grad - grad.gather(1, z.argmax(dim=-1, keepdim=True))
            dh = (p * (centred - (p * centred).sum(dim=-1, keepdim=True))) @ wide
            h, first, second = _adam_step(h, first, second, dh, step, rate)
        return [parameter.set(h, first, second)]

    products = Products(len(start), head)
    z, p, centred, work = torch.empty(4, *grad.shape, device=start.device)
    dh = torch.empty_like(start)

    def eager() -> Outputs:
        h, *moments = parameter.tensors
        token = products(h, head, z).max(dim=-1, keepdim=True).indices
        torch.sub(grad, grad.gather(1, token), out=centred)
        for step, rate in enumerate(rates, start=1):
            torch.softmax(z, dim=-1, out=p)
            dz = softmax_gradient_(p, z.copy_(centred), work)
            adam_step_(h, products.mix(dz, head, dh), moments, step, rate)
            # The logits of one step decide whether the one before it moved the token.
            if not torch.equal(products(h, head, z).max(dim=-1, keepdim=True).indices, token):
                break
        return [h]

    def in_float64() -> Outputs:
        h = start.double()
        state = ops.AdamState.zeros(h)
        ops.dto_descent_latents(h, head, grad, state, schedule)
        _expect_all_steps(state, steps)
        return [h]

    return Versions(
        ours,
        naive,
        eager,
        in_float64,
        parameter.reset,
        in_place=True,
        products=products_alone(len(start), [head], [head], steps),
    )


class _Parameter:
    """Tensors that a descent changes, and their former values."""

    def __init__(self, start: Tensor):
        self._start = start
        self.value = start.clone()
        self.state = ops.AdamState.zeros(start)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The parameter and Adam's moments."""
        return self.value, self.state.exp_avg, self.state.exp_avg_sq

    def set(self, *tensors: Tensor) -> Tensor:
        """Change them as the ops do, in place; returns the parameter."""
        for tensor, new in zip(self.tensors, tensors, strict=True):
            tensor.copy_(new)
        return self.value

    def reset(self) -> None:
        self.value.copy_(self._start)
        for tensor in self.state:
            tensor.zero_()


def _adam_step(
    x: Tensor, first: Tensor, second: Tensor, grad: Tensor, step: int, rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam as it is written down."""
    first = 0.9 * first + 0.1 * grad
    second = 0.999 * second + 0.001 * grad**2
    mean, variance = first / (1 - 0.9**step), second / (1 - 0.999**step)
    return x - rate * mean / (variance.sqrt() + 1e-8), first, second


def _schedule(steps: int, device: torch.device) -> Tensor:
    return ops.cosine_schedule(steps, _LR, min_ratio=0.1).to(device)


def _expect_all_steps(state: ops.AdamState, steps: int) -> None:
    """A version that stops early would do less work than one that does not."""
    if not bool((state.step == steps).all()):
        raise RuntimeError(
            f"a hard token moved before step {steps}: the case does not compare like with like"
        )
