"""Runs any backend of any op against the op's body in float64.

The rule, for every result of a call and every row of it (a number a row is a row of one):

    |ours − float64| ≤ magnitude · (2 · worst body error + floor) + underflow

where | | is the largest difference in the row, *magnitude* the row's largest float64 value, and the
*worst body error* the largest |body − float64| / magnitude among the rows, of the op's plain-PyTorch
body in the dtype of the inputs. FLOORS has the floors, UNDERFLOW the last term (1.2e-35). Integers
and booleans (tokens, steps) must agree, unless float32's rounding of the inputs moves them in float64
too.

Rounding is chance, and the body may be lucky: a case that exceeds the bound is drawn again, up to
DRAWS times, the body's worst error growing with the draws, and fails if it exceeds it every time, or
once by GROSS times what the result's largest row is allowed. (A row of one or two dot products whose
terms cancel is small by chance, and as far off as its neighbours are.)
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from nabla_fast.errors import BackendUnavailable
from nabla_fast.ops import synchronize, use_backend
from nabla_fast.ops.registry import Op
from nabla_fast.ops.registry.known_calls import KnownCalls
from nabla_fast.plans import plan

from .inputs import Case, Draw

# Two roundings of a result in float32, one in half precision; in float64, where body and oracle are
# the same, what sums in another order may differ by.
FLOORS = {torch.float64: 1e-12, torch.float32: 2e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# Two float32 logarithms on end, whatever dtype the noise is returned in.
OP_FLOORS = {"gumbel_noise": 2e-7}
# Added to the floor: float64's own rounding of 1 − p, on which the entropy of a peaked row rests.
OP_ABSOLUTE = {"token_stats": 1e-15}
# Added where float32 computes: a kernel may take a probability below the smallest normal number for 0.
# A gradient's row then lacks it times G, 1/τ and a head row: 13 times a probability of 3.9e-40 where it
# was seen, in a row whose other probability is 1; up to some 2^10 times in the coldest of the cases.
UNDERFLOW = 2.0**-126 * 2**10
DRAWS, GROSS = 6, 30

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

Arguments = dict[str, Any]
Results = dict[str, Tensor]


# -- what there is to run ----------------------------------------------------------------------------


def home(backend: str) -> str:
    """The device whose tensors a backend is made for, if it is here."""
    return DEVICES[-1] if backend in ("triton", "cuda") else "cpu"


def drawn_on(device: str) -> contextlib.AbstractContextManager:
    """Inside, new tensors are on the device."""
    return contextlib.nullcontext() if device == "cpu" else torch.device(device)


def device_parameter(device: str) -> Any:
    return pytest.param(device, marks=pytest.mark.gpu if device == "cuda" else ())


def cases_for(backend: str, cases: Sequence[Case]) -> list[Case]:
    """The cases for a backend; in an interpreter none that is large, and some made smaller."""
    if not interpreted(backend):
        return list(cases)
    return [replace(case, make=case.small or case.make) for case in cases if not case.large]


def interpreted(backend: str) -> bool:
    """Whether this backend's kernels run in an interpreter, or on a host of device code."""
    if backend == "cuda":
        return not torch.cuda.is_available()
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def takes(op: Op, backend: str, arguments: Arguments) -> bool:
    """Whether the backend runs these inputs."""
    given = [(p, arguments.get(p.name, p.default)) for p in op.parameters]
    try:
        with use_backend(backend):
            op.chosen(
                *(value for p, value in given if not p.keyword),
                **{p.name: value for p, value in given if p.keyword},
            )
    except BackendUnavailable:
        return False
    return True


# -- trees of tensors --------------------------------------------------------------------------------


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with every tensor in its lists, tuples and dicts replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def copied(tensor: Tensor) -> Tensor:
    """A copy with the same strides, gaps between rows included."""
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0:
        return tensor.clone()
    memory = tensor.as_strided((extent,), (1,)).clone()
    return memory.as_strided(tensor.shape, tensor.stride())


def to_float64(value: Any) -> Any:
    """``value`` with every floating-point tensor as float64."""
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t.clone(), value)


def to_device(device: str, value: Any) -> Any:
    """``value`` on a device, with its strides."""
    return map_tensors(lambda t: copied(t) if device == "cpu" else t.to(device), value)


def flatten(op: Op, arguments: Arguments) -> dict[str, Any]:
    """The arguments of the ``torch.library`` op by the names of its schema, in order."""
    return {
        field: value
        for parameter in op.parameters
        for field, value in zip(
            parameter.fields,
            parameter.flatten(arguments.get(parameter.name, parameter.default)),
            strict=True,
        )
    }


