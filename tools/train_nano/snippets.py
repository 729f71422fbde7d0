"""Small Python and shell facts for training questions, from `tables/snippets.toml`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.train_nano.tables import read_table

_SNIPPETS = read_table("snippets")


def _pairs(name: str) -> tuple[tuple[str, str], ...]:
    return tuple((first, second) for first, second in _SNIPPETS[name])


# Name, purpose (after "Write a Python function that"), source.
FUNCTIONS: tuple[tuple[str, str, str], ...] = tuple(
    (row["name"], row["purpose"], row["source"]) for row in _SNIPPETS["functions"]
)
EXPRESSIONS = _pairs("expressions")  # expression, the repr of its value
MEANINGS = _pairs("meanings")  # Python word, its meaning
ERRORS = _pairs("errors")  # exception, when it is raised
QUESTIONS: Mapping[str, Mapping[str, Any]] = _SNIPPETS["questions"]  # by the table that they are on
SHELL = _pairs("shell")  # purpose, command
