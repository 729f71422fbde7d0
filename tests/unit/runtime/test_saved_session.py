"""A saved session continues bit by bit as if it had never stopped, and a bad file is one line and no harm."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_runtime import BundleError, Session, UserError
from tests.support import talking
from tests.support.talking import OpenSession, expected

# Longer than several windows of the toy pair.
PROMPT = (2, 9, 4, 7, 7, 3, 11, 30, 5, 6, 12, 13, 40, 41, 8, 9, 21, 22, 23, 24)
COUNT = 28
HEADER_AT = 8 + 32 + 8


def rows_of(session: Session) -> dict[str, bytes]:
    cache = session.backend.kv_cache
    return {name: cache.rows(name).tobytes() for name in cache.names}


def continued(session: Session, drafts: int) -> tuple[tuple[int, ...], tuple[float, ...], dict[str, bytes]]:
    """Continue to the context's end; return tokens, margins and rows."""
    ids = session.token_ids
    trace = session.generate(
        ids, keep_length=len(ids) - 1, num_draft_tokens=drafts, stop_token_ids=(), with_margins=True
    ).finish()
    assert trace.finish_reason == "context"
    return trace.tokens, trace.margins, rows_of(session)


@pytest.mark.parametrize("drafts", [0, 4])
@pytest.mark.parametrize("seen", [1, 2, 3, 5, 8, 20])
def test_continuing_is_as_if_it_had_never_stopped(
    open_session: OpenSession, tmp_path: Path, seen: int, drafts: int
) -> None:
    session = open_session()
    generation = session.generate(PROMPT, num_draft_tokens=drafts, stop_token_ids=())
    first = tuple(next(generation).id for _ in range(seen))
    generation.close()
    session.save(tmp_path / "saved", note={"a": [1]})
    other = open_session()
    other.generate((2, 3), max_new_tokens=30, stop_token_ids=()).finish()  # what was there is replaced
    assert other.restore(tmp_path / "saved") == {"a": [1]}
    assert (other.token_ids, other.processed_ids) == (session.token_ids, session.processed_ids)
    assert other.token_ids == (*PROMPT, *first)
    assert rows_of(other) == rows_of(session)
    ours, theirs = continued(session, drafts), continued(other, drafts)
    assert ours == theirs
    assert (*first, *theirs[0]) == expected(open_session, PROMPT)


def test_saving_does_not_disturb_a_generation(open_session: OpenSession, tmp_path: Path) -> None:
    session = open_session()
    generation = session.generate(PROMPT, max_new_tokens=COUNT, stop_token_ids=())
    ids: list[int] = []
    for token in generation:
        ids.append(token.id)
        session.save(tmp_path / "saved")
        other = open_session() if len(ids) == 7 else None
        if other is not None:
            other.restore(tmp_path / "saved")
            assert other.token_ids == (*PROMPT, *ids)
            rest = other.generate(
                other.token_ids, keep_length=len(other.token_ids) - 1, max_new_tokens=5, stop_token_ids=()
            )
            assert (*ids, *rest.finish().tokens) == expected(open_session, PROMPT, 12)
    assert tuple(ids) == expected(open_session, PROMPT, COUNT)


def test_only_filled_rows_are_written(open_session: OpenSession, tmp_path: Path) -> None:
    session = open_session()
    session.save(tmp_path / "empty")
    other = open_session()
    other.generate((2, 3, 8), max_new_tokens=2, stop_token_ids=()).finish()
    session.generate(PROMPT, max_new_tokens=1, stop_token_ids=()).finish()
    session.save(tmp_path / "saved")
    content = (tmp_path / "saved").read_bytes()
    header_bytes = int.from_bytes(content[40:48], "little")
    assert b"".join(rows_of(session).values()) == content[HEADER_AT + header_bytes :]
    assert json.loads(content[HEADER_AT:][:header_bytes])["token_ids"] == list(session.token_ids)
    other.restore(tmp_path / "empty")
    assert (other.token_ids, other.backend.kv_cache.filled_length) == ((), 0)


def test_a_generation_under_way_ends_when_a_session_is_restored(open_session: OpenSession, tmp_path: Path) -> None:
    session = open_session()
    session.generate(PROMPT, max_new_tokens=3, stop_token_ids=()).finish()
    session.save(tmp_path / "saved")
    running = session.generate((2, 8), stop_token_ids=())
    next(running)
    session.restore(tmp_path / "saved")
    with pytest.raises(UserError, match="another generation started"):
        list(running)
    assert session.processed_ids == session.token_ids[:-1]
    assert continued(session, 4)[0] == expected(open_session, PROMPT)[3:]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    opened = talking.fake_opener(tmp_path, lambda position: True)()
    opened.generate(PROMPT, max_new_tokens=3, stop_token_ids=()).finish()
    return opened


def refused(session: Session, path: Path) -> str:
    """Restore from `path`, which fails and changes nothing; return the message."""
    before = session.token_ids, rows_of(session)
    with pytest.raises(UserError) as caught:
        session.restore(path)
    assert (session.token_ids, rows_of(session)) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def saved(session: Session, tmp_path: Path) -> Path:
    session.save(tmp_path / "saved")
    return tmp_path / "saved"


