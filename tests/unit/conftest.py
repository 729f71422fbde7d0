"""The toy pair, lowered once per test run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mtp_runtime import Session
from tests.unit import talking

# Any drafter will do for what is not about drafts: this one is nearly always wrong.
WRONG_TABLE = tuple((7 * position + 3) % 64 for position in range(80))
TOY_PROMPT = (2, 5, 9, 11, 3, 4, 8, 20, 33, 41, 2, 3)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle's folder with the toy target and a drafter that is nearly always wrong. Do not change it."""
    from tests.unit import toy_pair

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
    from tests.unit import toy_pair

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


# Who can chat: a backend without graphs, with a drafter that is right, wrong or either; and LiteRT on the toy pair.
@pytest.fixture(params=["fake-right", "fake-wrong", "fake-mixed", "toy"])
def open_session(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[talking.OpenSession]:
    """Open a fresh session on the same bundle at each call; all are closed after the test."""
    if request.param == "toy":
        folder: Path = request.getfixturevalue("toy_talking")
        opener: talking.OpenSession = lambda: Session.open(folder, threads=1, verify=False)  # noqa: E731
    else:
        agree = {
            "fake-right": lambda position: True,
            "fake-wrong": lambda position: False,
            "fake-mixed": lambda position: position % 3 != 0,
        }[request.param]
        opener = talking.fake_opener(tmp_path, agree)
    with talking.closing_all(opener) as opened:
        yield opened


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pair as transformers saves it, in `target` and `drafter`. Do not change it."""
    from tests.unit import tiny_files

    folder = tmp_path_factory.mktemp("tiny")
    tiny_files.save_pair(folder)
    return folder


@pytest.fixture
def tiny(tiny_source: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pair to spoil."""
    from tests.unit import tiny_files

    return tiny_files.copy_pair(tiny_source, tmp_path / "tiny")


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """Hear Ctrl-C, and let children hear it, even where a shell in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
