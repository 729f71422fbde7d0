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
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tools.train_nano.dialogues import SEED as CHAT_SEED
from tools.train_nano.dialogues import training_dialogues
from tools.train_nano.documents import Document, documents
from tools.train_nano.heldout_prompts import SEED, HeldOut, write_prompts
from tools.train_nano.nano_ids import BOS, EOS, TURN_CLOSE
from tools.train_nano.nano_tokenizer import chat_prompt, save_tokenizer, train_tokenizer, without_special
from tools.train_nano.near_copies import Tokens, drop_near_copies, shared_fractions
from tools.train_nano.sources import KJV_READER, SOURCES, Kind

KINDS: tuple[Kind, ...] = ("code", "prose")
HELD_OUT_PER_MILLE = 20
TOKENIZER_SAMPLE_CHARS = 24_000_000
MAX_SHARED = 0.3  # of a held-out document with the training text, for perplexity
MAX_CODE_TOKENS = 24_000_000  # the rest of the code is left out, so that prose keeps its share
CHAT_TOKENS = 18_000_000
CHATS_IN_TOKENIZER_SAMPLE = 10_000


def fetch(cache: Path) -> dict[str, Path]:
    """Download and unpack every source; return package → its folder (Debian) or its wheel (PyPI)."""
    debs, wheels, trees = cache / "debs", cache / "wheels", cache / "x"
    for folder in (debs, wheels, trees):
        folder.mkdir(parents=True, exist_ok=True)
    folders: dict[str, Path] = {}
    for package in [s.package for s in SOURCES if s.registry == "debian"] + [KJV_READER]:
        if not list(debs.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=debs, check=True)
        folders[package] = trees / package
        if not folders[package].exists():
            archive = next(iter(debs.glob(f"{package}_*.deb")))
            subprocess.run(["dpkg", "-x", str(archive), str(folders[package])], check=True)
    for source in (s for s in SOURCES if s.registry == "pypi"):
        pattern = f"{source.package.replace('-', '_')}-{source.version}-*.whl"
        if not list(wheels.glob(pattern)):
            pinned = f"{source.package}=={source.version}"
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", pinned]
            subprocess.run(command, cwd=wheels, check=True)
        folders[source.package] = next(iter(wheels.glob(pattern)))
    return folders


def is_held_out(source: str, group: str) -> bool:
    """Split by the hash of source and group, so a file, page or book is on one side as a whole."""
    per_mille = 40 if source == "bible-kjv-text" else HELD_OUT_PER_MILLE
    return int(hashlib.sha256(f"{source}/{group}".encode()).hexdigest(), 16) % 1000 < per_mille


def chats() -> Iterator[str]:
    """Yield conversations as the chat template writes them, without BOS, to the end of the model's last turn."""
    for talk in training_dialogues(CHAT_SEED):
        yield chat_prompt(talk.messages, talk.tools, thinking=talk.thinking, open_turn=False).rstrip("\n")


def encode(tokenizer: Tokenizer, texts: list[str], end: list[int]) -> list[Tokens]:
    """Return token arrays of `texts`, each with BOS before and `end` behind."""
    encoded: list[Tokens] = []
    for start in range(0, len(texts), 512):
        batch = tokenizer.encode_batch_fast(texts[start : start + 512], add_special_tokens=False)
        encoded += [np.array([BOS, *item.ids, *end], dtype=np.uint16) for item in batch]
    return encoded


def capped(code_lengths: list[int]) -> set[int]:
    """Return the documents that stay when code is cut, at random, to `MAX_CODE_TOKENS`; a length of 0 always stays."""
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


