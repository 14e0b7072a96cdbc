"""The kernel benchmark: no time without a passed check, limits that are the machine's, no case lost."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch

from nabla_fast import _native
from nabla_fast.bench import kernel_cases, kernels, machine, measure
from nabla_fast.bench.kernel_cases import (
    Case,
    dto_descent,
    dto_descent_latents,
    embedding_mix,
    lm_logits,
    token_stats,
)
from nabla_fast.bench.kernel_cases.in_place import products_alone
from nabla_fast.bench.machine import Machine
from nabla_fast.bench.measure import Timing, interleaved, peak_bytes
from nabla_fast.cli import main
from nabla_fast.errors import BackendUnavailable, InputError

CPU = torch.device("cpu")
LIMITS = Machine("loops", 1, read=1e10, triad=8e9, multiply_add=1e11, float32_matmul=5e10)

needs_native = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))


@pytest.fixture(autouse=True)
def _small_caches(monkeypatch):
    """To empty real ones takes longer than what is tested here."""
    monkeypatch.setattr(measure, "_FLUSH_BYTES", 1 << 16)


def small_cases(_: torch.device = CPU, **__: object) -> list[Case]:
    return [
        token_stats(3, 257, torch.float32, CPU),
        embedding_mix(3, 257, [8, 6], torch.bfloat16, CPU, hard=True, backward=True),
        embedding_mix(3, 257, [8], torch.float32, CPU, hard=False, backward=False),
        dto_descent(2, 257, 5, CPU),
        dto_descent_latents(2, 257, 9, 6, torch.float32, CPU),
    ]


def run_small(cases: list[Case], backend: str = "torch", **options) -> list[dict]:
    options = {"compiled": False, "seconds": 0.01, "on_row": lambda row: None} | options
    return kernels.run(cases, backend, CPU, LIMITS, **options)


def with_ours(case: Case, ours) -> Case:
    """``case`` whose version of ours is ``ours(versions)``."""

    def prepare():
        versions = case.prepare()
        return replace(versions, ours=lambda: ours(versions))

    return replace(case, prepare=prepare)


def test_rows_have_times_and_limits():
    rows = run_small(small_cases())
    assert [row["check"] for row in rows] == ["passed"] * 5
    for row in rows:
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["naive_ms"] > 0
        assert row["eager_ms"] > 0
        assert row["compile_ms"] is None
        assert row["limit_ms"] > 0
        assert row["limit"] in ("memory", "matmul")
        assert row["backend"] == "torch"
        assert json.dumps(row)
    assert rows[4]["checked"] == "K=4"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_row_is_timed_as_a_graph_too():
    device = torch.device("cuda")
    cases = [
        dto_descent(2, 257, 5, device),
        dto_descent_latents(2, 257, 16, 6, torch.float32, device),
        token_stats(3, 257, torch.float32, device),
    ]
    rows = kernels.run(
        cases, "triton", device, LIMITS, compiled=False, seconds=0.01, on_row=lambda row: None
    )
    assert [row["check"] for row in rows] == ["passed"] * 3
    assert all(row["graph_ms"] > 0 for row in rows)
    assert ["products_ms" in row for row in rows] == [False, True, False]
    assert not [row for row in rows if "graph_error" in row]


def test_a_descent_whose_graph_fails_has_its_other_times(monkeypatch: pytest.MonkeyPatch):
    def fail(function):
        raise RuntimeError("no graph")

    versions = dto_descent(2, 257, 5, CPU).prepare()
    monkeypatch.setattr(kernels, "replayed", fail)
    row = kernels._times(versions, CPU, False, 0.01, graph=True, products=False)
    assert row["graph_error"] == "RuntimeError: no graph"
    assert "graph_ms" not in row
    assert row["median_ms"] > 0
    monkeypatch.setattr(kernels, "replayed", lambda function: function)
    assert kernels._times(versions, CPU, False, 0.01, graph=True, products=False)["graph_ms"] > 0


def test_products_alone():
    tables = [torch.randn(257, width) for width in (8, 6)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as p:
        products_alone(3, tables, tables[:1], times=2)()
    # Both factors of each; the result's shape comes third.
    shapes = [event.input_shapes[:2] for event in p.events() if event.name == "aten::mm"]
    assert shapes == 2 * [[[3, 8], [8, 257]], [[3, 6], [6, 257]], [[3, 257], [257, 8]]]


def test_products_are_timed_beside_the_row():
    versions = embedding_mix(3, 257, [8, 6], torch.bfloat16, CPU, hard=True, backward=True).prepare()
    row = kernels._times(versions, CPU, False, 0.01, graph=False, products=True)
    assert row["products_ms"] > 0


def test_results_alone():
    rows = run_small(small_cases(), seconds=None)
    assert [row["check"] for row in rows] == ["passed"] * 5
    assert not [row for row in rows if "median_ms" in row]


def test_quick_cases_are_the_same_ops():
    for device in (CPU, torch.device("cuda")):
        whole, quick = (kernel_cases.cases(device, quick=quick) for quick in (False, True))
        assert {case.op for case in quick} == {case.op for case in whole}
        assert max(case.bytes for case in quick) < max(case.bytes for case in whole) / 4


def test_logits_in_bfloat16():
    options = {"hard": True, "backward": True, "logits": torch.bfloat16}
    (row,) = run_small([embedding_mix(3, 257, [8, 6], torch.bfloat16, CPU, **options)])
    assert row["check"] == "passed"
    assert row["shape"].endswith("z=bfloat16")


def test_the_larger_of_two_limits_holds():
    memory = Case("op", "N=1", "float32", 10**7, 10**7, lambda: None)
    assert kernels.limit(memory, LIMITS) == {"limit_ms": 1.0, "limit": "memory"}
    matmul = replace(memory, flops=10**9)
    assert kernels.limit(matmul, LIMITS) == {"limit_ms": 10.0, "limit": "matmul"}


@needs_native
@pytest.mark.parametrize(
    ("flops", "limit", "figure"), [(0, "memory", "read"), (10**9, "matmul", "multiply_add")]
)
def test_a_limit_is_timed_beside_the_row(
    monkeypatch: pytest.MonkeyPatch, flops: int, limit: str, figure: str
):
    def slow_loop(name: str, threads: int) -> machine.Loop:
        assert (name, threads) == (figure, 1)
        return machine.Loop(lambda: time.sleep(0.002), amount=(flops or case.bytes) / 3)

    case = replace(small_cases()[0], flops=flops)
    for other in (replace(LIMITS, source="torch"), replace(LIMITS, copy=1e12, float32_matmul=1e12)):
        assert kernels.limiting_loop(case, other) is None
    monkeypatch.setattr(kernels, "loop_of", slow_loop)
    (row,) = run_small([case])
    assert row["limit"] == limit
    assert row["limit_ms"] >= 6.0


@needs_native
@pytest.mark.parametrize("figure", ["read", "multiply_add", "dot_product", "tile_product"])
def test_loops_of_the_figures(figure: str):
    loop = machine.loop_of(figure, 1)
    assert loop.run() == loop.amount or figure == "read"
    assert loop.amount > 0 or figure in ("dot_product", "tile_product")
    assert machine.loop_of("float32_matmul", 1) is None


def test_a_product_may_be_made_of_faster_ones():
    limits = replace(LIMITS, dot_product=1.5e11, bfloat16_matmul=4e11)
    assert limits.rate(0) == 1e11
    assert limits.rate(1) == 4e11
    assert limits.rate(2) == 2e11
    assert replace(limits, bfloat16_matmul=1.8e11).rate(2) == 1e11
    assert replace(limits, tile_product=3e12).rate(2) == 1.5e12
    assert LIMITS.rate(1) == 1e11


def test_bf16_is_held_against_the_unit_that_multiplies_it():
    slow = replace(LIMITS, dot_product=5e10, bfloat16_matmul=4e10)
    assert slow.rate(1) == 5e10
    assert slow.rate(2) == 1e11


def test_a_wrong_result_gets_no_time():
    wrong = with_ours(small_cases()[0], lambda v: [value * 1.001 for value in v.naive()])
    (row,) = run_small([wrong])
    assert row["check"] == "failed"
    assert row["max_error"] == pytest.approx(1e-3, rel=0.1)
    assert "median_ms" not in row
    assert "limit_ms" not in row


def test_a_nan_is_an_error():
    wrong = with_ours(small_cases()[0], lambda v: [value * torch.nan for value in v.naive()])
    (row,) = run_small([wrong])
    assert row["check"] == "failed"
    assert row["max_error"] == float("inf") or row["max_error"] > 1e30


def raising(versions):
    raise RuntimeError("this one\nfails")


def test_a_case_that_raises_is_a_row_and_loses_no_other():
    cases = small_cases()[:3]
    cases[1] = with_ours(cases[1], raising)
    seen = []
    rows = run_small(cases, on_row=seen.append)
    assert [row["check"] for row in rows] == ["passed", "error", "passed"]
    assert rows == seen
    assert rows[1]["error"] == "RuntimeError: this one"
    assert rows[1]["max_error"] is None
    assert "median_ms" not in rows[1]


def test_inputs_that_do_not_fit_are_a_row():
    def prepare():
        raise MemoryError

    (row,) = run_small([replace(small_cases()[0], prepare=prepare)])
    assert (row["check"], row["error"]) == ("error", "MemoryError")


def test_a_missing_backend_is_no_row():
    with pytest.raises(BackendUnavailable, match="unknown backend"):
        run_small(small_cases(), backend="abacus")


@needs_native
def test_a_row_says_which_backend_it_used():
    stats, double = small_cases()[0], lm_logits(3, 257, 9, torch.float32, CPU)

    def prepare():
        versions = double.prepare()
        return replace(versions, ours=versions.in_float64)  # which no kernel takes

    rows = run_small([stats, replace(double, prepare=prepare)], backend="cpu")
    assert [row["backend"] for row in rows] == ["cpu", "torch"]


def test_a_compiler_that_fails_costs_its_own_time_alone(monkeypatch):
    def compile_(function):
        return lambda: raising(None)

    monkeypatch.setattr(torch, "compile", compile_)
    (row,) = run_small(small_cases()[:1], compiled=True)
    assert (row["check"], row["compile_ms"]) == ("passed", None)
    assert row["compile_error"] == "RuntimeError: this one"


def test_cases_are_chosen_by_name_and_dtype():
    assert [case.op for case in kernels.chosen(small_cases(), ["latents", "stats"])] == [
        "token_stats",
        "dto_descent_latents",
    ]
    assert len(kernels.chosen(small_cases(), None)) == 5
    assert len(kernels.chosen(small_cases(), None, ["float32"])) == 4
    assert [case.dtype for case in kernels.chosen(small_cases(), None, ["bfloat16"])] == ["bfloat16"]
    with pytest.raises(InputError, match="--dtype bfloat16: no case"):
        kernels.chosen(small_cases(), ["latents"], ["bfloat16"])
    with pytest.raises(InputError, match=r"there are: .*dto_descent; "):
        kernels.chosen(small_cases(), ["abacus"])


def test_there_is_a_case_for_every_op_and_none_takes_memory_beforehand():
    peak = measure.PeakMemory(CPU)
    cases = kernel_cases.cases(CPU)
    assert (peak.bytes() or 0) < 50e6
    ops = {case.op.split()[0] for case in cases}
    assert ops == {
        "draw_tokens",
        "token_stats",
        "embedding_mix",
        "linear_embedding_mix",
        "onehot_grad",
        "onehot_grad_norm",
        "dto_descent",
        "dto_descent_latents",
        "lm_logits",
        "nll_grad",
        "prefix_attention",
    }
    assert len({(case.op, case.shape, case.dtype) for case in cases}) == len(cases)


# -- measuring ---------------------------------------------------------------------------------------


def test_every_function_runs_equally_often():
    counts = {"a": 0, "b": 0}
    resets = []

    def count(name: str):
        counts[name] += 1

    functions = {name: lambda name=name: count(name) for name in counts}
    times = interleaved(functions, CPU, seconds=0.01, reset=lambda: resets.append(dict(counts)))
    assert counts["a"] == counts["b"] >= 5
    assert all(isinstance(timing, Timing) for timing in times.values())
    assert len(resets) == counts["a"] + counts["b"]  # one before each


def test_what_takes_very_long_runs_once(monkeypatch):
    monkeypatch.setattr(measure, "_SLOWEST_S", measure._SLOW_S)
    milliseconds = {"a": 1.0, "b": 700.0}
    counts = dict.fromkeys(milliseconds, 0)

    def count(name: str) -> str:
        counts[name] += 1
        return name

    monkeypatch.setattr(measure, "_time_cpu", lambda function: milliseconds[function()])
    functions = {name: lambda name=name: count(name) for name in counts}
    times = interleaved(functions, CPU, seconds=0.0)
    assert counts == {"a": 5, "b": 1}
    assert times["b"] == Timing(700.0, 700.0, 700.0)
    del functions["a"]
    assert interleaved(functions, CPU, seconds=0.0) == {"b": times["b"]}


def test_peaks_leave_out_results_and_see_what_is_gone():
    size = 40 << 20

    def double() -> list[torch.Tensor]:
        temporary = torch.ones(size // 4)
        return [temporary * 2]

    if (peak := peak_bytes(double, CPU)) is None:
        pytest.skip("this platform does not tell")
    assert abs(peak - size) < size // 4
    # Freed memory that is used again counts too.
    assert abs(peak_bytes(double, CPU) - size) < size // 4
    existing = double()
    assert peak_bytes(lambda: existing, CPU, in_place=True) < size // 4
    assert abs(peak_bytes(lambda: [torch.ones(size // 4)], CPU)) < size // 4


def test_results_that_share_memory_count_once():
    size = 40 << 20

    def halves() -> list[torch.Tensor]:
        temporary = torch.ones(size // 4)
        both = temporary * 2
        return [*both.view(2, -1), both]

    if (peak := peak_bytes(halves, CPU)) is None:
        pytest.skip("this platform does not tell")
    assert abs(peak - size) < size // 4


@needs_native
def test_the_machine_is_measured_by_loops(monkeypatch):
    monkeypatch.setattr(machine, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "_SECONDS", 0.01)
    found = machine.measure_machine(CPU)
    document = found.to_json()
    assert (document["source"], document["why"]) == ("loops", None)
    assert document["threads"] == torch.get_num_threads()
    for key in ("read", "triad", "multiply_add", "float32_matmul", "bfloat16_matmul"):
        assert document[f"{key}_per_s"] > 0
    assert (document["dot_product_per_s"] is None) == (_native.cpu_isa() not in ("avx512_bf16", "amx"))
    assert (document["tile_product_per_s"] is None) == (_native.cpu_isa() != "amx")
    assert found.bandwidth >= found.read


def test_without_the_extension_torch_is_measured_and_it_says_so(monkeypatch):
    monkeypatch.setattr(machine, "_SECONDS", 0.01)
    monkeypatch.setattr(_native, "available", lambda: False)
    monkeypatch.setattr(_native, "why_missing", lambda: "no compiler")
    document = machine.measure_machine(CPU).to_json()
    assert (document["source"], document["why"]) == ("torch", "no compiler")
    assert document["copy_per_s"] > 0
    assert document["read_per_s"] is None


# -- the command -------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``bench kernels`` on small cases: exit status, standard output, standard error."""
    monkeypatch.setattr(kernel_cases, "cases", small_cases)
    monkeypatch.setattr(machine, "measure_machine", lambda device: LIMITS)

    def run(*arguments: str) -> tuple[int, str, str]:
        options = ["--backend", "torch", "--no-compile", "--seconds", "0.01", *arguments]
        status = main(["bench", "kernels", *options])
        return status, *capsys.readouterr()

    return run


