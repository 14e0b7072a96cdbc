"""The command ``nabla-fast``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nabla_fast._version import __version__
from nabla_fast.cli.interrupts import terminated_as_interrupted
from nabla_fast.cli.output import give_up_stdout, make_writable, say

INTERRUPTED = 130  # the shell's code for a command ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0 is success, 1 an error met while working, 2 bad input, 130 Ctrl-C or a request to terminate.
    """
    make_writable()
    try:
        with terminated_as_interrupted():
            status = _run(argv)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt as interrupt:
        return _fail(interrupt if str(interrupt) else "interrupted", INTERRUPTED)
    except BrokenPipeError:
        give_up_stdout()
        return _fail("nobody reads standard output any more", 1)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it parses has the command as ``run``."""
    from nabla_fast.cli import bench, demo, env, generate
    from nabla_fast.cli.options import CommandParser

    parser = CommandParser(prog="nabla-fast", description="Gradient-guided decoding, made cheap.")
    parser.add_argument("--version", action="version", version=f"nabla-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in (demo, generate, bench, env):
        module.add_parser(commands)
    return parser


def _run(argv: Sequence[str] | None) -> int:
    from nabla_fast.errors import BackendUnavailable, DecodingFailed, InputError, ModelError

    arguments = make_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (InputError, ModelError, BackendUnavailable) as error:
        return _fail(error, 2)
    except BrokenPipeError:
        raise
    except (DecodingFailed, OSError) as error:
        return _fail(error, 1)


def _fail(message: object, status: int) -> int:
    say(message)
    return status
