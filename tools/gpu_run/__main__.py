"""``make gpu``: checks, benchmarks and tests of one run on a machine with a GPU.

The machine needs a Python with torch and transformers, and pybind11 and setuptools for the C++ extension;
nothing is downloaded. Under ``$OUT`` (``build/gpu`` if unset) lie ``results.tar.gz``, renewed after each
part, ``summary.json``, and rows as they come; the last thing printed is a table. A part that fails does not
stop the next.

Results are checked at real widths before anything is timed; then come the rows that goals are set for;
then what takes long or may hang: torch.compile, profilers, the models, tests. The C++ extension is
compiled meanwhile. Wheels in ``build/wheels`` (``make gpu-wheels``) are put beside the package.
``--allow-cpu`` runs all that a CPU can run, at small sizes: does the run itself work?
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.compile_check.targets import TARGETS
from tools.gpu_run.package import NativeBuild, environment_of, link_package
from tools.gpu_run.running import ROOT, Part, Run, run_process

COMMAND_LINE = [
    sys.executable,
    "-c",
    "import sys; from nabla_fast.cli import main; sys.exit(main())",
]
# Its name, and its architecture as the compile check has it.
FIND_GPU = """
import torch
if torch.cuda.is_available():
    print(torch.cuda.get_device_name())
    if torch.version.hip:
        print(torch.cuda.get_device_properties().gcnArchName.split(":")[0])
    else:
        print("sm_{}{}".format(*torch.cuda.get_device_capability()))
