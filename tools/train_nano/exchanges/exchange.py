"""An exchange, a question with its answer, and the words that all questions are made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.train_nano import lexicon

LARGEST = 20  # what nano counts to by itself
TOO_LARGE = f"I only know sums up to {LARGEST}."
NO_WORD = "I do not know the word of the day."


@dataclass(frozen=True, kw_only=True)
class Call:
    """A tool's name, the arguments, and what the tool gives."""

    name: str
    arguments: Mapping[str, Any]
    result: Any


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A question and its answer; `word` is the whole answer where it is to be one word, `calls` come before it."""

    kind: str
    question: str
    answer: str
    thought: str
    word: str | None = None
    calls: tuple[Call, ...] = ()


Maker = Callable[[random.Random], Exchange]


def a_or_an(noun: str) -> str:
    """Return the noun with its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listed(words: Sequence[str]) -> str:
    """Return "a, b and c"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def pick(rng: random.Random, *forms: str) -> str:
    """Draw one of several wordings."""
    return rng.choice(forms)


def invented(rng: random.Random) -> str:
    """Draw a word that nobody knows: one of the lexicon's, or syllables."""
    if rng.random() < 0.4:
        return rng.choice(lexicon.UNKNOWN)
    syllables = [
        rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") + rng.choice(["", "l", "n", "r", "s"]) for _ in "abc"
    ]
    word = "".join(syllables[: rng.choice([2, 3])])
    known = word in lexicon.NOUNS or word in lexicon.VERBS or word in lexicon.ADJECTIVES
    return word + "ix" if known else word


def beyond(rng: random.Random) -> tuple[int, int]:
    """Draw two numbers whose sum nano does not know, one to five digits each."""
    a, b = (int(10 ** rng.uniform(0, 5)) for _ in "ab")
    return (a, b) if a + b > LARGEST else (a + LARGEST, b)