def library_op(op: Op) -> Any:
    """``torch.ops.nabla_fast.<name>.default``."""
    return getattr(torch.ops.nabla_fast, op.name).default


def mutated(op: Op) -> list[str]:
    """The names of the flat arguments that the op changes in place."""
    return [a.name for a in library_op(op)._schema.arguments if a.alias_info and a.alias_info.is_write]


# -- running -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialized memory is NaN (or an absurd integer), so that reading it shows."""

    def fill(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            poison = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min + 1
            return tensor.fill_(poison)

        return filled

    with contextlib.ExitStack() as stack:
        for owner, names in (
            (torch, ("empty", "empty_like", "empty_strided")),
            (Tensor, ("new_empty", "new_empty_strided")),
        ):
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, fill(getattr(owner, name))))
        yield


def _results(op: Op, call: Callable[..., Any], arguments: Arguments) -> Results:
    with torch.no_grad():
        result = call(**arguments)
    if isinstance(result, Tensor):
        results = {"result": result}
    elif op.record:
        results = dict(zip(op.record._fields, result, strict=True))
    else:
        results = {f"result[{i}]": tensor for i, tensor in enumerate(result)}
    flat = flatten(op, arguments)
    return results | {name: flat[name] for name in mutated(op)}


def run(op: Op, backend: str, arguments: Arguments) -> Results:
    """A backend's results, and the arguments it changed, by name; the others stay as they were.

    Raises:
        BackendUnavailable: the backend does not take these inputs.
    """
    given = map_tensors(copied, arguments)
    with use_backend(backend), poisoned():
        results = _results(op, op, given)
        synchronize()
    kept, changed = mutated(op), flatten(op, given)
    for name, before in flatten(op, arguments).items():
        if name not in kept:
            same = _bitwise_equal(before, changed[name])
            assert same, f"{op.name} on {backend} changed its argument {name}"
    return results


def run_by_plan(op: Op, backend: str, calls: Sequence[Arguments]) -> Results:
    """Results as of :func:`run` of the last of calls that are alike, which a plan makes.

    The plan's memory is poisoned.
    """

    def poison(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.dtype == torch.uint8:  # what kernels alone see: NaN, or −1
            return tensor.fill_(255)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 1)

    make, known = torch.empty_strided, KnownCalls(op.parameters, ())
    with (
        mock.patch.object(op, "_known", known),
        mock.patch.object(torch, "empty_strided", poison),
        mock.patch.object(plan, "CALLS_BEFORE", 0),
        plan.enabled(True),
        use_backend(backend),
    ):
        for arguments in calls:
            results = _results(op, op, map_tensors(copied, arguments))
            synchronize()
    (one,) = known._known.values()
    assert one.plans, "no plans of this backend"
    assert one.plans._plans, f"no plan: {one.plans.reason}"
    return results


def run_body(op: Op, arguments: Arguments) -> Results:
    """The same by the op's body in plain PyTorch."""
    with use_backend("torch"):
        return _results(op, op.body, map_tensors(torch.clone, arguments))


def _bitwise_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list):
        return all(map(_bitwise_equal, a, b))
    return a == b


# -- the rule ----------------------------------------------------------------------------------------


def check(
    op: Op,
    case: Case,
    draw: Draw,
    device: str,
    compute: Callable[[Arguments], Results],
    peer: Callable[[Arguments], Results] | None = None,
) -> None:
    """Hold ``compute`` to the rule: results of the op by name, as :func:`run` returns them.

    Args:
        op, case, draw, device: what is computed.
        compute: what is held to the rule.
        peer: plain PyTorch in the dtypes of the inputs where the body computes in wider ones: its errors
            are allowed too.
    Raises:
        BackendUnavailable: ``compute`` does not take these inputs.
    """
    worst: dict[str, float] = {}
    for _ in range(DRAWS):
        arguments = to_device(device, case.make(draw))
        excess, gross, message = compare(op, compute(arguments), arguments, worst, peer)
        if excess <= 1:
            return
        if gross > GROSS:
            break
    pytest.fail(f"{op.name}, {case.name}: {message}")


