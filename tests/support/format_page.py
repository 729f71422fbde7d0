"""docs/format.md as data: the names in it, and its tables."""

from __future__ import annotations

import re

from tests.support.places import ROOT

PAGE = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")


def named(text: str) -> set[str]:
    """Return every name in backticks, without the shapes behind names."""
    return {re.sub(r"\[.*\]", "", part) for quoted in re.findall(r"`([^`]+)`", text) for part in quoted.split(", ")}


def section(title: str) -> str:
    """Return what follows a heading, up to the next one."""
    _, _, rest = PAGE.partition(f"## {title}\n")
    return rest.partition("\n## ")[0]


def tables() -> list[tuple[str, str, str]]:
    """Return the rows of the tables of signatures: what they are called, their inputs and their outputs."""
    rows = []
    for table in re.findall(r"^\| (?:signature|graph) \|.*\n\|---.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE):
        for line in table.splitlines():
            name, inputs, outputs = (cell.strip() for cell in line.strip("|").split(" | "))
            rows.append((name, inputs, outputs))
    return rows


def pattern(name: str) -> re.Pattern[str]:
    """Return what matches the names that a name with `{N}` or `…` stands for."""
    escaped = re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(name))
    return re.compile(escaped.replace("…", ".*"))
