"""Gemma 4's published chat template, rendered by us against the expected text and against transformers.

The template comes with a checkpoint and is not ours to ship: MTP_GEMMA4_TEMPLATE names the file, or MTP_E2B or
MTP_E4B a folder with `target/chat_template.jinja`. The expected texts are those of the template of April 2026.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mtp_runtime.text.chat import Message, render_chat
from tests.support.chats import rendered_by_transformers

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where"}},
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}


@pytest.fixture(scope="module")
def template() -> str:
    folders = [Path(os.environ[name]) for name in ("MTP_E2B", "MTP_E4B") if name in os.environ]
    places = [folder / inner / "chat_template.jinja" for folder in folders for inner in ("target", "")]
    if "MTP_GEMMA4_TEMPLATE" in os.environ:
        places.insert(0, Path(os.environ["MTP_GEMMA4_TEMPLATE"]))
    for path in places:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    pytest.skip("give Gemma 4's chat_template.jinja in MTP_GEMMA4_TEMPLATE")


CONVERSATIONS: dict[str, tuple[list[Message], dict[str, Any], str]] = {
    "system, user, assistant, user": (
        [
            {"role": "system", "content": " Be brief. "},
            {"role": "user", "content": "Hi <b>you</b>"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "And?"},
        ],
        {},
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi <b>you</b><turn|>\n<|turn>model\nHello.<turn|>\n"
        "<|turn>user\nAnd?<turn|>\n<|turn>model\n",
    ),
    "thinking": (
        [
            {"role": "user", "content": "1 + 1"},
            {"role": "assistant", "content": "<|channel>thought\nhm<channel|>2"},
            {"role": "user", "content": "+ 1"},
        ],
        {"enable_thinking": True},
        "<bos><|turn>system\n<|think|><turn|>\n<|turn>user\n1 + 1<turn|>\n<|turn>model\n2<turn|>\n"
        "<|turn>user\n+ 1<turn|>\n<|turn>model\n",
    ),
    "tools": (
        [{"role": "user", "content": "Oslo?"}],
        {"tools": [TOOL], "enable_thinking": True},
        "<bos><|turn>system\n<|think|><|tool>declaration:weather"
        '{description:<|"|>Tells the weather<|"|>,parameters:{properties:{city:{description:<|"|>Where<|"|>,'
        'type:<|"|>STRING<|"|>}},required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|><turn|>\n'
        "<|turn>user\nOslo?<turn|>\n<|turn>model\n",
    ),
    "a tool call and what it gave": (
        [
            {"role": "user", "content": "Oslo?"},
            {
                "role": "assistant",
                "tool_calls": [CALL],
                "tool_responses": [{"name": "weather", "response": {"rain": False}}],
            },
        ],
        {"enable_thinking": True},
        "<bos><|turn>system\n<|think|><turn|>\n<|turn>user\nOslo?<turn|>\n<|turn>model\n"
        '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:2}<tool_call|>'
        "<|tool_response>response:weather{rain:false}<tool_response|>",
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_becomes_the_expected_text(template: str, name: str) -> None:
    messages, options, expected = CONVERSATIONS[name]
    text = render_chat(template, messages, bos_token="<bos>", **options)
    text = text.replace("<|think|>\n", "<|think|>")  # later editions end the line there
    # Some sizes' templates open and close an empty thought where thinking is off.
    assert text.removesuffix("<|channel>thought\n<channel|>") == expected


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [True, False])
def test_transformers_renders_the_same(template: str, name: str, prompt: bool) -> None:
    messages, options, _ = CONVERSATIONS[name]
    options = {**options, "add_generation_prompt": prompt}
    text = render_chat(template, messages, bos_token="<bos>", **options)
    assert text == rendered_by_transformers(template, messages, **options)
