"""What the kernels that more than one op launches have to do."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    # Each program loads its rows of the states and its rows of the tables, these like its neighbour.
    joined = min(JOINED, launch["tiles_of_rows"])
    loaded = launch.programs * sum(
        min(rows, tile[0]) * width * state.element_size() + tile[1] * width * table.element_size() / joined
        for state, table, width in zip(states, tables, widths, strict=True)
    )
    loaded += size(*reads)
    return Work(
        rows * vocabulary,
        reads=[*states, *tables, *reads],
        writes=writes,
        loaded=loaded,
        products=[whole],
    )


def _product(launch: Launch) -> Work:
    writes = [launch["product_ptr"]]
    if launch["SPLIT"]:
        writes.append(launch["rest_ptr"])
    return vocabulary_tiles(launch, writes=writes)


def _weighted_rows(launch: Launch) -> Work:
    weights, tables, widths = launch["weights_ptr"], launch["tables"], launch["widths"]
    rows, vocabulary, split = launch["rows"], launch["vocabulary"], launch["split_size"]
    splits = math.ceil(vocabulary / split)
    tile, columns = (launch["ROWS"], launch["WIDTH"]), launch["COLUMNS"]
    kind = 1 if launch["SOFTMAX"] else terms(weights, tables[0])
    steps = [math.ceil(min(split, vocabulary - start) / columns) for start in range(0, vocabulary, split)]
    tiles = launch["tiles_of_rows"] * launch["tiles_of_width"]
    step = 2.0 * tile[0] * tile[1] * columns * kind
    # Each tile of the widths loads the weights anew, like its neighbour; each tile of the rows the tables.
    tiles_of_width = launch["tiles_of_width"]
    loaded = tiles_of_width * size(weights) / min(JOINED, tiles_of_width)
    loaded += launch["tiles_of_rows"] * size(*tables)
    return Work(
        rows * vocabulary,
        reads=[weights, *tables],
        writes=[(launch["partial_ptr"], 4 * splits * rows * sum(widths))],
        loaded=loaded,
        products=[Product(tiles * sum(steps) * step, step)],
    )


def _joined_rows(launch: Launch) -> Work:
    rows, splits, mix = launch["rows"], launch["splits"], launch["mix_ptr"]
    read = launch["partial_ptr"], 4 * splits * rows * launch["table_width"]
    return Work(mix.numel(), reads=[read], writes=[mix], passes=splits)


def _slice_sums(launch: Launch) -> Work:
    logits = launch["logits_ptr"]
    return Work(logits.numel(), reads=[logits], writes=[launch["tops_ptr"], launch["totals_ptr"]])


def _joined_sums(launch: Launch) -> Work:
    parts = [launch[name] for name in ("tops_ptr", "totals_ptr", "keys_ptr")]
    return Work(parts[0].numel(), reads=parts, writes=[launch["top_ptr"], launch["total_ptr"]])


def _row_totals(launch: Launch) -> Work:
    parts = launch["parts_ptr"]
    passes = math.ceil(launch["parts"] / launch["COLUMNS"])
    return Work(parts.numel(), reads=[parts], writes=[launch["totals_ptr"]], passes=passes)


def _gumbel_noise(launch: Launch) -> Work:
    noise = launch["noise_ptr"]
    return Work(noise.numel(), reads=[noise] if launch["ADD"] else [], writes=[noise])


WORK = {
    "vocabulary_product._vocabulary_product_kernel": _product,
    "weighted_rows._weighted_rows_kernel": _weighted_rows,
    "weighted_rows._join_kernel": _joined_rows,
    "softmax_sums._slice_kernel": _slice_sums,
    "softmax_sums._join_kernel": _joined_sums,
    "row_totals._row_totals_kernel": _row_totals,
    "gumbel._gumbel_noise_kernel": _gumbel_noise,
}