def test_json_holds_rows_machine_and_environment(command):
    status, out, err = command("--json", "--op", "token_stats", "dto")
    document = json.loads(out)
    assert status == 0
    assert [row["op"] for row in document["rows"]] == ["token_stats", "dto_descent", "dto_descent_latents"]
    assert document["machine"] == LIMITS.to_json()
    assert document["interrupted"] is False
    assert document["environment"]["threads"] == torch.get_num_threads()
    level = _native.cpu_isa() if _native.available() else None
    assert document["environment"]["isa"] == level
    assert {row["isa"] for row in document["rows"]} == {level}
    assert document["environment"]["torch_isa"]["aten"] == torch.backends.cpu.get_cpu_capability()
    assert "dto_descent N=2 V=257 K=5 float32: passed" in err


def test_the_table_shows_every_column(command):
    status, out, _ = command()
    assert status == 0
    for title in ("ours", "eager", "naive", "compile", "limit", "error"):
        assert title in out
    assert "multiply add 100" in out


def test_a_failing_case_is_shown_and_counts(command, monkeypatch):
    cases = small_cases()
    cases[0] = with_ours(cases[0], raising)
    cases[2] = with_ours(cases[2], lambda v: [value * 2 for value in v.naive()])
    monkeypatch.setattr(kernel_cases, "cases", lambda device, **_: cases)
    status, out, err = command("--json")
    assert status == 1
    checks = [row["check"] for row in json.loads(out)["rows"]]
    assert checks == ["error", "passed", "failed", "passed", "passed"]
    assert "token_stats N=3 V=257 float32: error (RuntimeError: this one)" in err
    assert command()[0] == 1


