"""Tests that every backend of every op passes, and those of an op as a torch.library op.

An op's test files say which op and backend they are about, and pytest finds the tests here:

    class TestContract(BackendContract):
        tested, backend = TOKEN_STATS, "cpu"

Tests that say nothing about an op or a backend are missing from such a class.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.autograd import forward_ad

from nabla_fast.errors import BackendUnavailable, InputError
from nabla_fast.ops import backend_status
from nabla_fast.ops.registry import Op
from nabla_fast.ops.registry.schema import tensors_in
from nabla_fast.plans import plan

from .bad_rows import BAD_ROWS, REASONS, hidden_with, logits_with, rows_refused
from .harness import (
    DEVICES,
    Arguments,
    cases_for,
    check,
    device_parameter,
    drawn_on,
    flatten,
    interpreted,
    library_op,
    map_tensors,
    rows_of,
    run,
    run_by_plan,
    takes,
    to_device,
)
from .inputs import Case, Draw


@dataclass(frozen=True)
class OpUnderTest:
    """An op, its kinds of input, and what the contract must know of it.

    Args:
        checked, compiled: names of the cases for opcheck and torch.compile, if not the first alone.
        differentiable: the arguments that get a gradient.
        rows_alone: whether rows do not depend on rows beside them, nor on threads, to the bit.
        on_logits: calls of the op on logits [N, V], each of which names bad rows.
        on_hidden: calls of the op on hidden states [N, H] and a head [V, H], the same.
    """

    op: Op
    cases: Sequence[Case]
    checked: Sequence[str] = ()
    compiled: Sequence[str] = ()
    differentiable: Sequence[str] = ()
    rows_alone: bool = False
    on_logits: Sequence[Callable[[Tensor], Any]] = field(default=())
    on_hidden: Sequence[Callable[[Tensor, Tensor], Any]] = field(default=())

    def case(self, name: str) -> Case:
        """The case of this name."""
        return next(case for case in self.cases if case.name == name)

    def chosen(self, names: Sequence[str]) -> list[Case]:
        """The cases of these names, or the first if there are none."""
        return [self.case(name) for name in names] or [self.cases[0]]


def only_if(applies: Callable[[Any], Any]) -> Callable[[Callable], Callable]:
    """The test is there only in classes of which ``applies`` is true."""

    def mark(test: Callable) -> Callable:
        test.applies = applies
        return test

    return mark


class Selected:
    """A class of tests without those that do not apply to it."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if not cls.__name__.startswith("Test"):
            return
        for name in dir(cls):
            applies = getattr(getattr(cls, name), "applies", None)
            if applies and not applies(cls):
                setattr(cls, name, None)


def by_name(cases: Sequence[Case], slow: bool = False) -> list[Any]:
    """Parameters of these cases; with ``slow``, slow ones are marked so."""
    return [
        pytest.param(case, id=case.name, marks=pytest.mark.slow if slow and case.slow else ())
        for case in cases
    ]


class OnBackend(Selected):
    """Tests on one backend, skipped where it is missing."""

    backend: ClassVar[str]

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        backend = getattr(cls, "backend", "cuda")  # whose tests have a fixture that builds it
        if backend != "cuda" and (why := backend_status()[backend]):
            cls.pytestmark = [*getattr(cls, "pytestmark", ()), pytest.mark.skip(f"{backend}: {why}")]


