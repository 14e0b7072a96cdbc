"""The compile check: what it reads, what it calls a failure, and one kernel through all of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.compile_check import __main__ as command
from tools.compile_check import counts, results, versions
from tools.compile_check.__main__ import failure, run, show
from tools.compile_check.figures import asynchronous, figures, main_loop, read
from tools.compile_check.flow import stretches
from tools.compile_check.machine_code import amdgcn, sass
from tools.compile_check.model import document, hardware, predictions, timing
from tools.compile_check.model.hardware import Hardware
from tools.compile_check.model.l2_cache import L2Cache
from tools.compile_check.model.timing import Counts, times
from tools.compile_check.resources import Resources, amd_usage, nvidia_usage
from tools.compile_check.targets import TARGETS
from tools.compile_check.work import Product, Work

# Loops of kernels that Triton 3.7.1 compiled, without what stands around them and without encodings.
RECORDED = Path(__file__).with_name("machine_code")

PRINTED = """
Resource usage:
 Common:
  GLOBAL:0
 Function k:
  REG:202 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
ASSEMBLY = """
    .name:           k
    .private_segment_fixed_size: 24
    .sgpr_count:     16
    .vgpr_count:     204
    .vgpr_spill_count: 6
"""


def test_usage():
    assert nvidia_usage(PRINTED) == (202, 16)
    assert amd_usage(ASSEMBLY) == (204, 24)


def test_usage_of_another_format():
    with pytest.raises(ValueError, match="not enough values"):
        nvidia_usage("Resource usage: none")


@pytest.mark.parametrize(
    ("used", "problem"),
    [
        (Resources(255, 0, 232_448, True, True), None),
        (Resources(255, 0, 0, False, False), None),
        (Resources(255, 8, 0, True, True), "spills: 8 bytes of stack a thread"),
        (Resources(8, 0, 232_449, False, False), "232449 bytes of shared memory, 232448 are allowed"),
        (Resources(8, 0, 0, False, True), "half-precision products without HGMMA"),
    ],
)
def test_problems(used: Resources, problem: str | None):
    assert used.problem(TARGETS["sm_90"]) == problem


def test_asynchronous_products():
    kernel = read((RECORDED / "sm_90_asynchronous.txt").read_text(), TARGETS["sm_90"])
    loop = main_loop(kernel).costs
    assert (loop.instructions, loop.barriers, loop.tensor) == (94, 2, 4)
    # Four products of 64 × 64 × 16, a quarter of them by each warp of a group.
    assert loop.tensor_flops == 4 * 2 * 64 * 64 * 16 / 4
    assert loop.warp_flops == 0
    assert asynchronous(kernel)
    # Outside of the loop everything is waited for, and the endless loop at the end is no loop.
    assert kernel.costs.drained == 1
    assert kernel.costs.instructions == 200 - 94 + 1
    assert len(kernel.everything()) == 2


def test_products_that_are_waited_for():
    kernel = read((RECORDED / "sm_90_waited_for.txt").read_text(), TARGETS["sm_90"])
    loop = main_loop(kernel).costs
    assert (loop.barriers, loop.tensor, loop.drained) == (33, 10, 3)
    assert asynchronous(kernel) is False


def test_products_of_amd():
    kernel = read((RECORDED / "gfx942_product.txt").read_text(), TARGETS["gfx942"])
    loop = main_loop(kernel).costs
    assert (loop.instructions, loop.barriers, loop.tensor) == (85, 2, 8)
    assert loop.tensor_flops == 8 * 2 * 32 * 32 * 8
    assert asynchronous(kernel) is None


BRANCHES = """
        /*0000*/  S2R R0, SR_TID.X ;
        /*0010*/  ISETP.GE.AND P0, PT, R0, c[0x0][0x210], PT ;
        /*0020*/  @P0 BRA 0x90 ;
        /*0030*/  LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/  @!PT BRA 0x60 ;
        /*0050*/  FFMA R4, R4, R5, R6 ;
        /*0060*/  IADD3 R0, R0, 0x1, RZ ;
        /*0070*/  ISETP.NE.AND P1, PT, R0, RZ, PT ;
        /*0080*/  @P1 BRA 0x30 ;
        /*0090*/  @P2 BRA 0xc0 ;
        /*00a0*/  MUFU.EX2 R1, R1 ;
        /*00b0*/  EXIT ;
        /*00c0*/  CALL.REL.NOINC 0xe0 ;
        /*00d0*/  BRA 0xa0 ;
        /*00e0*/  FMUL R1, R1, R1 ;
        /*00f0*/  RET.REL.NODEC R2 0x0 ;
        /*0100*/  BRA 0x100;
        /*0110*/  NOP;
"""


