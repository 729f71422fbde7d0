"""The pure parts of reading texts: what is cut out of a tokenizer.json, and several templates as one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_export.source.templates import joined
from mtp_export.source.tokenizer_file import call_settings, without_call_settings
from mtp_runtime.errors import UserError
from mtp_runtime.text.chat import render_chat

VALUES = st.none() | st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9), max_size=3)
DOCUMENTS = st.dictionaries(
    st.sampled_from(["truncation", "padding", "model", "truncation ", "", '"}'])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    VALUES | st.lists(VALUES, max_size=2),
    max_size=6,
)


@given(DOCUMENTS, st.sampled_from([None, 0, 3]), st.booleans())
def test_all_but_truncation_and_padding_stays_byte_for_byte(
    document: dict[str, Any], indent: int | None, ascii_only: bool
) -> None:
    def text_of(value: dict[str, Any]) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ascii_only)

    removed = {key: None if key in ("truncation", "padding") else value for key, value in document.items()}
    assert without_call_settings(text_of(document)) == text_of(removed)
    assert call_settings(text_of(document)) == {
        key: value for key, value in document.items() if key in ("truncation", "padding") and value is not None
    }


PIECES = ["\n", " ", "\t", "a", "{{ x }}", "{{- x }}", "{{ x -}}", "{# c #}", "{% if x %}b{% endif %}", "{%- if x %}"]
PIECES += ["{% endif %}", "{% set y = 1 %}", "{%+ set y = 1 %}", "{% set y = 1 +%}", "\r\n", "{{ y }}"]


def template_of(pieces: list[str]) -> str:
    """A template of pieces: what is opened is closed, and nothing else is."""
    depth, text = 0, ""
    for piece in pieces:
        if piece == "{% endif %}" and not depth:
            continue
        depth += {"{%- if x %}": 1, "{% endif %}": -1}.get(piece, 0)
        text += piece
    return text + "{% endif %}" * depth


SPACE = st.sampled_from(["", "\n", "\n \n", " \n", "\n\t", "\n\n", " "])
TEMPLATES = st.builds(
    lambda before, pieces, after: before + template_of(pieces) + after,
    SPACE,
    st.lists(st.sampled_from(PIECES), max_size=8),
    SPACE,
)


@given(TEMPLATES, TEMPLATES)
def test_two_templates_in_one_text_render_as_each_alone(default: str, tool_use: str) -> None:
    text = joined({"default": default, "tool_use": tool_use, "rag": "not this one"})
    assert text is not None
    for alone, tools in ((default, None), (tool_use, []), (tool_use, [{"type": "function"}])):
        assert render_chat(text, [], tools=tools, x="X") == render_chat(alone, [], tools=tools, x="X")


def test_one_template_stays_as_it_is() -> None:
    assert joined({"default": " a\n", "rag": "b"}) == " a\n"
    assert joined({"rag": "b"}) is None
    assert joined({}) is None


def test_a_template_for_tools_alone_refuses_other_conversations() -> None:
    text = joined({"tool_use": "with {{ tools | length }}"})
    assert text is not None
    assert render_chat(text, [], tools=[{}]) == "with 1"
    with pytest.raises(UserError, match="the template is for conversations with tools"):
        render_chat(text, [])
