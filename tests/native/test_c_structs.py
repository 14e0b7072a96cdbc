"""The C interface from another language: structs laid out by hand, calls, and structs of other ages."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from c_structs import I32, I64, STRUCTS, AttentionArgs, Matrix, NllGradArgs, Output, StatsArgs

import nabla_fast

OK, INVALID_TAU, INVALID_POINTER, WORKSPACE_TOO_SMALL = 0, 17, 18, 23
TOO_LARGE, INVALID_SIZE, OVERLAP, INVALID_SOFTCAP = 27, 28, 29, 30


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    try:
        path = nabla_fast.get_library()
    except RuntimeError as error:
        pytest.skip(str(error))
    loaded = ctypes.CDLL(path)
    loaded.nabla_fast_nll_grad_workspace.restype = I64
    loaded.nabla_fast_status_string.restype = ctypes.c_char_p
    return loaded


def layout(kind: type[ctypes.Structure]) -> list[int]:
    return [ctypes.sizeof(kind), *(getattr(kind, name).offset for name, _ in kind._fields_)]


def test_every_struct_is_laid_out_here():
    header = (Path(nabla_fast.get_include()) / "nabla_fast.h").read_text()
    assert set(re.findall(r"^\} (nabla_fast_\w+);$", header, re.MULTILINE)) == {
        kind.__name__ for kind in STRUCTS
    }


def test_structs_are_laid_out_as_the_compiler_has_them(tmp_path: Path):
    compiler = shutil.which("cc") or pytest.skip("needs cc")
    print_all = []
    for kind in STRUCTS:
        numbers = [f"sizeof({kind.__name__})"]
        numbers += [f"offsetof({kind.__name__}, {name})" for name, _ in kind._fields_]
        print_all += [f'printf("%d ", (int){number});' for number in numbers] + ['printf("\\n");']
    source, program = tmp_path / "layout.c", tmp_path / "layout"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <nabla_fast.h>\n"
        "int main(void) {\n" + "\n".join(print_all) + "\nreturn 0;\n}\n"
    )
    flags = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{nabla_fast.get_include()}"]
    subprocess.run([compiler, *flags, source, "-o", program], check=True, timeout=120)
    printed = subprocess.run([program], capture_output=True, text=True, check=True, timeout=120).stdout
    found = [[int(number) for number in line.split()] for line in printed.splitlines()]
    assert dict(zip([kind.__name__ for kind in STRUCTS], found, strict=True)) == {
        kind.__name__: layout(kind) for kind in STRUCTS
    }


def test_a_struct_of_a_program_from_before_a_field(library: ctypes.CDLL):
    # No queries: nothing else is looked at.
    args = AttentionArgs(kv_heads=1, dim=1, block_size=1)
    for size, status in (
        (AttentionArgs.logsumexp.offset, OK),
        (ctypes.sizeof(args), OK),
        (448, INVALID_SIZE),
    ):
        args.size = size
        assert library.nabla_fast_prefix_attention(ctypes.byref(args)) == status


@pytest.mark.parametrize("softcap", [-1.0, math.nan, math.inf, -math.inf, 1e-300, 1e300])
@pytest.mark.parametrize("function", ["prefix_attention", "prefix_attention_backward"])
def test_softcaps_of_no_use_are_refused(library: ctypes.CDLL, function: str, softcap: float):
    args = AttentionArgs(size=ctypes.sizeof(AttentionArgs), kv_heads=1, dim=1, block_size=1)
    call = getattr(library, f"nabla_fast_{function}")
    args.softcap = 50.0
    assert call(ctypes.byref(args)) == OK
    args.softcap = softcap
    assert call(ctypes.byref(args)) == INVALID_SOFTCAP
    assert b"softcap" in library.nabla_fast_status_string(INVALID_SOFTCAP)


class Stats:
    """A call of nabla_fast_token_stats on two rows of four logits, 0 1 2 3 and 5 0 5 5."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        # Two more elements, so that results have somewhere to overlap.
        self.logits = (ctypes.c_float * 10)(0, 1, 2, 3, 5, 0, 5, 5)
        self.logsumexp, self.confidence, self.entropy = ((ctypes.c_float * 2)() for _ in range(3))
        self.argmax, self.row_status = (I64 * 2)(), (I32 * 2)()
        self.args = args = StatsArgs(size=ctypes.sizeof(StatsArgs), rows=2, vocab=4, tau=1.0)
        args.logits = Matrix(ctypes.addressof(self.logits), 4, 4, 0)
        for name in ("logsumexp", "confidence", "entropy", "argmax", "row_status"):
            setattr(args, name, ctypes.addressof(getattr(self, name)))

    def __call__(self, args: ctypes.Structure | None = None) -> int:
        return self.library.nabla_fast_token_stats(ctypes.byref(args or self.args))

    def clear(self) -> None:
        self.argmax[:] = -7, -7

    def check(self) -> None:
        assert list(self.argmax) == [3, 0]
        assert list(self.row_status) == [OK, OK]
        assert self.confidence[0] == pytest.approx(1 / sum(math.exp(-n) for n in range(4)), rel=1e-6)
        assert self.logsumexp[1] == pytest.approx(math.log(3 * math.exp(5) + 1), rel=1e-6)