def compare(
    op: Op,
    ours: Results,
    arguments: Arguments,
    worst: dict[str, float],
    peer: Callable[[Arguments], Results] | None = None,
) -> tuple[float, float, str]:
    """How many times the largest error is the allowed one, of its row and of the largest row; where it is.

    Args:
        worst: the body's, and its peer's, worst relative error so far by result, brought up to date.
    """
    exact_arguments = to_float64(arguments)
    body, exact = run_body(op, arguments), run_body(op, exact_arguments)
    of_peer = peer(arguments) if peer else body
    assert ours.keys() == body.keys()
    for name, value in body.items():
        got = (ours[name].dtype, ours[name].shape)
        assert got == (value.dtype, value.shape), (
            f"{op.name}: {name} is {got}, not {value.dtype} {value.shape}"
        )

    differs, body_differs = _choices_differ(ours, exact), _choices_differ(body, exact)
    # Where rounding decides on a token or a step, either is right, and the row's numbers follow it.
    decided = ~_undecided(op, exact_arguments, exact) if differs.any() else ~differs
    if (differs & decided).any():
        return math.inf, math.inf, f"another token or step than float64 in rows {_rows(differs & decided)}"

    excess, gross, message = 0.0, 0.0, ""
    for name, value in exact.items():
        if not value.is_floating_point():
            continue
        magnitude = _row_maximum(torch.where(value.isfinite(), value.abs(), 0.0))
        same = ~_spread(body_differs, value)
        body_error = _row_error(body[name], value)[same] / magnitude[same]
        if peer:
            peer_error = _row_error(of_peer[name], value) / magnitude
            body_error = torch.cat([body_error, peer_error])
        worst[name] = max([worst.get(name, 0.0), *body_error[body_error.isfinite()].tolist()])
        floor = OP_FLOORS.get(op.name, FLOORS[ours[name].dtype])
        underflow = 0.0 if ours[name].dtype == torch.float64 else UNDERFLOW
        allowed = magnitude * (2 * worst[name] + floor) + OP_ABSOLUTE.get(op.name, 0.0) + underflow
        error = torch.where(~_spread(~decided, value), _row_error(ours[name], value), 0.0)
        excesses = torch.where(error > allowed, error / allowed, 0.0)
        if len(excesses) and excesses.max() > excess:
            row = int(excesses.argmax())
            excess = float(excesses.max())
            message = f"row {row} of {name} is off by {error[row]:.3g} > {allowed[row]:.3g}"
        if len(excesses):
            gross = max(gross, float((error / allowed.max()).nan_to_num(nan=0.0).max()))
    return excess, gross, message


def _choices_differ(results: Results, exact: Results) -> Tensor:
    """[N] rows in which an integer or boolean result is another one."""
    pairs = [(results[name], value) for name, value in exact.items() if not value.is_floating_point()]
    rows = len(pairs[0][0] if pairs else next(iter(exact.values())))
    differs = torch.zeros(rows, dtype=torch.bool)
    for value, wanted in pairs:
        differs |= (value != wanted).cpu().view(rows, -1).any(dim=1)
    return differs


def _spread(mask: Tensor, value: Tensor) -> Tensor:
    """A mask of rows for a result that has as many; for another one, all of its rows or none."""
    return mask if len(mask) == len(value) else mask.any().expand(len(value))


def _undecided(op: Op, exact_arguments: Arguments, exact: Results) -> Tensor:
    """[N] rows whose tokens or steps change in float64 when inputs move by float32's rounding."""
    generator = torch.Generator().manual_seed(0)

    def nudge(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        return tensor * (1 + 1e-6 * noise) if tensor.is_floating_point() else tensor

    changed = [_choices_differ(run_body(op, map_tensors(nudge, exact_arguments)), exact) for _ in range(8)]
    return torch.stack(changed).any(dim=0)


def _rows(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def _row_error(value: Tensor, exact: Tensor) -> Tensor:
    """[N] largest difference in each row; infinities must agree, and a NaN is an infinite difference."""
    value = value.double()
    difference = torch.where(value == exact, 0.0, (value - exact).abs())
    return _row_maximum(difference.nan_to_num(nan=torch.inf, posinf=torch.inf))


def _row_maximum(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(tensor.shape[0], -1)
    return flat.amax(dim=1).cpu() if flat.numel() else torch.zeros(tensor.shape[0])


# -- rows by themselves ------------------------------------------------------------------------------

_SHARED = ("head", "tables", "token_maps", "group", "bias")


def rows_of(arguments: Arguments, rows: slice) -> Arguments:
    """The same call on some of the rows."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor[rows]

    return {
        name: value
        if name in _SHARED or (name == "schedule" and value.ndim == 1)
        else map_tensors(cut, value)
        for name, value in arguments.items()
    }
