"""Chats in our Conversation, LiteRT-LM's and transformers: prompts, replies, calls and cached tokens, compared."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from mtp_export.check.chats import MAX_CALLS, Chat
from mtp_export.check.stock_runtime import StockTurn
from mtp_runtime import Conversation, GenerationTrace, Session
from mtp_runtime.measure.parity import Comparison, Verdict, compare_tokens
from mtp_runtime.text.native_calls import assistant_message

_THOUGHT = re.compile(r"<\|channel>thought\n(.*?)(?:<channel\|>|\Z)", re.DOTALL)  # one without an end is all the reply
_UNFINISHED = re.compile(r"<\|tool_call>.*|\ufffd+\Z", re.DOTALL)  # where a reply was cut
_SHOWN = 60  # characters of a text that differs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTurn:
    """A prompt, the beginning of the conversation included, and the reply as the chat template sees it."""

    prompt: str
    content: str
    trace: GenerationTrace

    @property
    def text(self) -> str:
        """Return the reply without its thought and calls, as an app shows it."""
        return _THOUGHT.sub("", str(self._message["content"]))

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Return the functions that the reply calls."""
        return [call["function"] for call in self._message.get("tool_calls", [])]

    @property
    def thought(self) -> str:
        """Return the thought of the reply, empty if there is none."""
        return "".join(_THOUGHT.findall(self.content))

    @property
    def is_cut(self) -> bool:
        """Return whether the reply ended at a limit: a runtime that keeps its last drafts then holds more tokens."""
        return self.trace.finish_reason != "stop"

    @property
    def _message(self) -> dict[str, Any]:
        return assistant_message(self.content)


def hold(session: Session, chat: Chat, *, max_new_tokens: int, num_draft_tokens: int) -> list[ChatTurn]:
    """Hold a chat in the reference runtime; margins are recorded without drafts.

    Raises:
        ContextFullError: a prompt of the chat does not fit the context.
        MtpError: the chat template or the bundle fails.
    """
    options = {**chat.variables, **({"tools": list(chat.tools)} if chat.tools else {})}
    conversation = Conversation(session, system=chat.system, **options)
    turns: list[ChatTurn] = []
    for text in chat.user_texts:
        messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
        for _ in range(1 + MAX_CALLS):
            reply = conversation.say(
                messages,
                max_new_tokens=max_new_tokens,
                num_draft_tokens=num_draft_tokens,
                with_margins=num_draft_tokens == 0,
            )
            trace = reply.finish()
            prompt = session.tokenizer.decode(reply.prompt_ids, skip_special_tokens=False)
            turns.append(ChatTurn(prompt=prompt, content=reply.content(), trace=trace))
            calls = reply.as_message().get("tool_calls", [])
            if not calls:
                break
            names = [call["function"]["name"] for call in calls]
            messages = [{"role": "tool", "name": name, "content": chat.answer(name)} for name in names]
    return turns


def compare_tokens_of_chat(
    chat: Chat, reference: Sequence[ChatTurn], outputs: Sequence[Sequence[int]], *, tolerance: float
) -> Comparison:
    """Compare the replies of another run with the reference's, token by token, up to the first that differs."""
    for number, (turn, output) in enumerate(zip(reference, outputs, strict=False)):
        comparison = compare_tokens(
            chat.name,
            turn.trace.tokens,
            output,
            margins=turn.trace.margins,
            tolerance=tolerance,
            max_new_tokens=len(turn.trace.tokens),
        )
        if comparison.verdict != "equal":
            detail = f"reply {number + 1}, token {comparison.first_difference}"
            return _comparison(chat, reference, number, comparison.verdict, detail, comparison.margin)
    return _whole(chat, reference, len(outputs))