class BackendContract(OnBackend):
    """One op on one backend."""

    tested: ClassVar[OpUnderTest]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "device" in metafunc.fixturenames:
            metafunc.parametrize("device", [device_parameter(device) for device in DEVICES])
        if "case" in metafunc.fixturenames:
            cases = cases_for(self.backend, self.tested.cases)
            metafunc.parametrize("case", by_name(cases, interpreted(self.backend)))

    def repeated(self) -> list[Case]:
        """The cases for tests that run each one many times: in an interpreter, the first alone."""
        cases = cases_for(self.backend, self.tested.cases)
        return cases[: 1 if interpreted(self.backend) else None]

    def test_against_float64(self, device: str, case: Case, draw: Draw):
        try:
            check(self.tested.op, case, draw, device, partial(run, self.tested.op, self.backend))
        except BackendUnavailable as error:
            pytest.skip(str(error))

    def test_takes_something(self, draw: Draw):
        # Otherwise every run above was skipped.
        assert any(
            takes(self.tested.op, self.backend, to_device(device, case.make(draw)))
            for device in DEVICES
            for case in cases_for(self.backend, self.tested.cases)
        )

    @only_if(lambda cls: cls.backend != "torch")
    def test_runs_repeat_bitwise(self, device: str, draw: Draw):
        for case in self.repeated():
            arguments = to_device(device, case.make(draw))
            try:
                first, second = (run(self.tested.op, self.backend, arguments) for _ in range(2))
            except BackendUnavailable:
                continue
            for name, value in first.items():
                assert torch.equal(value, second[name]), f"{case.name}: {name} differs between two runs"

    @only_if(lambda cls: cls.backend == "triton")
    def test_plans_repeat_the_launcher(self, device: str, draw: Draw):
        for case in self.repeated():
            self._same_by_plan(device, case, draw)

    @pytest.mark.slow
    @only_if(lambda cls: cls.backend == "triton")
    def test_plans_repeat_the_launcher_in_every_case(self, device: str, case: Case, draw: Draw):
        if not self._same_by_plan(device, case, draw):
            pytest.skip("not for this backend")

    def _same_by_plan(self, device: str, case: Case, draw: Draw) -> bool:
        """Whether the backend takes the case; its results by a plan are those of its launcher then."""
        calls = [to_device(device, case.make(draw)) for _ in range(3)]
        if not takes(self.tested.op, self.backend, calls[-1]):
            return False
        by_plan = run_by_plan(self.tested.op, self.backend, calls)
        with plan.enabled(False):
            wanted = run(self.tested.op, self.backend, calls[-1])
        for name, value in by_plan.items():
            assert torch.equal(value, wanted[name]), f"{case.name}: {name} is another one"
        return True

    @only_if(lambda cls: cls.tested.rows_alone and cls.backend != "torch")
    def test_rows_do_not_depend_on_batch_or_threads(
        self, device: str, draw: Draw, threads: Callable[[int], None]
    ):
        for case in self.repeated():
            arguments = to_device(device, case.make(draw))
            if arguments.get("group") is not None:
                continue
            threads(1)
            try:
                together = run(self.tested.op, self.backend, arguments)
            except BackendUnavailable:
                continue
            threads(4)
            self._same_alone(case.name, arguments, together)

    def _same_alone(self, name: str, arguments: Arguments, together: dict[str, Tensor]) -> None:
        for row in range(len(next(iter(together.values())))):
            alone = run(self.tested.op, self.backend, rows_of(arguments, slice(row, row + 1)))
            for key, value in alone.items():
                equal = torch.equal(value[0], together[key][row])
                assert equal, f"{name}: row {row} of {key} is another one by itself"

    def _examples(self, test: Callable[[dict[int, str]], None]) -> None:
        """``test`` on draws of bad rows, each of which has several kinds."""
        count = 5 if interpreted(self.backend) else 25
        settings(deadline=None, max_examples=count)(given(bad=BAD_ROWS)(test))()

    @only_if(lambda cls: cls.tested.on_logits)
    def test_bad_rows_of_logits_are_named(self, device: str):
        def named(bad: dict[int, str]) -> None:
            logits = logits_with(bad).to(device)
            for call in self.tested.on_logits:
                refused = rows_refused(self.tested.op, self.backend, partial(call, logits.clone()))
                assert refused == sorted(bad.items())

        with drawn_on(device):
            self._examples(named)

    @only_if(lambda cls: cls.tested.on_hidden)
    def test_bad_rows_of_hidden_states_are_named(self, device: str):
        def named(bad: dict[int, str]) -> None:
            hidden, head = (tensor.to(device) for tensor in hidden_with(bad))
            for call in self.tested.on_hidden:
                refused = rows_refused(self.tested.op, self.backend, partial(call, hidden.clone(), head))
                assert refused == sorted(bad.items())

        with drawn_on(device):
            self._examples(named)

    @only_if(lambda cls: cls.tested.on_logits)
    def test_one_bad_token_far_into_a_long_row(self, device: str):
        # The first vector and its end, far into the row, the last token: of several tiles anyway.
        last = 9000 if interpreted(self.backend) else 33_336
        for reason in ("has a NaN logit", "has a +inf logit"):
            for token in (0, last) if interpreted(self.backend) else (0, 15, 8191, last):
                logits = torch.full((1, last + 1), -torch.inf, device=device)
                logits[0, 20] = 1.0
                logits[0, token] = REASONS[reason]
                call = partial(self.tested.on_logits[0], logits)
                with drawn_on(device):
                    assert rows_refused(self.tested.op, self.backend, call) == [(0, reason)]


