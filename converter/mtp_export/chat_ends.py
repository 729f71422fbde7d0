"""What an export has to know of a checkpoint's chats: that its template works, and what ends replies and calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mtp_export.arch.spec import TargetSpec
from mtp_export.source import texts
from mtp_export.source.checkpoint import Checkpoint
from mtp_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mtp_export.reply_ends import ReplyEnds

# What these call takes LiteRT's libraries, which the command line's help does without.


def check_chat_template(
    target: Checkpoint, stop_token_ids: Sequence[int], contents: Mapping[str, str], *, for_stock: bool
) -> None:
    """Check the chat template among a checkpoint's texts, if there is one; `for_stock` in LiteRT-LM too.

    Raises:
        CheckpointError: it does not render, or not in LiteRT-LM as in transformers.
        BackendError: LiteRT-LM fails.
    """
    from mtp_export.litertlm_metadata import added_pieces, stop_texts
    from mtp_export.stock_template import check_renders, check_template

    if "chat_template" not in contents:
        return
    template, names = contents["chat_template"], texts.special_tokens(target)
    stops = stop_texts(added_pieces(contents["tokenizer"]), stop_token_ids)
    if for_stock:
        check_template(template, special_tokens=names, stops=stops, tokenizer_json=contents["tokenizer"])
    else:
        check_renders(template, special_tokens=names, stops=stops)


def reply_ends(
    target: Checkpoint, spec: TargetSpec, stop_token_ids: Sequence[int], contents: Mapping[str, str]
) -> ReplyEnds | None:
    """Return what ends replies and calls in a checkpoint's chats, None where template and stop tokens do not say."""
    from mtp_export.litertlm_metadata import added_pieces, stop_texts
    from mtp_export.reply_ends import ReplyEnds
    from mtp_export.stock_template import habits_of

    if "chat_template" not in contents:
        return None
    pieces = added_pieces(contents["tokenizer"])
    stops = stop_texts(pieces, stop_token_ids)
    habits = habits_of(contents["chat_template"], special_tokens=texts.special_tokens(target), stops=stops)
    ids = {text: token_id for token_id, text in pieces.items()}
    reply, call = (
        next((ids[stop] for stop in stops if closing.endswith(stop)), None)
        for closing in (habits.closing, habits.call_closing)
    )
    tokenizer = Tokenizer.parse(contents["tokenizer"], spec.bos_token_id, str(target.folder))
    behind = tokenizer.encode(habits.between.removeprefix(habits.closing), bos=False)
    if reply is None or not behind:
        return None
    return ReplyEnds(reply=reply, call=reply if call is None else call, behind_reply=behind[0])
