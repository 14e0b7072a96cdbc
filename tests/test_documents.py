"""Documents: their snippets run and print what they say, links lead somewhere, tables are the results'."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import nabla_fast
from nabla_fast import _native, cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "nabla_fast" / "assets" / "README.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

MOST_README_LINES = 150
NEED_KERNELS = {"backends.md", "c_interface.md", "extending.md"}  # pages that call the C++ kernels by name
APART = {"extending.md"}  # a page that registers ops, which other tests would find

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^ *```\n"
    r"(?: *<!-- output -->\n *```text\n(?P<output>.*?)^ *```\n)?",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\(([^)\s:]+)\)")
ROOMS = "nabla_fast|csrc|triton_kernels|tests|tools|benchmarks|examples|docs"
PATH = re.compile(rf"\b((?:{ROOMS})/(?:[\w./-]|<op>)*)")
# Numbers with a point: their last digits differ between CPUs and releases of torch.
REAL = re.compile(r"-?\d+\.\d+")


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    code: str
    output: str | None  # what it prints, where the page says so
    line: int  # of the page, from 1, at which the code begins


def blocks(page: Path, language: str) -> list[Block]:
    """The page's blocks of a language, in order."""
    text = page.read_text()
    return [
        Block(
            language,
            textwrap.dedent(match["code"]),
            None if match["output"] is None else textwrap.dedent(match["output"]),
            text[: match.start("code")].count("\n") + 1,
        )
        for match in FENCE.finditer(text)
        if match["language"] == language
    ]


def pages_with(language: str) -> list[object]:
    """The pages that have blocks of a language, as parameters."""
    return [pytest.param(page, id=page.name) for page in PAGES if blocks(page, language)]


def assert_prints(page: Path, block: Block, printed: str) -> None:
    """A block printed what the page says, up to the last digits of real numbers."""
    where = f"{page.name}, line {block.line}"
    said = block.output or ""
    assert REAL.sub("#", printed) == REAL.sub("#", said), where
    numbers = [[float(number) for number in REAL.findall(text)] for text in (printed, said)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=0.051), where


def require_kernels(page: Path) -> None:
    """Skips where a page needs the C++ kernels and there is no compiler."""
    if page.name in NEED_KERNELS and not _native.available():
        pytest.skip(_native.why_missing())


# -- snippets ----------------------------------------------------------------------------------------


def run_here(page: Path, code: Sequence[Block]) -> Iterator[str]:
    """Output of each block; they share a namespace."""
    namespace = {"__name__": "__main__"}
    for block in code:
        # Tracebacks name the lines of the page.
        compiled = compile("\n" * (block.line - 1) + block.code, page, "exec", dont_inherit=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compiled, namespace)
        yield printed.getvalue()


def run_apart(page: Path, code: Sequence[Block]) -> list[str]:
    """Output of each block, in a process of their own."""
    end = "--- end of a block"
    script = "".join(f"{block.code}\nprint({end!r})\n" for block in code)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split(f"{end}\n")[:-1]


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs_and_prints_what_the_page_says(page: Path):
    require_kernels(page)
    code = blocks(page, "python")
    run = run_apart if page.name in APART else run_here
    for block, printed in zip(code, run(page, code), strict=True):
        if block.output is not None:
            assert_prints(page, block, printed)


@pytest.mark.parametrize("page", pages_with("c"))
def test_c_compiles_and_prints_what_the_page_says(page: Path, tmp_path: Path):
    compiler = shutil.which("cc") or pytest.skip("needs cc")
    try:
        library = nabla_fast.get_library()
    except RuntimeError as error:
        pytest.skip(str(error))
    for block in blocks(page, "c"):
        source, program = tmp_path / "program.c", tmp_path / "program"
        source.write_text(block.code)
        flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{nabla_fast.get_include()}"]
        link = [library, f"-Wl,-rpath,{Path(library).parent}", "-lm"]
        subprocess.run([compiler, *flags, source, *link, "-o", program], check=True, timeout=120)
        result = subprocess.run([program], capture_output=True, text=True, check=True, timeout=120)
        assert_prints(page, block, result.stdout)


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Puts arguments through the command line's parser, and runs nothing."""

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, *arguments: object) -> None:
        parse(self, *arguments)
        raise Parsed

    def check(words: list[str]) -> None:
        with pytest.raises(Parsed):
            cli.main(words)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    return check


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", pages_with("sh"))
def test_commands_are_there(page: Path, parses: Callable[[list[str]], None]):
    for block in blocks(page, "sh"):
        for line in block.code.splitlines():
            words = shlex.split(line, comments=True)
            words = words[: words.index(">")] if ">" in words else words
            program, *rest = words or [""]
            if program == "nabla-fast":
                parses(rest)
            elif program == "make":
                assert set(rest) <= make_targets(), line
            elif program == "pytest":
                assert (ROOT / rest[0]).exists(), line
            elif words[:2] == ["python", "-m"]:
                assert (ROOT / f"{words[2].replace('.', '/')}.py").exists(), line
            else:
                assert program in ("", "pip", "cc", "cmake", "export"), line


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(example: Path, capsys: pytest.CaptureFixture[str]):
    runpy.run_path(str(example), run_name="__main__")
    captured = capsys.readouterr()
    assert captured.out
    assert not captured.err


# -- references --------------------------------------------------------------------------------------


def anchors(document: Path) -> set[str]:
    """Names of a document's headings, as GitHub makes them."""
    text = FENCE.sub("", document.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    for link in LINK.findall(FENCE.sub("", document.read_text())):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_named_are_there(page: Path):
    """In diagrams, tables and text; ``<op>`` stands for an op that has all of them."""
    generated = re.sub(r"<!-- ([\w-]+):begin -->.*?<!-- \1:end -->", "", page.read_text(), flags=re.DOTALL)
    for name in PATH.findall(generated):
        path = ROOT / name.rstrip(".").replace("<op>", "embedding_mix")
        assert path.exists() or path.is_relative_to(ROOT / "benchmarks" / "results"), name


def test_every_function_of_the_c_interface_is_named():
    header = (Path(nabla_fast.get_include()) / "nabla_fast.h").read_text()
    functions = set(re.findall(r"NABLA_FAST_API\s+[\w\s*]+?(nabla_fast_\w+)\(", header))
    page = (ROOT / "docs" / "c_interface.md").read_text()
    missing = {name for name in functions if f"`{name}`" not in page}
    assert {name for name in missing if not name.endswith("_workspace")} == set()


def test_the_readme_is_short_and_links_to_every_page():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= MOST_README_LINES
    linked = {(ROOT / link).resolve() for link in LINK.findall(readme)}
    assert {page for page in PAGES if page.name != "README.md"} <= linked


# -- tables ------------------------------------------------------------------------------------------


def test_tables_are_those_of_the_results():
    tables = pytest.importorskip("tools.tables", reason="not run from a checkout")
    for document in tables.DOCUMENTS:
        assert tables.updated(document) == document.read_text(), document
