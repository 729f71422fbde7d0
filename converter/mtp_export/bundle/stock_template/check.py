"""The proof of a template: stock LiteRT-LM renders every conversation as transformers does, or the export ends here.

Templates are from anywhere, so transformers' side is rendered in a process with limits as well: `python -m
mtp_export.bundle.stock_template.check` is that process.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mtp_export.bundle.stock_template.compose import NEXT, Habits, habits_of, stock_template
from mtp_export.bundle.stock_template.conversations import Conversation, Message, conversations, with_answers_moved
from mtp_export.bundle.stock_template.rendering import Rendered, render_in_stock
from mtp_export.bundle.stock_template.stub import write_stub
from mtp_export.child_process import ChildFailedError, ChildTimeoutError, answer_parent, limit_memory, run_child
from mtp_export.errors import CheckpointError
from mtp_runtime.errors import BackendError, MtpError, UserError
from mtp_runtime.measure.parity import common_length
from mtp_runtime.text.chat import render_chat

_LIMIT_S = 60
_LIMIT_BYTES = 4 << 30
_CONTEXT = 60  # characters that are shown around a difference
_REMEDY = "correct it, or give another with --chat-template"
_NEEDED = "a question"  # the conversation without which a template is none


class _Request(msgspec.Struct):
    template: str
    special_tokens: dict[str, str]
    stops: list[str]
    for_stock: bool


class _Expected(msgspec.Struct):
    """The template for the runtime and the texts that it must make of the conversations, or why the checkpoint's is
    refused."""

    stock: str = ""
    texts: list[Rendered] = []
    refusal: str = ""


def check_template(
    template: str, *, special_tokens: Mapping[str, str], stops: Sequence[str], tokenizer_json: str
) -> int:
    """Compare the texts that stock LiteRT-LM makes of conversations with those of transformers; `stops` are the texts
    of the tokens that end a reply.

    Returns:
        How many conversations came out equal, the beginnings of longer ones included; those that transformers' side
        refuses, as LiteRT-LM then must, are not counted.

    Raises:
        CheckpointError: a conversation differs, with both texts, or the template cannot be written for LiteRT-LM.
        BackendError: LiteRT-LM fails.
    """
    every = every_conversation()
    expected = _expected(template, special_tokens, stops, for_stock=True)
    with tempfile.TemporaryDirectory(prefix="mtp-template-") as folder:
        tokenizer, stub = Path(folder) / "tokenizer.json", Path(folder) / "stub.litertlm"
        tokenizer.write_text(tokenizer_json, encoding="utf-8")
        write_stub(stub, expected.stock, tokenizer)
        try:
            rendered = render_in_stock(stub, every, timeout_s=_LIMIT_S)
        except BackendError as error:
            raise BackendError(f"the chat template cannot be tried in LiteRT-LM: {error}: {_REMEDY}") from error
    _compare(every, expected.texts, rendered)
    return sum(text.text is not None for text in expected.texts)


def check_renders(template: str, *, special_tokens: Mapping[str, str], stops: Sequence[str]) -> None:
    """Check that transformers' side renders a template within limits, whatever runtime it is for.

    Raises:
        CheckpointError: it cannot be read, does not end, takes too much memory, or renders no question.
    """
    _expected(template, special_tokens, stops, for_stock=False)


def every_conversation() -> list[Conversation]:
    """Return the fixed conversations, and each of their beginnings that ends with a reply: the runtime renders these to
    find the text that the next message adds."""
    return [part for whole in conversations() for part in (*_histories(whole), whole)]


def _histories(whole: Conversation) -> Iterator[Conversation]:
    roles = [message["role"] for message in whole.messages]
    for end in range(1, len(roles)):
        if roles[end - 1] != "assistant" or roles[end] not in ("user", "tool"):
            continue
        # All answers of a call come at once.
        further = next((i for i in range(end, len(roles)) if roles[i] != "tool"), len(roles))
        yield dataclasses.replace(
            whole,
            name=f"{whole.name}, its first {end} messages",
            messages=whole.messages[:end],
            going_on=whole.messages[end : max(further, end + 1)],
        )


def _compare(every: Sequence[Conversation], expected: Sequence[Rendered], rendered: Sequence[Rendered]) -> None:
    for conversation, ours, theirs in zip(every, expected, rendered, strict=True):
        if ours.text == theirs.text:
            continue
        if ours.text is None and (conversation.going_on or not ours.refused):
            continue  # what fails in an expression there may come out here
        raise CheckpointError(
            f"the chat template does not come out the same in LiteRT-LM, first in the conversation "
            f"{conversation.name!r}: transformers writes {_shown(ours, theirs)}, LiteRT-LM {_shown(theirs, ours)}: "
            "write the template otherwise and give it with --chat-template"
        )


def _shown(one: Rendered, other: Rendered) -> str:
    """Return a text around the first place where it differs from another, or why there is none."""
    if one.text is None:
        return f"none ({one.error[:_CONTEXT]})"
    place = 0 if other.text is None else common_length(one.text, other.text)
    start, end = max(0, place - _CONTEXT), place + _CONTEXT
    cut = ("…" if start else "", "…" if end < len(one.text) else "")
    return f"{cut[0]}{json.dumps(one.text[start:end], ensure_ascii=False)}{cut[1]}"


def _expected(template: str, special_tokens: Mapping[str, str], stops: Sequence[str], *, for_stock: bool) -> _Expected:
    """Render transformers' side in a process of its own, with the clock that LiteRT-LM has."""
    request = _Request(template=template, special_tokens=dict(special_tokens), stops=list(stops), for_stock=for_stock)
    module = "mtp_export.bundle.stock_template.check"
    try:
        expected, _ = run_child(module, request, _Expected, timeout_s=_LIMIT_S, environment={"TZ": "UTC"})
    except ChildTimeoutError:
        raise CheckpointError(f"the chat template does not end within {_LIMIT_S} s: {_REMEDY}") from None
    except ChildFailedError as failure:
        reason = failure.last_line or "killed"
        raise CheckpointError(f"the chat template cannot be rendered ({reason}): {_REMEDY}") from None
    if expected.refusal:
        raise CheckpointError(expected.refusal)
    for conversation, text in zip(every_conversation(), expected.texts, strict=True):
        if conversation.name == _NEEDED and text.text is None:
            raise CheckpointError(f"the chat template does not render a user's question ({text.error}): {_REMEDY}")
    return expected


