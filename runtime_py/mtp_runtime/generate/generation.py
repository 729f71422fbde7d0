"""Generation: the committed tokens of one request as they come, with their text."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mtp_runtime.bundle.contract import Manifest
from mtp_runtime.generate.loop import GenerationLoop, Request
from mtp_runtime.generate.stats import GenerationStats
from mtp_runtime.generate.trace import FinishReason, GenerationTrace, Token
from mtp_runtime.text.stop_strings import StoppingText


class Generation(Iterator[Token]):
    """The committed tokens of one request, as they come; `stats` and `finish_reason` grow with them.

    A stop sequence ends it as a stop id does: the token that completes it is the last one, and tokens of the same
    round after it are dropped, from the cache too. `tokens` has those that spell the sequence, `text` excludes it.
    """

    def __init__(
        self,
        loop: GenerationLoop,
        manifest: Manifest,
        request: Request,
        open_text: Callable[[], StoppingText],
        *,
        stops: bool,
    ) -> None:
        """Start nothing yet: the first `next` processes the prompt. With `stops`, text is read as tokens come."""
        self.request = request
        self.stats = GenerationStats()
        self.tokens: list[Token] = []
        self.finish_reason: FinishReason = "abandoned"
        self._loop = loop
        self._manifest = manifest
        self._source = loop.generate(request, self.stats)
        self._open_text = open_text
        # A tokenizer is needed, and time spent, only where text is read.
        self._text = open_text() if stops else None
        self.piece = ""

    def __next__(self) -> Token:
        token = next(self._source)
        self.tokens.append(token)
        self.finish_reason = self._loop.finish_reason
        if self._text is not None:
            self._read(self._text)
        return token

    @property
    def text(self) -> str:
        """The text so far, without special tokens, a stop id or a stop sequence."""
        return self.read_text().text

    @property
    def stop_string(self) -> str | None:
        """The stop sequence that ended the text, if one did."""
        return None if self._text is None else self._text.reached

    def with_text(self) -> Iterator[tuple[Token, str]]:
        """Yield each token with the text that is certain since the one before; joined it is `text` at the end."""
        self.read_text()
        for token in self:
            yield token, self.piece

    def read_text(self) -> StoppingText:
        """Return the text so far, and read the tokens to come: `piece` is the text that the last one made certain."""
        if self._text is None:
            self._text = self._open_text()
            for token in self.tokens[:-1]:
                self._text.push(token.id)
            if self.tokens:
                self._read(self._text)
        return self._text

    def _read(self, text: StoppingText) -> None:
        """Add the last token to the text, and end here if that completes a stop sequence."""
        last = self.tokens[-1].id
        self.piece = "" if last in self.request.stop_token_ids else text.push(last)
        if self.finish_reason != "abandoned":
            self.piece += text.finish()
        if text.reached is not None:
            self._source.close()
            self.finish_reason = "stop"

    def close(self) -> None:
        """Stop here; the cache stays as if generation had ended with the last token."""
        self._source.close()

    def finish(self) -> GenerationTrace:
        """Run to the end and return the trace."""
        for _ in self:
            pass
        return self.trace()

    def trace(self) -> GenerationTrace:
        """Return the trace of the tokens so far."""
        return GenerationTrace(
            model=self._manifest.model,
            recipe=self._manifest.recipe,
            num_draft_tokens=self.request.num_draft_tokens,
            prompt_ids=self.request.prompt_ids,
            tokens=tuple(token.id for token in self.tokens),
            origins=tuple(token.origin for token in self.tokens),
            margins=tuple(token.margin for token in self.tokens if token.margin is not None),
            finish_reason=self.finish_reason,
            stats=self.stats,
        )
