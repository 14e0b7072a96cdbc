"""Every backend of every op on every kind of input."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from nabla_fast.errors import BackendUnavailable
from nabla_fast.ops.registry import Op, all_ops

from .cases import CASES, Case, Draw
from .harness import (
    DEVICES,
    ROW_INDEPENDENT,
    backend_parameters,
    cases_to_repeat,
    check,
    device_parameter,
    rows_of,
    run,
    run_parameters,
    to_device,
)


def test_every_op_has_cases():
    assert not all_ops().keys() - CASES.keys()


@pytest.mark.parametrize(("op", "backend", "device", "case"), run_parameters())
def test_backend_against_float64(op: Op, backend: str, device: str, case: Case, draw: Draw):
    try:
        check(op, case, draw, device, partial(run, op, backend))
    except BackendUnavailable as error:
        pytest.skip(str(error))


def inputs(op: Op, backend: str, draw: Draw):
    """(case's name, inputs) of the cases that this backend takes, on the devices there are."""
    for device in DEVICES:
        for case in cases_to_repeat(op, backend):
            yield case.name, to_device(device, case.make(draw))


@pytest.mark.parametrize(("op", "backend"), backend_parameters())
def test_backend_takes_something(op: Op, backend: str, draw: Draw):
    # Otherwise every run of it above was skipped.
    for _, arguments in inputs(op, backend, draw):
        try:
            run(op, backend, arguments)
        except BackendUnavailable:
            continue
        return
    pytest.fail(f"{backend} takes no case of {op.name}")


FASTER = [p for p in backend_parameters(*ROW_INDEPENDENT) if p.values[1] != "torch"]


@pytest.mark.parametrize(("op", "backend"), FASTER)
def test_rows_do_not_depend_on_batch_or_threads(op: Op, backend: str, draw: Draw):
    threads = torch.get_num_threads()
    for name, arguments in inputs(op, backend, draw):
        if arguments.get("group") is not None:
            continue
        try:
            together = run(op, backend, arguments)
        except BackendUnavailable:
            continue
        try:
            torch.set_num_threads(1 if threads > 1 else 4)
            for row in range(len(next(iter(together.values())))):
                for key, alone in run(op, backend, rows_of(arguments, slice(row, row + 1))).items():
                    equal = torch.equal(alone[0], together[key][row])
                    assert equal, f"{name}: row {row} of {key} is another one by itself"
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize(("op", "backend"), [p for p in backend_parameters() if p.values[1] != "torch"])
@pytest.mark.parametrize("device", [device_parameter(device) for device in DEVICES])
def test_runs_repeat_bitwise(op: Op, backend: str, device: str, draw: Draw):
    for case in cases_to_repeat(op, backend):
        arguments = to_device(device, case.make(draw))
        try:
            first, second = (run(op, backend, arguments) for _ in range(2))
        except BackendUnavailable:
            continue
        for name, value in first.items():
            assert torch.equal(value, second[name]), f"{case.name}: {name} differs between two runs"
