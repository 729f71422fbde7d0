"""Questions about small Python code and shell commands."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from tools.train_nano import snippets
from tools.train_nano.exchanges.exchange import Exchange

_ROWS: Mapping[str, Sequence[Sequence[str]]] = {
    "functions": snippets.FUNCTIONS,
    "expressions": snippets.EXPRESSIONS,
    "meanings": snippets.MEANINGS,
    "errors": snippets.ERRORS,
    "shell": snippets.SHELL,
}
_DRAWN = ["functions", "functions", "expressions", "expressions", "meanings", "errors", "shell"]


def code(rng: random.Random) -> Exchange:
    """Ask for a function, a value, a meaning, an exception or a shell command."""
    kind = rng.choice(_DRAWN)
    texts: Mapping[str, Any] = snippets.QUESTIONS[kind]
    values = dict(zip(texts["fields"], rng.choice(_ROWS[kind]), strict=True))
    return Exchange(
        kind="code",
        question=rng.choice(texts["wordings"]).format(**values),
        answer=texts["answer"].format(**values),
        thought=texts["thought"].format(**values),
        word=values.get(texts.get("word")),
    )
