"""The page of predictions, docs/gpu_predictions.md: tables between markers, from the committed counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.compile_check.model import hardware, predictions, timing
from tools.compile_check.model.hardware import H200
from tools.compile_check.model.predictions import Prediction
from tools.compile_check.model.timing import Counts, Times
from tools.markers import replaced

PAGE = Path(__file__).resolve().parents[3] / "docs" / "gpu_predictions.md"
_MOVED = 0.2
_SMALL = 0.01  # of an op's time: launches below are one line; of a launch's: what is below is not shown


def constants_table() -> str:
    rows = ["| constant | value | source |", "|---|---|---|"]
    rows += [f"| {name} | {value / unit:g} | {source} |" for _, value, unit, name, source in _constants()]
    return "\n".join(rows)


def _constants() -> list[tuple[str, float, float, str, str]]:
    return hardware.constants()


def shares_table(
    made: Sequence[Prediction], others: Sequence[Prediction], title: str = "of the former kernels"
) -> str:
    """Predicted times and shares, beside those of other kernels."""
    beside = {one.key: one for one in others}
    rows = [
        f"| op | of | N | limit | *predicted* time | *predicted* share | {title} | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in made:
        old = beside.get(one.key)
        cells = [
            f"`{one.op}`",
            one.of,
            f"{one.rows}",
            f"{_time(one.limit())} ({one.limited_by})",
            _time(one.seconds()),
            _share(one.share()),
            "–" if old is None else f"{_share(old.share())}, {_time(old.seconds())}",
            _goal(one),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _goal(one: Prediction) -> str:
    if one.goal_seconds is not None:
        return f"≤ {_time(one.goal_seconds)}"
    return "–" if one.goal is None else f"≥ {one.goal:.0%}"


def sensitivity_table(made: Sequence[Prediction]) -> str:
    """Each share with each constant 20 % smaller and 20 % larger."""
    names = [name for name, *_ in _constants()]
    titles = [title.split(",")[0] for *_, title, _ in _constants()]
    rows = [f"| op | of | N | share | {' | '.join(titles)} |", "|---|---|---|---|" + "---|" * len(titles)]
    for one in made:
        moved = [
            f"{_share(low)}–{_share(high)}" if _share(low) != _share(high) else "·"
            for low, high in predictions.sensitivities(one, names, _MOVED)
        ]
        rows.append(f"| `{one.op}` | {one.of} | {one.rows} | {_share(one.share())} | {' | '.join(moved)} |")
    return "\n".join(rows)


def arithmetic(made: Sequence[Prediction]) -> str:
    """Every prediction with its numbers put in."""
    return "\n\n".join(_one(prediction) for prediction in made)


def _one(one: Prediction) -> str:
    whole = one.seconds()
    products = f"{one.flops:.4g} FLOP / {H200.product_flops / 1e12:g} TFLOP/s"
    memory = f"{one.bytes / 1e6:,.1f} MB / {H200.bandwidth / 1e12:g} TB/s"
    lines = [
        f"**`{one.op}`, {one.of}, N = {one.rows}**: limit "
        f"{products if one.limited_by == 'products' else memory} = {_time(one.limit())}; *predicted* "
        f"{_time(whole)}, {_time(one.limit())} / {_time(whole)} = {_share(one.share())}.",
        "",
    ]
    rest, number = 0.0, 0
    for counts in one.launches:
        took = timing.times(counts, H200)
        if counts.launches * took.total < _SMALL * whole:
            rest += counts.launches * took.total
            number += counts.launches
        else:
            lines.append(f"* {_launch(counts, took)}")
    if number:
        lines.append(f"* {number} more, each kind below 1 %: {_time(rest)}")
    return "\n".join(lines)


def _launch(counts: Counts, took: Times) -> str:
    """A kind of launch: each of its times, how they join, and how often."""
    clock = f"{H200.clock / 1e9:g} GHz"
    own = math.ceil(counts.programs / hardware.MULTIPROCESSORS)
    parts: list[tuple[str, float, str]] = [
        ("memory", took.memory, f"{_mega(counts.memory)} / {H200.bandwidth / 1e12:g} TB/s"),
        ("L2", took.l2, f"{_mega(counts.l2)} / {H200.l2_bandwidth / 1e12:g} TB/s"),
    ]
    if not counts.programs:
        rate = f"{counts.products:.4g} FLOP / {H200.product_flops / 1e12:g} TFLOP/s"
        parts.append(("products", took.products, rate))
        how = "the longest"
    else:
        warps = f"{own} × {counts.warps} / {hardware.SLOTS}"
        if own * counts.warps < hardware.SLOTS:
            warps = "1"
        parts.append(("issue", took.issue, f"{warps} × {counts.issue:,.0f} cycles / {clock}"))
        rates = [
            f"{flops:.4g} FLOP / {rate / 1e12:g} TFLOP/s"
            for flops, rate in (
                (counts.products, H200.product_flops),
                (counts.warp_products, H200.warp_product_flops),
            )
            if flops
        ]
        joined = " + ".join(rates)
        parts.append(
            ("products", took.products, f"{own} × {hardware.MULTIPROCESSORS} × ({joined})" if rates else "")
        )
        shared = f"{own} × {counts.shared:,.0f} B / ({hardware.SHARED_BYTES} B × {clock})"
        parts.append(("shared memory", took.shared, shared))
        barriers = f"{own} × {counts.barriers:,.0f} × {H200.barrier_cycles:g} cycles / {clock}"
        parts.append(("barriers", took.barriers, barriers))
        how = _joined(counts)
    least = _SMALL * took.total
    told = "; ".join(f"{name} {text} = {_time(value)}" for name, value, text in parts if value >= least)
    if not told:
        told = "next to nothing"
    launch = _time(H200.launch_seconds)
    return f"`{counts.name}` × {counts.launches}: {told}; {how} + {launch} = {_time(took.total)}"


def _joined(counts: Counts) -> str:
    if counts.resident > 1:
        return f"{counts.resident} blocks a multiprocessor: the longest"
    if not counts.products and not counts.warp_products:
        return "one block: the longer of issue and shared memory + barriers + the longer of memory and L2"
    if counts.asynchronous:
        return "one block, asynchronous: the longest, barriers added to issue and shared memory"
    return "one block: the longer of issue and shared memory + products + barriers; memory or L2 if longer"


def _mega(number: float) -> str:
    return f"{number / 1e6:,.1f} MB" if number < 1e10 else f"{number / 1e9:,.1f} GB"


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _time(seconds: float) -> str:
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    micro = seconds * 1e6
    return f"{micro:.0f} µs" if micro >= 100 else f"{micro:.2g} µs"


def page(
    text: str, made: Sequence[Prediction], former: Sequence[Prediction], cuda: Sequence[Prediction]
) -> str:
    """The page with what stands between its markers made anew.

    Raises:
        ValueError: a marker is not there.
    """
    sections: dict[str, Callable[[], str]] = {
        "constants": constants_table,
        "shares": lambda: shares_table(made, former),
        "sensitivity": lambda: sensitivity_table(made),
        "arithmetic": lambda: arithmetic(made),
        "cuda": lambda: shares_table(cuda, made, "of Triton's kernels"),
        "cuda-arithmetic": lambda: arithmetic(cuda),
    }
    for name, section in sections.items():
        text = replaced(text, name, section())
    return text


def written() -> str:
    """The page as the committed counts have it."""
    _, made = predictions.load(predictions.NOW)
    former = predictions.load(predictions.FORMER)[1] if predictions.FORMER.exists() else []
    _, cuda = predictions.load(predictions.CUDA)
    return page(PAGE.read_text(), made, former, cuda)
