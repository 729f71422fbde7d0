"""Near copies of training text, which must not be held out."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tools.train_nano.documents import Document

MAX_SEEN_LINES = 0.6  # a file of which more lines were seen in earlier files is a near copy: dropped
NGRAM = 16  # tokens; a held-out document sharing many of these with the training text is a near copy
Tokens = NDArray[np.uint16]


def drop_near_copies(candidates: Iterable[Document]) -> list[Document]:
    """Keep a document unless most of its longer lines were seen in documents before it."""
    seen: set[int] = set()
    kept = []
    for document in candidates:
        lines = {hash(line.strip()) for line in document.text.splitlines() if len(line.strip()) > 20}
        if lines and len(lines & seen) <= MAX_SEEN_LINES * len(lines):
            kept.append(document)
        seen |= lines
    return kept


def ngram_hashes(tokens: Tokens) -> NDArray[np.uint64]:
    """Return a 64-bit hash of every `NGRAM` consecutive tokens. Shapes: [T] → [T - NGRAM + 1]."""
    count = max(len(tokens) - NGRAM + 1, 0)
    hashed = np.zeros(count, dtype=np.uint64)
    for offset in range(NGRAM):
        hashed = hashed * np.uint64(6364136223846793005) + tokens[offset : offset + count].astype(np.uint64)
        hashed ^= hashed >> np.uint64(29)
    return hashed


def shared_fractions(train: Tokens, held_out: list[Tokens]) -> list[float]:
    """Return for each held-out array the fraction of its n-grams that the training tokens contain."""
    hashed = [ngram_hashes(tokens) for tokens in held_out]
    relevant = np.unique(np.concatenate(hashed))
    seen = []
    for start in range(0, len(train), 1 << 22):
        block = ngram_hashes(train[start : start + (1 << 22) + NGRAM - 1])
        seen.append(np.intersect1d(block, relevant))
    known = np.unique(np.concatenate(seen))
    return [float(np.isin(h, known).mean()) if len(h) else 1.0 for h in hashed]
