"""Fetch the sources, split them, learn the tokenizer and write the token arrays and the held-out prompts.

Runs on a CPU. Needs `apt-get`, `dpkg` and `pip`, no rights beyond writing to its folders.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import lzma
import random
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tools.train_nano.dialogues import SEED as CHAT_SEED
from tools.train_nano.dialogues import training_dialogues
from tools.train_nano.documents import Document, documents
from tools.train_nano.nano_ids import BOS, EOS, TURN_CLOSE
from tools.train_nano.nano_tokenizer import chat_prompt, save_tokenizer, train_tokenizer, without_special
from tools.train_nano.sources import KJV_READER, SOURCES

SEED = 20260
HELD_OUT_PER_MILLE = 20
TOKENIZER_SAMPLE_CHARS = 24_000_000
MAX_SEEN_LINES = 0.6  # a file of which more lines were seen in earlier files is a near copy: dropped
NGRAM = 16  # tokens; a held-out document sharing many of these with the training text is a near copy
MAX_SHARED = {"ppl": 0.3, "prompt": 0.08}
PROMPTS_PER_KIND = 16
PROMPT_AVOIDS = re.compile(r"@\w|https?:|copyright|licen[cs]e|\bauthors?\b", re.IGNORECASE)
MAX_CODE_TOKENS = 24_000_000  # the rest of the code is left out, so that prose keeps its share
CHAT_TOKENS = 18_000_000
CHATS_IN_TOKENIZER_SAMPLE = 10_000
Tokens = NDArray[np.uint16]


def fetch(cache: Path) -> dict[str, Path]:
    """Download and unpack every source; return package → its folder (Debian) or its wheel (PyPI)."""
    debs, wheels, trees = cache / "debs", cache / "wheels", cache / "x"
    for folder in (debs, wheels, trees):
        folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Path] = {}
    for package in [s.package for s in SOURCES if s.registry == "debian"] + [KJV_READER]:
        if not list(debs.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=debs, check=True)
        found[package] = trees / package
        if not found[package].exists():
            archive = next(iter(debs.glob(f"{package}_*.deb")))
            subprocess.run(["dpkg", "-x", str(archive), str(found[package])], check=True)
    for source in (s for s in SOURCES if s.registry == "pypi"):
        pattern = f"{source.package.replace('-', '_')}-{source.version}-*.whl"
        if not list(wheels.glob(pattern)):
            wanted = f"{source.package}=={source.version}"
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", wanted]
            subprocess.run(command, cwd=wheels, check=True)
        found[source.package] = next(iter(wheels.glob(pattern)))
    return found


def is_held_out(source: str, group: str) -> bool:
    """The split: by the hash of source and group, so a file, page or book is on one side as a whole."""
    per_mille = 40 if source == "bible-kjv-text" else HELD_OUT_PER_MILLE
    return int(hashlib.sha256(f"{source}/{group}".encode()).hexdigest(), 16) % 1000 < per_mille


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


def chats() -> Iterator[str]:
    """Conversations as the chat template writes them, without BOS, to the end of the model's last turn."""
    for talk in training_dialogues(CHAT_SEED):
        yield chat_prompt(talk.messages, talk.tools, thinking=talk.thinking, open_turn=False).rstrip("\n")


def encode(tokenizer: Tokenizer, texts: list[str], end: list[int]) -> list[Tokens]:
    """Token arrays of `texts`, each with BOS before and `end` behind."""
    encoded: list[Tokens] = []
    for start in range(0, len(texts), 512):
        batch = tokenizer.encode_batch_fast(texts[start : start + 512], add_special_tokens=False)
        encoded += [np.array([BOS, *item.ids, *end], dtype=np.uint16) for item in batch]
    return encoded


def ngram_hashes(tokens: Tokens) -> NDArray[np.uint64]:
    """A 64-bit hash of every `NGRAM` consecutive tokens. Shapes: [T] → [T - NGRAM + 1]."""
    count = max(len(tokens) - NGRAM + 1, 0)
    hashed = np.zeros(count, dtype=np.uint64)
    for offset in range(NGRAM):
        hashed = hashed * np.uint64(6364136223846793005) + tokens[offset : offset + count].astype(np.uint64)
        hashed ^= hashed >> np.uint64(29)
    return hashed


def shared_fractions(train: Tokens, held_out: list[Tokens]) -> list[float]:
    """For each held-out array the fraction of its n-grams that the training tokens contain."""
    hashed = [ngram_hashes(tokens) for tokens in held_out]
    wanted = np.unique(np.concatenate(hashed))
    seen = []
    for start in range(0, len(train), 1 << 22):
        block = ngram_hashes(train[start : start + (1 << 22) + NGRAM - 1])
        seen.append(np.intersect1d(block, wanted))
    known = np.unique(np.concatenate(seen))
    return [float(np.isin(h, known).mean()) if len(h) else 1.0 for h in hashed]


def prompt_text(tokenizer: Tokenizer, document: Document, tokens: Tokens) -> str:
    """The beginning of a document, 40–160 tokens by the hash of its path."""
    size = 40 + int(hashlib.sha256(document.path.encode()).hexdigest(), 16) % 121
    return str(tokenizer.decode(tokens[1 : 1 + size].tolist(), skip_special_tokens=False))