def learn_tokenizer(train: Sequence[Document], folder: Path) -> Tokenizer:
    """Learn the tokenizer from equal parts of code and prose, and conversations, and save it in `folder`."""
    rng = random.Random(SEED)
    sample = []
    for kind in KINDS:
        texts = [d.text for d in train if d.kind == kind]
        rng.shuffle(texts)
        size = 0
        for text in texts:
            size += len(text)
            if size < TOKENIZER_SAMPLE_CHARS // 2:
                sample.append(text)
    sample += [without_special(text) for text in itertools.islice(chats(), CHATS_IN_TOKENIZER_SAMPLE)]
    tokenizer = train_tokenizer(sample)
    save_tokenizer(tokenizer, folder)
    return tokenizer


def encode_chats(tokenizer: Tokenizer) -> list[Tokens]:
    """Return the tokens of conversations, `CHAT_TOKENS` in all or a few more."""
    talks: list[Tokens] = []
    count, stream = 0, chats()
    while count < CHAT_TOKENS:
        fresh = encode(tokenizer, list(itertools.islice(stream, 4096)), [])
        talks, count = talks + fresh, count + sum(map(len, fresh))
    assert all(a[-1] == TURN_CLOSE for a in talks)
    return talks


def save_held_out(out: Path, pool: Sequence[HeldOut]) -> dict[str, object]:
    """Write the held-out tokens of each kind without near copies, and return their counts for the summary."""
    counts: dict[str, object] = {}
    for kind in KINDS:
        fresh = [e.tokens for e in pool if e.document.kind == kind and e.shared <= MAX_SHARED]
        np.save(out / f"heldout_{kind}.npy", np.concatenate(fresh))
        counts[f"heldout_{kind}"] = {"documents": len(fresh), "tokens": int(sum(len(a) for a in fresh))}
    return counts


def summarise(train: Sequence[Document], arrays: Sequence[Tokens], talks: Sequence[Tokens]) -> dict[str, object]:
    """Count the training tokens by kind and by source."""
    by_kind, by_source = dict.fromkeys(KINDS, 0), dict[str, int]()
    for document, array in zip(train, arrays, strict=True):
        by_kind[document.kind] += len(array)
        by_source[document.source] = by_source.get(document.source, 0) + len(array)
    return {"train_tokens": by_kind | {"chat": sum(map(len, talks))}, "tokens_by_source": by_source}


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

    folders = fetch(options.cache)
    collected = [d for s in SOURCES for d in documents(folders[s.package], s, folders)]
    print(f"{len(collected)} documents", flush=True)
    train = drop_near_copies(d for d in collected if not is_held_out(d.source, d.group))
    held_out = [d for d in collected if is_held_out(d.source, d.group)]
    stored = options.nano / "target/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(stored)) if options.keep_tokenizer else learn_tokenizer(train, stored.parent)
    print("tokenizer ready", flush=True)

    arrays, talks = encode(tokenizer, [d.text for d in train], [EOS]), encode_chats(tokenizer)
    # The held-out texts are compared with all that was collected, capped or not.
    held_arrays = encode(tokenizer, [d.text for d in held_out], [EOS])
    shares = shared_fractions(np.concatenate(arrays + talks), held_arrays)
    rows = zip(held_out, held_arrays, shares, strict=True)
    pool = [HeldOut(document=document, tokens=tokens, shared=shared) for document, tokens, shared in rows]
    write_prompts(options.prompts, tokenizer, pool)

    options.out.mkdir(parents=True, exist_ok=True)
    kept = capped([len(a) if d.kind == "code" else 0 for a, d in zip(arrays, train, strict=True)])
    groups: dict[str, list[Tokens]] = {
        k: [a for i, a in enumerate(arrays) if i in kept and train[i].kind == k] for k in KINDS
    }
    groups["chat"] = talks
    model_turn = tokenizer.encode("<|turn>model\n", add_special_tokens=False).ids
    save_training(options.out, groups, model_turn)
    totals = summarise(train, arrays, talks)
    by_source = totals.pop("tokens_by_source")
    summary = {**totals, **save_held_out(options.out, pool), "tokens_by_source": by_source}
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