def edited(saved: Path, change: Callable[[dict[str, Any]], None], rows: bytes | None = None) -> Path:
    """Change the header, and with it everything that protects it."""
    content = saved.read_bytes()
    size = int.from_bytes(content[40:48], "little")
    header = json.loads(content[HEADER_AT : HEADER_AT + size])
    change(header)
    return written(saved, json.dumps(header).encode(), content[HEADER_AT + size :] if rows is None else rows)


def written(path: Path, header: bytes, rows: bytes) -> Path:
    payload = len(header).to_bytes(8, "little") + header + rows
    path.write_bytes(b"MTPSAVE1" + hashlib.sha256(payload).digest() + payload)
    return path


def test_every_truncation_is_refused(session: Session, saved: Path) -> None:
    content = saved.read_bytes()
    for length in (0, 1, 7, 8, 39, 40, 47, 48, 60, len(content) // 2, len(content) - 4, len(content) - 1):
        saved.write_bytes(content[:length])
        message = refused(session, saved)
        assert "cut short or damaged: save the session again" in message or length < 8
    saved.write_bytes(content + b"\0")
    assert "cut short or damaged" in refused(session, saved)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_every_flipped_byte_is_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    opened = talking.fake_opener(folder, lambda position: True)()
    opened.generate(PROMPT, max_new_tokens=3, stop_token_ids=()).finish()
    opened.save(folder / "saved")
    content = bytearray((folder / "saved").read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (folder / "saved").write_bytes(content)
    refused(opened, folder / "saved")


def test_another_bundle_is_named(session: Session, saved: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["files"]["drafter"] = "0" * 64
        header["model"] = "E2B\n"

    edited(saved, change)
    message = refused(session, saved)
    assert "was saved with another bundle (of E2B ; this one is of fake)" in message
    with pytest.raises(BundleError):
        session.restore(saved)


HUGE = 1 << 62


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.update(token_ids=[2] * 100),
        lambda header: header.update(token_ids=[2, 50]),
        lambda header: header.update(token_ids=[-1] * 22),
        lambda header: header.update(token_ids=[1 << 70] * 22),
        lambda header: header.update(token_ids=[2] * 5),
        lambda header: header.update(token_ids="x"),
        lambda header: header.update(extra=1),
        lambda header: header.update(shapes={}),
        lambda header: header["shapes"].update(kv_cache_k_0=[1, 1, 22]),
        lambda header: header["shapes"].update(kv_cache_k_0=[1, 1, -22, -1]),
        lambda header: header["shapes"].update(kv_cache_k_0=[HUGE, HUGE, HUGE, HUGE]),
        lambda header: header["shapes"].update(other=[1, 1, 0, HUGE]),
        lambda header: header["shapes"].update(other=[1, HUGE, 0, HUGE]),
        lambda header: header["shapes"].update(kv_cache_k_0=[1, 22, 1, 1]),
        lambda header: header.update(shapes={"other": header["shapes"]["kv_cache_k_0"]}),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(
    session: Session, saved: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    message = refused(session, edited(saved, change))
    assert "cut short or damaged" in message or "does not fit this bundle" in message


def test_rows_of_another_shape_are_refused(session: Session, saved: Path) -> None:
    edited(saved, lambda header: header["shapes"].update(kv_cache_k_0=[1, 1, 0, 1]), b"")
    session.restore(saved)  # tokens without rows are only tokens
    assert session.processed_ids == ()
    edited(saved, lambda header: header["shapes"].update(kv_cache_k_0=[1, 2, 4, 8]), bytes(256))
    assert "does not fit this bundle" in refused(session, saved)


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b"[" * 100_000, b"\xff", b'{"model": 3}', b"null"])
def test_a_header_that_is_no_header_is_refused(session: Session, saved: Path, header: bytes) -> None:
    assert "cut short or damaged" in refused(session, written(saved, header, b""))


def test_a_file_of_another_kind_is_refused(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "other"
    assert "cannot read the session" in refused(session, path)
    np.savez(path.open("wb"), a=np.zeros(3))
    assert "is not a saved session" in refused(session, path)
    path.write_bytes(b"MTPSAVE1" + bytes(32) + (1 << 63).to_bytes(8, "little") + b"{}")
    assert "cut short or damaged" in refused(session, path)
    path.unlink()
    path.mkdir()
    assert "is not a file" in refused(session, path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in refused(session, tmp_path / "pipe")


def test_a_failed_save_leaves_what_was_there(
    session: Session, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, names = saved.read_bytes(), sorted(tmp_path.iterdir())
    session.generate((2, 8), max_new_tokens=3, stop_token_ids=()).finish()
    with pytest.raises(UserError, match="its messages are not JSON"):
        session.save(saved, note=object())
    with pytest.raises(UserError, match=r"cannot write the session to .*: No such file"):
        session.save(tmp_path / "nowhere" / "saved")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(UserError, match="No space left on device"):
            session.save(saved)
    assert (saved.read_bytes(), sorted(tmp_path.iterdir())) == (before, names)
    session.save(saved)
    assert saved.read_bytes() != before
    assert sorted(tmp_path.iterdir()) == names


def test_a_closed_session_neither_saves_nor_restores(session: Session, saved: Path) -> None:
    session.close()
    with pytest.raises(UserError, match="the session is closed"):
        session.save(saved)
    with pytest.raises(UserError, match="the session is closed"):
        session.restore(saved)