"""
MOST_SHARDS = 8  # of the tests; each holds a context of some 500 MB on the GPU


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


class Plan:
    """The parts of a run, in order."""

    def __init__(self, run: Run, architecture: str):
        self.run = run
        self.gpu = bool(run.gpu)
        self.architecture = architecture
        self.backend = "triton" if self.gpu else "cpu"
        self.device = "cuda" if self.gpu else "cpu"
        self._interpreter = {} if self.gpu else {"TRITON_INTERPRET": "1"}

    def parts(self, native: NativeBuild) -> Iterator[Sequence[Part] | Part]:
        """Each to be run before the next is asked for."""
        files = self.run.files
        yield Part("environment", [*COMMAND_LINE, "env", "--json"], 40, True)
        if self.gpu and self.architecture in TARGETS:
            cache = self.run.environment["TRITON_CACHE_DIR"]
            check = ["--json", "--targets", self.architecture, "--cache", cache]
            yield Part("compile", python("tools.compile_check", *check), 75, True)
        if not self.gpu:
            native.wait(self.run.left() - 60)  # the CPU's kernels are all there is to measure
            if not self._has_native():
                self.backend = "torch"
        yield self._kernels("check", "--check", "--quick", seconds=90)
        timed = ["--seconds", "0.4"] if self.gpu else ["--seconds", "0.01", "--op", "token_stats", "lm_"]
        yield self._kernels("kernels", "--no-compile", *timed, seconds=150)
        launch = (
            ["--seconds", "0.2"] if self.gpu else ["--op", "token_stats of logits", "--seconds", "0.02"]
        )
        yield Part("launch", [*COMMAND_LINE, "bench", "launch", "--json", *launch], 60, True)
        tune = [
            "--json",
            "--output",
            str(files / "presets.json"),
            "--rows",
            str(self.run.out / "tune.jsonl"),
        ]
        tune += ["--seconds", "0.3"] if self.gpu else ["--quick", "--seconds", "0"]
        yield Part("tune", python("tools.tune", *tune), 90, True, self._interpreter)
        yield from self._of_gpus_alone()
        compiled = ["--compile", "--op", "token_stats", "embedding_mix", "--seconds", "0.3"]
        yield self._kernels("compiled", *(compiled if self.gpu else ["--check", "--op", "lm_"]), seconds=60)
        native.wait(30)
        decode = ["--device", self.device, "--repeats", "1", "--json"]
        decode += [
            "--cases",
            *(("steps", "together", "greedy", "generate") if self.gpu else ("steps", "greedy", "--quick")),
        ]
        yield Part("decode", [*COMMAND_LINE, "bench", "decode", *decode], 60, True)
        demo = ["--json", "--device", self.device, *(() if self.gpu else ("--problems", "2"))]
        yield Part("demo", [*COMMAND_LINE, "demo", *demo], 40, True)
        yield self._tests()

    def _kernels(self, name: str, *options: str, seconds: float) -> Part:
        command = [*COMMAND_LINE, "bench", "kernels", "--backend", self.backend, "--device", self.device]
        rows = str(self.run.out / "rows.jsonl")
        if not self.gpu:
            options = (*options, "--quick")
        return Part(name, [*command, "--json", "--rows", rows, *options], seconds, True)

    def _of_gpus_alone(self) -> Iterator[Part]:
        """Other projects' kernels, profiles of four ops, and a checker's look at the descents."""
        calls = python("tools.gpu_run.calls")
        tools = {
            "ncu": ["--clock-control", "none", "--profile-from-start", "off", "--launch-count", "40"],
            "memcheck": ["--tool", "memcheck", "--error-exitcode", "1"],
            "racecheck": ["--tool", "racecheck", "--error-exitcode", "1"],
        }
        if not self.gpu:
            for name in ("others", *tools):
                self.run.skip(name, "no GPU")
            yield Part("calls", [*calls, "descents", "--device", "cpu", "--backend", self.backend], 60)
            return
        yield Part("others", python("tools.gpu_run.others"), 50)
        for name, options in tools.items():
            program = shutil.which("ncu" if name == "ncu" else "compute-sanitizer")
            if program is None:
                self.run.skip(name, "the machine has no such tool")
            elif name == "ncu":
                report = ["--export", str(self.run.files / "ncu"), "--force-overwrite", "--set", "basic"]
                sections = ["--section", "MemoryWorkloadAnalysis", "--section", "WarpStateStats"]
                command = [program, *options, *report, *sections, "--print-details", "all"]
                yield Part(name, [*command, *calls, "profiled"], 70)
            else:
                # With every tensor in an allocation of its own, no access beyond one goes unseen.
                apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
                yield Part(name, [program, *options, *calls, "descents"], 50, False, apart)

    def _tests(self) -> list[Part]:
        """In several processes at a time: compiling takes most of it."""
        shards = max(1, min(MOST_SHARDS, (os.cpu_count() or 1) // 2)) if self.gpu else 1
        pytest = python("pytest", "-p", "tools.shard", "-m", "gpu or smoke" if self.gpu else "smoke")
        return [
            Part(
                f"tests {number + 1} of {shards}",
                [
                    *pytest,
                    f"--shard={number}/{shards}",
                    f"--junitxml={self.run.files / f'tests_{number + 1}.xml'}",
                ],
                170,
            )
            for number in range(shards)
        ]

    def _has_native(self) -> bool:
        """Whether the C++ extension can be imported by the parts."""
        program = "import sys; from nabla_fast import _native; sys.exit(not _native.available())"
        return run_process([sys.executable, "-c", program], 60, self.run.environment)[0] == 0


def find_gpu() -> tuple[str, str]:
    """Name, empty if there is none, and architecture of the first GPU; in a process, as the parts are."""
    rc, stdout, stderr = run_process([sys.executable, "-c", FIND_GPU], 60, os.environ)
    if rc != 0:
        sys.stderr.write(stderr.decode(errors="replace"))
    name, architecture, *_ = [*stdout.decode().splitlines(), "", ""] if rc == 0 else ["", ""]
    return name, architecture


def unpacked_wheels() -> Path | None:
    """A folder with what the wheels in ``build/wheels`` hold; None if there is none."""
    wheels = sorted((ROOT / "build" / "wheels").glob("*.whl"))
    folder = ROOT / "build" / "gpu_wheels"
    shutil.rmtree(folder, ignore_errors=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder)
    return folder if wheels else None


def summary_table(run: Run) -> str:
    """How each part went, and the times of the rows that goals are set for."""
    lines = [f"{result.name:<14} {result}" for result in run.results]
    with contextlib.suppress(OSError):
        rows = map(json.loads, (run.out / "rows.jsonl").read_text().splitlines())
        lines += [
            f"{row['op']} {row['shape']} {row['dtype']}: {_said(row)}"
            for row in rows
            if "median_ms" in row or row["check"] != "passed"
        ]
    return "\n".join([*lines, f"files: {run.out}"])


def _said(row: dict) -> str:
    if row["check"] != "passed":
        return f"{row['check']} {row.get('error', '')}".rstrip()
    names = ("median", "graph", "products", "limit", "eager")
    times = {name: row.get(f"{name}_ms") for name in names}
    return ", ".join(f"{name} {time:.4g} ms" for name, time in times.items() if time is not None)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_run", description=__doc__.splitlines()[0])
    parser.add_argument("--allow-cpu", action="store_true", help="run the parts without a GPU too")
    parser.add_argument("--seconds", type=float, default=570.0, help="of all parts together")
    parser.add_argument("--only", nargs="+", metavar="PART", help="only parts whose name begins so")
    arguments = parser.parse_args(argv)

    gpu, architecture = find_gpu()
    print(f"GPU: {gpu}" if gpu else "no GPU found: torch.cuda.is_available() is False", file=sys.stderr)
    if not gpu and not arguments.allow_cpu:
        print("with --allow-cpu the parts run on the CPU, and GPU tests are skipped", file=sys.stderr)
        return 1

    environment = environment_of(link_package(), unpacked_wheels())
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu").resolve()
    run = Run(out, ROOT / "build" / "gpu_files", gpu, arguments.seconds, environment)
    if not gpu:
        run.patience = 3.0  # such a machine may be slow, and nobody waits for it
    native = NativeBuild(environment, run.files / "native_build.txt")
    try:
        for parts in Plan(run, architecture).parts(native):
            wanted = [parts] if isinstance(parts, Part) else list(parts)
            if arguments.only:
                wanted = [p for p in wanted if p.name.startswith(tuple(arguments.only))]
            if wanted:
                run.together(wanted)
    finally:
        native.stop()
    print(summary_table(run))
    return int(any(result.failed for result in run.results))


if __name__ == "__main__":
    sys.exit(main())
