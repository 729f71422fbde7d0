"""Turning a conversation into a prompt with the bundle's own chat template."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mtp_runtime.errors import BundleError, UserError

# `role` and `content`, and whatever else the template reads: tool_calls, tool_responses, a list of content parts.
Message = Mapping[str, Any]

_REASONING = ("reasoning_content", "thinking", "reasoning")


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    special_tokens: Mapping[str, str] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """Return the prompt that asks the model for its next turn after `messages`.

    `special_tokens` are texts by name, such as bos_token; `tools` are JSON schemas of functions; `variables` are
    further names that the template reads, such as enable_thinking, `documents` to answer from, or another bos_token.
    The template is data from anywhere: it runs in jinja2's sandbox, with the names, filters and options that
    transformers gives it.

    Raises:
        BundleError: the template does not work.
        UserError: the template refuses the conversation.
    """
    names: dict[str, Any] = {
        "documents": None,  # as transformers has it: a template may ask whether it is none
        **(special_tokens or {}),
        **variables,
        "messages": [_with_reasoning(message) for message in messages],
        "tools": None if tools is None else [dict(tool) for tool in tools],
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        return _compiled(template).render(names)
    except (
        TemplateError,
        SyntaxError,  # `continue` outside a loop: jinja passes on what compiling its code raises
        AttributeError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        MemoryError,
        RecursionError,
    ) as error:
        # Jinja passes on what the template's own expressions raise.
        raise BundleError(f"the bundle's chat template does not work ({error}): run with a plain prompt") from error


def _with_reasoning(message: Message) -> dict[str, Any]:
    """A message's reasoning goes under the name that templates read, whatever it is called, and under `thinking`."""
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> Template:
    """Compile once what a conversation renders at every turn."""
    return chat_environment().from_string(template)


def chat_environment() -> ImmutableSandboxedEnvironment:
    """Return what chat templates are compiled in: the options, filters and functions that transformers gives them."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(Extension):
    """`{% generation %}`, which marks the assistant's text for training: here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as an instance's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter, leave `<`, `>` and `&` as they are: a prompt is not HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _refuse(message: object) -> NoReturn:
    raise UserError(f"the bundle's chat template refuses this conversation: {message}")
