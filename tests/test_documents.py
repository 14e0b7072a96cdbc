"""Figures in the documents come from committed results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "nabla_fast/assets/README.md")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tables_are_those_of_the_results(name: str):
    readme = pytest.importorskip("tools.tables", reason="not run from a checkout")
    document = ROOT / name
    assert readme.updated(document) == document.read_text()


def test_links_in_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
