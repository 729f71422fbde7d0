"""What an app sees in stock LiteRT-LM's Conversation, from nano's bundle alone: turns, thoughts, tools, restored chats.

The reference is transformers' template: after each reply the runtime must hold that text's tokens, drafts off and on.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import litert_lm
import pytest
from transformers import AutoTokenizer

from mtp_export.check.chats import Chat, parity_chats
from mtp_export.check.stock_runtime import StockRequest, StockTurn, run_stock
from mtp_export.source.embedded import EMBEDDED
from mtp_runtime import Session
from tests.conftest import Export
from tools.train_nano.dialogues import held_out

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/litert_lm_chat.py"
CONTEXT = 1024
QUESTIONS = [prompt.question for prompt in held_out() if not prompt.calls]
CHATS = [Chat(name=f"chat {n}", user_texts=tuple(QUESTIONS[6 * n : 6 * n + 6])) for n in range(12)]


@pytest.fixture(scope="module")
def container(export_nano: Export) -> Path:
    return export_nano("f32") / "nano.litertlm"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED / "target")


@pytest.fixture(scope="module")
def runs(container: Path) -> dict[bool, list[list[StockTurn]]]:
    """Chats by whether there were drafts."""

    def run(drafts: bool) -> list[list[StockTurn]]:
        chats = [*CHATS, *parity_chats()]
        result = run_stock(
            StockRequest(
                model_path=str(container),
                prompts=[],
                max_new_tokens=1,
                context_length=CONTEXT,
                use_mtp=drafts,
                threads=1,
                chats=chats,
                max_chat_tokens=96,
            )
        )
        assert result.chat_errors == [""] * len(chats)
        return result.chats

    return {drafts: run(drafts) for drafts in (False, True)}


def test_drafts_change_no_reply_and_no_token_that_is_held(runs: dict[bool, list[list[StockTurn]]]) -> None:
    texts = {drafts: [[(t.fed, t.reply, t.held_tokens) for t in chat] for chat in runs[drafts]] for drafts in runs}
    assert texts[True][: len(CHATS)] == texts[False][: len(CHATS)]
    assert sum(len(chat) for chat in runs[True]) >= 6 * len(CHATS)
    for with_drafts, without in zip(runs[True], runs[False], strict=True):
        assert [turn.reply for turn in with_drafts] == [turn.reply for turn in without]


@pytest.mark.parametrize("drafts", [False, True])
def test_the_tokens_in_the_cache_are_those_that_transformers_writes(
    runs: dict[bool, list[list[StockTurn]]], tokenizer: Any, drafts: bool
) -> None:
    """Six turns, and turns with calls and answers: the text of the template up to what ended the reply."""
    for chat, turns in zip([*CHATS, *parity_chats()], runs[drafts], strict=True):
        if chat.variables:
            continue  # a thought is taken back: the next test
        held = ""
        for turn in turns:
            held += turn.fed + _written(turn)
            ids = tokenizer(f"<bos>{held}", add_special_tokens=False)["input_ids"]
            assert len(ids) == turn.held_tokens, (chat.name, held)
        messages = _messages(chat, turns)
        options = {"tools": list(chat.tools)} if chat.tools else {}
        whole = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert f"<bos>{held}" == whole.removesuffix("\n")


@pytest.mark.parametrize("drafts", [False, True])
def test_a_thought_is_taken_back(runs: dict[bool, list[list[StockTurn]]], tokenizer: Any, drafts: bool) -> None:
    (place,) = (i for i, chat in enumerate(parity_chats()) if chat.variables)
    turns = runs[drafts][len(CHATS) + place]
    assert "channels" in turns[0].reply  # it thought
    assert any("channels" not in turn.reply for turn in turns[1:])  # and was not to think again
    messages: list[dict[str, Any]] = []
    for question, turn in zip(parity_chats()[place].user_texts, turns, strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": turn.text}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=True).removesuffix("\n")
        # Thoughts of earlier turns are gone; that of this turn goes with the next message at the latest.
        thought = turn.reply.get("channels", {}).get("thought")
        written = f"<|channel>thought\n{thought}<channel|>" if thought else ""
        before, text, end = whole.rpartition(turn.text)
        texts = {whole, f"{before}{written}{text}{end}"}
        assert turn.held_tokens in [len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]


@pytest.mark.parametrize("drafts", [False, True])
def test_a_chat_is_restored_from_its_messages(container: Path, tokenizer: Any, drafts: bool) -> None:
    before = [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": "It is a word."},
        {"role": "user", "content": "What is 231 plus 84?"},
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "content": [{"type": "tool_response", "name": "add", "response": {"result": 315}}]},
        {"role": "assistant", "content": "231 plus 84 is 315."},
    ]
    known = [*before[:4], {"role": "tool", "name": "add", "content": {"result": 315}}, before[5]]
    with (
        _engine(container, drafts) as engine,
        engine.create_conversation(
            messages=before, system_message="Be brief.", sampler_config=_GREEDY, max_output_tokens=96
        ) as chat,
    ):
        messages = [{"role": "system", "content": "Be brief."}, *known]
        for question in QUESTIONS[1:5]:
            reply = chat.send_message(question)["content"][0]["text"]
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
            whole = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(whole.removesuffix("\n"), add_special_tokens=False)["input_ids"]
            assert chat.token_count == len(ids)


@pytest.mark.parametrize("most", [3, 7, 64])
@pytest.mark.parametrize("drafts", [False, True])
def test_a_chat_until_the_context_is_full(container: Path, drafts: bool, most: int) -> None:
    """It goes on until there is no room, and then says so: no crash, and nothing but replies before."""
    held, ended = 0, ""
    with (
        _engine(container, drafts, max_num_tokens=256) as engine,
        engine.create_conversation(sampler_config=_GREEDY, max_output_tokens=most) as chat,
    ):
        for _ in range(100):
            try:
                reply = chat.send_message("Hello")
            except RuntimeError:
                ended = "error"
                break
            if not any(part.get("text") for part in reply["content"]):
                ended = "empty"
                break
            held = chat.token_count
    assert ended
    assert held > 256 - 2 * 16 - 20  # a turn and the smallest prefill may be left


def test_no_draft_is_a_stop_token(export_nano: Export) -> None:
    """So that LiteRT-LM, which forgets a stop token that was drafted, keeps every one."""
    questions = random.Random(3).sample(QUESTIONS, 20)
    with Session.open(export_nano("f32"), threads=1) as session:
        stops = set(session.manifest.stop_token_ids)
        origins = [
            session.generate(session.chat_prompt(question), max_new_tokens=64).finish() for question in questions
        ]
        ended = [trace for trace in origins if trace.finish_reason == "stop"]
        assert len(ended) == len(questions)
        assert stops == {1, 50, 106}
        for trace in ended:
            assert trace.origins[-1] in ("correction", "bonus")


def test_the_example_generates_the_same_with_drafts(container: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(container)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-300:]
    lines = done.stdout.splitlines()
    assert lines[:2] == ['calls {"name": "add", "arguments": {"a": 231, "b": 84}}', "231 plus 84 is 315."]
    assert len(lines) == 8
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 40


_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 231, "b": 84}}}
_GREEDY = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=0)


def _engine(container: Path, drafts: bool, **options: Any) -> Any:
    cpu = litert_lm.Backend.CPU(thread_count=1)
    return litert_lm.Engine(
        str(container), backend=cpu, cache_dir=":nocache", enable_speculative_decoding=drafts, **options
    )


def _written(turn: StockTurn) -> str:
    """Return a reply in the notation of the template, with what ended it."""
    if not turn.calls:
        return f"{turn.text}<turn|>"
    calls = (f"<|tool_call>call:{call['name']}{{{_arguments(call['arguments'])}}}<tool_call|>" for call in turn.calls)
    return f"{''.join(calls)}<|tool_response>"


def _arguments(values: dict[str, Any]) -> str:
    pairs = (
        f'{key}:<|"|>{value}<|"|>' if isinstance(value, str) else f"{key}:{value}" for key, value in values.items()
    )
    return ",".join(pairs)


def _messages(chat: Chat, turns: list[StockTurn]) -> list[dict[str, Any]]:
    """Return the conversation as transformers knows it."""
    messages: list[dict[str, Any]] = []
    texts = iter(chat.user_texts)
    answers: list[dict[str, Any]] = []
    for turn in turns:
        messages += answers or [{"role": "user", "content": next(texts)}]
        calls = [{"type": "function", "function": call} for call in turn.calls]
        messages.append({"role": "assistant", "content": turn.text} | ({"tool_calls": calls} if calls else {}))
        answers = [{"role": "tool", "name": call["name"], "content": chat.answer(call["name"])} for call in turn.calls]
    return messages
