"""Imports run one way: from the commands down to the ops, and never back up."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nabla_fast

PACKAGE = Path(nabla_fast.__file__).parent
KERNELS = PACKAGE / "triton_kernels"
if not KERNELS.is_dir():  # a checkout, where they lie outside
    KERNELS = PACKAGE.parent / "triton_kernels"

# The rooms of the package, each of which may import itself and those before it.
ROOMS = (
    "nabla_fast._version",
    "nabla_fast.results",
    "nabla_fast.errors",
    "nabla_fast.config",
    "nabla_fast._triton",
    "nabla_fast._native",
    "nabla_fast.plans",
    "nabla_fast.triton_kernels",
    "nabla_fast.ops",
    "nabla_fast.models",
    "nabla_fast.decode",
    "nabla_fast.integrations",
    "nabla_fast.decoder",
    "nabla_fast.sampler",
    "nabla_fast.checkpoints",
    "nabla_fast.env",
    "nabla_fast.demo",
    "nabla_fast.bench",
    "nabla_fast.cli",
    "nabla_fast.__main__",
    "nabla_fast",
)

# Rooms within decode: the two loops do not know each other.
APART = {("nabla_fast.decode.reference", "nabla_fast.decode.batched")}


def modules() -> dict[str, Path]:
    """Path of every Python module by its dotted name."""
    found = {}
    for root, prefix in ((PACKAGE, "nabla_fast"), (KERNELS, "nabla_fast.triton_kernels")):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join((prefix, *(part for part in parts if part != "__init__")))
            found[name] = path
    return found


MODULES = modules()


def imported(name: str) -> Iterator[str]:
    """The package's modules that a module imports anywhere: in functions and for types too."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            # A name may be a submodule, before which its package is imported.
            targets = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (target for target in targets if target in MODULES and target != name)


GRAPH = {name: set(imported(name)) for name in MODULES}


def room(name: str) -> int:
    """Index of the room a module stands in."""
    fitting = [index for index, r in enumerate(ROOMS) if name == r or name.startswith(r + ".")]
    return fitting[0]


def test_every_module_stands_in_a_room():
    strangers = [name for name in MODULES if ROOMS[room(name)] == "nabla_fast" and name != "nabla_fast"]
    assert not strangers


def test_no_circle():
    try:
        list(graphlib.TopologicalSorter(GRAPH).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_one_way(name: str):
    up = {target for target in GRAPH[name] if room(target) > room(name)}
    assert not up, f"{name} imports {', '.join(sorted(up))}, which stand above it"


@pytest.mark.parametrize(("left", "right"), sorted(APART))
def test_rooms_that_do_not_know_each_other(left: str, right: str):
    for one, other in ((left, right), (right, left)):
        for name in MODULES:
            if name == one or name.startswith(one + "."):
                crossing = {target for target in GRAPH[name] if target.startswith(other)}
                assert not crossing, f"{name} imports {', '.join(sorted(crossing))}"


def test_the_way_of_a_mix_to_machine_code_is_short():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    listed = page.split("<!-- path: embedding_mix -->")[1].split("\n\n")[0]
    files = re.findall(r"\* `(csrc/[^`]+)`", listed)
    assert len(files) == len(set(files)) <= 12
    assert sum(len((PACKAGE.parent / name).read_text().splitlines()) for name in files) <= 1700
