"""The conversations that parity runs: the user's messages, and the answers of tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation as an app has it. Whatever the model calls is answered with what `answers` has for the tool."""

    name: str
    user_texts: tuple[str, ...]
    system: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    answers: dict[str, Any] = {}
    variables: dict[str, Any] = {}

    def answer(self, name: str) -> Any:
        """Return the answer of the tool of that name."""
        return self.answers.get(name, {"error": "there is no such tool"})


MAX_CALLS = 4  # answered one after the other before the user goes on


def user_message(text: str) -> dict[str, Any]:
    """Return a user's text as LiteRT-LM's Conversation takes it."""
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def answers_message(answers: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the answers to all calls of a reply, by the tools' names, likewise."""
    parts = [{"type": "tool_response", "name": name, "response": response} for name, response in answers]
    return {"role": "tool", "content": parts}


def _tool(name: str, description: str, **parameters: tuple[str, str]) -> dict[str, Any]:
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


_ADD = _tool("add", "Add two whole numbers.", a=("integer", "the first number"), b=("integer", "the second number"))
_WORD = _tool("word_of_the_day", "Look up the word of the day.", day=("string", "a day of the week, a date or today"))
_SIX = (
    "What does the verb climb mean?",
    "What does the noun river mean?",
    "Hello",
    "What does the verb run mean?",
    "What does the noun stone mean?",
    "Thank you",
)


def parity_chats() -> list[Chat]:
    """Six turns, two tools and a further turn, and thinking."""
    return [
        Chat(name="six turns", user_texts=_SIX),
        Chat(
            name="two tools",
            user_texts=(
                "What is 231 plus 84?",
                "Tell me the word of the day for Monday.",
                "What does the noun river mean?",
            ),
            tools=(_ADD, _WORD),
            answers={
                "add": {"result": 315},
                "word_of_the_day": {"meaning": "a tower with a bright light that guides ships", "word": "lighthouse"},
            },
        ),
        Chat(name="thinking", user_texts=_SIX[:3], variables={"enable_thinking": True}),
    ]
