"""The tests that every backend must pass: subclass the classes below and give a fixture `session` over nano at f32,
for `ConversationTests` another over the same bundle, `other_session`, and for `ClosingTests` a `fresh_session` each.

The expectations follow from the definition of a pass, not from another backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from mtp_export.check.parity import has_same_bits
from mtp_runtime import BackendError, ContextFullError, Conversation, GenerationTrace, MtpError, Session
from mtp_runtime.bundle.contract import CacheName
from mtp_runtime.generate.backend import FloatArray, TargetPass

PROMPT = 'class Stack:\n    """A stack."""\n\n    def push(self, item):'
# For ONNX Runtime, and bundles for a GPU, whose passes over one and over several tokens use other kernels: float32 sums
# in another order differ by some 1e-5 in logits of up to 30; a wrong row or mask differs by more than 1e-2.
TOLERANCE = 1e-3


def tolerance_of(session: Session) -> float:
    """Return how far passes may differ: not at all where a token has the same bits in every pass."""
    return 0.0 if has_same_bits(session.manifest) else TOLERANCE


def tokens_of(session: Session, count: int) -> list[int]:
    """Return some text of `count` tokens."""
    ids = session.tokenize(PROMPT)
    return (ids + ids[1:] * (count // len(ids) + 1))[:count]


def start(session: Session, tokens: Sequence[int]) -> None:
    """Fill the cache with `tokens` and nothing else."""
    session.backend.kv_cache.rewind(0)
    session.backend.prefill(tokens)


def all_rows(session: Session) -> dict[str, FloatArray]:
    cache = session.backend.kv_cache
    return {name: cache.rows(name) for name in cache.names}


def assert_same_rows(session: Session, expected: dict[str, FloatArray], tolerance: float | None = None) -> None:
    """Compare the filled rows of every cache, by default as closely as the session's passes agree."""
    tolerance = tolerance_of(session) if tolerance is None else tolerance
    actual = all_rows(session)
    assert actual.keys() == expected.keys()
    for name, rows in expected.items():
        assert actual[name].shape == rows.shape
        np.testing.assert_allclose(actual[name], rows, rtol=0, atol=tolerance, err_msg=name)


class Continued(NamedTuple):
    """Two tokens and the pass over them that is expected after a number of others, whose cache rows are `rows`."""

    tokens: list[int]
    rows: dict[str, FloatArray]
    expected: TargetPass


def continued(session: Session, filled: int) -> Continued:
    """Fill the cache with so many tokens, and verify two more, which stay out of it."""
    tokens = tokens_of(session, filled + 2)
    start(session, tokens[:filled])
    rows = all_rows(session)
    return Continued(tokens=tokens[filled:], rows=rows, expected=session.backend.verify(tokens[filled:]))


