"""A conversation of several turns: each prompt is the whole of it, and tokens that the cache holds are not processed
again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import msgspec

from mtp_runtime.errors import UserError
from mtp_runtime.generate.generation import Generation
from mtp_runtime.generate.options import GenerationOptions, OptionChanges, with_changes
from mtp_runtime.generate.session import Session
from mtp_runtime.generate.stats import GenerationStats
from mtp_runtime.generate.trace import FinishReason, GenerationTrace, Token
from mtp_runtime.measure.parity import common_length
from mtp_runtime.text.native_calls import assistant_message

Message = Mapping[str, Any]


class Turn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message to the model, or the answers of several tools, and its reply, as the chat template takes them."""

    messages: tuple[dict[str, Any], ...]
    reply: dict[str, Any]


class _Saved(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    system: str | None
    options: dict[str, Any]
    turns: tuple[Turn, ...]


class Reply(Iterator[Token]):
    """The tokens of a reply, as they come; the conversation has the turn as soon as one has come.

    Closing it early, or saying something else first, keeps the tokens so far as the reply.
    """

    def __init__(
        self,
        conversation: Conversation,
        messages: Sequence[Message],
        prompt_ids: Sequence[int],
        options: GenerationOptions,
    ) -> None:
        """Start nothing yet: the first `next` processes the prompt. Made by `Conversation.say`."""
        self.messages = tuple(messages)
        self.prompt_ids = tuple(prompt_ids)
        self._conversation = conversation
        self._options = options
        self._generation: Generation | None = None
        self._over = False

    def __next__(self) -> Token:
        if self._over:
            raise StopIteration
        try:
            token = next(self._started())
        except BaseException:
            self.close()
            raise
        if self.finish_reason != "abandoned":
            self.close()
        return token

    @property
    def tokens(self) -> tuple[Token, ...]:
        """The tokens so far."""
        return () if self._generation is None else tuple(self._generation.tokens)

    @property
    def text(self) -> str:
        """The text so far, without special tokens, a stop id or a stop sequence."""
        return "" if self._generation is None else self._generation.text

    @property
    def stats(self) -> GenerationStats:
        """What the reply cost; `reused_tokens` of its `prompt_tokens` were in the cache."""
        return GenerationStats() if self._generation is None else self._generation.stats

    @property
    def finish_reason(self) -> FinishReason:
        """Why the reply ended; "abandoned" until it did."""
        return "abandoned" if self._generation is None else self._generation.finish_reason

    def with_text(self) -> Iterator[tuple[Token, str]]:
        """Yield each token with the text that is certain since the one before."""
        for token in self:
            yield token, self._started().piece

    def finish(self) -> GenerationTrace:
        """Run to the end and return the trace.

        Raises:
            UserError: the reply was closed before its first token.
        """
        for _ in self:
            pass
        if self._generation is None:
            raise UserError("the reply was closed before it began: say it again")
        return self._generation.trace()

    def close(self) -> None:
        """Stop here; closing twice is harmless."""
        if self._over:
            return
        self._over = True
        if self._generation is not None:
            self._generation.close()
        self._conversation._end(self)

    def content(self) -> str:
        """Return the reply as the chat template is to see it: with special tokens, without what ended it."""
        if self._generation is None:
            return ""
        generation, tokenizer = self._generation, self._conversation.session.tokenizer
        ids = [token.id for token in generation.tokens]
        if ids and ids[-1] in generation.request.stop_token_ids:
            ids.pop()
        text = tokenizer.decode(ids, skip_special_tokens=False)
        if generation.stop_string is not None:
            # Special tokens inside the sequence, which has none, would hide it.
            end = text.find(generation.stop_string)
            return text[:end] if end >= 0 else generation.text
        return text

    def as_message(self) -> dict[str, Any]:
        """Return the reply as a message: where the conversation has tools and the reply calls them in Gemma 4's
        notation, with `tool_calls` as OpenAI's API writes them."""
        if self._conversation.has_tools:
            return assistant_message(self.content())
        return {"role": "assistant", "content": self.content()}

    def _started(self) -> Generation:
        """Return the generation; what the cache holds is looked at as late as possible, for others may use it."""
        if self._generation is None:
            session = self._conversation.session
            kept = session.keepable(common_length(self.prompt_ids[:-1], session.processed_ids))
            self._generation = session.generate(self.prompt_ids, self._options, keep_length=kept)
            self._generation.read_text()
        return self._generation


class Conversation:
    """Turns of messages and replies on one session, which may be shared with others, one reply at a time.

    Each prompt is the chat template's text of the whole conversation. Its longest beginning whose rows are in the
    cache is not processed again: usually all but the new message. A template that writes past replies otherwise than
    they were generated (Gemma 4's drops thoughts) makes that shorter, and the result no different. Where sliding layers
    keep only the last rows, and what follows the beginning has taken the place of some, all is processed again.
    """

    def __init__(self, session: Session, *, system: str | None = None, **options: Any) -> None:
        """Begin without turns. `options` go to the chat template: tools, enable_thinking and so on."""
        self.session = session
        self._system = system
        self._options = options
        self._turns: list[Turn] = []
        self._reply: Reply | None = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns so far, the last with the tokens so far of a reply under way."""
        running = self._reply
        return (*self._turns, _turn(running)) if running is not None and running.tokens else tuple(self._turns)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages so far, in order."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, *(dict(message) for turn in self.turns for message in (*turn.messages, turn.reply))]

    @property
    def has_tools(self) -> bool:
        """Whether the chat template is given tools."""
        return bool(self._options.get("tools"))

    def say(
        self,
        message: str | Message | Sequence[Message],
        options: GenerationOptions | None = None,
        **changes: Unpack[OptionChanges],
    ) -> Reply:
        """Return the reply to a user's text, to any message, or to several, as an iterator of its tokens.

        Tools are answered by messages with the role "tool", their `name` and `content`, one for each of the reply's
        `tool_calls`, all in one `say`.

        `options` and `changes` are those of `Session.generate`, without keep_length. A reply under way is closed first.
        The turn is part of the conversation from the reply's first token on: if there is none, it never was.

        Raises:
            BundleError: the bundle has no chat template, or it does not work.
            UserError: the template refuses the conversation. At the first token: as `Session.generate`.
        """
        chosen = with_changes(options, changes)
        if chosen.keep_length:
            raise UserError("keep_length is the conversation's own matter: leave it out")
        self._close_reply()
        if isinstance(message, str):
            message = {"role": "user", "content": message}
        new = [dict(one) for one in ([message] if isinstance(message, Mapping) else message)]
        prompt = self.session.chat_prompt([*self.messages, *new], **self._options)
        self._reply = Reply(self, new, self.session.tokenize(prompt, bos=False), chosen)
        return self._reply

    def rewind(self, turn: int) -> None:
        """Keep the first `turn` turns and forget the others; 0 begins anew. A reply under way is closed first.

        Raises:
            UserError: there are fewer turns than that.
        """
        self._close_reply()
        if not 0 <= turn <= len(self._turns):
            raise UserError(f"cannot rewind to turn {turn}: the conversation has {len(self._turns)}")
        del self._turns[turn:]

    def save(self, path: Path | str) -> None:
        """Write the conversation and the session's cache to one file; a reply under way is closed first.

        Raises:
            UserError: the file cannot be written, or a message or option is not JSON.
        """
        self._close_reply()
        saved = _Saved(system=self._system, options=self._options, turns=tuple(self._turns))
        self.session.save(path, note=saved)

    @classmethod
    def restore(cls, session: Session, path: Path | str) -> Conversation:
        """Return the conversation that `save` wrote to `path`, the session's cache as it was.

        Raises:
            UserError: the file cannot be read, is no saved session, or has no conversation.
            BundleError: it was saved with another bundle.
        """
        note = session.restore(path)
        try:
            saved = msgspec.convert(note, _Saved)
        except msgspec.ValidationError as error:
            raise UserError(f"{path} has no conversation ({error}): restore it with Session.restore") from error
        conversation = cls(session, system=saved.system, **saved.options)
        conversation._turns = list(saved.turns)
        return conversation

    def _close_reply(self) -> None:
        if self._reply is not None:
            self._reply.close()

    def _end(self, reply: Reply) -> None:
        """Keep the turn of a reply that is over."""
        if reply is self._reply:
            self._turns = list(self.turns)
            self._reply = None


def _turn(reply: Reply) -> Turn:
    return Turn(messages=tuple(dict(message) for message in reply.messages), reply=reply.as_message())