class EveryInstructionSet:
    """The op's C++ kernel on every kind of input with every instruction set."""

    tested: ClassVar[OpUnderTest]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", by_name(self.tested.cases))

    def test_every_instruction_set(self, isa: str, case: Case, draw: Draw):
        if not takes(self.tested.op, "cpu", case.make(draw)):
            pytest.skip("not for this backend")
        check(self.tested.op, case, draw, "cpu", partial(run, self.tested.op, "cpu"))


class LibraryContract:
    """One op as a torch.library op: opcheck, torch.compile to the bit, and torch's other modes."""

    tested: ClassVar[OpUnderTest]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            names = self.tested.checked if "opcheck" in metafunc.function.__name__ else self.tested.compiled
            metafunc.parametrize("case", by_name(self.tested.chosen(names)))

    # Of opcheck itself in torch 2.14.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    def test_opcheck(self, case: Case, draw: Draw):
        arguments = self._differentiable(case.make(draw))
        flat = flatten(self.tested.op, arguments)
        torch.library.opcheck(library_op(self.tested.op), tuple(flat.values()))

    @pytest.mark.usefixtures("fresh_compiler")
    def test_compiled_equals_eager(self, case: Case, draw: Draw):
        arguments = case.make(draw)
        compiled = torch.compile(
            lambda **kwargs: self.tested.op(**kwargs), fullgraph=True, backend="aot_eager"
        )
        eager = self._outcome(self.tested.op, arguments)
        for ours, wanted in zip(self._outcome(compiled, arguments), eager, strict=True):
            assert ours.dtype == wanted.dtype
            assert torch.equal(ours, wanted)

    def test_no_rows_of_any_strides(self, draw: Draw):
        """A tensor without elements may have whatever strides."""

        def spread(tensor: Tensor) -> Tensor:
            return tensor if tensor.numel() else tensor.repeat_interleave(2, dim=-1)[..., ::2]

        arguments = self.tested.cases[0].make(draw)
        if "group" in arguments:
            arguments["group"] = None
        results = self.tested.op(**map_tensors(spread, rows_of(arguments, slice(0, 0))))
        assert all(tensor.numel() == 0 for tensor in tensors_in([results]))

    def test_tangents_are_refused(self, draw: Draw):
        """torch's dispatcher would take their derivatives for zero."""
        arguments = self.tested.cases[0].make(draw)
        floats: list[Tensor] = []
        map_tensors(lambda t: floats.append(t) if t.is_floating_point() else None, arguments)
        for chosen in floats:
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(chosen, torch.ones_like(chosen))
                call = map_tensors(lambda t, of=chosen, to=dual: to if t is of else t, arguments)
                with pytest.raises(InputError, match=f"^{self.tested.op.name}: .* has a tangent, and ops"):
                    self.tested.op(**call)

    def test_a_copy_is_the_op_itself(self):
        op = self.tested.op
        assert copy.deepcopy([op])[0] is pickle.loads(pickle.dumps(op)) is op

    @pytest.fixture
    def fresh_compiler(self) -> Iterator[None]:
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    def _differentiable(self, arguments: Arguments) -> Arguments:
        return arguments | {name: arguments[name].requires_grad_() for name in self.tested.differentiable}

    def _outcome(self, call: Any, arguments: Arguments) -> list[Tensor]:
        """Results, changed arguments and gradients of a call."""
        arguments = self._differentiable(map_tensors(lambda t: t.detach().clone(), arguments))
        result = call(**arguments)
        results = [result] if isinstance(result, Tensor) else list(result)
        if self.tested.differentiable:
            sum((r.float() * (i + 1)).square().sum() for i, r in enumerate(results)).backward()
            results.extend(arguments[name].grad for name in self.tested.differentiable)
        tensors: list[Tensor] = []
        map_tensors(lambda t: tensors.append(t) or t, arguments)
        return results + tensors
