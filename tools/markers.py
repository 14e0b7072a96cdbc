"""Sections of documents between the markers ``<!-- name:begin -->`` and ``<!-- name:end -->``."""

from __future__ import annotations


def replaced(text: str, name: str, section: str) -> str:
    """``text`` with ``section`` between the markers of ``name``.

    Raises:
        ValueError: a marker is not there.
    """
    begin, end = (f"<!-- {name}:{edge} -->" for edge in ("begin", "end"))
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"no {begin} … {end}")
    return f"{head}{begin}\n{section}\n{end}{tail}"