def test_longest_path():
    """A loop with a branch inside. A slow path that lies behind the exit is no loop."""
    whole = stretches(sass(BRANCHES))
    assert [i.address for i in whole.instructions] == [0, 0x10, 0x20, 0x90, 0xA0, 0xB0, 0xC0, 0xD0]
    (loop,) = whole.loops
    assert [i.address for i in loop.instructions] == [0x30, 0x40, 0x50, 0x60, 0x70, 0x80]
    assert loop.loops == []


def test_no_code():
    with pytest.raises(ValueError, match="no instructions"):
        stretches(sass("cuobjdump: another format"))


def test_nested_loops_of_amd():
    assembly = """
k:
	s_mov_b32 s0, 0
.LBB0_1:
	ds_read_b128 v[0:3], v4
.LBB0_2:
	v_fma_f32 v0, v1, v2, v3
	s_cbranch_scc1 .LBB0_2
	s_barrier
	s_cbranch_vccnz .LBB0_1
	s_endpgm
	s_nop 0
"""
    outer = stretches(amdgcn(assembly)).loops[0]
    assert [i.opcode for i in outer.instructions] == ["ds_read_b128", "s_barrier", "s_cbranch_vccnz"]
    assert [i.opcode for i in outer.loops[0].instructions] == ["v_fma_f32", "s_cbranch_scc1"]


def test_instructions_an_element():
    kernel = read((RECORDED / "sm_90_asynchronous.txt").read_text(), TARGETS["sm_90"])
    # Two programs of 8 warps for a tile of 64 × 128 over a depth of 640, 64 at a time.
    step = 2.0 * 64 * 128 * 64
    work = Work(2 * 64 * 128, products=[Product(2 * 10 * step, step)])
    told = figures(kernel, work, programs=2, warps=8, target=TARGETS["sm_90"])
    assert told.instructions_per_element == (107 + 10 * 94) * 256 / (64 * 128)
    assert (told.loop_instructions, told.barriers, told.tensor_instructions) == (94, 2, 4)
    nothing_said = figures(kernel, None, programs=2, warps=8, target=TARGETS["sm_90"])
    assert nothing_said.as_json()["instructions_per_element"] is None


def _row(kernel: str, count: float | None, target: str = "sm_90") -> dict:
    row = {"op": "token_stats", "dtype": "bfloat16", "launch": "logits", "target": target}
    row |= {"kernel": kernel, "triton": "3.7.1", "problem": None, "instructions_per_element": count}
    return row


def test_counts_that_grow():
    committed = counts.renewed([_row("a", 20.0), _row("b", 20.0), _row("b", 30.0)], {})
    rows = [_row("a", 21.1), _row("b", 20.9), _row("b", 29.0), _row("c", 1.0), _row("c", 1.0, "sm_80")]
    counts.compare(rows, committed)
    assert [row["problem"] is None for row in rows] == [False, True, True, False, True]
    assert failure(rows[0]) == (
        "FAILED (Triton 3.7.1) sm_90 token_stats, bfloat16, logits: a: 21.1 instructions an element, "
        "6% more than the 20 of counts.json (5% are allowed)"
    )
    assert rows[3]["problem"] == "no committed count: make compile-check COMPILE_ARGS=--write"


def test_counts_are_renewed_for_what_was_compiled():
    other = "mixes, float16, logits: x"
    committed = {"sm_90": {"token_stats, bfloat16, logits: gone": 9.0, other: 7.0}, "gfx942": {other: 5.0}}
    assert counts.renewed([_row("a", 20.0)], committed) == {
        "sm_90": {other: 7.0, "token_stats, bfloat16, logits: a": 20.0},
        "gfx942": {other: 5.0},
    }


