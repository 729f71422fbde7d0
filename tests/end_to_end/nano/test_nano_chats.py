"""nano's held-out questions in the float bundles: transformers says the same to the token, with MTP on; replies end,
and tools are called as they are declared."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import litert_lm
import pytest
import torch
from transformers import AutoTokenizer, Gemma4ForConditionalGeneration

from mtp_export.source.embedded import EMBEDDED
from mtp_runtime import Session
from mtp_runtime.generate.trace import GenerationTrace
from tests.conftest import Export
from tools.train_nano import dialogues
from tools.train_nano.chats import calls, second_messages, undeclared
from tools.train_nano.dialogues import SEED, digest, held_out, training_dialogues
from tools.train_nano.exchanges import PLAIN

PROMPTS = held_out()
MAX_NEW_TOKENS = 128
SHARE = 0.95


@pytest.fixture(scope="module", params=["tflite", "onnx"])
def session(request: pytest.FixtureRequest, export_nano: Export) -> Iterator[Session]:
    with Session.open(export_nano("f32", export_format=request.param), threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference() -> Any:
    return Gemma4ForConditionalGeneration.from_pretrained(EMBEDDED / "target", dtype=torch.float32)


def said(session: Session, prompt: str) -> GenerationTrace:
    return session.generate(prompt, max_new_tokens=MAX_NEW_TOKENS).finish()


@torch.inference_mode()
def is_greedy(reference: Any, trace: GenerationTrace) -> bool:
    """Whether each token is the one that the reference would choose after those before it, and so all are those that it
    would say."""
    ids = torch.tensor([[*trace.prompt_ids, *trace.tokens]])
    logits = reference(input_ids=ids[:, :-1], logits_to_keep=len(trace.tokens)).logits[0]
    return bool(torch.equal(logits.argmax(-1), ids[0, len(trace.prompt_ids) :]))


def text_of(session: Session, trace: GenerationTrace) -> str:
    return session.tokenizer.decode(trace.tokens, skip_special_tokens=False)


def test_held_out_questions(session: Session, reference: Any) -> None:
    plain = [prompt for prompt in PROMPTS if not prompt.calls]
    traces = [said(session, session.chat_prompt(prompt.question)) for prompt in plain]
    assert [p.question for p, trace in zip(plain, traces, strict=True) if not is_greedy(reference, trace)] == []
    ended = [trace.finish_reason == "stop" for trace in traces]
    right = [text_of(session, trace) == f"{prompt.answer}<turn|>" for prompt, trace in zip(plain, traces, strict=True)]
    assert len(plain) == 400
    assert sum(ended) >= SHARE * len(plain)
    assert sum(right) >= 0.9 * len(plain)  # it knows its small world
    assert sum(trace.stats.accepted for trace in traces) > 2 * sum(trace.stats.rounds for trace in traces)


def test_held_out_prompts_that_need_a_tool(session: Session, reference: Any) -> None:
    calling = [prompt for prompt in PROMPTS if prompt.calls]
    valid, right, used = 0, 0, 0
    for prompt in calling:
        trace = said(session, session.chat_prompt(prompt.question, tools=prompt.tools))
        assert is_greedy(reference, trace), prompt.question
        called = calls(text_of(session, trace), prompt.tools)
        valid += called is not None and trace.finish_reason == "stop"
        right += called == [(call.name, dict(call.arguments)) for call in prompt.calls]
        answered = said(session, session.chat_prompt(second_messages(prompt), tools=prompt.tools))
        assert is_greedy(reference, answered), prompt.question
        used += text_of(session, answered) == f"{prompt.answer}<turn|>"
    assert len(calling) == 200
    assert valid >= SHARE * len(calling)
    assert right >= SHARE * len(calling)
    assert used >= SHARE * len(calling)


def test_prompts_are_those_that_transformers_makes(session: Session) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "target")
    for prompt in PROMPTS:
        options: dict[str, Any] = {"tools": list(prompt.tools) or None}
        conversations: list[list[dict[str, Any]]] = [[{"role": "user", "content": prompt.question}]]
        conversations += [second_messages(prompt)] if prompt.calls else []
        for messages in conversations:
            theirs: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
            assert list(session.tokenize(session.chat_prompt(messages, **options))) == theirs["input_ids"]


def test_no_tool_is_called_that_is_not_declared(session: Session, reference: Any) -> None:
    """So what loses the declarations on the way to the model is seen."""
    prompts = [undeclared(prompt) for prompt in PROMPTS if prompt.calls]
    refused = 0
    for prompt in prompts:
        trace = said(session, session.chat_prompt(prompt.question))
        assert is_greedy(reference, trace), prompt.question
        refused += text_of(session, trace) == f"{prompt.answer}<turn|>"
    assert refused >= SHARE * len(prompts)


def test_no_training_conversation_has_a_held_out_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions as they are drawn, before they are typed more casually."""
    questions: set[str] = set()

    def remember(rng: random.Random, question: str) -> str:
        questions.add(question)
        return question

    monkeypatch.setattr(dialogues, "casual", remember)
    stream = training_dialogues(SEED)
    for _ in range(20_000):
        next(stream)
    assert len(questions) > 10_000
    assert not questions & {prompt.question for prompt in PROMPTS}


