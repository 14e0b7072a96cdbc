"""Plans of calls: what they repeat, and which calls have none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from nabla_fast.plans import plan
from nabla_fast.plans.plan import Plans
from nabla_fast.plans.recording import Recorder, recorder, step


@pytest.fixture(autouse=True)
def plans_are_used_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plan, "CALLS_BEFORE", 0)
    with plan.enabled(True):
        yield


class Counted:
    """A call's launcher, which counts how often it runs."""

    def __init__(self, function: Callable[..., object]):
        self.function, self.runs = function, 0
        self.plans = Plans()

    def __call__(self, *tensors: Tensor) -> object:
        def compute() -> object:
            self.runs += 1
            return self.function(*tensors)

        return self.plans.run(compute, list(tensors))


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape)


def test_a_plan_repeats_steps_results_and_views():
    def launcher(a: Tensor, b: Tensor) -> list[Tensor]:
        whole = torch.empty(4, 6)
        left, right = whole.split([2, 4], dim=1)
        step(torch.mm, a, b[:, :2], out=left)
        step(torch.add, a[:, :4], 1.0, out=right)
        return [whole, whole[1:3].T]

    call = Counted(launcher)
    for _ in range(4):
        a, b = numbers(4, 4), numbers(4, 3)
        whole, part = call(a, b)
        wanted = torch.cat([a @ b[:, :2], a + 1.0], dim=1)
        torch.testing.assert_close(whole, wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(part, whole[1:3].T)
        assert part.data_ptr() == whole[1:].data_ptr()
    assert call.runs == 1


def test_what_torch_computes_is_seen():
    def launcher(a: Tensor) -> tuple[Tensor, Tensor]:
        doubled = (a * 2).t().contiguous()
        doubled += 1
        return doubled, doubled.view(torch.int32)[0]

    call = Counted(launcher)
    for _ in range(3):
        a = numbers(3, 5)
        doubled, bits = call(a)
        assert torch.equal(doubled, (2 * a).T + 1)
        assert torch.equal(bits, doubled[0].view(torch.int32))
    assert call.runs == 1


def test_arguments_that_begin_inside_their_storage():
    call = Counted(lambda a: [(a[1:] + 0.5)])
    for start in (0, 4, 8):  # a multiple of 16 bytes, so that the plan is one
        a = numbers(20)[start : start + 8]
        assert torch.equal(call(a)[0], a[1:] + 0.5)
    assert call.runs == 1


def test_what_is_changed_in_place_is_changed():
    def launcher(a: Tensor, b: Tensor) -> Tensor:
        step(torch.add, a, b, out=a)
        return a + 0

    call = Counted(launcher)
    for _ in range(3):
        a, b = numbers(5), numbers(5)
        wanted = a + b
        assert torch.equal(call(a, b), wanted)
        assert torch.equal(a, wanted)
    assert call.runs == 1


def test_addresses_that_launchers_may_look_at_have_plans_of_their_own():
    call = Counted(lambda a: a + a.data_ptr() % 16)
    memory = numbers(64)
    for start in (0, 1, 2, 4, 5, 1, 0):
        a = memory[start : start + 8]
        assert torch.equal(call(a), a + 4 * (start % 4))
    assert call.runs == 3


def test_other_configurations_have_plans_of_their_own():
    chosen = 1.0
    call = Counted(lambda a: a * chosen)
    a = numbers(3)
    call(a)
    with plan.other_configuration():
        chosen = 2.0
        assert torch.equal(call(a), a * 2)
    chosen = 3.0
    assert torch.equal(call(a), a)  # the former plan
    assert call.runs == 2


CONSTANT = torch.ones(3)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda a: a * float(a.sum()), "_local_scalar_dense"),
        (lambda a: a + CONSTANT, "neither an argument nor made"),
        (lambda a: a.nonzero().flatten() + 0.0, "depends on data"),
        (lambda a: a * len(a.nonzero()), "depends on data"),
        (lambda a: torch._neg_view(a + 1), "a sign is not in memory"),
        (lambda a: torch._neg_view(a) + 1, "a sign is not in memory"),
        (lambda a: torch.complex(a, a).conj().resolve_conj(), "a sign is not in memory"),
        (lambda a: torch.nn.Parameter(a + 1, requires_grad=False), "not made by the call"),
        (lambda a: torch.stack(torch.topk(a, 2).values.tensor_split(2)), "several tensors"),
        (lambda a: a, "not made by the call"),
        (lambda a: a[1:], "not made by the call"),
        (lambda a: (a + 1).view(torch.int16), "wider or narrower"),
        (lambda a: sum((a + n for n in range(600)), a), "many steps"),
    ],
)
def test_calls_without_a_plan(function: Callable[[Tensor], Tensor], reason: str):
    call = Counted(function)
    for _ in range(6):
        a = numbers(3)
        assert torch.equal(call(a), function(a))
    assert call.runs == 6
    assert reason in call.plans.reason


