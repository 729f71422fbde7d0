"""The held-out prompts: beginnings of documents that training did not see."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from tools.train_nano.documents import Document
from tools.train_nano.near_copies import Tokens
from tools.train_nano.sources import SOURCES

SEED = 20260
MAX_SHARED = 0.08  # of a prompt's document with the training text
PROMPTS_PER_KIND = 16
PROMPT_AVOIDS = re.compile(r"@\w|https?:|copyright|licen[cs]e|\bauthors?\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A held-out document, its tokens, and the fraction of its n-grams that training saw."""

    document: Document
    tokens: Tokens
    shared: float


def prompt_text(tokenizer: Tokenizer, document: Document, tokens: Tokens) -> str:
    """Return the beginning of a document, 40–160 tokens by the hash of its path."""
    size = 40 + int(hashlib.sha256(document.path.encode()).hexdigest(), 16) % 121
    return str(tokenizer.decode(tokens[1 : 1 + size].tolist(), skip_special_tokens=False))


def write_prompts(path: Path, tokenizer: Tokenizer, pool: Sequence[HeldOut]) -> None:
    """Choose 16 code and 16 prose prompts, 40–160 tokens each, spread over the sources, and write them."""
    rng = random.Random(SEED)
    rows = []
    for kind in ("code", "prose"):
        for number, entry in enumerate(_choose(rng, [e for e in pool if e.document.kind == kind], tokenizer)):
            rows.append(json.dumps(_row(f"{kind}-{number:02d}", entry, tokenizer), ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def _choose(rng: random.Random, pool: Sequence[HeldOut], tokenizer: Tokenizer) -> list[HeldOut]:
    by_source: dict[str, list[HeldOut]] = defaultdict(list)
    for entry in pool:
        avoided = PROMPT_AVOIDS.search(tokenizer.decode(entry.tokens[1:161].tolist()))
        if entry.shared <= MAX_SHARED and len(entry.tokens) > 400 and not avoided:
            by_source[entry.document.source].append(entry)
    names = sorted(by_source)
    rng.shuffle(names)
    for entries in by_source.values():
        rng.shuffle(entries)
    chosen: list[HeldOut] = []
    while len(chosen) < PROMPTS_PER_KIND:
        chosen += [by_source[n].pop() for n in names if by_source[n]][: PROMPTS_PER_KIND - len(chosen)]
    return chosen


def _row(name: str, entry: HeldOut, tokenizer: Tokenizer) -> dict[str, str]:
    source = next(s for s in SOURCES if s.package == entry.document.source)
    text = prompt_text(tokenizer, entry.document, entry.tokens)
    return {
        "id": name,
        "kind": entry.document.kind,
        "text": text,
        "source": f"{source.registry}:{source.package}/{entry.document.path}",
        "version": source.version,
        "licence": source.licence,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