def test_no_question_has_two_answers() -> None:
    rng = random.Random(2)
    answers: dict[str, str] = {}
    for maker, _ in PLAIN:
        for _ in range(10_000):
            exchange = maker(rng)
            assert answers.setdefault(exchange.question, exchange.answer) == exchange.answer, exchange.question


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|tool_call>call:add{a:1,b:-2}<tool_call|><|tool_response>", [("add", {"a": 1, "b": -2})]),
        ('<|tool_call>call:word_of_the_day{day:<|"|>1 May<|"|>}<tool_call|>', [("word_of_the_day", {"day": "1 May"})]),
        ("<|tool_call>call:add{a:1}<tool_call|>", None),
        ("<|tool_call>call:add{a:1,b:2,c:3}<tool_call|>", None),
        ('<|tool_call>call:add{a:1,b:<|"|>2<|"|>}<tool_call|>', None),
        ("<|tool_call>call:add{a:1,b:2,}<tool_call|>", None),
        ("<|tool_call>call:add{a:1,a:3,b:2}<tool_call|>", None),
        ("<|tool_call>call:add{a:1b:2}<tool_call|>", None),
        ("<|tool_call>call:divide{a:1,b:2}<tool_call|>", None),
        ("<|tool_call>call:add{a:1,b:2}", None),
        ("Well: <|tool_call>call:add{a:1,b:2}<tool_call|>", None),
        ("3<turn|>", None),
    ],
)
def test_what_counts_as_a_valid_call(text: str, expected: object) -> None:
    tools = next(prompt for prompt in PROMPTS if prompt.calls).tools
    assert calls(text, tools) == expected


def test_held_out_questions_are_those_of_the_model_card() -> None:
    assert f"sha256 {digest(PROMPTS)}" in (EMBEDDED / "MODEL_CARD.md").read_text(encoding="utf-8")


def add(a: int, b: int) -> int:
    """Add two whole numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a + b


@pytest.mark.parametrize("drafts", [False, True])
def test_the_stock_conversation_chats_and_calls_a_tool(export_nano: Export, drafts: bool) -> None:
    """LiteRT-LM's own, from the bundle alone: its template, its tokenizer and its stop tokens."""
    path = next(export_nano("int8").glob("*.litertlm"))
    options: dict[str, Any] = {"backend": litert_lm.Backend.CPU(), "cache_dir": ":nocache"}
    options["enable_speculative_decoding"] = drafts
    with litert_lm.Engine(str(path), **options) as engine:
        with engine.create_conversation() as conversation:
            reply = conversation.send_message("What does the verb climb mean?")
            assert reply["content"][0]["text"] == "To climb is to go up something using hands and feet."
        with engine.create_conversation(tools=[add]) as conversation:
            reply = conversation.send_message("What is 231 plus 84?")
            assert reply["content"][0]["text"] == "231 plus 84 is 315."