def test_arguments_that_are_one_tensor_have_a_plan_of_their_own():
    call = Counted(lambda a, b: a + b if a.data_ptr() != b.data_ptr() else a * 10)
    a, b = numbers(4), numbers(4)
    for _ in range(2):
        assert torch.equal(call(a, b), a + b)
        assert torch.equal(call(b, b), b * 10)
    assert call.runs == 2


def test_arguments_may_be_parts_of_one_memory():
    call = Counted(lambda q, k, v: q + 2 * k + 3 * v)
    for _ in range(3):
        q, k, v = numbers(5, 12).split([4, 4, 4], dim=1)
        torch.testing.assert_close(call(q, k, v), q + 2 * k + 3 * v, rtol=1e-6, atol=1e-6)
    assert call.runs == 1
    inside = Counted(lambda q, k, v: q[1:] + k[1:] * v[1:])  # each lies in several of them
    for _ in range(3):
        q, k, v = numbers(5, 12).split([4, 4, 4], dim=1)
        assert torch.equal(inside(q, k, v), q[1:] + k[1:] * v[1:])
    assert inside.runs == 1


def test_memory_made_a_piece_at_a_time_is_not_held():
    def launcher(a: Tensor) -> Tensor:
        for _ in range(4):
            torch.empty(10_000_000)
        return a + 1

    call = Counted(launcher)
    for _ in range(2):
        call(numbers(2))
    assert call.runs == 2
    assert "much memory" in call.plans.reason


def test_an_error_leaves_no_plan_and_no_recorder():
    def launcher(a: Tensor) -> Tensor:
        raise ValueError("broken")

    call = Counted(launcher)
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            call(numbers(2))
    assert recorder() is None
    assert torch._C._len_torch_dispatch_stack() == 0


def test_an_error_of_a_step_comes_from_the_plan_too():
    def expect_positive(a: Tensor) -> None:
        if not bool((a > 0).all()):
            raise ValueError("not positive")

    def launcher(a: Tensor) -> Tensor:
        step(expect_positive, a)
        return a + 1

    call = Counted(launcher)
    call(torch.ones(3))
    with pytest.raises(ValueError, match="not positive"):
        call(-torch.ones(3))
    assert torch.equal(call(torch.ones(3)), torch.full((3,), 2.0))
    assert call.runs == 1


def test_a_plan_enters_what_its_steps_need_and_leaves_it():
    entered: list[str] = []

    class context:
        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *error: object) -> None:
            entered.append("out")

    def launcher(a: Tensor) -> Tensor:
        if recorder() is not None:
            recorder().within(context)
        return a + 1

    call = Counted(launcher)
    call(numbers(2))
    call(numbers(2))
    assert entered == ["in", "out"]


def test_calls_that_come_seldom_are_not_recorded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "CALLS_BEFORE", 2)
    recorded: list[bool] = []

    def launcher(a: Tensor) -> Tensor:
        recorded.append(recorder() is not None)
        return a + 1

    call = Counted(launcher)
    for _ in range(5):
        call(numbers(2))
    assert recorded == [False, False, True]


