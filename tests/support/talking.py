"""Sessions that can chat, on any backend: a tokenizer of single characters and a short chat template.

Text survives the way to tokens and back, but not always by the same tokens: "a" and "b" in a row are read as "ab".
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from mtp_runtime import Bundle, Session
from mtp_runtime.backends.litert.static import StaticBackend
from mtp_runtime.bundle.contract import FileEntry, Manifest
from tests.support.fake_backend import FakeBackend, fake_manifest
from tests.support.tokenizers import bpe_json

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn>{{ 'm' if message.role == 'assistant' else message.role[0] }}"
    "{{ message.content }}<turn|>{% endfor %}{% if add_generation_prompt %}<|turn>m{% endif %}"
)
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>")
# Opens a fresh session with the same bundle each time.
OpenSession = Callable[[], Session]


def tokenizer_json(vocab_size: int) -> str:
    """Return a tokenizer of `vocab_size` tokens: the special ones, "ab", and single characters."""
    words = [*SPECIAL, "ab", *"abcdefghijklmnopqrstuvwxyz\n .,;:!?ABCDEFGHIJKLMNOPQRSTUVWXYZ"][:vocab_size]
    return bpe_json(words, len(SPECIAL), merges=[("a", "b")])


def write_texts(folder: Path, vocab_size: int) -> dict[str, FileEntry]:
    """Write the tokenizer and the template into `folder`; return their entries by role."""
    texts = {"tokenizer": tokenizer_json(vocab_size), "chat_template": TEMPLATE}
    entries = {}
    for role, text in texts.items():
        data = text.encode()
        (folder / role).write_bytes(data)
        entries[role] = FileEntry(path=role, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    return entries


def fake_opener(folder: Path, agree: Callable[[int], bool], **manifest: int) -> OpenSession:
    """Return how to open sessions on the fake backend, whose drafter is right where `agree` says so."""
    plain = fake_manifest(**manifest)  # type: ignore[arg-type]  # only integer options are used here
    full = msgspec.structs.replace(plain, files={**plain.files, **write_texts(folder, plain.vocab_size)})

    def open_session() -> Session:
        bundle = Bundle(full, folder, None)
        return Session(bundle, StaticBackend(FakeBackend(bundle.manifest, agree), bundle.manifest))

    return open_session


def talking_copy(bundle: Path, folder: Path) -> Path:
    """Write a copy of the `bundle` that talks into the empty `folder`, whatever its backend."""
    manifest = Manifest.from_json((bundle / "manifest.json").read_text(encoding="utf-8"))
    for entry in manifest.files.values():
        os.link(bundle / entry.path, folder / entry.path)
    files = {**manifest.files, **write_texts(folder, manifest.vocab_size)}
    talking = msgspec.structs.replace(manifest, files=files)
    (folder / "manifest.json").write_text(talking.to_json(), encoding="utf-8")
    return folder


@contextlib.contextmanager
def closing_all(open_session: OpenSession) -> Iterator[OpenSession]:
    """Close at the end whatever was opened."""
    with contextlib.ExitStack() as opened:
        yield lambda: opened.enter_context(open_session())


def expected(open_session: OpenSession, prompt_ids: Sequence[int], count: int | None = None) -> tuple[int, ...]:
    """Return what plain decoding in a fresh session says after `prompt_ids`."""
    session = open_session()
    trace = session.generate(prompt_ids, max_new_tokens=count, num_draft_tokens=0, stop_token_ids=()).finish()
    return trace.tokens
