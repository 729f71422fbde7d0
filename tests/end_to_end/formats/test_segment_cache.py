"""Converted segments that are kept from one export to the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_export.formats.segment_cache import _PACKAGE, _SOURCES, cached_results


def shout(word: str) -> bytes:
    """A conversion; says that it ran, in a file beside the word's name."""
    path = Path(word)
    path.write_text(path.read_text() + "." if path.exists() else ".")
    return path.name.upper().encode()


@pytest.fixture
def words(tmp_path: Path, no_segments: None) -> list[str]:
    return [str(tmp_path / name) for name in ("one", "two", "three")]


def runs(words: list[str]) -> list[int]:
    return [len(Path(word).read_text()) for word in words]


def test_what_was_computed_is_not_computed_again(words: list[str]) -> None:
    assert list(cached_results(shout, words[:2], 2)) == [b"ONE", b"TWO"]
    assert list(cached_results(shout, words[::-1], 2)) == [b"THREE", b"TWO", b"ONE"]
    assert runs(words) == [1, 1, 1]


def test_what_a_stopped_run_had_computed_is_kept(words: list[str]) -> None:
    results = cached_results(shout, words, 1)
    assert next(results) == b"ONE"
    results.close()
    assert list(cached_results(shout, words[:1], 1)) == [b"ONE"]
    assert runs(words[:1]) == [1]


def entries() -> list[Path]:
    return list((Path(os.environ["XDG_CACHE_HOME"]) / "mtp-export" / "segments").iterdir())


@pytest.mark.parametrize("damage", [b"", b"x" * 100])
def test_a_damaged_entry_is_computed_again(words: list[str], damage: bytes) -> None:
    list(cached_results(shout, words[:1], 1))
    (entry,) = entries()
    entry.write_bytes(damage)
    assert list(cached_results(shout, words[:1], 1)) == [b"ONE"]
    assert runs(words[:1]) == [2]


def test_a_place_that_cannot_be_written_costs_the_cache_alone(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert list(cached_results(shout, words[:1], 1)) == [b"ONE"]
    assert runs(words[:1]) == [2]


def test_names_are_the_same_in_every_process(words: list[str]) -> None:
    """A name depends on what a segment is, not on where it lies in memory or how strings are hashed."""
    script = (
        "from mtp_export.arch.published import PAIRS; from mtp_export.graph.static import trace_embedder\n"
        "import pickle, hashlib; graph = trace_embedder(PAIRS['nano'].target, 'embedder')\n"
        "print(hashlib.sha256(pickle.dumps(list(graph.segments.values()))).hexdigest())"
    )
    command = [sys.executable, "-c", script]
    assert subprocess.check_output(command) == subprocess.check_output(command)


def test_names_depend_on_every_module_that_says_how_an_operation_is_converted() -> None:
    """Else an export takes what an older version of it converted."""
    lowering = {path for path in _PACKAGE.rglob("*.py") if "@lower(" in path.read_text(encoding="utf-8")}
    assert len(lowering) > 1
    assert lowering <= {path for pattern in _SOURCES for path in _PACKAGE.glob(pattern)}