def test_ctrl_c_keeps_finished_rows(command, monkeypatch):
    def interrupted(versions):
        raise KeyboardInterrupt

    cases = small_cases()
    cases[1] = with_ours(cases[1], interrupted)
    monkeypatch.setattr(kernel_cases, "cases", lambda device, **_: cases)
    status, out, err = command("--json")
    document = json.loads(out)
    assert (status, len(document["rows"]), document["interrupted"]) == (130, 1, True)
    assert "the rows are those that were finished" in err


def test_rows_are_written_when_they_are_done(command, monkeypatch, tmp_path):
    def looked(versions):
        assert len(path.read_text().splitlines()) == 1
        return versions.ours()

    path, cases = tmp_path / "rows.jsonl", small_cases()[:2]
    cases[1] = with_ours(cases[1], looked)
    monkeypatch.setattr(kernel_cases, "cases", lambda device, **_: cases)
    status, out, _ = command("--json", "--check", "--rows", str(path))
    assert status == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{k: v for k, v in row.items() if k != "isa"} for row in json.loads(out)["rows"]]
    assert "passed" in command("--check")[1]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--op", "abacus"], "--op 'abacus' is in no name"),
        (["--seconds", "0"], "--seconds must be positive"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--backend", "cuda"], "backend 'cuda' is not available"),
    ],
)
def test_refuses_in_one_line(command, options: list[str], line: str):
    status, out, err = command(*options)
    assert (status, out) == (2, "")
    assert line in err


