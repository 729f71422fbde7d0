"""Chats in two runtimes, held against each other: replies that were cut, chats that do not fit, known faults."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest

from mtp_export.check import stock_runtime
from mtp_export.check.chat_parity import ChatTurn, compare_stock_chat
from mtp_export.check.chats import Chat, parity_chats
from mtp_export.check.own_runs import reference_chats
from mtp_export.check.stock_runtime import StockTurn, known_faults
from mtp_runtime import ContextFullError, GenerationTrace
from mtp_runtime.generate.stats import GenerationStats
from mtp_runtime.generate.trace import FinishReason
from mtp_runtime.measure.parity import Comparison

CHAT = Chat(name="two turns", user_texts=("a", "b"))
SESSION: Any = SimpleNamespace(tokenizer=SimpleNamespace(bos_token="<bos>"), tokenize=lambda text, bos: list(text))


def ours(content: str, *, finish_reason: FinishReason = "stop", margin: float = 1.0) -> ChatTurn:
    trace = GenerationTrace(
        model="nano",
        recipe="f32",
        num_draft_tokens=0,
        prompt_ids=(2, 3),
        tokens=(4, 5, 1),
        origins=("plain",) * 3,
        margins=(1.0, margin, 1.0),
        finish_reason=finish_reason,
        stats=GenerationStats(),
    )
    return ChatTurn(prompt="<bos>p", content=content, trace=trace)


def stock(text: str, *, thought: str = "", held_tokens: int = 5) -> StockTurn:
    reply: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    if thought:
        reply["channels"] = {"thought": thought}
    return StockTurn(message={}, fed="p", reply=reply, held_tokens=held_tokens)


def compare(reference: list[ChatTurn], replies: list[StockTurn], error: str = "") -> Comparison:
    return compare_stock_chat(SESSION, CHAT, reference, replies, error, tolerance=0.01)


def test_whole_replies_and_the_tokens_in_the_cache_must_be_equal() -> None:
    reference = [ours("one"), ours("two")]
    comparison = compare(reference, [stock("one"), stock("two")])
    assert (comparison.verdict, comparison.agreed, comparison.compared, comparison.detail) == ("equal", 2, 2, "")
    assert compare(reference, [stock("one"), stock("two more")]).detail == 'reply 2: expected "two", got "two more"'
    assert compare(reference, [stock("one"), stock("two", held_tokens=6)]).verdict == "different"
    assert compare(reference, [stock("one")], "no room").detail == "message 2: no room"
    assert compare([ours("one"), ours("two", margin=0.005)], [stock("one"), stock("2")]).verdict == "near_tie"


def test_a_thought_without_an_end_is_no_text() -> None:
    """LiteRT-LM puts all of it into the channel."""
    reference = [ours("one"), ours("<|channel>thought\nI wonder")]
    assert compare(reference, [stock("one"), stock("", thought="I wonder")]).verdict == "equal"
    for reply in (stock("I wonder"), stock(""), stock("", thought="I know")):
        assert compare(reference, [stock("one"), reply]).verdict == "different"


@pytest.mark.parametrize("finish_reason", ["max_tokens", "context"])
@pytest.mark.parametrize(
    ("content", "thought", "text"),
    [
        ("one", "", "one"),
        ("one", "", "one and more"),
        ("caf\ufffd", "", "café"),
        ('one<|tool_call>call:add{a:<|"|>', "", "one"),
        ("<|channel>thought\nI wo", "I wonder", ""),
        ("<|channel>thought\nI wo", "I wo.\n", "one"),
        ("<|channel>thought\nI do.\n<channel|>one", "I do.\n", "one and"),
    ],
)
def test_a_reply_that_was_cut_is_compared_by_its_beginning(
    content: str, thought: str, text: str, finish_reason: FinishReason
) -> None:
    """With drafts LiteRT-LM gives up to K tokens more, holds them, and goes on from there: whatever comes then."""
    cut = ours(content, finish_reason=finish_reason)
    comparison = compare(
        [cut, ours("two")], [stock(text, thought=thought, held_tokens=9), stock("other", held_tokens=20)]
    )
    assert (comparison.verdict, comparison.agreed, comparison.compared) == ("equal", 1, 1)
    assert comparison.detail == "compared up to reply 1, which was cut at the limit"
    assert compare([cut, ours("two")], [stock(text, thought=thought, held_tokens=9)], "no room").verdict == "equal"


def test_a_reply_that_was_cut_elsewhere_is_different() -> None:
    cut = ours("one", finish_reason="max_tokens")
    assert compare([cut, ours("two")], [stock("on"), stock("two")]).verdict == "different"
    assert compare([cut, ours("two")], [stock("another"), stock("two")]).verdict == "different"


def test_a_chat_that_does_not_fit_is_left_out() -> None:
    def hold(session: Any, chat: Chat, **options: Any) -> list[ChatTurn]:
        if chat.tools:
            raise ContextFullError("full")
        return [ours(chat.name)]

    session: Any = SimpleNamespace(
        bundle=SimpleNamespace(has=lambda role: True), manifest=SimpleNamespace(context_length=60)
    )
    held = reference_chats(session, lambda line: None, hold)
    assert [chat.name for chat in held.chats] == [turns[0].content for turns in held.turns] == ["six turns", "thinking"]
    assert held.left_out == ["chat two tools: it does not fit the context of 60 tokens"]
    assert len(parity_chats()) == 3


def versions(**installed: str) -> Callable[[str], str]:
    def version(name: str) -> str:
        try:
            return installed[name.replace("-", "_")]
        except KeyError:
            raise PackageNotFoundError(name) from None

    return version


@pytest.mark.parametrize(
    ("installed", "beginning"),
    [
        ({"litert_lm_api": "0.18.1"}, "LiteRT-LM 0.18.1 has known faults with drafts: it samples the first token"),
        ({"litert_lm_api_nightly": "0.19.0.dev20261026"}, "LiteRT-LM 0.19.0.dev20261026 has known faults with drafts"),
        ({"litert_lm_api": "0.20.0"}, None),
        ({}, None),
    ],
)
def test_known_faults_are_of_the_version_that_is_installed(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], beginning: str | None
) -> None:
    monkeypatch.setattr(stock_runtime, "version", versions(**installed))
    faults = known_faults()
    assert faults is None if beginning is None else faults is not None and faults.startswith(beginning)
