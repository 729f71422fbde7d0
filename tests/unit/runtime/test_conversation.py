"""Turns of a conversation say what a fresh session would, and process only what the cache has not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mtp_runtime import Backend, Conversation, MtpError, Session, UserError
from tests.support import talking
from tests.support.talking import OpenSession, closing_all, expected

# Short enough for four turns in 60 positions; the last one reads across many windows of the toy pair.
MESSAGES = ("cab", "Q!", "abba", "z")
COUNT = 4
# Tokens of a reply come from these options: nothing ends it but its length.
OPTIONS: dict[str, Any] = {"max_new_tokens": COUNT, "stop_token_ids": ()}


class CountingBackend:
    """Implements Backend by another one, and counts the tokens that are prefilled."""

    def __init__(self, backend: Backend) -> None:
        self.kv_cache, self.embed_ms = backend.kv_cache, 0.0
        self.verify, self.draft, self.close = backend.verify, backend.draft, backend.close
        self.prefilled = 0
        self._prefill = backend.prefill

    def prefill(self, token_ids: Sequence[int]) -> None:
        self.prefilled += len(token_ids)
        self._prefill(token_ids)


def ids_of(reply: Any) -> tuple[int, ...]:
    return tuple(token.id for token in reply.tokens)


def is_consistent(session: Session) -> bool:
    """Whether every filled row is accounted for by a token."""
    return len(session.processed_ids) == session.backend.kv_cache.filled_length


@pytest.mark.parametrize("drafts", [0, 4])
def test_each_turn_equals_a_fresh_session(open_session: OpenSession, drafts: int) -> None:
    opened = open_session()
    backend = CountingBackend(opened.backend)
    session = Session(opened.bundle, backend)
    conversation = Conversation(session)
    for turn, message in enumerate(MESSAGES):
        before = session.processed_ids
        backend.prefilled = 0
        reply = conversation.say(message, num_draft_tokens=drafts, **OPTIONS)
        trace = reply.finish()
        assert trace.tokens == expected(open_session, reply.prompt_ids, COUNT)
        stats = reply.stats
        # All but the prompt's last token and what is in the cache.
        assert backend.prefilled == stats.prompt_tokens - stats.reused_tokens - 1
        assert reply.prompt_ids[: stats.reused_tokens] == before[: stats.reused_tokens]
        assert (stats.reused_tokens > 0) == (turn > 0)
        shorter = min(len(before), len(reply.prompt_ids) - 1)
        assert stats.reused_tokens == shorter or reply.prompt_ids[stats.reused_tokens] != before[stats.reused_tokens]
        assert is_consistent(session)
    assert [turn.messages[0]["content"] for turn in conversation.turns] == list(MESSAGES)
    assert len(conversation.messages) == 2 * len(MESSAGES)


def test_a_reply_that_tokenizes_to_the_same_ids_is_reused_whole(tmp_path: Path) -> None:
    with closing_all(talking.fake_opener(tmp_path, lambda position: True, cache_length=256)) as open_session:
        session = open_session()
        conversation = Conversation(session, system="be short")
        for message in MESSAGES:
            processed = session.processed_ids
            reply = conversation.say(message, **OPTIONS)
            reply.finish()
            before = session.tokenizer.decode(processed, skip_special_tokens=False)
            read_back = session.tokenize(before) == list(processed)
            if read_back and processed:
                assert reply.stats.reused_tokens == len(processed)
        assert conversation.messages[0] == {"role": "system", "content": "be short"}


@pytest.mark.parametrize("turn", range(len(MESSAGES)))
def test_rewinding_to_any_turn_goes_on_from_there(open_session: OpenSession, turn: int) -> None:
    session = open_session()
    conversation = Conversation(session)
    for message in MESSAGES[:3]:
        conversation.say(message, **OPTIONS).finish()
    turns = conversation.turns
    if turn == len(turns):
        with pytest.raises(UserError, match="cannot rewind to turn 4: the conversation has 3"):
            conversation.rewind(4)
    conversation.rewind(turn)
    assert conversation.turns == turns[:turn]
    reply = conversation.say("other", **OPTIONS)
    assert reply.finish().tokens == expected(open_session, reply.prompt_ids, COUNT)
    # The beginning at least: <bos> and the first turn's mark.
    assert reply.stats.reused_tokens >= (3 if turn == 0 else 8)
    assert conversation.turns[:turn] == turns[:turn]
    assert len(conversation.turns) == turn + 1
    assert is_consistent(session)


@pytest.mark.parametrize("how", ["closed", "dropped", "rewound"])
@pytest.mark.parametrize("seen", range(1, 8))
def test_an_abandoned_reply_keeps_the_tokens_that_were_read(open_session: OpenSession, seen: int, how: str) -> None:
    session = open_session()
    conversation = Conversation(session)
    conversation.say("ab", **OPTIONS).finish()
    reply = conversation.say("cd", max_new_tokens=12, stop_token_ids=())
    first = [next(reply).id for _ in range(seen)]
    assert conversation.turns[1].reply["content"] == session.tokenizer.decode(first, skip_special_tokens=False)
    if how == "closed":
        reply.close()
        assert is_consistent(session)
        assert session.processed_ids == (*reply.prompt_ids, *first[:-1])
    if how == "rewound":
        conversation.rewind(2)
    after = conversation.say("e", **OPTIONS)
    assert after.finish().tokens == expected(open_session, after.prompt_ids, COUNT)
    assert ids_of(reply) == tuple(first)
    assert reply.finish_reason == "abandoned"
    assert list(reply) == []
    assert len(conversation.turns) == 3
    assert session.tokenizer.decode(first, skip_special_tokens=False) in session.tokenizer.decode(
        after.prompt_ids, skip_special_tokens=False
    )


def test_a_reply_that_never_began_is_no_turn(open_session: OpenSession) -> None:
    session = open_session()
    conversation = Conversation(session)
    conversation.say("ab", **OPTIONS).finish()
    never = conversation.say("cd", **OPTIONS)
    reply = conversation.say("e", **OPTIONS)
    reply.finish()
    assert [turn.messages[0]["content"] for turn in conversation.turns] == ["ab", "e"]
    assert list(never) == []
    with pytest.raises(UserError, match="the reply was closed before it began"):
        never.finish()


def test_a_refused_turn_leaves_the_conversation_as_it_was(open_session: OpenSession) -> None:
    session = open_session()
    conversation = Conversation(session)
    conversation.say("ab", **OPTIONS).finish()
    turns = conversation.turns
    with pytest.raises(UserError, match=r"the prompt has .* tokens, the context takes 60"):
        next(conversation.say("x" * 60, **OPTIONS))
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        next(conversation.say("x", max_new_tokens=0))
    with pytest.raises(UserError, match="keep_length is the conversation's own matter"):
        conversation.say("x", keep_length=3)
    assert conversation.turns == turns
    reply = conversation.say("cd", **OPTIONS)
    assert reply.finish().tokens == expected(open_session, reply.prompt_ids, COUNT)
    assert reply.stats.reused_tokens > 0


def test_two_conversations_share_a_session(open_session: OpenSession) -> None:
    session = open_session()
    conversations = [Conversation(session), Conversation(session)]
    for turn in range(2):
        for conversation, message in zip(conversations, ("abc", "xyz"), strict=True):
            reply = conversation.say(message + str(turn), **OPTIONS)
            assert reply.finish().tokens == expected(open_session, reply.prompt_ids, COUNT)


def test_a_reply_overtaken_by_another_generation_ends_there(open_session: OpenSession) -> None:
    session = open_session()
    conversation = Conversation(session)
    reply = conversation.say("ab", max_new_tokens=12, stop_token_ids=())
    next(reply)
    session.generate((2, 8), max_new_tokens=3, stop_token_ids=()).finish()
    with pytest.raises(MtpError, match="another generation started"):
        list(reply)
    after = conversation.say("e", **OPTIONS)
    assert after.finish().tokens == expected(open_session, after.prompt_ids, COUNT)


@pytest.mark.parametrize("drafts", [0, 4])
def test_a_later_turn_fills_the_context_to_its_last_slot(open_session: OpenSession, drafts: int) -> None:
    session = open_session()
    conversation = Conversation(session)
    conversation.say("ab", **OPTIONS).finish()
    reply = conversation.say("cd", num_draft_tokens=drafts, stop_token_ids=())
    trace = reply.finish()
    assert trace.finish_reason == "context"
    assert len(trace.prompt_ids) + len(trace.tokens) == session.manifest.context_length
    assert trace.tokens == expected(open_session, reply.prompt_ids)
    assert session.backend.kv_cache.filled_length == session.manifest.context_length - 1


def test_a_reply_contains_neither_stop_sequence_nor_stop_id(open_session: OpenSession) -> None:
    session = open_session()
    ids = expected(open_session, session.tokenize(session.chat_prompt("ab")), 12)
    raw = session.tokenizer.decode(ids, skip_special_tokens=False)
    text = session.detokenize(ids)
    stop = text[3:5]
    reply = Conversation(session).say("ab", max_new_tokens=12, stop=stop, stop_token_ids=())
    streamed = "".join(piece for _, piece in reply.with_text())
    assert streamed == reply.text == text[: text.index(stop)]
    conversation = Conversation(session)
    conversation.say("ab", max_new_tokens=12, stop=stop, stop_token_ids=()).finish()
    assert stop not in conversation.turns[0].reply["content"]
    conversation.rewind(0)
    conversation.say("ab", max_new_tokens=12, stop_token_ids=[ids[7]]).finish()
    kept = ids[: ids.index(ids[7])]
    assert conversation.turns[0].reply["content"] == session.tokenizer.decode(kept, skip_special_tokens=False)
    assert raw.startswith(conversation.turns[0].reply["content"])


def test_options_reach_the_template(tmp_path: Path) -> None:
    with closing_all(talking.fake_opener(tmp_path, lambda position: True)) as open_session:
        (tmp_path / "chat_template").write_text("{{ bos_token }}{{ tools[0].name }}{{ extra }}", encoding="utf-8")
        conversation = Conversation(open_session(), tools=[{"name": "abc"}], extra="x")
        reply = conversation.say({"role": "tool", "content": ["z"]}, **OPTIONS)
        assert conversation.session.detokenize(reply.prompt_ids) == "abcx"


def test_a_saved_conversation_goes_on_bit_by_bit(open_session: OpenSession, tmp_path: Path) -> None:
    session = open_session()
    conversation = Conversation(session, system="s", extra=1)
    conversation.say("cab", **OPTIONS).finish()
    running = conversation.say("de", max_new_tokens=9, stop_token_ids=())
    for _ in range(3):
        next(running)
    conversation.save(tmp_path / "saved")
    other = open_session()
    restored = Conversation.restore(other, tmp_path / "saved")
    assert restored.turns == conversation.turns
    assert restored.messages == conversation.messages
    replies = [each.say("f", with_margins=True, **OPTIONS) for each in (conversation, restored)]
    traces = [reply.finish() for reply in replies]
    assert traces[0].tokens == traces[1].tokens
    assert traces[0].margins == traces[1].margins
    assert replies[0].prompt_ids == replies[1].prompt_ids
    assert traces[0].stats.reused_tokens == traces[1].stats.reused_tokens > 0
    for name in session.backend.kv_cache.names:
        rows = [each.backend.kv_cache.rows(name) for each in (session, other)]
        assert rows[0].tobytes() == rows[1].tobytes()


def test_a_session_saved_without_a_conversation_says_so(open_session: OpenSession, tmp_path: Path) -> None:
    session = open_session()
    session.generate((2, 8), max_new_tokens=3, stop_token_ids=()).finish()
    session.save(tmp_path / "saved")
    with pytest.raises(UserError, match=r"has no conversation .* restore it with Session.restore"):
        Conversation.restore(session, tmp_path / "saved")
