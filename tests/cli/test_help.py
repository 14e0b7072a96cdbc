"""``--help``: every option of every command has a help text and shows its default once."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from nabla_fast import DTOConfig, SamplingConfig
from nabla_fast.cli import main, make_parser
from nabla_fast.cli.options import CommandParser


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


PARSERS = {parser.prog: parser for parser in parsers(make_parser())}


def shown(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """The option's help as it is printed, on one line."""
    formatter = parser._get_formatter()
    return " ".join(formatter._expand_help(action).split())


def test_every_command_is_read():
    assert set(PARSERS) >= {
        "nabla-fast",
        "nabla-fast demo",
        "nabla-fast generate",
        "nabla-fast bench",
        "nabla-fast bench kernels",
        "nabla-fast bench decode",
        "nabla-fast bench launch",
        "nabla-fast env",
    }


@pytest.mark.parametrize("prog", PARSERS)
def test_every_option_says_what_it_does_and_its_default(prog: str):
    parser = PARSERS[prog]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            assert all(choice.help for choice in action._choices_actions)
            continue
        text = shown(parser, action)
        said = text.split(" (default: ")[0]
        assert said.strip(), action.option_strings
        if isinstance(action, argparse._HelpAction | argparse._VersionAction):
            continue
        assert text.count("default") == 1, text
        assert text.endswith(")"), text
        if not isinstance(action.default, bool | None) and action.default != []:
            assert text.endswith(f"(default: {action.default})"), text
    assert parser.format_help()


@pytest.mark.parametrize("command", ["demo", "generate"])
def test_every_setting_is_an_option(command: str):
    flags = PARSERS[f"nabla-fast {command}"]._option_string_actions
    for name in (*DTOConfig.names(), *(f"resample_{n}" for n in vars(SamplingConfig()))):
        if not name.endswith("_sampling"):
            assert f"--{name.replace('_', '-')}" in flags


def test_defaults_in_words():
    parser = CommandParser()
    parser.add_argument("--share", default="5%", help="a share")
    parser.add_argument("--fast", action=argparse.BooleanOptionalAction, default=True, help="be fast")
    parser.add_argument("--quiet", action="store_true", help="be quiet")
    parser.add_argument("--file", help="a file")
    parser.add_argument("--threads", help="threads (default: all)")
    texts = [shown(parser, action) for action in parser._actions[1:]]
    assert texts == [
        "a share (default: 5%)",
        "be fast (default: yes)",
        "be quiet (default: no)",
        "a file (default: none)",
        "threads (default: all)",
    ]


def test_help_and_version_end_with_0(capsys):
    for flag in ("--help", "--version"):
        with pytest.raises(SystemExit) as ended:
            main([flag])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(("usage: nabla-fast", "nabla-fast "))