def compare_stock_chat(
    session: Session,
    chat: Chat,
    reference: Sequence[ChatTurn],
    stock: Sequence[StockTurn],
    error: str,
    *,
    tolerance: float,
) -> Comparison:
    """Compare a chat in LiteRT-LM's Conversation with ours: the text that it fed the model, the reply, and how many
    tokens it holds after each reply.

    The comparison ends with a reply that was cut at a limit: there LiteRT-LM with drafts gives and holds up to K tokens
    more, and every later turn has another beginning.
    """
    for number, (ours, theirs) in enumerate(zip(reference, stock, strict=False)):
        if not _is_fed(session, ours.prompt, theirs.fed, first=number == 0):
            detail = f"prompt {number + 1}: expected …{_end(ours.prompt)}, fed {_end(theirs.fed)}"
            return _comparison(chat, reference, number, "different", detail)
        if ours.is_cut and _begins(ours, theirs):
            return _cut(chat, number + 1)
        if (ours.thought, ours.text, ours.calls) != (theirs.thought, theirs.text, theirs.calls):
            smallest = min(ours.trace.margins, default=None)
            tie = smallest is not None and smallest <= tolerance
            reply = theirs.text or theirs.thought or str(theirs.calls)
            detail = f"reply {number + 1}: expected {_end(ours.content)}, got {_end(reply)}"
            return _comparison(chat, reference, number, "near_tie" if tie else "different", detail, smallest)
        held = _held(session, ours)
        if theirs.held_tokens not in held:
            expected = " or ".join(map(str, held))
            detail = f"reply {number + 1}: expected {expected} tokens in the cache, it holds {theirs.held_tokens}"
            return _comparison(chat, reference, number, "different", detail)
    if error:
        return _comparison(chat, reference, len(stock), "different", f"message {len(stock) + 1}: {error}")
    return _whole(chat, reference, len(stock))


def _begins(ours: ChatTurn, theirs: StockTurn) -> bool:
    """Return whether a reply that was cut is the beginning of another, up to an unfinished call or character."""
    thought, text = (_UNFINISHED.sub("", part) for part in (ours.thought, ours.text))
    return theirs.thought.startswith(thought) and theirs.text.startswith(text)


def _is_fed(session: Session, prompt: str, fed: str, *, first: bool) -> bool:
    """Return whether a text is the part of a prompt that the cache lacks: of the first, all but the start token."""
    bos = session.tokenizer.bos_token
    return fed == prompt.removeprefix(bos) if first else bool(fed) and prompt.endswith(fed)


def _held(session: Session, turn: ChatTurn) -> tuple[int, ...]:
    """Return the numbers of tokens that the runtime may hold after a reply.

    A thought before a text is taken back, at once or with the next message: templates drop it as the user goes on.
    """
    prompt, whole = len(turn.trace.prompt_ids), len(turn.trace.tokens)
    if not turn.thought or turn.calls:
        return (prompt + whole,)
    return (prompt + whole, prompt + len(session.tokenize(turn.text, bos=False)) + 1)  # and what ended it


def _cut(chat: Chat, count: int) -> Comparison:
    return Comparison(
        prompt=f"chat: {chat.name}",
        compared=count,
        agreed=count,
        first_difference=None,
        margin=None,
        verdict="equal",
        detail=f"compared up to reply {count}, which was cut at the limit",
    )


def _whole(chat: Chat, reference: Sequence[ChatTurn], count: int) -> Comparison:
    if count == len(reference):
        return _comparison(chat, reference, count, "equal", "")
    detail = f"{count} replies, expected {len(reference)}"
    return _comparison(chat, reference, min(count, len(reference)), "different", detail)


def _comparison(
    chat: Chat,
    reference: Sequence[ChatTurn],
    agreed: int,
    verdict: Verdict,
    detail: str,
    margin: float | None = None,
) -> Comparison:
    return Comparison(
        prompt=f"chat: {chat.name}",
        compared=len(reference),
        agreed=agreed,
        first_difference=None if verdict == "equal" else agreed,
        margin=margin,
        verdict=verdict,
        detail=detail,
    )


def _end(text: str) -> str:
    return json.dumps(text[-_SHOWN:], ensure_ascii=False)
