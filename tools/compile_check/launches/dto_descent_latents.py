"""Launches of dto_descent_latents: h and its moments are float32, head and G are what the dtype says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from nabla_fast.triton_kernels.common import presets
from nabla_fast.triton_kernels.dto_descent_latents import dto_descent_latents
from tools.compile_check.recording import Launch
from tools.compile_check.work import JOINED, Memory, Product, Work, size

ROWS, FEW, VOCABULARY, HIDDEN, ITERS = 16, 2, 151_936, 4096, 2


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    if dtype == torch.float16:
        return
    kind = "half" if dtype == torch.bfloat16 else "float32"
    # The widest rows that the target reads once.
    few_width = presets.config("dto_descent_latents", kind, torch.device("meta"))["FEW_WIDTH"]
    schedule = torch.empty(ITERS, dtype=torch.float64, device="meta")
    for rows, hidden, how in ((ROWS, HIDDEN, "two passes"), (FEW, few_width, "one pass")):
        head = torch.empty(VOCABULARY, hidden, dtype=dtype, device="meta")
        h, first, second = (torch.empty(rows, hidden, device="meta") for _ in range(3))
        grad = torch.empty(rows, VOCABULARY, device="meta")
        step = torch.empty(rows, dtype=torch.int64, device="meta")
        arguments = (h, head, grad, first, second, step, schedule)
        plain = {"until": None, "group": None, "tau": 1.0, "noise": None}
        everything = {"until": step, "group": step, "tau": 1.0, "noise": (step, step)}
        yield how, partial(dto_descent_latents, *arguments, **plain)
        if dtype == torch.bfloat16:
            yield f"{how}, noise, groups", partial(dto_descent_latents, *arguments, **everything)


def _verdict(launch: Launch) -> Work:
    sums = launch["sums_ptr"]
    return Work(launch.programs * launch["slices"], reads=[sums], writes=[launch["steps_ptr"]])


def _step(launch: Launch) -> Work:
    state = [launch[name] for name in ("h_ptr", "first_ptr", "second_ptr")]
    partial = launch["partial_ptr"], 8 * launch["splits"] * state[0].numel()
    passes = math.ceil(launch["splits"] / launch["SPLITS"])
    return Work(state[0].numel(), reads=[*state, partial], writes=state, passes=passes)


def _terms(launch: Launch) -> int:
    """Of a float32 operand that meets the head."""
    return 3 if launch["head_ptr"].dtype == torch.bfloat16 else 1


def _logits_product(launch: Launch, tiles: int) -> Product:
    """head·hᵀ of so many tiles of tokens and rows."""
    step = 2.0 * launch["TOKENS"] * launch["ROWS"] * launch["DEPTH"] * _terms(launch)
    return Product(tiles * step * math.ceil(launch["width"] / launch["DEPTH"]), step)


def _logits(launch: Launch) -> Work:
    h, head, y = launch["h_ptr"], launch["head_ptr"], launch["y_ptr"]
    width = launch["width"]
    rows = min(launch["rows"], launch["ROWS"])
    loaded = launch.programs * width * (launch["TOKENS"] * head.element_size() + 4 * rows)
    product = _logits_product(launch, launch.programs)
    return Work(y.numel(), reads=[h, head], writes=[y], loaded=loaded, products=[product])


def _tiles_of_split(launch: Launch) -> int:
    return math.ceil(min(launch["split_size"], launch["vocabulary"]) / launch["TOKENS"])


def _sums(launch: Launch) -> Work:
    y, grad = launch["y_ptr"], launch["grad_ptr"]
    passes = _tiles_of_split(launch)
    return Work(y.numel(), reads=[y, grad], writes=[launch["sums_ptr"]], passes=passes)


def _pull(launch: Launch) -> Work:
    y, grad, head = launch["y_ptr"], launch["grad_ptr"], launch["head_ptr"]
    tiles = _tiles_of_split(launch)
    step = 2.0 * launch["WIDTH"] * 2 * launch["ROWS"] * launch["TOKENS"] * _terms(launch)
    loaded = launch["tiles_of_rows"] * size(head) + launch["tiles_of_width"] * (size(y) + size(grad))
    return Work(
        y.numel(),
        reads=[y, grad, head],
        writes=[(launch["partial_ptr"], 8 * launch["splits"] * launch["rows"] * launch["width"])],
        loaded=loaded,
        products=[Product(launch.programs * tiles * step, step)],
    )


def _one_pass(launch: Launch) -> Work:
    states, head, grad = launch["states_ptr"], launch["head_ptr"], launch["grad_ptr"]
    rows, width, splits = launch["rows"], launch["width"], launch["splits"]
    tiles, terms = _tiles_of_split(launch), _terms(launch)
    noise = [] if launch["noise_ptr"] is None else [launch["noise_ptr"]]
    pulls = launch["partial_ptr"] is not None
    held = launch["HOLD"] if pulls else 0
    # Every tile of tokens reads h, which its neighbours read at the same time.
    loaded = launch["tiles_of_rows"] * size(head) + splits * tiles * size(states) / min(JOINED, splits)
    writes: list[Memory] = [launch["sums_ptr"]]
    # A product's lines: three terms of a row and nothing, or one. Held chunks are in no loop of their own.
    step = 2.0 * launch["TOKENS"] * launch["ROWS"] * (4 if terms == 3 else 1) * launch["DEPTH"]
    products = [Product(launch.programs * tiles * step * (launch["CHUNKS"] - held), step)]
    if pulls:
        products.insert(0, Product(launch.programs * tiles, 1.0))
        loaded += launch["tiles_of_rows"] * size(head) * (1 - held / launch["CHUNKS"])
        writes.append((launch["partial_ptr"], 8 * splits * rows * width))
    return Work(
        rows * launch["vocabulary"],
        reads=[states, head, grad, *noise],
        writes=writes,
        loaded=loaded,
        products=products,
        passes=tiles,
    )


def _begin(launch: Launch) -> Work:
    # A few numbers: the corrections of the steps, and the team of a row.
    return Work(max(launch["iters"], launch.programs), writes=[launch["corrections_ptr"]])


WORK = {
    "dto_descent_latents._begin_kernel": _begin,
    "dto_descent_latents._verdict_kernel": _verdict,
    "dto_descent_latents._step_kernel": _step,
    "latents_passes.logits_kernel": _logits,
    "latents_passes.sums_kernel": _sums,
    "latents_passes.pull_kernel": _pull,
    "latents_passes.one_pass_kernel": _one_pass,
}