# -- the table of the documents ----------------------------------------------------------------------


@pytest.fixture
def document(command) -> dict:
    """What ``bench kernels --json`` prints, of two cases."""
    return json.loads(command("--json", "--op", "token_stats", "dto_descent_latents")[1])


def kernels_table(document: dict) -> str:
    readme = pytest.importorskip("tools.tables", reason="not run from a checkout")
    return readme.kernels_table(document)


def test_the_documents_table_compares_with_ours(document):
    row = document["rows"][0]
    row |= {"median_ms": 2.0, "eager_ms": 5.0, "naive_ms": 30.0, "compile_ms": None, "limit_ms": 1.5}
    row |= {"backend": "cpu", "peak_bytes": 1_000_000, "naive_peak_bytes": 50_000_000}
    table = kernels_table(document).splitlines()
    expected = "| token_stats | N=3 V=257 | float32 | 2.00 | 2.5× | 15× | – | 75% (memory) | 1.0 MB (2%) |"
    assert table[2] == expected
    assert "dto_descent_latents (plain PyTorch)" in table[3]
    assert "10 GB/s" in table[-1]
    assert "100 GFLOP/s" in table[-1]


def test_levels_have_tables_of_their_own(document):
    tables = pytest.importorskip("tools.tables", reason="not run from a checkout")
    single = {**document, "environment": document["environment"] | {"isa": "avx512"}}
    rest = {key: document[key] for key in ("machine", "interrupted", "environment")}
    both = {
        "levels": {"avx2": rest, "amx": rest},
        "rows": [row | {"isa": isa} for isa in ("avx2", "amx") for row in document["rows"]],
        # Of the process that started the others: it is at no level.
        "environment": {key: document["environment"][key] for key in ("versions", "cpu", "threads")},
    }
    single["rows"] = [row | {"isa": "avx512"} for row in document["rows"]]
    text = tables.cpu_kernels_tables(both, single)
    places = [text.index(f"level `{isa}`**") for isa in ("avx2", "amx", "avx512")]
    assert places == sorted(places)
    assert text.count("| token_stats (plain PyTorch) |") == 3
    assert text.count("Medians of one interleaved run") == 1
    assert tables.cpu_kernels_tables() == tables.NO_FIGURES


@pytest.mark.parametrize("change", ["interrupted", "failed"])
def test_no_table_of_results_that_are_not_whole(document, change: str):
    if change == "interrupted":
        document["interrupted"] = True
    else:
        document["rows"][1]["check"] = "failed"
    with pytest.raises(SystemExit, match="the kernel benchmark's results"):
        kernels_table(document)