# Round numbers, for times that can be seen: 132 multiprocessors of 1 GHz.
ROUND = Hardware(132e12, 66e12, 1e12, 2e12, 1e9, 1e-6, 10.0)


def test_time_of_an_elementwise_launch():
    # 20 programs on the busiest multiprocessor, 8 warps each: 40 a slot, 500 cycles each.
    counted = Counts("k", 1, 8e6, 8e6, 2600, 8, 4, instructions=400, issue=500, barriers=7, shared=1280)
    took = times(counted, ROUND)
    assert took.issue == pytest.approx(20e-6)
    assert took.memory == pytest.approx(8e-6)
    assert took.l2 == pytest.approx(4e-6)
    assert took.shared == pytest.approx(20 * 10e-9)
    assert took.longest == "issue"
    assert took.total == pytest.approx(21e-6)


@pytest.mark.parametrize(("is_asynchronous", "total"), [(False, 10 + 6 + 0.2), (True, 10)])
def test_time_of_products(is_asynchronous: bool, total: float):
    # Two programs a multiprocessor, one at a time: 10 Mflop at 1 Tflop/s, or warps' at half of it.
    counted = Counts("k", 1, 1e6, 0, 264, 4, 1, 100, 3000, products=3e6, warp_products=1e6, barriers=10)
    counted = dataclasses.replace(counted, asynchronous=is_asynchronous)
    took = times(counted, ROUND)
    assert took.products == pytest.approx(10e-6)
    assert took.issue == pytest.approx(6e-6)
    assert took.barriers == pytest.approx(0.2e-6)
    assert took.total == pytest.approx((total + 1) * 1e-6)


def test_time_of_one_block():
    """Nothing else can run while it waits for memory."""
    took = times(Counts("k", 1, 4e6, 2e6, 75, 16, 1, 100, 1000, barriers=5), ROUND)
    assert took.total == pytest.approx(4e-6 + 4e-6 + 0.05e-6 + 1e-6)


def test_time_of_torch():
    took = times(Counts("torch.mm", 1, 1e6, 4e6, products=264e6), ROUND)
    assert took.total == pytest.approx(2e-6 + 1e-6)
    assert timing.limit(264e6, 1e6, ROUND) == pytest.approx(2e-6)


def test_resident_blocks():
    assert timing.resident(64, 32, 8, 10_000) == 4  # registers: 65,536 / (256 · 64)
    assert timing.resident(246, 131_072, 8, 10_000) == 1
    assert timing.resident(32, 73_728, 4, 10_000) == 3  # shared memory
    assert timing.resident(32, 32, 16, 75) == 1  # fewer programs than multiprocessors
    assert timing.resident(255, 230_000, 16, 10_000) == 1


def test_stored_rows(tmp_path: Path):
    rows = [_row("b", 2.0), _row("a", 1.0, "gfx942"), _row("c", 3.0) | {"triton": "3.6.0"}]
    assert [path.name for path in results.store(rows, tmp_path)] == [
        "triton-3.7.1.json",
        "triton-3.6.0.json",
    ]
    stored = json.loads((tmp_path / "triton-3.7.1.json").read_text())
    assert stored["kernels"] == [rows[1], rows[0]]


