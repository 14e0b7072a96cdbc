"""A pytest plugin for one of several processes that share a run: ``-p tools.shard --shard 2/8``.

On a GPU most of a test's time goes into compiling kernels, by one thread.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", help="K/N: the tests K, K + N, K + 2N, … of all")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # After the selection by marks, so that the tests left are shared evenly.
    number, shards = map(int, config.getoption("--shard").split("/"))
    others = [item for n, item in enumerate(items) if n % shards != number]
    config.hook.pytest_deselected(items=others)
    items[:] = items[number::shards]
