"""Is structured output what it should be: JSON that parses, or tool calls in Gemma 4's grammar?

    <|tool_call>call:NAME{key:value,…}<tool_call|>

with values that are texts between <|"|>, numbers, true, false, null, [lists] and {mappings}.
"""

from __future__ import annotations

import json
import re

from mtp_export.check.prompts import Expectation

_QUOTE = '<|"|>'
_CALL = re.compile(r"<\|tool_call>(.*?)<tool_call\|>", re.DOTALL)
_NAME = re.compile(r"call:[A-Za-z_][\w.-]*(?=\{)")
_KEY = re.compile(r"[A-Za-z_][\w.-]*:")
_PLAIN = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?(?=[,}\]])|(true|false|null)(?=[,}\]])")


def is_valid(text: str, expects: Expectation, opened: str = "") -> bool:
    """Whether `text`, special tokens included, holds what is expected of it.

    json: its first object or list is whole and parses; `opened` is the part of it that the prompt has already written.
    tool_call: there is at least one call, and every call is whole and of the grammar.
    """
    if expects == "json":
        return _has_json(opened + text)
    calls = [match.group(1) for match in _CALL.finditer(text)]
    whole = len(calls) == text.count("<|tool_call>") > 0
    return whole and all(_is_call(call) for call in calls)


def _has_json(text: str) -> bool:
    starts = [at for at in (text.find("{"), text.find("[")) if at >= 0]
    if not starts:
        return False
    try:
        json.JSONDecoder().raw_decode(text, min(starts))
    except (ValueError, RecursionError):
        return False
    return True


def _is_call(call: str) -> bool:
    name = _NAME.match(call)
    return name is not None and _value_end(call, name.end()) == len(call)


def _value_end(text: str, at: int) -> int:
    """Where the value that begins at `at` ends; -1 if none does."""
    if text.startswith(_QUOTE, at):
        end = text.find(_QUOTE, at + len(_QUOTE))
        return -1 if end < 0 else end + len(_QUOTE)
    opening = text[at : at + 1]
    if opening not in ("{", "["):
        plain = _PLAIN.match(text, at)
        return -1 if plain is None else plain.end()
    closing = "}" if opening == "{" else "]"
    at += 1
    if text.startswith(closing, at):
        return at + 1
    while True:
        if opening == "{":
            key = _KEY.match(text, at)
            if key is None:
                return -1
            at = key.end()
        at = _value_end(text, at)
        if at < 0 or text[at : at + 1] not in (",", closing):
            return -1
        at += 1
        if text[at - 1] == closing:
            return at