@pytest.fixture
def stats(library: ctypes.CDLL) -> Stats:
    stats = Stats(library)
    assert stats() == OK
    stats.check()
    stats.clear()
    return stats


def test_a_later_struct_may_have_more_that_is_zero(stats: Stats):
    Later = type(
        "Later", (ctypes.Structure,), {"_fields_": [("known", StatsArgs), ("more", ctypes.c_char * 40)]}
    )
    later = Later(known=stats.args)
    later.known.size = ctypes.sizeof(Later)
    assert stats(later) == OK
    stats.check()
    stats.clear()
    # A field that this version does not know might change what the call means.
    ctypes.memset(ctypes.addressof(later) + ctypes.sizeof(Later) - 1, 1, 1)
    assert stats(later) == INVALID_SIZE
    assert list(stats.argmax) == [-7, -7]
    # Behind the size that the struct says, nobody looks.
    later.known.size = ctypes.sizeof(StatsArgs)
    assert stats(later) == OK
    stats.check()


@pytest.mark.parametrize("size", [0, -1, -(2**63), 191, 8, 2**63 - 1, 2**40])
def test_no_version_has_a_struct_of_that_size(stats: Stats, size: int):
    stats.args.size = size
    assert stats() == INVALID_SIZE
    assert list(stats.argmax) == [-7, -7]


def test_no_struct(stats: Stats):
    assert stats.library.nabla_fast_token_stats(None) == INVALID_POINTER
    assert stats.library.nabla_fast_nll_grad_workspace(None) == 0


@pytest.mark.parametrize(
    ("result", "over"), [("entropy", "confidence"), ("row_status", "argmax"), ("logsumexp", "logits")]
)
@pytest.mark.parametrize("shift", [0, 4])
def test_results_overlap_nothing(stats: Stats, result: str, over: str, shift: int):
    setattr(stats.args, result, ctypes.addressof(getattr(stats, over)) + shift)
    assert stats() == OVERLAP
    assert list(stats.argmax) == [-7, -7]


def entropy(*logits: float) -> float:
    total = sum(map(math.exp, logits))
    return -sum(math.exp(z) / total * (z - math.log(total)) for z in logits)


def test_results_may_lie_between_the_rows(stats: Stats):
    rows = (ctypes.c_float * 12)(0, 1, 2, 3, 0, 0, 5, 0, 5, 5, 0, 0)
    stats.args.logits = Matrix(ctypes.addressof(rows), 4, 6, 0)
    stats.args.entropy = ctypes.addressof(rows) + 4 * 4
    assert stats() == OK
    stats.check()
    assert rows[4:6] == pytest.approx([entropy(0, 1, 2, 3), entropy(5, 0, 5, 5)], rel=1e-6)
    assert list(rows[:4]) == [0, 1, 2, 3]


def test_sizes_beyond_memory_and_wrong_numbers_are_refused(stats: Stats):
    stats.args.logits.stride = 2**62
    assert stats() == TOO_LARGE
    assert b"larger than any address space" in stats.library.nabla_fast_status_string(TOO_LARGE)
    stats.args.logits.stride = 4
    stats.args.tau = 0.0
    assert stats() == INVALID_TAU


def test_a_workspace_of_the_size_that_the_query_says(library: ctypes.CDLL):
    hidden, head = (ctypes.c_float * 2)(1, -1), (ctypes.c_float * 6)(1, 0, 0, 1, 1, 1)
    targets, grad, row_status = (I64 * 1)(2), (ctypes.c_float * 2)(), (I32 * 1)(-1)
    args = NllGradArgs(size=ctypes.sizeof(NllGradArgs), rows=1, vocab=3)
    args.hidden = Matrix(ctypes.addressof(hidden), 2, 2, 0)
    args.head = Matrix(ctypes.addressof(head), 2, 2, 0)
    args.grad = Output(ctypes.addressof(grad), 2, 2, 0)
    args.targets, args.row_status = ctypes.addressof(targets), ctypes.addressof(row_status)
    needed = library.nabla_fast_nll_grad_workspace(ctypes.byref(args))
    assert needed > 0
    memory = ctypes.create_string_buffer(needed)
    args.workspace, args.workspace_bytes = ctypes.addressof(memory), needed - 1
    assert library.nabla_fast_nll_grad(ctypes.byref(args)) == WORKSPACE_TOO_SMALL
    assert row_status[0] == -1
    args.workspace_bytes = needed
    assert library.nabla_fast_nll_grad(ctypes.byref(args)) == OK
    assert row_status[0] == OK
    # Logits are 1, -1 and 0.
    p = [math.exp(z) / sum(map(math.exp, (1, -1, 0))) for z in (1, -1, 0)]
    assert list(grad) == pytest.approx([p[0] + p[2] - 1, p[1] + p[2] - 1], rel=1e-5)
