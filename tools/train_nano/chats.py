"""How the target answers held-out questions: whether it ends, calls tools as they are declared, and is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mtp_runtime.text.native_calls import assistant_message
from tools.train_nano.dialogues import Prompt, call_messages
from tools.train_nano.exchanges.exchange import NO_WORD, TOO_LARGE
from tools.train_nano.generation import Generator
from tools.train_nano.model import LanguageModel
from tools.train_nano.nano_ids import BOS, CALL_CLOSE, CHANNEL_OPEN, RESPONSE_OPEN, STOP_IDS, TURN_CLOSE
from tools.train_nano.nano_tokenizer import chat_prompt

NEW_TOKENS = 128
_TYPES: Mapping[str, type] = {"string": str, "integer": int}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The target's answer to a prompt, special tokens included, and the ids of both."""

    prompt: Prompt
    prompt_ids: list[int]
    ids: list[int]
    text: str

    @property
    def ended(self) -> bool:
        """By a stop token: of the turn, or of a call that waits for its answer."""
        return self.ids[-1] in (TURN_CLOSE, RESPONSE_OPEN)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers to held-out questions: plain, with thoughts, with tool calls, with the tools' answers, without the
    tools that they need."""

    plain: Sequence[Answer]
    thinking: Sequence[Answer]
    calling: Sequence[Answer]
    using: Sequence[Answer]
    refusing: Sequence[Answer]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return BOS and the text's tokens."""
    return [BOS, *tokenizer.encode(text, add_special_tokens=False).ids]


def write_texts(target: LanguageModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[Tensor, list[int]]:
    """Write greedy continuations of prompts of any lengths, and return where each ends, its stop id included.

    Shapes: → ids [B, T], ends [B]
    """
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    padded = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    generate = Generator(target, len(prompts), width + new_tokens, temperature=1.0, sampled=0)
    ids = generate(padded, torch.tensor(lengths))
    ends = []
    for row, begin in zip(ids.tolist(), lengths, strict=True):
        stops = [i for i in range(begin, begin + new_tokens) if row[i] in STOP_IDS]
        ends.append(stops[0] + 1 if stops else begin + new_tokens)
    return ids, ends


def first_prompt(tokenizer: Tokenizer, prompt: Prompt, *, thinking: bool = False) -> list[int]:
    """Return the question alone, with its tools."""
    messages = [{"role": "user", "content": prompt.question}]
    return encode(tokenizer, chat_prompt(messages, prompt.tools, thinking=thinking))


def second_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Return the question, the right calls and the tools' replies."""
    return [{"role": "user", "content": prompt.question}, *call_messages(prompt.calls)]


def second_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Return the conversation that goes on after the tools' replies."""
    return encode(tokenizer, chat_prompt(second_messages(prompt), prompt.tools))


def answers(
    target: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[Prompt], prompt_ids: Sequence[list[int]]
) -> list[Answer]:
    """Let the target answer each, greedily, with at most `NEW_TOKENS`."""
    rows, ends = write_texts(target, prompt_ids, NEW_TOKENS)
    replies = []
    for prompt, before, row, end in zip(prompts, prompt_ids, rows.tolist(), ends, strict=True):
        ids = row[len(before) : end]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        replies.append(Answer(prompt=prompt, prompt_ids=before, ids=ids, text=text))
    return replies


def calls(text: str, tools: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]] | None:
    """Return the calls that a reply consists of.

    None unless each names a declared tool and has its parameters, all of them and none else, of their types.
    """
    declared = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in tools}
    reply = text.removesuffix("<|tool_response>")
    message = assistant_message(reply)
    # Nothing beside the calls, and each as the template would write it.
    written = chat_prompt([message], open_turn=False)
    if message["content"] or "tool_calls" not in message or written != f"<|turn>model\n{reply}<|tool_response>":
        return None
    parsed = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
    for name, values in parsed:
        types = {key: _TYPES[value["type"]] for key, value in declared.get(name, {}).items()}
        if name not in declared or {key: type(value) for key, value in values.items()} != types:
            return None
    return parsed


def right_calls(answer: Answer) -> bool:
    """Return whether the calls are those that the question wants, with the numbers and days that it names."""
    expected = [(call.name, dict(call.arguments)) for call in answer.prompt.calls]
    return calls(answer.text, answer.prompt.tools) == expected


def right_text(answer: Answer) -> bool:
    """Return whether the answer is the generator's, to the letter."""
    return answer.text == f"{answer.prompt.answer}<turn|>"


def share(values: Sequence[bool]) -> str:
    """Return how many of how many, and the percentage, as in the model card."""
    return f"{sum(values)} of {len(values)} ({100 * sum(values) / len(values):.1f} %)"


def undeclared(prompt: Prompt) -> Prompt:
    """Return the question without the tools that it needs, which is to be refused."""
    answer = TOO_LARGE if prompt.calls[0].name == "add" else NO_WORD
    return replace(prompt, tools=(), calls=(), answer=answer)


def chat_rows(replies: Answers) -> list[str]:
    """Return table rows: how many held-out questions end, call and are answered right."""
    rows = [
        f"| questions | end by a stop token within {NEW_TOKENS} tokens | {share([a.ended for a in replies.plain])} |",
        f"| questions | answered right, to the letter | {share([right_text(a) for a in replies.plain])} |",
    ]
    kinds = Counter(a.prompt.kind for a in replies.plain)
    for kind in sorted(kinds):
        right = [right_text(a) for a in replies.plain if a.prompt.kind == kind]
        rows.append(f"| questions: {kind} | answered right | {share(right)} |")
    thought = [a.ids[0] == CHANNEL_OPEN for a in replies.thinking]
    rows.append(f"| questions, with `enable_thinking` | begin with a thought | {share(thought)} |")
    valid = [
        a.ids[-2:] == [CALL_CLOSE, RESPONSE_OPEN] and calls(a.text, a.prompt.tools) is not None for a in replies.calling
    ]
    refused = share([right_text(a) for a in replies.refusing])
    rows += [
        f"| tool prompts | give valid calls | {share(valid)} |",
        f"| tool prompts | give the right calls | {share([right_calls(a) for a in replies.calling])} |",
        f"| tool prompts | the tool's answer is used right | {share([right_text(a) for a in replies.using])} |",
        f"| tool prompts, no tool declared | are refused, to the letter | {refused} |",
    ]
    return rows
