"""Words, facts and names in plain English for training questions, from `tables/words.toml` and `tables/facts.toml`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.train_nano.tables import read_table

Entry = tuple[str, str, str]


def _entries(rows: Mapping[str, Any]) -> dict[str, Entry]:
    return {word: (first, second, definition) for word, (first, second, definition) in rows.items()}


_WORDS, _FACTS = read_table("words"), read_table("facts")
NOUNS = _entries(_WORDS["nouns"])  # plural, category, definition
VERBS = _entries(_WORDS["verbs"])  # past tense, -ing form, definition
ADJECTIVES = _entries(_WORDS["adjectives"])  # opposite, comparative, definition
UNKNOWN: tuple[str, ...] = tuple(_WORDS["unknown"])  # words whose meaning the model does not know
SOUNDS: dict[str, str] = _FACTS["sounds"]  # animal: its sound, as a verb
COLOURS: dict[str, str] = _FACTS["colours"]  # thing: its usual colour
CAPITALS: dict[str, str] = _FACTS["capitals"]  # country: its capital
UNKNOWABLE: tuple[str, ...] = tuple(_FACTS["unknowable"])  # questions that a model without a network cannot answer
NAMES: tuple[str, ...] = tuple(_FACTS["names"])  # first names from many languages
