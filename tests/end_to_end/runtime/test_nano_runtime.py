"""The reference runtime on the real pair: the cache is shared, and the whole context is used, to its last slot."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from mtp_runtime import Session
from mtp_runtime.bundle.contract import CacheName
from mtp_runtime.generate.backend import FloatArray
from mtp_runtime.measure.parity import compare_tokens
from tests.conftest import Export

PROMPT = 'class Stack:\n    """A stack."""\n\n    def push(self, item):'
# int8 graphs of one and of several tokens round differently; the largest margin at which that was seen to matter in
# 32 prompts is below 1e-2 logits.
TOLERANCE = 1e-2


@pytest.fixture(scope="module")
def session(export_nano: Export) -> Iterator[Session]:
    with Session.open(export_nano("int8")) as opened:
        yield opened


def test_mtp_equals_plain_decoding_up_to_the_last_slot(session: Session) -> None:
    plain = session.generate(PROMPT, num_draft_tokens=0, stop_token_ids=(), with_margins=True).finish()
    assert len(plain.prompt_ids) + len(plain.tokens) == session.manifest.context_length
    for drafts in (1, session.manifest.num_draft_tokens):
        drafted = session.generate(PROMPT, num_draft_tokens=drafts, stop_token_ids=()).finish()
        assert len(drafted.tokens) == len(plain.tokens)
        assert drafted.finish_reason == "context"
        assert drafted.stats.accepted > 0
        comparison = compare_tokens(
            f"K = {drafts}",
            plain.tokens,
            drafted.tokens,
            margins=plain.margins,
            tolerance=TOLERANCE,
            max_new_tokens=len(plain.tokens),
        )
        assert comparison.verdict != "different", comparison


def test_prefill_leaves_the_rows_that_decoding_would(session: Session) -> None:
    """A prompt of 150 tokens, prefilled in chunks with padding, against the same tokens decoded one by one."""
    ids = (session.tokenize(PROMPT) * 20)[:151]
    cache = session.backend.kv_cache
    session.generate(ids, max_new_tokens=1).finish()
    prefilled = {name: cache.rows(name) for name in cache.names}
    assert session.backend.kv_cache.filled_length == len(ids)
    cache.rewind(0)
    for token in ids:
        session.backend.verify((token,))
        cache.advance(1)
    for name, expected in prefilled.items():
        decoded = cache.rows(name)
        # Dynamic int8 activations round per row and per kernel; a wrong row is off by its whole norm.
        norm = np.linalg.norm(expected, axis=-1)  # 0 of a ring's first position
        error = np.linalg.norm(decoded - expected, axis=-1) / np.maximum(norm, 1e-6)
        assert error.max() < 0.05, name


def test_the_drafter_reads_the_rows_that_the_target_writes(session: Session) -> None:
    """The same draft pass before and after the rows of one cache change: it sees the change without being told."""
    cache = session.backend.kv_cache
    session.generate(PROMPT, max_new_tokens=4).finish()
    activations = np.linspace(-1, 1, session.manifest.hidden_size, dtype=np.float32)

    def draft() -> FloatArray:
        return session.backend.draft(7, activations).activations

    before = draft()
    rows = {name: cache.rows(name) for name in cache.names}
    random = np.random.default_rng(3)
    seen = set()
    for name, values in rows.items():
        changed = values + random.standard_normal(values.shape[-1], np.float32)
        changed[:, :, 0] *= 0.5
        cache.restore({**rows, name: changed})
        if np.abs(draft() - before).max() > 1e-4:
            seen.add(name)
    drafter_reads = {3, 4}  # the last cache of each kind of layer
    assert seen == {str(name) for i in drafter_reads for name in CacheName.pair(i)}
    cache.restore(rows)
    np.testing.assert_array_equal(draft(), before)
