"""The chats of a checkpoint, as far as an export depends on them: a template that works, and the ends of replies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mtp_export.formats.format import ReplyEnds
from mtp_export.source import texts
from mtp_export.source.checkpoint import Checkpoint
from mtp_runtime.text.tokenizer import Tokenizer

# What these call takes LiteRT's libraries, which the command line's help does without.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTexts:
    """The chat template, the special tokens by name that it sees, and the ids of the tokens that end a reply by their
    text."""

    template: str
    special_tokens: Mapping[str, str]
    stop_ids: Mapping[str, int]


def read_chat_texts(target: Checkpoint, stop_token_ids: Sequence[int], contents: Mapping[str, str]) -> ChatTexts | None:
    """Return the texts of a checkpoint that chats depend on, None if there is no chat template."""
    from mtp_export.bundle.metadata import added_pieces

    if "chat_template" not in contents:
        return None
    pieces = added_pieces(contents["tokenizer"])
    return ChatTexts(
        template=contents["chat_template"],
        special_tokens=texts.special_tokens(target),
        stop_ids={pieces[token_id]: token_id for token_id in stop_token_ids if token_id in pieces},
    )


def check_chat_template(chat: ChatTexts, tokenizer_json: str, *, for_stock: bool) -> None:
    """Check a chat template; `for_stock` in LiteRT-LM too.

    Raises:
        CheckpointError: it does not render, or not in LiteRT-LM as in transformers.
        BackendError: LiteRT-LM fails.
    """
    from mtp_export.bundle.stock_template import check_renders, check_template

    names, stops = chat.special_tokens, list(chat.stop_ids)
    if for_stock:
        check_template(chat.template, special_tokens=names, stops=stops, tokenizer_json=tokenizer_json)
    else:
        check_renders(chat.template, special_tokens=names, stops=stops)


def reply_ends(chat: ChatTexts, tokenizer: Tokenizer) -> ReplyEnds | None:
    """Return the tokens that end replies and calls in chats, None if the template writes no stop token there."""
    from mtp_export.bundle.stock_template import habits_of

    habits = habits_of(chat.template, special_tokens=chat.special_tokens, stops=list(chat.stop_ids))
    reply, call = (
        next((token_id for stop, token_id in chat.stop_ids.items() if closing.endswith(stop)), None)
        for closing in (habits.closing, habits.call_closing)
    )
    behind = tokenizer.encode(habits.between.removeprefix(habits.closing), bos=False)
    if reply is None or not behind:
        return None
    return ReplyEnds(reply=reply, call=reply if call is None else call, behind_reply=behind[0])
