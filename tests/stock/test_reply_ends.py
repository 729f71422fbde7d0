"""What LiteRT-LM 0.18 feeds as zeros, the token that ended a reply, comes out of prefill as that token."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from mtp_runtime import Session
from tests.conftest import Export

REPLY = "<|turn>user\nHello<turn|>\n<|turn>model\nHello!"
BEHIND_REPLY = "\n<|turn>user\nWhat is a river?<turn|>\n<|turn>model\n"
CALL = "<|turn>model\n<|tool_call>call:add{a:1,b:2}<tool_call|>"
BEHIND_CALL = "response:add{result:3}<tool_response|>"


@pytest.fixture(scope="module", params=["f32", "int8", "int4"])
def session(request: pytest.FixtureRequest, export_nano: Export) -> Iterator[Session]:
    with Session.open(export_nano(request.param), threads=1) as opened:
        yield opened


def cached(session: Session, before: list[int], ids: list[int], *, zeros: bool) -> dict[str, NDArray[np.float32]]:
    """Return the caches after two prefills, the second with zeros as its first row."""
    backend = session.backend
    backend.kv_cache.rewind(0)
    backend.prefill(before)
    rows = backend._rows  # type: ignore[attr-defined]  # no caller but LiteRT-LM feeds zeros
    look_up = rows.set

    def without_first(index: int, token: int) -> None:
        look_up(index, token)
        if index == 0:
            rows.embeddings[0, 0] = 0
            rows.per_layer_embeddings[0, 0] = 0

    if zeros:
        rows.set = without_first
    try:
        backend.prefill(ids)
    finally:
        rows.set = look_up
    return {name: backend.kv_cache.rows(name) for name in backend.kv_cache.names}


@pytest.mark.parametrize(
    ("before", "token", "behind"),
    [(REPLY, "<turn|>", BEHIND_REPLY), (CALL, "<|tool_response>", BEHIND_CALL)],
    ids=["a reply", "a call"],
)
def test_a_first_row_of_zeros(session: Session, before: str, token: str, behind: str) -> None:
    ids = session.tokenize(token + behind, bos=False)
    prompt_ids = session.tokenize(before)
    expected = cached(session, prompt_ids, ids, zeros=False)
    mended = cached(session, prompt_ids, ids, zeros=True)
    assert expected.keys() == mended.keys()
    for name, rows in expected.items():
        assert np.array_equal(rows, mended[name]), name


def test_other_rows_are_left_alone(session: Session) -> None:
    """Zeros for a token that ends nothing would be another prompt, so they are the end of a call then."""
    ids = session.tokenize(f"a{BEHIND_CALL}", bos=False)
    prompt_ids = session.tokenize(CALL)
    expected = cached(session, prompt_ids, ids, zeros=False)
    mended = cached(session, prompt_ids, ids, zeros=True)
    assert any(not np.array_equal(rows, mended[name]) for name, rows in expected.items())