def _render(request: _Request, folder: Path) -> _Expected:
    limit_memory(_LIMIT_BYTES)
    try:
        names, stops = request.special_tokens, request.stops
        habits = habits_of(request.template, special_tokens=names, stops=stops)
        stock = ""
        if request.for_stock:
            stock = stock_template(request.template, habits, special_tokens=names, stops=stops)
        renderer = _Transformers(request, habits)
        return _Expected(stock=stock, texts=[renderer.rendered(conversation) for conversation in every_conversation()])
    except CheckpointError as error:
        return _Expected(refusal=str(error))


class _Transformers:
    """Renders conversations as transformers does, in the form that LiteRT-LM must give them."""

    def __init__(self, request: _Request, habits: Habits) -> None:
        self._request, self._habits = request, habits
        self._bos = request.special_tokens.get("bos_token", "") if habits.starts_with_bos else ""

    def rendered(self, conversation: Conversation) -> Rendered:
        """Return the text of a conversation without the start token, or why there is none.

        Raises:
            CheckpointError: LiteRT-LM could not go on behind its beginning.
        """
        further = self._text_or_none(conversation, [*conversation.messages, *conversation.going_on])
        if further.text is None or not conversation.going_on or not self._request.for_stock:
            return further
        history = self._history(conversation)
        if not further.text.startswith(history):
            raise CheckpointError(
                f"the chat template writes the beginning of the conversation {conversation.name!r} otherwise once it "
                f"goes on, and LiteRT-LM only adds to what it has: it has {_shown(Rendered(history), further)}"
                f" and would need {_shown(further, Rendered(history))}: give another with --chat-template"
            )
        return Rendered(history)

    def _text_or_none(self, conversation: Conversation, messages: Sequence[Message]) -> Rendered:
        try:
            return Rendered(self._text(conversation, messages))
        except CheckpointError:
            raise
        except MtpError as error:
            return Rendered(None, str(error), refused=isinstance(error, UserError))

    def _history(self, conversation: Conversation) -> str:
        """Return the history as prelude.jinja and coda.jinja make it."""
        messages, habits = list(conversation.messages), self._habits
        calls = messages[-1].get("tool_calls")
        if calls and not habits.calls_close:
            return self._text(conversation, messages, add_generation_prompt=False)
        further: Message = {"role": "user", "content": NEXT}
        if calls:
            name = calls[0]["function"]["name"]
            further = {"role": "tool", "name": name, "tool_call_id": calls[0].get("id"), "content": NEXT}
        text = self._text(conversation, [*messages, further], add_generation_prompt=False).partition(NEXT)[0]
        if calls or habits.replies_close:
            return text[: max((text.rfind(s) + len(s) for s in self._request.stops if s in text), default=0)]
        if not text.endswith(habits.between):
            raise CheckpointError(
                f"the chat template goes on behind a reply with {json.dumps(text[-_CONTEXT:])} in the conversation "
                f"{conversation.name!r} and with {json.dumps(habits.between)} in another: give another with "
                "--chat-template"
            )
        return text.removesuffix(habits.between) + habits.closing

    def _text(self, conversation: Conversation, messages: Sequence[Message], **variables: Any) -> str:
        in_call = self._habits.answers_in_call
        if in_call:
            messages = _with_answers_in_calls(messages)
        else:
            messages = [_with_wrapped_list(message) for message in messages]
        if self._habits.joins_texts:
            messages = [_with_joined_texts(message) for message in messages]
            if any(isinstance(message.get("content"), list) and message["content"] for message in messages):
                raise UserError("the chat template takes texts alone")
        text = self._rendered(conversation, messages, variables)
        if self._request.for_stock and not text.startswith(self._bos):
            raise CheckpointError(
                f"the chat template begins with {self._bos!r} in some conversations and not in {conversation.name!r}, "
                "and LiteRT-LM writes it always or never: give another with --chat-template"
            )
        return text.removeprefix(self._bos)

    def _rendered(self, conversation: Conversation, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        return render_chat(
            self._request.template,
            messages,
            special_tokens=self._request.special_tokens,
            tools=list(conversation.tools) or None,
            **{**conversation.variables, **variables},
        )


def _with_joined_texts(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, list) or not content or any(part["type"] != "text" for part in content):
        return message
    return message | {"content": "".join(part["text"] for part in content)}


def _with_wrapped_list(message: Message) -> Message:
    """Wrap the answer of a tool that is a list: as a content it would be a list of parts."""
    if message["role"] == "tool" and isinstance(message["content"], list):
        return message | {"content": {"value": message["content"]}}
    return message


def _with_answers_in_calls(messages: Sequence[Message]) -> list[Message]:
    """Return messages with answers of tools as `tool_responses` of the message that called them."""

    def add(moved: list[Message], message: Message) -> None:
        answer = {"name": message["name"], "response": message["content"]}
        moved[-1] = moved[-1] | {"tool_responses": [*moved[-1].get("tool_responses", []), answer]}

    return with_answers_moved(messages, add)


if __name__ == "__main__":
    answer_parent(_Request, _render)
