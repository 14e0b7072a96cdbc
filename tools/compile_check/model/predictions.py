"""Predictions of all cases: made by compiling, kept as JSON, computed from the counts in it."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tools.compile_check.model import timing
from tools.compile_check.model.hardware import H200, Hardware
from tools.compile_check.model.timing import Counts

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "compile_check"
NOW, FORMER = RESULTS / "predictions.json", RESULTS / "predictions_former.json"
CUDA = RESULTS / "predictions_cuda.json"  # of csrc/cuda
FAMILIES = ("mixes", "statistics", "descent", "latents", "attention")


@dataclass(frozen=True)
class Prediction:
    """Counts of a case of a family, without tensors: attributes as of :class:`~.cases.Case`."""

    family: str
    op: str
    of: str
    rows: int
    flops: float
    bytes: float
    goal: float | None
    goal_seconds: float | None
    launches: tuple[Counts, ...]

    @property
    def key(self) -> tuple[str, str, int]:
        return self.op, self.of, self.rows

    def seconds(self, constants: Hardware = H200) -> float:
        """Predicted, in a graph."""
        return timing.seconds(self.launches, constants)

    def limit(self, constants: Hardware = H200) -> float:
        return timing.limit(self.flops, self.bytes, constants)

    def share(self, constants: Hardware = H200) -> float:
        """Predicted share of the limit."""
        return self.limit(constants) / self.seconds(constants)

    @property
    def limited_by(self) -> str:
        return "products" if self.flops / H200.product_flops > self.bytes / H200.bandwidth else "memory"


def make(families: Sequence[str], workers: int, cache: str | None = None) -> list[Prediction]:
    """Compile what the cases launch, and count; ``cache`` is where what is compiled is kept."""
    tasks = [(family, number) for family in families for number in range(4)]
    with contextlib.ExitStack() as stack:
        cache = cache or stack.enter_context(tempfile.TemporaryDirectory())
        os.environ |= {"TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        os.environ.pop("TRITON_INTERPRET", None)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            return [made for part in pool.map(_make, *zip(*tasks, strict=True)) for made in part]


def _make(family: str, number: int) -> list[Prediction]:
    """Those of one number of rows, the ``number``-th; none if there are fewer."""
    from tools.compile_check.model.trace import trace

    cases = list(importlib.import_module(f"tools.compile_check.model.{family}").cases())
    rows = sorted({case.rows for case in cases}, reverse=True)[number : number + 1]
    names = [name for name in Prediction.__dataclass_fields__ if name not in ("family", "launches")]
    return [
        Prediction(family, *(getattr(case, name) for name in names), launches=tuple(trace(case.call)))
        for case in cases
        if case.rows in rows
    ]


def store(predictions: Sequence[Prediction], path: Path, compiler: str) -> None:
    """Keep counts of what ``compiler``, a name and its release, has compiled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = ",\n".join(map(_as_text, predictions))
    path.write_text(f'{{"compiler": "{compiler}", "target": "sm_90", "cases": [\n{cases}\n]}}\n')


def _as_text(made: Prediction) -> str:
    """JSON with a line for each launch."""
    case = json.dumps({name: value for name, value in vars(made).items() if name != "launches"})
    launches = ",\n  ".join(json.dumps(counts.as_json()) for counts in made.launches)
    return f'{case[:-1]}, "launches": [\n  {launches}]}}'


def load(path: Path) -> tuple[str, list[Prediction]]:
    """The compiler, and the predictions."""
    told = json.loads(path.read_text())
    return told["compiler"], [
        Prediction(**{**row, "launches": tuple(Counts(**counts) for counts in row["launches"])})
        for row in told["cases"]
    ]


def moved(constants: Hardware, name: str, by: float) -> Hardware:
    """With one constant times ``by``."""
    return replace(constants, **{name: by * getattr(constants, name)})


def sensitivities(prediction: Prediction, names: Sequence[str], by: float) -> Iterator[tuple[float, float]]:
    """The share where each constant is smaller and larger by the part ``by``."""
    for name in names:
        low, high = (prediction.share(moved(H200, name, 1 + sign * by)) for sign in (-1, 1))
        yield low, high