def test_another_release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    printed = '{"kernels": [{"triton": "3.6.0"}], "failed": 0}'

    def run(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess:
        assert env["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / "3.6.0")
        assert command[-2:] == ["--targets", "sm_90"]
        return subprocess.CompletedProcess(command, 1, printed)

    monkeypatch.setattr(versions, "installed", lambda release: tmp_path / release)
    monkeypatch.setattr(versions.subprocess, "run", run)
    assert versions.check_with("3.6.0", ["--targets", "sm_90"]) == [{"triton": "3.6.0"}]
    printed = ""
    with pytest.raises(RuntimeError, match=r"the check with Triton 3\.6\.0 ended with 1"):
        versions.check_with("3.6.0", ["--targets", "sm_90"])


def test_traced_products_and_cache():
    trace = pytest.importorskip("tools.compile_check.model.trace", reason="triton is not installed")
    a, b = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((64, 1024), (1024, 512)))

    def call() -> torch.Tensor:
        product = torch.mm(a, b, out_dtype=torch.float32)  # on a GPU alone, but for this
        product.addmm_(a, b)
        return torch.mm(a, b, out=a.new_empty(64, 512)) + product

    wide, added, narrow, total = trace.trace(call)
    operands, flops = 2 * (64 * 1024 + 1024 * 512), 2 * 64 * 1024 * 512
    result = 4 * 64 * 512
    assert wide == Counts("torch.mm", 1, operands + result, operands + result, products=flops)
    assert added == Counts("torch.addmm_", 1, 0.0, operands + 2 * result, products=flops)
    assert narrow == Counts("torch.mm", 1, result / 2, operands + result / 2, products=flops)
    assert total == Counts("torch.add", 1, result, 2.5 * result)


def test_cache_forgets_what_was_used_long_ago():
    line = L2Cache.LINE
    cache = L2Cache(4 * line)
    small, large = (torch.empty(n * line, dtype=torch.int8, device="meta") for n in (2, 3))
    assert [cache.missed(small), cache.missed(small), cache.missed((small, 1000))] == [2 * line, 0, 0]
    assert [cache.missed(large), cache.missed(large[:line]), cache.missed(small)] == [3 * line, 0, line]


def test_rows_that_lie_apart_take_the_lines_of_their_own():
    line = L2Cache.LINE
    cache = L2Cache(8 * line)
    matrix = torch.empty(3, 4 * line, dtype=torch.int8, device="meta")
    assert cache.missed(matrix[:, : 2 * line]) == 6 * line
    assert cache.missed(matrix[1:, : 2 * line]) == 0
    assert cache.missed(matrix[2, line : 3 * line]) == line


def test_sensitivity():
    launches = (Counts("k", 2, 4e9, 0, 13_200, 8, 4, 100, 100.0),)
    made = predictions.Prediction("f", "op", "of", 1, 0.0, 4e9, None, None, launches)
    assert made.limited_by == "memory"
    assert made.share() == pytest.approx(0.5, rel=0.01)
    (memory, clock) = predictions.sensitivities(made, ["bandwidth", "clock"], 0.2)
    assert memory == pytest.approx((0.5, 0.5), rel=0.01)  # limit and time alike
    assert clock == pytest.approx((0.5, 0.5), rel=0.01)


def test_constants_have_sources():
    for name, value, unit, title, source in hardware.constants():
        assert getattr(hardware.H200, name) == value
        assert value / unit < 1000
        assert title
        assert source


def test_page_is_what_the_counts_say():
    assert document.written() == document.PAGE.read_text()


def test_arithmetic_shows_its_numbers():
    text = document.PAGE.read_text()
    _, made = predictions.load(predictions.NOW)
    for one in made:
        assert f"**`{one.op}`, {one.of}, N = {one.rows}**: limit " in text
    assert "*predicted*" in text


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_one_kernel():
    command = [sys.executable, "-m", "tools.compile_check", "--json", "--workers", "1"]
    command += ["--ops", "gumbel_noise", "--dtypes", "float32", "--targets", "sm_90", "gfx942"]
    process = subprocess.run(
        command,
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},  # which it must not heed
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    result = json.loads(process.stdout)
    assert result["failed"] == 0
    assert {row["target"] for row in result["kernels"]} == {"sm_90", "gfx942"}
    for row in result["kernels"]:
        assert row["kernel"] == "_gumbel_noise_kernel"
        assert 0 < row["registers"] <= 256
        assert row["stack"] == 0
        assert not row["half_products"]
        assert row["instructions_per_element"] > 100  # Philox and two logarithms in double precision
        assert row["barriers"] == 0
        assert row["triton"]
        assert (row["predicted_share"] is None) == (row["target"] != "sm_90")


def killed(target: str, op: str, dtype: str) -> list[dict]:
    """In the place of ``check``: the process ends, as by the system for its memory."""
    os._exit(9)


def test_a_compiler_that_is_killed_is_a_failed_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "check", killed)
    (row,) = run(["sm_90"], ["token_stats"], ["float32"], 1)
    assert row["kernel"] is None
    assert "BrokenProcessPool" in row["problem"]
    assert (row["target"], row["op"], row["dtype"]) == ("sm_90", "token_stats", "float32")
    assert "token_stats" in show(row)
    assert "does not compile" in failure(row)
