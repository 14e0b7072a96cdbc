"""Everything worth running once on a machine with a GPU: build, benchmarks, GPU tests, demo.

The machine needs a Python with torch, transformers, pybind11 and setuptools; nothing is downloaded. Each
part is a process of its own with a time limit, and a part that fails does not stop the next. The benchmarks
come before the tests, which compile hundreds of small kernels and may run out of time. Under
``$OUT`` (``build/gpu`` if unset) lie ``summary.json``, ``log.txt`` with what the parts printed, and the
JSON or XML of each part; the last thing printed is a table. Exit status 1 if a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("sm_80", "sm_90", "sm_100")  # architectures that the compile check knows
COMMAND_LINE = [
    sys.executable,
    "-c",
    "import sys; from nabla_fast.cli import main; sys.exit(main())",
]
PIP = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
# Its name and its architecture as the compile check has it.
FIND_GPU = """
import torch
if torch.cuda.is_available():
    print(torch.cuda.get_device_name())
    major, minor = torch.cuda.get_device_capability()
    print("" if torch.version.hip else f"sm_{major}{minor}")
"""

TOTAL_SECONDS = 465.0  # of all parts together, whatever their own limits
LOG_BYTES = 2 << 20  # the end of a part's output that the log keeps
TIMED_OUT = 124
MOST_SHARDS = 8  # of the tests; each holds a context of some 500 MB on the GPU
GRACE_SECONDS = 5.0  # between the interruption of a late part and its end


@dataclass(frozen=True)
class Result:
    """How a part went. `rc` is its exit status, 124 if its time ran out."""

    name: str
    rc: int
    seconds: float
    note: str = ""

    @property
    def failed(self) -> bool:
        return self.rc != 0


def run_process(
    command: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> tuple[int, bytes, bytes]:
    """Exit status, standard output and standard error of a command.

    One that is late is interrupted, so that it can print what it has, and killed with all its processes.
    """
    # Files, not pipes: a grandchild that outlives the command would keep a pipe open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True
        )
        try:
            rc = process.wait(seconds)
        except subprocess.TimeoutExpired:
            rc = TIMED_OUT
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        finally:
            # Its children may outlive it, and hold memory of the GPU.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        return rc, out.read(), err.read()


class GpuRun:
    """The parts that have run, their files, and the time that is left."""

    def __init__(self, out: Path, gpu: str):
        self.out = out
        self.gpu = gpu
        self.results: list[Result] = []
        self.environment = dict(os.environ)
        self.environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton_cache"))
        self._lock = threading.Lock()
        self.started = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        self.log = out / "log.txt"
        self.log.write_bytes(b"")

    def part(self, name: str, command: Sequence[str], seconds: float, output: str | None = None) -> Result:
        """Run a part; with `output`, its standard output is JSON and goes to that file under $OUT."""
        began = time.monotonic()
        left = TOTAL_SECONDS - (began - self.started)
        if left < 1:
            with self._lock:
                return self._finish(Result(name, TIMED_OUT, 0.0, "no time left for it"))
        limit = min(seconds, left)
        rc, stdout, stderr = run_process(command, limit, self.environment)
        note = f"stopped after {limit:.0f} s" if rc == TIMED_OUT else ""
        if output:
            (self.out / output).write_bytes(stdout)
            if rc == 0 and not is_json(stdout):
                rc, note = 1, "its standard output is not JSON"
        with self._lock:
            self._append(name, command, stderr if output else stdout + stderr)
            return self._finish(Result(name, rc, round(time.monotonic() - began, 1), note))

    def retract(self) -> None:
        """Drop the last result, for a part that another way of doing it replaces."""
        self.results.pop()

    def _append(self, name: str, command: Sequence[str], printed: bytes) -> None:
        with self.log.open("ab") as log:
            log.write(f"==== {name}: {' '.join(command)}\n".encode())
            log.write(printed[-LOG_BYTES:].rstrip() + b"\n\n")

    def _finish(self, result: Result) -> Result:
        print(f"{result.name}: {outcome(result)}", file=sys.stderr, flush=True)
        self.results.append(result)
        # Written after every part, so that a run that is cut off leaves what it had.
        summary = {
            "gpu": self.gpu or None,
            "parts": [asdict(result) for result in self.results],
            "seconds": round(time.monotonic() - self.started, 1),
        }
        (self.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        return result


def is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def outcome(result: Result) -> str:
    word = f"FAILED (rc {result.rc})" if result.failed else "ok"
    return f"{word}, {result.seconds:.1f} s" + (f", {result.note}" if result.note else "")


def build(run: GpuRun) -> None:
    """Install the package in place; where that is not allowed, into a directory of its own."""
    if run.part("build", [*PIP, "--editable", "."], 60).failed:
        run.retract()
        site = ROOT / "build" / "gpu_site"
        run.part("build", [*PIP, "--upgrade", "--target", str(site), "."], 60)
        # The checkout itself, where nothing is built, must not come before it.
        run.environment["PYTHONSAFEPATH"] = "1"
        paths = [str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]
        run.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def find_gpu() -> tuple[str, str]:
    """Name, empty if there is none, and architecture of the first GPU; in a process, as the parts are."""
    rc, stdout, stderr = run_process([sys.executable, "-c", FIND_GPU], 60, os.environ)
    if rc != 0:
        sys.stderr.write(stderr.decode(errors="replace"))
    name, architecture, *_ = [*stdout.decode().splitlines(), "", ""] if rc == 0 else ["", ""]
    return name, architecture


def compile_ahead(run: GpuRun, architecture: str) -> None:
    """Compile the kernels of the benchmarks on all cores; what is launched later is found, not compiled."""
    check = [sys.executable, "-m", "tools.compile_check", "--json"]
    check += ["--targets", architecture, "--cache", run.environment["TRITON_CACHE_DIR"]]
    run.part("compile", check, 75, "compile.json")


def tests(run: GpuRun, shards: int) -> None:
    """The GPU tests in several processes at a time: compiling takes most of it."""

    def shard(number: int) -> None:
        name = f"tests {number + 1}/{shards}"
        pytest = [sys.executable, "-m", "pytest", "-m", "gpu or smoke"]
        pytest += ["-p", "tools.shard", "--shard", f"{number}/{shards}"]
        run.part(name, [*pytest, f"--junitxml={run.out / f'tests_{number + 1}.xml'}"], 170)

    with ThreadPoolExecutor(shards) as pool:
        list(pool.map(shard, range(shards)))


def kernel_backends(run: GpuRun) -> list[str]:
    """The backends to measure: those with kernels for a GPU, or what there is without one."""
    try:
        backends = json.loads((run.out / "environment.json").read_bytes())["backends"]
    except (OSError, ValueError, KeyError):
        backends = {}
    available = [name for name, backend in backends.items() if backend["available"]]
    wanted = ("triton", "cuda") if run.gpu else ("cpu",)
    return [name for name in wanted if name in available] or ["torch"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--allow-cpu", action="store_true", help="run the parts without a GPU too")
    arguments = parser.parse_args(argv)

    gpu, architecture = find_gpu()
    print(f"GPU: {gpu}" if gpu else "no GPU found: torch.cuda.is_available() is False", file=sys.stderr)
    if not gpu and not arguments.allow_cpu:
        print("with --allow-cpu the parts run on the CPU, and GPU tests are skipped", file=sys.stderr)
        return 1

    run = GpuRun(Path(os.environ.get("OUT") or ROOT / "build" / "gpu").resolve(), gpu)
    device = "cuda" if gpu else "cpu"
    build(run)
    run.part("environment", [*COMMAND_LINE, "env", "--json"], 40, "environment.json")
    if architecture in TARGETS:
        compile_ahead(run, architecture)
    for backend in kernel_backends(run):
        kernels = [*COMMAND_LINE, "bench", "kernels", "--backend", backend, "--seconds", "1", "--json"]
        run.part(f"kernels {backend}", kernels, 120, f"kernels_{backend}.json")
    decode = [*COMMAND_LINE, "bench", "decode", "--device", device, "--repeats", "1", "--json"]
    decode += ["--cases", "together", "greedy", "generate"]
    run.part("decode", decode, 90, "decode.json")
    tests(run, max(1, min(MOST_SHARDS, (os.cpu_count() or 1) // 2)))
    run.part("demo", [*COMMAND_LINE, "demo", "--json", "--device", device], 60, "demo.json")

    for result in run.results:
        print(f"{result.name:<14} {outcome(result)}")
    print(f"files: {run.out}")
    return int(any(result.failed for result in run.results))


if __name__ == "__main__":
    sys.exit(main())