class BackendTests:
    """One cache, shared and in place; every pass equals its one-token equivalent; a rewind leaves no trace."""

    @pytest.mark.parametrize("filled", [3, 300])
    def test_verify_equals_one_token_at_a_time(self, session: Session, filled: int) -> None:
        tokens, tolerance = tokens_of(session, filled + 5), tolerance_of(session)
        start(session, tokens[:filled])
        together = session.backend.verify(tokens[filled:])
        session.backend.kv_cache.advance(5)
        rows = all_rows(session)
        session.backend.kv_cache.rewind(filled)
        for at, token in enumerate(tokens[filled:]):
            one = session.backend.verify((token,))
            session.backend.kv_cache.advance(1)
            np.testing.assert_allclose(together.logits[at], one.logits[0], rtol=0, atol=tolerance)
            np.testing.assert_allclose(together.activations[at], one.activations[0], rtol=0, atol=tolerance)
        assert_same_rows(session, rows)

    @pytest.mark.parametrize("filled", [3, 300])
    def test_prefill_leaves_the_rows_that_decoding_would(self, session: Session, filled: int) -> None:
        tokens = tokens_of(session, filled)
        start(session, tokens)
        rows = all_rows(session)
        session.backend.kv_cache.rewind(0)
        for token in tokens:
            session.backend.verify((token,))
            session.backend.kv_cache.advance(1)
        assert_same_rows(session, rows)

    @pytest.mark.parametrize("filled", [3, 300])
    def test_a_rejected_pass_leaves_no_trace(self, session: Session, filled: int) -> None:
        tokens, rows, expected = continued(session, filled)
        session.backend.verify((7, 7, 7, 7, 7))
        session.backend.kv_cache.advance(5)
        session.backend.kv_cache.rewind(filled)
        assert_same_rows(session, rows, 0.0)
        np.testing.assert_array_equal(session.backend.verify(tokens).logits, expected.logits)

    @pytest.mark.parametrize("filled", [3, 300])
    def test_a_rewind_far_back_continues_as_if_nothing_had_followed(self, session: Session, filled: int) -> None:
        tokens = tokens_of(session, filled + 1)
        start(session, tokens[:filled])
        expected, rows = session.backend.verify(tokens[filled:]).logits, all_rows(session)
        start(session, tokens_of(session, filled))
        session.backend.prefill(tokens_of(session, 600))
        session.backend.kv_cache.rewind(filled)
        assert_same_rows(session, rows)
        logits = session.backend.verify(tokens[filled:]).logits
        np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance_of(session))

    @pytest.mark.parametrize("filled", [3, 300])
    def test_rows_that_are_restored_continue_to_the_bit(self, session: Session, filled: int) -> None:
        tokens, rows, expected = continued(session, filled)
        start(session, (3, 4, 5))
        session.backend.kv_cache.restore(rows)
        assert session.backend.kv_cache.filled_length == filled
        restored = session.backend.verify(tokens)
        np.testing.assert_array_equal(restored.logits, expected.logits)
        np.testing.assert_array_equal(restored.activations, expected.activations)

    @pytest.mark.parametrize("filled", [3, 300])
    def test_target_and_drafter_read_the_rows_of_the_one_cache(self, session: Session, filled: int) -> None:
        cache = session.backend.kv_cache
        start(session, tokens_of(session, filled))
        activations = np.linspace(-1, 1, session.manifest.hidden_size, dtype=np.float32)
        draft = session.backend.draft(7, activations).activations
        logits = session.backend.verify((7,)).logits
        rows = all_rows(session)
        random = np.random.default_rng(3)
        seen = set()
        for name, values in rows.items():
            changed = values + random.standard_normal(values.shape, np.float32)
            cache.restore({**rows, name: changed})
            assert np.abs(session.backend.verify((7,)).logits - logits).max() > 1e-3, name
            if np.abs(session.backend.draft(7, activations).activations - draft).max() > 1e-4:
                seen.add(name)
        assert seen == {str(name) for i in (3, 4) for name in CacheName.pair(i)}, "the last cache of each layer type"

    def test_candidates_are_scored_and_the_best_is_one_of_them(self, session: Session) -> None:
        start(session, tokens_of(session, 40))
        activations = np.linspace(-1, 1, session.manifest.hidden_size, dtype=np.float32)
        draft = session.backend.draft(7, activations, with_candidates=True)
        assert draft.candidates is not None
        assert draft.scores is not None
        head = session.manifest.drafter["head"]
        assert len(draft.candidates) == head["top_k"] * head["vocab_size"] // head["num_centroids"]
        assert len(set(draft.candidates.tolist())) == len(draft.candidates)
        assert draft.best == draft.candidates[draft.scores.argmax()]
        again = session.backend.draft(7, activations)
        assert again.candidates is None
        assert again.best == draft.best
        np.testing.assert_array_equal(again.activations, draft.activations)

    def test_the_result_of_a_pass_is_not_overwritten_by_the_next(self, session: Session) -> None:
        start(session, tokens_of(session, 40))
        first = session.backend.verify((7, 8))
        kept = first.logits.copy(), first.activations.copy()
        session.backend.verify((9, 10))
        np.testing.assert_array_equal(first.logits, kept[0])
        np.testing.assert_array_equal(first.activations, kept[1])

    @pytest.mark.parametrize("filled", [3, 300])
    def test_greedy_output_depends_neither_on_k_nor_on_where_a_pass_begins(self, session: Session, filled: int) -> None:
        prompt = tokens_of(session, filled)
        outputs = {
            k: session.generate(prompt, num_draft_tokens=k, max_new_tokens=64, stop_token_ids=()).finish().tokens
            for k in range(session.manifest.num_draft_tokens + 1)
        }
        assert len(outputs[0]) == 64
        assert set(outputs.values()) == {outputs[0]}

    def test_the_context_is_used_to_its_last_slot(self, session: Session) -> None:
        room = session.manifest.context_length
        prompt = tokens_of(session, room - 40)
        trace = session.generate(prompt, stop_token_ids=()).finish()
        assert len(prompt) + len(trace.tokens) == room
        assert trace.finish_reason == "context"
        with pytest.raises(ContextFullError):
            session.backend.prefill(tokens_of(session, session.manifest.cache_length))

    def test_rows_of_another_shape_are_refused(self, session: Session) -> None:
        start(session, tokens_of(session, 40))
        rows = all_rows(session)
        name = next(iter(rows))
        with pytest.raises(MtpError, match="they are of another bundle"):
            session.backend.kv_cache.restore({name: rows[name]})
        with pytest.raises(MtpError, match=r"the rows of kv_cache_k_0 are"):
            session.backend.kv_cache.restore({**rows, name: rows[name][:, :, :, :-1]})
        assert session.backend.kv_cache.filled_length == 40


