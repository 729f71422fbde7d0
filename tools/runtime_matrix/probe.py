"""What a version of LiteRT-LM does with a bundle, drafts off and on; imports nothing but that version.

python probe.py BUNDLE.litertlm ANSWER.json
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import litert_lm

PROMPTS = (
    "def add(a, b):",
    "def main():\n",
    "class Stack:",
    "The river",
    "import os\n",
    "for i in range(10):",
    "A stone is",
    "def reverse(text):",
    "Once there was",
    "x = [1, 2, 3]\n",
)
QUESTIONS = (
    "What does the verb climb mean?",
    "What does the noun river mean?",
    "What is a list?",
    "What does the verb run mean?",
    "What does the noun stone mean?",
    "Hello",
    "What does the verb swim mean?",
    "What does the noun bridge mean?",
    "Thank you",
    "What does the verb sing mean?",
    "What does the noun candle mean?",
    "What does the verb dig mean?",
)
GREEDY = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=0)
DRAWN = 200  # replies by seed
NEW = hasattr(litert_lm, "SpeculativeDecodingMode")
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two whole numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "the first number"},
                "b": {"type": "integer", "description": "the second number"},
            },
            "required": ["a", "b"],
        },
    },
}


class Add(litert_lm.Tool):  # type: ignore[misc]  # the library has no types
    """A tool that is declared, and answered by hand."""

    def get_tool_description(self) -> dict[str, Any]:
        """Return its declaration."""
        return TOOL

    def execute(self, param: Any) -> Any:
        """Never called: calls are answered by hand."""
        raise NotImplementedError


def open_engine(path: str, mode: str, **options: Any) -> Any:
    """Open a bundle with drafts OFF, ON or ADAPTIVE."""
    options = {"backend": litert_lm.Backend.CPU(thread_count=1), "cache_dir": ":nocache", **options}
    if NEW:
        options["speculative_decoding_config"] = litert_lm.SpeculativeDecodingConfig(
            mode=litert_lm.SpeculativeDecodingMode[mode]
        )
    else:
        options["enable_speculative_decoding"] = mode == "ON"
    return litert_lm.Engine(path, **options)


def session_texts(engine: Any, sampler: Any, prompts: Any, most: int) -> list[str]:
    """Continuations without a chat template."""
    texts = []
    for prompt in prompts:
        with engine.create_session(
            apply_prompt_template=False, sampler_config=sampler, max_output_tokens=most
        ) as session:
            session.run_prefill([prompt])
            texts.append(session.run_decode().texts[0])
    return texts


def text_of(reply: Any) -> str:
    """Return the text of a reply, or its calls."""
    calls = [call["function"] for call in reply.get("tool_calls", [])]
    return json.dumps(calls) if calls else "".join(part.get("text", "") for part in reply.get("content", []))


def chat(engine: Any, script: Any, **options: Any) -> list[Any]:
    """Replies, and the tokens held behind each."""
    replies = []
    with engine.create_conversation(sampler_config=GREEDY, automatic_tool_calling=False, **options) as conversation:
        for message in script:
            replies.append([text_of(conversation.send_message(message)), conversation.token_count])
    return replies


def greedy(engine: Any) -> Any:
    """Continuations of ten prompts; with drafts the last round's tokens are kept, so their beginnings are compared."""
    return [text[:100] for text in session_texts(engine, GREEDY, PROMPTS, 96)]


def turns(engine: Any) -> Any:
    """Ten chats of six turns, and the tokens held behind each."""
    return [chat(engine, (QUESTIONS * 2)[start : start + 6], max_output_tokens=60) for start in range(10)]


def tools(engine: Any) -> Any:
    """Try a call, its answer, and a further turn."""
    answer = {"role": "tool", "content": [{"type": "tool_response", "name": "add", "response": {"result": 315}}]}
    replies = chat(engine, ["What is 231 plus 84?", answer, QUESTIONS[1]], tools=[Add()], max_output_tokens=60)
    assert json.loads(replies[0][0])[0]["arguments"] == {"a": 231, "b": 84}, replies
    return replies


def thinking(engine: Any) -> Any:
    """Three turns that may begin with a thought; tokens held behind the last two."""
    replies = chat(engine, QUESTIONS[:3], extra_context={"enable_thinking": True}, max_output_tokens=100)
    return [text for text, _ in replies], [held for _, held in replies[1:]]


