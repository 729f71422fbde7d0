"""A reply in Gemma 4's notation becomes the message that the template writes it from, and a tool's answer reaches the
model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_export.source.embedded import EMBEDDED
from mtp_runtime import Conversation, Session
from mtp_runtime.text.chat import render_chat
from mtp_runtime.text.native_calls import assistant_message
from tests.conftest import Export
from tests.support.places import PUBLISHED_TEMPLATE
from tools.train_nano.dialogues import TOOLS

NANO = (EMBEDDED / "target/chat_template.jinja").read_text(encoding="utf-8")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: "<|" not in text)
KEYS = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8)
VALUES = st.recursive(
    TEXTS | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


def turn_of(template: str, message: dict[str, Any]) -> str:
    """What a model says where the template writes this message."""
    before = [{"role": "user", "content": "?"}]
    prompt = render_chat(template, before)
    whole = render_chat(template, [*before, message], add_generation_prompt=False)
    assert whole.startswith(prompt)
    return whole[len(prompt) :].removesuffix("<|tool_response>")


@given(st.lists(st.tuples(KEYS, st.dictionaries(KEYS, VALUES, max_size=4)), min_size=1, max_size=3), st.booleans())
def test_what_a_template_writes_is_read_back(calls: list[tuple[str, dict[str, Any]]], thinks: bool) -> None:
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    message |= {"tool_calls": [{"type": "function", "function": function} for function in functions]}
    if thinks:
        message["reasoning_content"] = "one\ntwo"
    templates = [NANO, PUBLISHED_TEMPLATE.read_text(encoding="utf-8")] if PUBLISHED_TEMPLATE.is_file() else [NANO]
    for template in templates:
        assert assistant_message(turn_of(template, message)) == message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No call.",
        "<|channel>thought\nhm\n<channel|>5",
        "<|tool_call>call:add{a:1",
        "<|tool_call>call:add{a:1}",
        "<|tool_call>call:add{a:1,}<tool_call|>",
        "<|tool_call>call:add{a}<tool_call|>",
        "<|tool_call>call:add{a:one}<tool_call|>",
        '<|tool_call>call:add{a:<|"|>1}<tool_call|>',
        "<|tool_call>call:{a:1}<tool_call|>",
        "<|tool_call>add{a:1}<tool_call|>",
        "<|tool_call>call:add{a:" + "[" * 100_000 + "}<tool_call|>",
        "<|tool_call>call:add{a:1}<tool_call|><|tool_call>call:add{",
        "<|tool_call>call:add{a:" + "1" * 5000 + "}<tool_call|>",
    ],
)
def test_what_is_no_call_stays_as_it_is(text: str) -> None:
    assert assistant_message(text) == {"role": "assistant", "content": text}


def test_text_around_calls_is_kept() -> None:
    text = "<|channel>thought\nhm\n<channel|>Let me see. <|tool_call>call:f{}<tool_call|>"
    function = {"name": "f", "arguments": {}}
    assert assistant_message(text) == {
        "role": "assistant",
        "content": "Let me see. ",
        "reasoning_content": "hm",
        "tool_calls": [{"type": "function", "function": function}],
    }


@pytest.fixture(scope="module")
def session(export_nano: Export) -> Iterator[Session]:
    with Session.open(export_nano("int8")) as opened:
        yield opened


def test_a_tools_answer_reaches_the_model(session: Session) -> None:
    """Two calls in one reply, then another turn with one; each prompt is what the template makes of the messages."""
    options: dict[str, Any] = {"tools": list(TOOLS.values())}
    conversation = Conversation(session, **options)
    reply = conversation.say("What is 231 plus 84, and 17 plus 950?")
    reply.finish()
    calls = [call["function"] for call in reply.as_message()["tool_calls"]]
    assert calls == [
        {"name": "add", "arguments": {"a": 231, "b": 84}},
        {"name": "add", "arguments": {"a": 17, "b": 950}},
    ]
    answers = [{"role": "tool", "name": "add", "content": {"result": value}} for value in (315, 967)]
    answered = conversation.say(answers)
    answered.finish()
    assert answered.text == "231 plus 84 is 315, and 17 plus 950 is 967."
    assert answered.stats.reused_tokens > 0.8 * len(reply.prompt_ids)
    messages = [{"role": "user", "content": "What is 231 plus 84, and 17 plus 950?"}, reply.as_message(), *answers]
    prompt = session.tokenizer.decode(answered.prompt_ids, skip_special_tokens=False)
    assert prompt == session.chat_prompt(messages, **options)
    assert conversation.messages == [*messages, answered.as_message()]
    again = conversation.say("Tell me the word of the day for Monday.")
    again.finish()
    assert again.as_message()["tool_calls"][0]["function"]["arguments"] == {"day": "Monday"}


def test_without_tools_a_reply_is_its_text(session: Session) -> None:
    conversation = Conversation(session)
    reply = conversation.say("What is 7 plus 5?")
    reply.finish()
    assert reply.as_message() == {"role": "assistant", "content": "7 plus 5 is 12."}
