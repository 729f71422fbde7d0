"""Conversations of nano's domain, for training and held out: one to six exchanges, with and without a system message,
tools and thoughts. A question is held out by its hash, in whatever conversation it would stand."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.train_nano.exchanges import PLAIN, WITH_TOOLS, casual
from tools.train_nano.exchanges.exchange import Call, Exchange, Maker
from tools.train_nano.exchanges.tools import without_tool

SEED = 20260  # of the conversations that nano was trained on
HELD_OUT_PER_MILLE = 40
Message = dict[str, Any]


def _function(name: str, description: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": dict(properties), "required": sorted(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


_DECLARED = json.loads((Path(__file__).parents[2] / "examples/tools.json").read_text(encoding="utf-8"))
TOOLS: Mapping[str, dict[str, Any]] = {tool["function"]["name"]: tool for tool in _DECLARED}
# Other words for the same, so that it is not these declarations alone that are known.
_OTHER: Mapping[str, tuple[dict[str, Any], ...]] = {
    "add": (
        _function("add", "Returns the sum of two numbers.", {"a": {"type": "number"}, "b": {"type": "number"}}),
        _function("add", "Adds b to a.", {"a": {"type": "integer"}, "b": {"type": "integer"}}),
    ),
    "word_of_the_day": (
        _function("word_of_the_day", "Gives the word of the day.", {"day": {"type": "string"}}),
        _function("word_of_the_day", "A word for a day.", {"day": {"type": "string", "description": "the day"}}),
    ),
}
_ONE_WORD = ("Answer in one word.", "Use one word only.", "One-word answers, please.")
_OPENINGS = ("Aye.", "Certainly.", "Well,", "Sure:", "Listen:")
_NEUTRAL = ("You are nano, a small language model.", "Be brief.", "You are a helpful assistant.", "Answer the user.")


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """A conversation as a chat template takes it."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    thinking: bool


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A held-out question with what it should be answered, after its calls if it has any."""

    id: str
    kind: str
    question: str
    answer: str
    tools: tuple[dict[str, Any], ...]
    calls: tuple[Call, ...]


def digest(prompts: Sequence[Prompt]) -> str:
    """Return a name for a set of prompts: the SHA-256 of their questions and answers."""
    return hashlib.sha256("\n".join(f"{p.question}\n{p.answer}" for p in prompts).encode()).hexdigest()


def is_held_out(exchange: Exchange) -> bool:
    """Return whether training must not see the question."""
    digest = hashlib.sha256(exchange.question.encode()).hexdigest()
    return int(digest, 16) % 1000 < HELD_OUT_PER_MILLE


def _draw(rng: random.Random, makers: Sequence[tuple[Maker, float]]) -> Exchange:
    maker = rng.choices([m for m, _ in makers], [weight for _, weight in makers])[0]
    return maker(rng)


def _for_training(rng: random.Random, makers: Sequence[tuple[Maker, float]], *, one_word: bool = False) -> Exchange:
    while True:
        exchange = _draw(rng, makers)
        # There are too few greetings to hold any back.
        if (exchange.kind == "talk" or not is_held_out(exchange)) and (exchange.word is not None or not one_word):
            return exchange


def call_messages(calls: Sequence[Call], **thought: str) -> list[Message]:
    """Return the calls of one reply, and what the tools give."""
    functions = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
    written = [{"type": "function", "function": function} for function in functions]
    calling: Message = {"role": "assistant", "content": "", "tool_calls": written, **thought}
    return [calling, *({"role": "tool", "name": call.name, "content": call.result} for call in calls)]


def _messages(exchange: Exchange, question: str, answer: str, thinking: bool) -> Iterator[Message]:
    yield {"role": "user", "content": question}
    thought = {"reasoning_content": exchange.thought} if thinking else {}
    if exchange.calls:
        yield from call_messages(exchange.calls, **thought)
        yield {"role": "assistant", "content": answer}
    else:
        yield {"role": "assistant", "content": answer, **thought}


def _system(rng: random.Random) -> tuple[str | None, bool, str]:
    """Return a system message if any, whether answers are one word, and what they begin with."""
    roll = rng.random()
    if roll < 0.78:
        return None, False, ""
    if roll < 0.88:
        return rng.choice(_NEUTRAL), False, ""
    if roll < 0.94:
        return rng.choice(_ONE_WORD), True, ""
    opening = rng.choice(_OPENINGS)
    return (
        rng.choice([f"Begin every answer with: {opening}", f"Start each answer with: {opening}"]),
        False,
        f"{opening} ",
    )


def dialogue(rng: random.Random) -> Dialogue:
    """Return a conversation for training."""
    names = []
    if rng.random() < 0.35:
        names = rng.sample(list(TOOLS), 2 if rng.random() < 0.6 else 1)
    tools = tuple(TOOLS[n] if rng.random() < 0.6 else rng.choice(_OTHER[n]) for n in names)
    thinking = rng.random() < 0.1
    system, one_word, opening = _system(rng)
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for _ in range(rng.choices([1, 2, 3, 4, 5, 6], [50, 24, 12, 7, 4, 3])[0]):
        calling = rng.random() < (0.6 if names else 0.25)
        exchange = _for_training(rng, WITH_TOOLS if calling else PLAIN, one_word=one_word and not calling)
        if calling and any(call.name not in names for call in exchange.calls):
            exchange = without_tool(exchange)
        answer = exchange.word if one_word and exchange.word is not None else opening + exchange.answer
        messages += _messages(exchange, casual(rng, exchange.question), answer, thinking)
    return Dialogue(messages=tuple(messages), tools=tools, thinking=thinking)


def training_dialogues(seed: int) -> Iterator[Dialogue]:
    """Conversations without end, none with a question that is held out."""
    rng = random.Random(seed)
    while True:
        yield dialogue(rng)


def held_out(seed: int = 1, *, questions: int = 400, tool_prompts: int = 200) -> list[Prompt]:
    """Questions that no training stage saw: plain ones without tools, then such as need a tool, with both declared."""
    rng = random.Random(seed)
    prompts: dict[str, Prompt] = {}
    for name, makers, count in (("question", PLAIN, questions), ("tool", WITH_TOOLS, tool_prompts)):
        enough = len(prompts) + count
        while len(prompts) < enough:
            exchange = _draw(rng, makers)
            failed = any(isinstance(call.result, dict) and "error" in call.result for call in exchange.calls)
            if is_held_out(exchange) and exchange.kind != "talk" and not failed:
                prompts.setdefault(
                    exchange.question,
                    Prompt(
                        id=f"{name}-{len(prompts) - enough + count:03d}",
                        kind=exchange.kind,
                        question=exchange.question,
                        answer=exchange.answer,
                        tools=tuple(TOOLS.values()) if exchange.calls else (),
                        calls=exchange.calls,
                    ),
                )
    return list(prompts.values())