def test_a_recording_is_one_threads():
    seen: list[object] = []
    with Recorder([]):
        thread = threading.Thread(target=lambda: seen.append(recorder()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_plans_of_many_alignments_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "_MOST", 2)
    call = Counted(lambda a: a + 1)
    memory = numbers(16)
    for start in (0, 1, 2, 3, 0):
        assert torch.equal(call(memory[start:]), memory[start:] + 1)
    assert len(call.plans._plans) <= 2


def test_tensors_of_no_elements():
    def launcher(a: Tensor, b: Tensor) -> list[Tensor]:
        out, nothing = torch.empty(3), torch.empty(0, 4)
        step(lambda one, two, out: out.copy_(one.sum() + torch.ones(3)), a, b, out)
        return [out, nothing]

    call = Counted(launcher)
    for number in range(3):
        out, nothing = call(torch.full((2,), float(number)), torch.empty(5, 0))
        assert torch.equal(out, torch.full((3,), 2.0 * number + 1))
        assert nothing.shape == (0, 4)
    assert call.runs == 1


def test_launches_get_addresses_and_are_the_launchers_where_a_guard_says_so():
    launched: list[tuple] = []
    current = 0

    def current_device() -> int:
        return current

    def launcher(a: Tensor) -> Tensor:
        scratch, out = torch.empty(5), torch.empty(3)
        args = (a, (scratch[1:], 7), None, 0.5, out)
        recorder().launch(
            lambda *all: launched.append(all),
            (1, 2),
            lambda d: 40 + d,
            0,
            ("m",),
            args,
            [(current_device, 0)],
        )
        return out

    call = Counted(lambda a: launcher(a) if recorder() is not None else a)
    call(numbers(4))
    for _ in range(2):
        a = numbers(4)
        out = call(a)
        *before, address, (inside, seven), none, half, result = launched.pop()
        assert before == [1, 2, 40, "m"]
        assert (address, seven, none, half, result) == (a.data_ptr(), 7, None, 0.5, out.data_ptr())
        assert inside % 16 == 4
    current = 1
    a = numbers(4)
    assert call(a) is a
    assert not launched


def test_random_numbers_are_drawn_anew():
    call = Counted(lambda a: torch.rand(3, generator=torch.Generator().manual_seed(0)) + a)
    for _ in range(4):
        assert torch.equal(call(torch.zeros(3)), call(torch.zeros(3)))
    assert "Generator" in call.plans.reason


def test_containers_that_steps_take():
    def launcher(a: Tensor) -> Tensor:
        out = torch.empty(3)
        step(
            lambda given: torch.add(given["a"], given["more"][0], out=given["out"]),
            {"a": a, "more": (a,), "out": out},
        )
        return out

    call = Counted(launcher)
    for _ in range(3):
        a = numbers(3)
        assert torch.equal(call(a), a + a)
    assert call.runs == 1

    def of_a_set(a: Tensor) -> Tensor:
        out = torch.empty(3)
        step(lambda given: next(iter(given)).fill_(1.0), {out})
        return out + a

    other = Counted(of_a_set)
    for _ in range(2):
        a = numbers(3)
        assert torch.equal(other(a), a + 1)
    assert "nothing is known of a set" in other.plans.reason


def test_an_op_within_a_call_is_one_step():
    library = torch.library.Library("nabla_fast_test", "FRAGMENT")
    library.define("bump(Tensor(a!) x) -> ()")
    library.impl("bump", lambda x: step(Tensor.add_, x, 1), "CompositeExplicitAutograd")

    def launcher(a: Tensor) -> Tensor:
        out = a * 1
        torch.ops.nabla_fast_test.bump(out)
        return out

    call = Counted(launcher)
    for _ in range(4):
        a = numbers(3)
        assert torch.equal(call(a), a + 1)


def test_inference_mode_shows_whole_functions():
    def launcher(a: Tensor) -> Tensor:
        return (a.t().contiguous() * 2).long().reshape(6) + a.reshape(6).long()

    call = Counted(launcher)
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            a = 10 * numbers(2, 3)
            assert torch.equal(call(a), launcher(a))
    assert call.runs == 1


def test_blocks_of_other_configurations_may_overlap():
    first, second = plan.other_configuration(), plan.other_configuration()
    assert plan._configuration == ()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert len(plan._configuration) == 1
    second.__exit__(None, None, None)
    assert plan._configuration == ()