def write_prompts(path: Path, tokenizer: Tokenizer, pool: list[tuple[Document, Tokens, float]]) -> None:
    """Choose 16 code and 16 prose prompts, 40–160 tokens each, spread over the sources, and write them."""
    versions = {s.package: s for s in SOURCES}
    rng = random.Random(SEED)
    rows = []
    for kind in ("code", "prose"):
        by_source: dict[str, list[tuple[Document, Tokens]]] = defaultdict(list)
        for document, tokens, shared in pool:
            avoided = PROMPT_AVOIDS.search(tokenizer.decode(tokens[1:161].tolist()))
            if document.kind == kind and shared <= MAX_SHARED["prompt"] and len(tokens) > 400 and not avoided:
                by_source[document.source].append((document, tokens))
        names = sorted(by_source)
        rng.shuffle(names)
        for entries in by_source.values():
            rng.shuffle(entries)
        chosen: list[tuple[Document, Tokens]] = []
        while len(chosen) < PROMPTS_PER_KIND:
            chosen += [by_source[n].pop() for n in names if by_source[n]][: PROMPTS_PER_KIND - len(chosen)]
        for number, (document, tokens) in enumerate(chosen):
            source = versions[document.source]
            text = prompt_text(tokenizer, document, tokens)
            row = {"id": f"{kind}-{number:02d}", "kind": kind, "text": text}
            row |= {"source": f"{source.registry}:{source.package}/{document.path}", "version": source.version}
            row |= {"licence": source.licence, "sha256": hashlib.sha256(text.encode()).hexdigest()}
            rows.append(json.dumps(row, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def capped(code_lengths: list[int]) -> set[int]:
    """The documents that stay when code is cut, at random, to `MAX_CODE_TOKENS`; a length of 0 always stays."""
    code = [i for i, length in enumerate(code_lengths) if length]
    random.Random(SEED + 1).shuffle(code)
    sizes = np.cumsum([code_lengths[i] for i in code])
    dropped = code[int(np.searchsorted(sizes, MAX_CODE_TOKENS, side="right")) :]
    return set(range(len(code_lengths))) - set(dropped)


def save_training(out: Path, groups: dict[str, list[Tokens]], model_turn: list[int]) -> None:
    """Write the tokens of each kind, compressed, and what begins a model's turn."""
    for kind, group in groups.items():
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(group))
        (out / f"train_{kind}.npy.xz").write_bytes(lzma.compress(buffer.getvalue(), preset=6))
    (out / "layout.json").write_text(json.dumps({"model_turn": model_turn}) + "\n", encoding="utf-8")


def main() -> None:
    """Write tokenizer, token arrays, prompts and a summary."""
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=root / "build/nano_sources")
    parser.add_argument("--out", type=Path, default=root / "build/nano_data")
    parser.add_argument("--nano", type=Path, default=root / "converter/mtp_export/nano")
    parser.add_argument("--prompts", type=Path, default=root / "converter/mtp_export/check/prompt_sets/heldout.jsonl")
    parser.add_argument("--keep-tokenizer", action="store_true", help="use the tokenizer already in --nano")
    options = parser.parse_args()
    rng = random.Random(SEED)

    folders = fetch(options.cache)
    collected = [d for s in SOURCES for d in documents(folders[s.package], s, folders)]
    print(f"{len(collected)} documents", flush=True)
    train = drop_near_copies(d for d in collected if not is_held_out(d.source, d.group))
    held_out = [d for d in collected if is_held_out(d.source, d.group)]

    if options.keep_tokenizer:
        tokenizer = Tokenizer.from_file(str(options.nano / "target/tokenizer.json"))
    else:
        sample = []
        for kind in ("code", "prose"):
            texts = [d.text for d in train if d.kind == kind]
            rng.shuffle(texts)
            size = 0
            for text in texts:
                size += len(text)
                if size < TOKENIZER_SAMPLE_CHARS // 2:
                    sample.append(text)
        sample += [without_special(text) for text in itertools.islice(chats(), CHATS_IN_TOKENIZER_SAMPLE)]
        tokenizer = train_tokenizer(sample)
        save_tokenizer(tokenizer, options.nano / "target")
    print("tokenizer ready", flush=True)

    arrays = encode(tokenizer, [d.text for d in train], [EOS])
    by_kind = {k: sum(len(a) for a, d in zip(arrays, train, strict=True) if d.kind == k) for k in ("code", "prose")}
    talks: list[Tokens] = []
    talk_tokens, stream = 0, chats()
    while talk_tokens < CHAT_TOKENS:
        fresh = encode(tokenizer, list(itertools.islice(stream, 4096)), [])
        talks, talk_tokens = talks + fresh, talk_tokens + sum(map(len, fresh))
    assert all(a[-1] == TURN_CLOSE for a in talks)

    # The held-out texts are compared with all that was collected, capped or not.
    whole = np.concatenate(arrays + talks)
    held_arrays = encode(tokenizer, [d.text for d in held_out], [EOS])
    shared = shared_fractions(whole, held_arrays)
    pool = list(zip(held_out, held_arrays, shared, strict=True))
    write_prompts(options.prompts, tokenizer, pool)

    options.out.mkdir(parents=True, exist_ok=True)
    kept = capped([len(a) if d.kind == "code" else 0 for a, d in zip(arrays, train, strict=True)])
    groups = {k: [a for i, a in enumerate(arrays) if i in kept and train[i].kind == k] for k in ("code", "prose")}
    groups["chat"] = talks
    model_turn = tokenizer.encode("<|turn>model\n", add_special_tokens=False).ids
    save_training(options.out, groups, model_turn)
    summary: dict[str, object] = {"train_tokens": by_kind | {"chat": talk_tokens}}
    for kind in ("code", "prose"):
        fresh = [a for d, a, s in pool if d.kind == kind and s <= MAX_SHARED["ppl"]]
        np.save(options.out / f"heldout_{kind}.npy", np.concatenate(fresh))
        summary[f"heldout_{kind}"] = {"documents": len(fresh), "tokens": int(sum(len(a) for a in fresh))}
    counts: dict[str, int] = defaultdict(int)
    for document, array in zip(train, arrays, strict=True):
        counts[document.source] += len(array)
    summary["tokens_by_source"] = dict(counts)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
