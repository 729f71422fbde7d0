"""A whole template for LiteRT-LM: its messages made transformers' ones, the checkpoint's template, and its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mtp_export.bundle.stock_template.conversations import Message
from mtp_export.bundle.stock_template.methods import literal
from mtp_export.bundle.stock_template.minijinja import helpers, translated, unindented
from mtp_runtime.errors import MtpError
from mtp_runtime.text.chat import render_chat

_MARKS = ("first-mark", "second-mark", "third-mark")
NEXT = "mark-of-the-next-message"  # what the history is rendered with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Habits:
    """How a template writes messages, which rendering some shows.

    `starts_with_bos`: it writes the start token itself.
    `joins_texts`: it knows contents that are texts alone, and gets the texts of a list of parts as one.
    `answers_in_call`: it takes a tool's answer that is an object only as `tool_responses` of the message that called.
    `calls_close`: it writes exactly one stop token between a call and its answer.
    `replies_close`: it writes exactly one stop token between a reply and the next message.
    `call_closing` is what it writes behind a call up to that token, empty where there is none.
    `between` is what it writes between a reply and the next message's text, and `closing` the beginning of that which
    ends with the token that ended the reply, empty where there is none. The affixes stand before and behind a message
    of the user and of the model, None where they depend on more than that.
    """

    starts_with_bos: bool
    joins_texts: bool
    answers_in_call: bool
    calls_close: bool
    replies_close: bool
    call_closing: str
    between: str
    closing: str
    user_affixes: tuple[str, str] | None
    model_affixes: tuple[str, str] | None


def stock_template(template: str, habits: Habits, *, special_tokens: Mapping[str, str], stops: Sequence[str]) -> str:
    """Return the template that makes LiteRT-LM's Conversation feed the model the text that `template` writes.

    `special_tokens` are texts by name, as the checkpoint's templates see them; `stops` are the texts of the tokens that
    end a reply.

    Raises:
        CheckpointError: it is no template, or has what the runtime's renderer has no counterpart of.
    """
    body = translated(template)
    names = {name: text for name, text in sorted(special_tokens.items()) if name.isidentifier()}
    settings = {
        "stock_bos": names.get("bos_token", ""),
        "stock_stops": list(stops),
        "stock_mark": NEXT,
        "stock_joins_texts": habits.joins_texts,
        "stock_answers_in_call": habits.answers_in_call,
        "stock_calls_close": habits.calls_close,
        "stock_replies_close": habits.replies_close,
        "stock_between": habits.between,
        "stock_closing": habits.closing,
        **names,
    }
    written = "".join(f"{{% set {name} = {literal(value)} %}}" for name, value in settings.items())
    whole = f"{{% set stock_body %}}{body}{{% endset %}}"
    return helpers() + written + unindented("prelude.jinja") + whole + unindented("coda.jinja")


def habits_of(template: str, *, special_tokens: Mapping[str, str], stops: Sequence[str]) -> Habits:
    """Find out how a template writes messages, by rendering some."""

    def render(*messages: Message) -> str:
        try:
            return render_chat(template, messages, special_tokens=special_tokens, add_generation_prompt=False)
        except MtpError:
            return ""

    first, second, third = _MARKS
    texts = [{"type": "text", "text": first}, {"type": "text", "text": second}]
    listed = render({"role": "user", "content": texts})
    joins_texts = not all(mark in listed for mark in (first, second)) or _is_printed(texts[0], listed)
    user = {"role": "user", "content": first}
    turns = render(user, {"role": "assistant", "content": second}, {"role": "user", "content": third})
    between = turns.partition(second)[2].partition(third)[0]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": second}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    answer = {"b": third}
    in_call = render(user, calling | {"tool_responses": [{"name": "f", "response": answer}]})
    apart = render(user, calling, {"role": "tool", "name": "f", "content": answer})
    text_apart = render(user, calling, {"role": "tool", "name": "f", "content": third})
    answers_in_call = third in in_call and third not in apart
    behind_call = (in_call if answers_in_call else text_apart).partition(second)[2].partition(third)[0]
    bos = special_tokens.get("bos_token", "")
    alone = render(user).removeprefix(bos)
    affixes = (alone.partition(first)[0], alone.partition(first)[2])
    behind_user = turns.partition(first)[2].partition(second)[0]
    regular = first in alone and behind_user.startswith(affixes[1]) and between.endswith(affixes[0])
    of_model = (behind_user.removeprefix(affixes[1]), between.removesuffix(affixes[0]))
    return Habits(
        starts_with_bos=bool(bos) and turns.startswith(bos),
        joins_texts=joins_texts,
        answers_in_call=answers_in_call,
        replies_close=sum(between.count(stop) for stop in stops) == 1,
        calls_close=sum(behind_call.count(stop) for stop in stops) == 1,
        call_closing=_up_to_stop(behind_call, stops),
        user_affixes=affixes if regular else None,
        model_affixes=of_model if regular else None,
        between=between,
        closing=_up_to_stop(between, stops),
    )


def _up_to_stop(text: str, stops: Sequence[str]) -> str:
    """Return the beginning of a text that ends with its first stop; empty if it has none."""
    return text[: min((text.find(stop) + len(stop) for stop in stops if stop in text), default=0)]


def _is_printed(part: Mapping[str, str], text: str) -> bool:
    """Return whether a part of a content was printed as it is, in Python's notation or as JSON."""
    return any(f"{quote}type{quote}: {quote}{part['type']}{quote}" in text for quote in "'\"")
