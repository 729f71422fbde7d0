"""A reply in Gemma 4's own notation as the message that a chat template takes: its thought, its text, its tool calls.

`<|channel>thought\\n…\\n<channel|>` before, `<|tool_call>call:NAME{key:value,…}<tool_call|>` for each call; strings
between `<|"|>`, otherwise as in JSON but with bare keys. Source: the published chat templates, which write the same.
"""

from __future__ import annotations

import re
from typing import Any

_CALL_OPEN, _CALL_CLOSE, _QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_THOUGHT = re.compile(r"<\|channel>thought\n(.*?)\n?<channel\|>", re.DOTALL)
_NAME = re.compile(r"call:([^{}<>\s]+)")
_KEY = re.compile(r"[^:{}\[\],<>]+")
_LITERAL = re.compile(r"true|false|null|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_LITERALS = {"true": True, "false": False, "null": None}
_MOST_LEVELS = 50


class _NoCallError(Exception):
    """The text is not in the notation."""


def assistant_message(text: str) -> dict[str, Any]:
    """Return a reply as a message of a conversation; `text` has its special tokens, and no stop token.

    Where it calls tools, and every call is in the notation, the message has `tool_calls` as OpenAI's API writes them,
    `content` without the calls and `reasoning_content` where it thought: a template writes a thought of the turn that a
    tool's answer belongs to again. Any other reply is its text as it is.
    """
    try:
        content, calls = _split(text)
    except _NoCallError:
        calls = []
    if not calls:
        return {"role": "assistant", "content": text}
    message: dict[str, Any] = {"role": "assistant", "content": content}
    thought = _THOUGHT.match(content)
    if thought:
        message |= {"content": content[thought.end() :], "reasoning_content": thought[1]}
    functions = ({"name": name, "arguments": arguments} for name, arguments in calls)
    return message | {"tool_calls": [{"type": "function", "function": function} for function in functions]}


def _split(text: str) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """Return the text without its calls, and the calls' names and arguments."""
    pieces, calls, at = [], [], 0
    while (start := text.find(_CALL_OPEN, at)) >= 0:
        pieces.append(text[at:start])
        name = _NAME.match(text, start + len(_CALL_OPEN))
        if name is None:
            raise _NoCallError
        arguments, at = _map(text, name.end(), 0)
        calls.append((name[1], arguments))
        at = _after(text, at, _CALL_CLOSE)
    return "".join([*pieces, text[at:]]), calls


def _after(text: str, at: int, sign: str) -> int:
    if not text.startswith(sign, at):
        raise _NoCallError
    return at + len(sign)


def _string(text: str, at: int) -> tuple[str, int]:
    start = _after(text, at, _QUOTE)
    end = text.find(_QUOTE, start)
    if end < 0:
        raise _NoCallError
    return text[start:end], end + len(_QUOTE)


def _map(text: str, at: int, level: int) -> tuple[dict[str, Any], int]:
    values: dict[str, Any] = {}
    at = _after(text, at, "{")
    while not text.startswith("}", at):
        at = _after(text, at, ",") if values else at
        if text.startswith(_QUOTE, at):
            key, at = _string(text, at)
        else:
            bare = _KEY.match(text, at)
            if bare is None:
                raise _NoCallError
            key, at = bare[0].strip(), bare.end()
        values[key], at = _value(text, _after(text, at, ":"), level)
    return values, at + 1


def _list(text: str, at: int, level: int) -> tuple[list[Any], int]:
    values: list[Any] = []
    at = _after(text, at, "[")
    while not text.startswith("]", at):
        value, at = _value(text, _after(text, at, ",") if values else at, level)
        values.append(value)
    return values, at + 1


def _value(text: str, at: int, level: int) -> tuple[Any, int]:
    if level == _MOST_LEVELS:
        raise _NoCallError
    if text.startswith(_QUOTE, at):
        return _string(text, at)
    if text.startswith("{", at):
        return _map(text, at, level + 1)
    if text.startswith("[", at):
        return _list(text, at, level + 1)
    literal = _LITERAL.match(text, at)
    if literal is None:
        raise _NoCallError
    word = literal[0]
    if word in _LITERALS:
        return _LITERALS[word], literal.end()
    try:
        return (int(word) if word.lstrip("-").isdigit() else float(word)), literal.end()
    except ValueError as error:  # more digits than Python converts
        raise _NoCallError from error
