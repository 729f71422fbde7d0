"""The toy pair, lowered once per test run, and what talks on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mtp_runtime import Session
from tests.support import talking
from tests.support.toy_prompt import TOY_PROMPT

# Any drafter will do for what is not about drafts: this one is nearly always wrong.
WRONG_TABLE = tuple((7 * position + 3) % 64 for position in range(80))


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle's folder with the toy target and a drafter that is nearly always wrong. Do not change it."""
    from tests.support import toy_pair

    folder = tmp_path_factory.mktemp("toy")
    toy_pair.lower_target(folder)
    toy_pair.lower_drafter(folder, WRONG_TABLE)
    (folder / "tokenizer.json").write_text(toy_pair.tokenizer_json(), encoding="utf-8")
    toy_pair.write_manifest(folder)
    return folder


@pytest.fixture(scope="session")
def toy_plain(toy_folder: Path) -> tuple[int, ...]:
    """What the toy target says after TOY_PROMPT, decoded plainly to the context's end."""
    with Session.open(toy_folder) as session:
        return session.generate(TOY_PROMPT, num_draft_tokens=0, stop_token_ids=()).finish().tokens


@pytest.fixture(scope="session")
def toy_with_drafter(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[int]], Path]:
    """Return a function that builds the toy bundle with a drafter of the given table."""
    from tests.support import toy_pair

    def build(table: Sequence[int]) -> Path:
        folder = tmp_path_factory.mktemp("toy-drafter")
        for name in ("target.tflite", "embedder.tflite", "per_layer_embedder.tflite", "tokenizer.json"):
            os.link(toy_folder / name, folder / name)
        toy_pair.lower_drafter(folder, table)
        toy_pair.write_manifest(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def toy_talking(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle with a tokenizer and a chat template that talk. Do not change it."""
    return talking.talking_copy(toy_folder, tmp_path_factory.mktemp("toy-talking"))


@pytest.fixture
def open_session(toy_talking: Path) -> Iterator[talking.OpenSession]:
    """Open a fresh session on the toy bundle at each call; all are closed after the test."""
    with talking.closing_all(lambda: Session.open(toy_talking, threads=1, verify=False)) as opened:
        yield opened
