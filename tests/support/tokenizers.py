"""Tokenizers of a few words, as `tokenizer.json` has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def bpe_json(
    words: Sequence[str],
    num_special: int,
    *,
    merges: Sequence[Sequence[str]] = (),
    normalizer: dict[str, Any] | None = None,
    decoders: Sequence[dict[str, Any]] = ({"type": "Fuse"},),
    fallback: bool = False,
) -> str:
    """Return a BPE tokenizer of `words`, whose number is their id, and of which the first `num_special` are special.

    `fallback`: what is no word is spelt by its bytes, and what is none of those either is one unknown token.
    """
    special = [
        {"id": index, "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for index, word in enumerate(words[:num_special])
    ]
    document: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": decoders[0] if len(decoders) == 1 else {"type": "Sequence", "decoders": list(decoders)},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": fallback,
            "byte_fallback": fallback,
            "vocab": {word: index for index, word in enumerate(words)},
            "merges": [list(pair) for pair in merges],
        },
    }
    return json.dumps(document)
