"""nano's held-out questions in the float bundles: transformers says the same to the token, with MTP on; replies end,
and tools are called as they are declared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from chats import calls, second_messages, undeclared
from dialogues import held_out, training_dialogues
from transformers import Gemma4ForConditionalGeneration

from mtp_export.embedded import EMBEDDED
from mtp_runtime import Session
from mtp_runtime.trace import GenerationTrace
from tests.conftest import Export

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
    valid, used = 0, 0
    for prompt in calling:
        question = session.chat_prompt(prompt.question, tools=prompt.tools)
        trace = said(session, question)
        assert is_greedy(reference, trace), prompt.question
        valid += calls(text_of(session, trace), prompt.tools) is not None
        answered = said(session, session.chat_prompt(second_messages(prompt), tools=prompt.tools))
        assert is_greedy(reference, answered), prompt.question
        used += text_of(session, answered) == f"{prompt.answer}<turn|>"
    assert len(calling) == 200
    assert valid >= SHARE * len(calling)
    assert used >= SHARE * len(calling)


def test_no_tool_is_called_that_is_not_declared(session: Session, reference: Any) -> None:
    """So what loses the declarations on the way to the model is seen."""
    prompts = [undeclared(prompt) for prompt in PROMPTS if prompt.calls]
    refused = 0
    for prompt in prompts:
        trace = said(session, session.chat_prompt(prompt.question))
        assert is_greedy(reference, trace), prompt.question
        refused += text_of(session, trace) == f"{prompt.answer}<turn|>"
    assert refused >= SHARE * len(prompts)


def test_no_training_conversation_has_a_held_out_question() -> None:
    held = {prompt.question for prompt in PROMPTS}
    stream = training_dialogues(1)
    for _ in range(5000):
        asked = {message["content"] for message in next(stream).messages if message["role"] == "user"}
        assert not asked & held


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|tool_call>call:add{a:1,b:-2}<tool_call|><|tool_response>", [("add", {"a": 1, "b": -2})]),
        ('<|tool_call>call:word_of_the_day{day:<|"|>1 May<|"|>}<tool_call|>', [("word_of_the_day", {"day": "1 May"})]),
        ("<|tool_call>call:add{a:1}<tool_call|>", None),
        ("<|tool_call>call:add{a:1,b:2,c:3}<tool_call|>", None),
        ('<|tool_call>call:add{a:1,b:<|"|>2<|"|>}<tool_call|>', None),
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
    """The card's tables are about these very prompts."""
    card = (EMBEDDED / "MODEL_CARD.md").read_text(encoding="utf-8")
    plain = sum(not prompt.calls for prompt in PROMPTS)
    assert f"### {plain} held-out questions and {len(PROMPTS) - plain} prompts that need a tool" in card