# Each longer than the sliding window, 128 tokens: every turn moves what a backend keeps of the window, and going back
# a turn must bring it back.
MESSAGES = tuple(f"Explain {topic}.\n" + PROMPT * 8 for topic in ("this class", "push", "pop"))
# Nothing ends a reply but its length.
REPLY: dict[str, Any] = {"max_new_tokens": 12, "stop_token_ids": (), "with_margins": True}


class ConversationTests:
    """Turns over one cache give what a fresh session would; a saved session continues to the bit.

    tests/unit/runtime/test_conversation.py and test_saved_session.py have the cases that do not depend on the backend.
    """

    def test_turns_reuse_the_cache_and_give_what_a_fresh_session_would(
        self, session: Session, other_session: Session
    ) -> None:
        conversation = Conversation(session)
        for turn, message in enumerate(MESSAGES):
            reply = conversation.say(message, **REPLY)
            assert reply.finish().tokens == other_session.generate(reply.prompt_ids, **REPLY).finish().tokens
            assert turn == 0 or reply.stats.reused_tokens > 128 * turn
        assert len(session.processed_ids) == session.backend.kv_cache.filled_length > 3 * 128

    def test_rewinding_to_any_turn_goes_on_from_there(self, session: Session, other_session: Session) -> None:
        conversation = Conversation(session)
        for message in MESSAGES:
            conversation.say(message, **REPLY).finish()
        turns = conversation.turns
        for turn in (2, 1, 0):
            conversation.rewind(turn)
            assert conversation.turns == turns[:turn]
            reply = conversation.say("And what is missing?", **REPLY)
            assert reply.finish().tokens == other_session.generate(reply.prompt_ids, **REPLY).finish().tokens
            assert reply.stats.reused_tokens > 128 * turn

    def test_a_reply_that_a_stop_text_ends_leaves_only_its_own_rows(
        self, session: Session, other_session: Session
    ) -> None:
        whole = session.generate(session.chat_prompt(MESSAGES[0]), **REPLY)
        whole.finish()
        stop = whole.text[4:6]
        conversation = Conversation(session)
        first = conversation.say(MESSAGES[0], stop=stop, **REPLY)
        first.finish()
        assert first.text == whole.text[: whole.text.index(stop)]
        assert len(session.processed_ids) == session.backend.kv_cache.filled_length
        reply = conversation.say("Go on.", **REPLY)
        assert reply.finish().tokens == other_session.generate(reply.prompt_ids, **REPLY).finish().tokens

    def test_a_saved_conversation_goes_on_to_the_bit(
        self, session: Session, other_session: Session, tmp_path: Path
    ) -> None:
        """Saved in the middle of a reply, in a round of drafts."""
        conversation = Conversation(session)
        conversation.say(MESSAGES[0], **REPLY).finish()
        running = conversation.say(MESSAGES[1], **REPLY)
        for _ in range(3):
            next(running)
        conversation.save(tmp_path / "saved")
        Conversation(other_session).say("What was there is replaced.", **REPLY).finish()
        restored = Conversation.restore(other_session, tmp_path / "saved")
        assert restored.turns == conversation.turns
        traces = [each.say(MESSAGES[2], **REPLY).finish() for each in (conversation, restored)]
        assert traces[0].stats.reused_tokens == traces[1].stats.reused_tokens > 128
        assert_same_continuation(session, other_session, traces)

    @pytest.mark.parametrize("filled", [3, 500])
    @pytest.mark.parametrize("drafts", [0, 4])
    def test_a_saved_session_continues_to_the_bit(
        self, session: Session, other_session: Session, tmp_path: Path, drafts: int, filled: int
    ) -> None:
        options = {**REPLY, "num_draft_tokens": drafts}
        running = session.generate(tokens_of(session, filled), **options)
        for _ in range(5):
            next(running)
        running.close()
        session.save(tmp_path / "saved")
        other_session.restore(tmp_path / "saved")
        assert (other_session.token_ids, other_session.processed_ids) == (session.token_ids, session.processed_ids)
        assert_same_rows(other_session, all_rows(session), 0.0)
        ids = session.token_ids
        traces = [each.generate(ids, keep_length=len(ids) - 1, **options).finish() for each in (session, other_session)]
        assert_same_continuation(session, other_session, traces)
        whole = session.generate(tokens_of(session, filled), **{**options, "max_new_tokens": 17}).finish()
        assert (*ids[filled:], *traces[0].tokens) == whole.tokens


def assert_same_continuation(session: Session, other: Session, traces: Sequence[GenerationTrace]) -> None:
    """Assert the same tokens, and margins and rows to the bit."""
    assert traces[0].tokens == traces[1].tokens
    assert traces[0].margins == traces[1].margins
    assert_same_rows(other, all_rows(session), 0.0)


class ClosingTests:
    """The error of a closed backend."""

    def test_a_closed_backend_is_refused(self, fresh_session: Session) -> None:
        backend = fresh_session.backend
        backend.verify((2,))
        backend.close()
        backend.close()
        with pytest.raises(BackendError, match="closed"):
            backend.verify((2,))