def restored(engine: Any) -> Any:
    """Try a chat that begins with the messages of another."""
    before = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "To go up."}]
    return chat(engine, QUESTIONS[1:4], messages=before, system_message="Be brief.", max_output_tokens=60)


def cut(engine: Any) -> Any:
    """Replies that end at max_output_tokens, and the turn behind them."""
    return chat(engine, QUESTIONS[:3], max_output_tokens=7)


def constrained(engine: Any) -> Any:
    """Try a reply that must match an expression, and one that must be JSON."""
    config = litert_lm.ConstrainedDecodingConfig(
        enable=True, provider=litert_lm.LiteRtLmConstraintProviderType.LL_GUIDANCE
    )
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    formats = (litert_lm.ResponseFormat.regex("[a-c]{5}"), litert_lm.ResponseFormat.json(schema))
    replies = []
    for response_format in formats:
        with engine.create_conversation(
            sampler_config=GREEDY, constrained_decoding_config=config, max_output_tokens=30
        ) as conversation:
            replies.append(text_of(conversation.send_message(QUESTIONS[2], response_format=response_format)))
    assert len(replies[0]) == 5, replies
    return replies


def cancelled(engine: Any) -> Any:
    """Try a reply that is cancelled in the middle, and the turn behind it."""
    with engine.create_conversation(sampler_config=GREEDY, max_output_tokens=60) as conversation:
        for _ in conversation.send_message_async(QUESTIONS[0]):
            conversation.cancel_process()
        ended = "an empty reply"
        for tries in range(1, 4):
            try:
                if text_of(conversation.send_message(QUESTIONS[1])):
                    return {"messages until a reply": tries}  # how far the first came is a matter of time
            except RuntimeError as error:
                ended = str(error)
    raise RuntimeError(f"no reply to three messages: {ended}")


def drawn(engine: Any) -> Counter[str]:
    """Return how often replies begin with the same three words, by seed."""
    counts: Counter[str] = Counter()
    for seed in range(DRAWN):
        sampler = litert_lm.SamplerConfig(top_k=5, top_p=1.0, temperature=0.8, seed=seed)
        (text,) = session_texts(engine, sampler, PROMPTS[3:4], 6)
        counts[" ".join(text.split()[:3])] += 1
    return counts


def until_full(engine: Any) -> Any:
    """Short turns until the context is full: how many got a reply, tokens held then, and how it ended."""
    ended, held, count = "no end", 0, 0
    with engine.create_conversation(sampler_config=GREEDY, max_output_tokens=7) as conversation:
        for _ in range(400):
            try:
                reply = text_of(conversation.send_message("hi"))
            except RuntimeError:
                ended = "error"
                break
            if not reply:
                ended = "an empty reply"
                break
            held, count = conversation.token_count, count + 1
    return {"replies": count, "held": held, "ended": ended}


EQUAL: dict[str, Callable[[Any], Any]] = {
    "greedy text": greedy,
    "six turns": turns,
    "tools": tools,
    "thinking": thinking,
    "a restored chat": restored,
    "max_output_tokens": cut,
    "constrained decoding": constrained,
    "cancel": cancelled,
}


def attempts(path: str, mode: str) -> Iterator[tuple[str, Any]]:
    """Yield every check of a mode: its result, or the error that it ended with."""
    with open_engine(path, mode) as engine:
        for name, check in {**EQUAL, "sampling": drawn}.items():
            try:
                yield name, check(engine)
            except (RuntimeError, ValueError, AssertionError, TypeError, KeyError) as error:
                yield name, {"error": f"{type(error).__name__}: {error}"[:200]}
    with open_engine(path, mode, max_num_tokens=256) as engine:
        try:
            yield "end of the context", until_full(engine)
        except RuntimeError as error:
            yield "end of the context", {"error": str(error)[:200]}


def main() -> None:
    """Write the results of every mode."""
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.FATAL)
    path, answer = sys.argv[1:]
    modes = ("OFF", "ON", "ADAPTIVE") if NEW else ("OFF", "ON")
    results = {mode: dict(attempts(path, mode)) for mode in modes}
    Path(answer).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
