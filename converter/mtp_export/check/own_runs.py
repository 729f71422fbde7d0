"""Our own runtime's runs of every prompt and chat: without drafts, which others are compared with, and with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from mtp_export.check.chat_parity import ChatTurn, hold
from mtp_export.check.chats import Chat, parity_chats
from mtp_export.check.prompts import Prompt
from mtp_runtime import GenerationTrace, Session
from mtp_runtime.errors import ContextFullError, UserError

CHAT_TOKENS = 96  # of a reply

Hold = Callable[..., list[ChatTurn]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceChats:
    """The chats that fit the context, their turns without drafts, and a line for each chat that does not fit."""

    chats: Sequence[Chat]
    turns: Sequence[Sequence[ChatTurn]]
    left_out: Sequence[str]

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self.chats)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """The runs that every other is compared with: the prompts as texts, their traces without drafts of at most
    `max_new_tokens`, the text that each token of a trace adds, and the chats."""

    prompts: Sequence[Prompt]
    traces: Sequence[GenerationTrace]
    pieces: Sequence[Sequence[str]]
    max_new_tokens: int
    chats: ReferenceChats

    @property
    def prompt_ids(self) -> list[str]:
        """Return the names of the prompts."""
        return [prompt.id for prompt in self.prompts]


def run_prompts(
    session: Session, prompts: Sequence[Prompt], max_new_tokens: int, on_run: Callable[[str], None]
) -> list[list[GenerationTrace]]:
    """Generate for every prompt with 0, 1, … K drafts in turn, so that a machine that slows down slows all alike.

    Returns:
        Traces by number of drafts and prompt. Those without drafts have margins, which cost a little time.

    Raises:
        UserError: a prompt yields no token.
    """
    depths = range(session.manifest.num_draft_tokens + 1)
    for k in depths:  # the first run of a graph packs its weights
        session.generate(prompts[0].text, max_new_tokens=8, num_draft_tokens=k).finish()
    runs: list[list[GenerationTrace]] = [[] for _ in depths]
    for number, prompt in enumerate(prompts, 1):
        on_run(f"reference runtime, prompt {number} of {len(prompts)}")
        for k in depths:
            generation = session.generate(
                prompt.text, max_new_tokens=max_new_tokens, num_draft_tokens=k, with_margins=k == 0
            )
            runs[k].append(generation.finish())
            if not runs[k][-1].tokens:
                raise UserError(f"prompt {prompt.id} yields no token: it fills the whole context")
    return runs


def reference_chats(session: Session, on_run: Callable[[str], None], hold_chat: Hold = hold) -> ReferenceChats:
    """Hold parity's chats without drafts, if there is a chat template."""
    chats: list[Chat] = []
    turns: list[list[ChatTurn]] = []
    left_out: list[str] = []
    for chat in parity_chats() if session.bundle.has("chat_template") else ():
        on_run(f"reference runtime, chat {chat.name}")
        try:
            turns.append(hold_chat(session, chat, max_new_tokens=CHAT_TOKENS, num_draft_tokens=0))
            chats.append(chat)
        except ContextFullError:
            length = session.manifest.context_length
            left_out.append(f"chat {chat.name}: it does not fit the context of {length} tokens")
    return ReferenceChats(chats=chats, turns=turns, left_out=left_out)
