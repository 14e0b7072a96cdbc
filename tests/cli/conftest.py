"""Fixtures of the commands' tests: the command line in this process, or in one of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from commands import Commands

from nabla_fast.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line here; returns exit status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Another process that runs one command line after another."""
    commands = Commands(tmp_path_factory.mktemp("commands") / "stderr")
    yield commands
    commands.close()
