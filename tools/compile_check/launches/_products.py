"""What the kernels that more than one op launches have to do."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tools.compile_check.recording import Launch
from tools.compile_check.work import JOINED, Memory, Product, Work, size, terms, tile_product


def vocabulary_tiles(launch: Launch, *, writes: Sequence[Memory], reads: Sequence[Memory] = ()) -> Work:
    """Of a kernel that takes ``products.vocabulary_tile`` and no other product."""
    states, tables, widths = launch["states"], launch["tables"], launch["widths"]
    rows, vocabulary = launch["rows"], launch["vocabulary"]
    tile, depth = (launch["ROWS"], launch["COLUMNS"]), launch["DEPTH"]
    kinds = [terms(state, table) for state, table in zip(states, tables, strict=True)]
    products = [
        tile_product(launch.programs, tile, [width], depth, kind)
        for width, kind in zip(widths, kinds, strict=True)
    ]
    # One Product for all tables: their loops are alike.
    whole = Product(sum(product.flops for product in products), products[0].step)
    # Each program loads its rows of the states and its rows of the tables, one of them like its neighbour.
    of_states, of_tables = 1, JOINED
    if states[0].ndim == 3 or launch["tiles_of_rows"] == 1:
        of_states, of_tables = JOINED, 1
    own = min(rows, tile[0])
    loaded = size(*reads) + launch.programs * sum(
        own * width * kind * state.element_size() / of_states
        + tile[1] * width * table.element_size() / of_tables
        for state, table, width, kind in zip(states, tables, widths, kinds, strict=True)
    )
    return Work(
        rows * vocabulary,
        reads=[*states, *tables, *reads],
        writes=writes,
        loaded=loaded,
        products=[whole],
    )


def chunk_of(launch: Launch, name: str, origin: int) -> Tensor:
    """The part of a matrix [N, ..] whose columns are the tokens of the launch's slices.

    Args:
        name: of the launch's argument.
        origin: token of the matrix' first column.
    """
    first = launch["first_slice"] * launch["COLUMNS"]
    return launch[name][:, first - origin : launch["end"] - origin]


def _product(launch: Launch) -> Work:
    return vocabulary_tiles(launch, writes=[launch["product_ptr"]])


def _terms(launch: Launch) -> Work:
    state, terms = launch["state_ptr"], launch["terms_ptr"]
    return Work(state.numel(), reads=[state], writes=[terms])


def _tops(launch: Launch) -> Work:
    logits = chunk_of(launch, "logits_ptr", launch["origin"])
    return Work(logits.numel(), reads=[logits], writes=[(launch["tops_ptr"], 8 * launch.programs)])


def _joined_tops(launch: Launch) -> Work:
    parts = [launch["tops_ptr"], launch["tokens_ptr"]]
    return Work(parts[0].numel(), reads=parts, writes=[launch["token_ptr"], launch["status_ptr"]])


def _weights(launch: Launch) -> Work:
    # Sums are rescaled where a chunk holds a row's largest logit so far by a power of two: seldom.
    logits = chunk_of(launch, "logits_ptr", launch["origin"])
    return Work(logits.numel(), reads=[logits], writes=launch["weights"])


def _divided(launch: Launch) -> Work:
    mix = launch["mix_ptr"]
    return Work(mix.numel(), reads=[(launch["sums_ptr"], 4 * mix.numel())], writes=[mix])


def _slice_sums(launch: Launch) -> Work:
    logits = launch["logits_ptr"]
    return Work(logits.numel(), reads=[logits], writes=[launch["tops_ptr"], launch["totals_ptr"]])


def _joined_sums(launch: Launch) -> Work:
    parts, logits = [launch[name] for name in ("tops_ptr", "totals_ptr")], launch["logits_ptr"]
    # A row's token is looked for in the slice that has the largest logit.
    slice_bytes = launch.programs * launch["LANES"] * launch["TILES"] * logits.element_size()
    reads = [*parts, (logits, min(slice_bytes, size(logits)))]
    return Work(parts[0].numel(), reads=reads, writes=[launch["top_ptr"], launch["total_ptr"]])


def _row_totals(launch: Launch) -> Work:
    parts = launch["parts_ptr"]
    passes = math.ceil(launch["parts"] / launch["COLUMNS"])
    return Work(parts.numel(), reads=[parts], writes=[launch["totals_ptr"]], passes=passes)


def _gumbel_noise(launch: Launch) -> Work:
    noise = launch["noise_ptr"]
    return Work(noise.numel(), reads=[noise] if launch["ADD"] else [], writes=[noise])


WORK = {
    "vocabulary_product._vocabulary_product_kernel": _product,
    "terms._terms_kernel": _terms,
    "row_tops._tops_kernel": _tops,
    "row_tops._join_kernel": _joined_tops,
    "soft_mix._weights_kernel": _weights,
    "soft_mix._divide_kernel": _divided,
    "softmax_sums._slice_kernel": _slice_sums,
    "softmax_sums._join_kernel": _joined_sums,
    "row_totals._row_totals_kernel": _row_totals,
    "gumbel._gumbel_noise_kernel": _gumbel_noise,
}
