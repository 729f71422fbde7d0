"""nano's chat template: it writes what the published one writes, and a prompt is the beginning of what follows it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mtp_export.source.embedded import EMBEDDED
from mtp_runtime.errors import UserError
from mtp_runtime.text.chat import render_chat
from tests.support.places import PUBLISHED_TEMPLATE
from tools.train_nano.dialogues import TOOLS, dialogue

TEMPLATE = (EMBEDDED / "target/chat_template.jinja").read_text(encoding="utf-8")
NESTED = {
    "type": "function",
    "function": {
        "name": "book",
        "description": 'A "table".',
        "parameters": {
            "type": "object",
            "properties": {
                "type": {"type": "string", "enum": ["in", "out"]},
                "names": {"type": "array", "items": {"type": "string"}},
                "at": {"type": "object", "properties": {"day": {"type": "string"}}, "required": ["day"]},
            },
            "required": ["type", "names"],
        },
    },
}
CALL = {"function": {"name": "add", "arguments": {"a": 2, "b": 3, "deep": {"x": [1, "y", None, True]}}}}
WORD = {"function": {"name": "w", "arguments": {}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "a question": [{"role": "user", "content": " Hi. "}],
    "a system message": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}],
    "a developer": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi."}],
    "turns": [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye."},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "audio"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "And this?"}, {"type": "video"}]},
    ],
    "a call": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "tool_calls": [CALL]}],
    "an answered call": [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "5"},
    ],
    "two answered calls": [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "tool_calls": [CALL, CALL]},
        {"role": "tool", "name": "add", "content": "5"},
        {"role": "tool", "name": "add", "content": "6"},
        {"role": "assistant", "content": "5 and 6."},
        {"role": "user", "content": "Thanks."},
    ],
    "a tool's answer in parts": [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": [{"type": "text", "text": "5"}]},
    ],
    "answers by the id of their calls": [
        {"role": "user", "content": "2 + 3, and the word?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "x", **CALL}, {"id": "y", **WORD}]},
        {"role": "tool", "tool_call_id": "y", "content": "oak"},
        {"role": "tool", "tool_call_id": "x", "content": '{"value": 5}'},
    ],
    "answers in the model's message": [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "tool_calls": [CALL], "tool_responses": [{"name": "add", "response": {"value": 5}}]},
    ],
    "answers and text in the model's message": [
        {"role": "user", "content": "2 + 3?"},
        {
            "role": "assistant",
            "content": "5.",
            "tool_calls": [CALL],
            "tool_responses": [{"name": "add", "response": {"value": 5}}],
        },
        {"role": "user", "content": "Thanks."},
    ],
    "a tool's answer with a picture": [
        {"role": "user", "content": "Draw."},
        {"role": "assistant", "tool_calls": [WORD]},
        {"role": "tool", "name": "w", "content": [{"type": "image"}, {"type": "text", "text": " oak "}]},
    ],
    "a call that is never answered": [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "user", "content": "Never mind."},
    ],
    "an answered call that leads nowhere": [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "5"},
        {"role": "user", "content": "Never mind."},
    ],
    "a system message in parts": [
        {"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Hi."},
    ],
    "a thought": [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "5", "reasoning_content": "2 + 3 = 5"},
    ],
    "a thought under its other name": [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "tool_calls": [CALL], "reasoning": "2 + 3 = 5"},
    ],
    "an old thought": [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "<|channel>thought\n2 + 3 = 5\n<channel|>5", "reasoning_content": "hm"},
        {"role": "user", "content": "Thanks."},
    ],
    "no content": [{"role": "user", "content": ""}, {"role": "assistant", "content": None}],
    "unicode": [{"role": "user", "content": "Grüße, 東京 🙂 {{ x }} <b>"}],
}


def rendered(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return render_chat(template, messages, special_tokens={"bos_token": "<bos>"}, **options)


@pytest.mark.skipif(not PUBLISHED_TEMPLATE.is_file(), reason="the published template is not beside this checkout")
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("open_turn", [False, True])
def test_it_writes_what_the_published_template_writes(name: str, thinking: bool, open_turn: bool) -> None:
    published = PUBLISHED_TEMPLATE.read_text(encoding="utf-8")
    messages = CONVERSATIONS[name]
    for tools in (None, list(TOOLS.values()), [NESTED]):
        options: dict[str, Any] = {"tools": tools, "enable_thinking": thinking, "add_generation_prompt": open_turn}
        theirs = rendered(published, messages, **options)
        if thinking and theirs.endswith("><|channel>thought\n"):
            # It opens the channel of a thought itself behind a tool's answer: a reply would then begin inside it.
            theirs = theirs.removesuffix("<|channel>thought\n")
        assert rendered(TEMPLATE, messages, **options) == theirs


def test_arguments_that_are_a_text_are_refused() -> None:
    call = {"function": {"name": "add", "arguments": '{"a": 2}'}}
    with pytest.raises(UserError, match="arguments of a tool call are a text: give them as an object"):
        rendered(TEMPLATE, [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}])


def test_differences_from_the_published_template() -> None:
    """Text beside calls comes before them, and each message of the model is a turn."""
    question = {"role": "user", "content": "?"}
    beside = rendered(TEMPLATE, [question, {"role": "assistant", "content": "Let me see.", "tool_calls": [WORD]}])
    assert beside.endswith("<|turn>model\nLet me see.<|tool_call>call:w{}<tool_call|><|tool_response>")
    twice = rendered(
        TEMPLATE, [question, {"role": "assistant", "content": "A."}, {"role": "assistant", "content": "B."}]
    )
    assert "<|turn>model\nA.<turn|>\n<|turn>model\nB.<turn|>\n" in twice


def test_a_prompt_is_the_beginning_of_the_conversation_with_its_reply() -> None:
    """Over conversations as nano was trained on: a reply is said where it was learnt."""
    rng = random.Random(5)
    seen = 0
    for _ in range(300):
        talk = dialogue(rng)
        options: dict[str, Any] = {"tools": list(talk.tools) or None, "enable_thinking": talk.thinking}
        messages = [dict(message) for message in talk.messages]
        last = max(i for i, message in enumerate(messages) if message["role"] == "user")
        for end in range(last + 1, len(messages)):
            if messages[end]["role"] == "assistant":
                whole = rendered(TEMPLATE, messages[: end + 1], add_generation_prompt=False, **options)
                prompt = rendered(TEMPLATE, messages[:end], **options)
                assert whole.startswith(prompt)
                assert whole[len(prompt) :].removesuffix("\n").endswith(("<turn|>", "<|tool_response>"))
                seen += 1
    assert seen > 300


def test_a_tools_answer_as_litert_lm_gives_it() -> None:
    """Its parts name the tool and hold an object."""
    messages = [*CONVERSATIONS["a call"]]
    part = {"type": "tool_response", "name": "add", "response": {"value": 5}}
    as_parts = rendered(TEMPLATE, [*messages, {"role": "tool", "content": [part]}])
    assert as_parts == rendered(TEMPLATE, [*messages, {"role": "tool", "name": "add", "content": {"value": 5}}])
    assert as_parts.endswith("<|tool_response>response:add{value:5}<tool_response|>")
