"""Session: an opened bundle that generates. The runtime's front door."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

from mtp_runtime.backend import Backend
from mtp_runtime.bundle import Bundle
from mtp_runtime.contract import Manifest
from mtp_runtime.errors import BundleError, UserError
from mtp_runtime.loop import GenerationLoop, Request
from mtp_runtime.sampling import Constraint, Sampling
from mtp_runtime.stats import GenerationStats
from mtp_runtime.tokenizer import TextStream, Tokenizer
from mtp_runtime.trace import FinishReason, GenerationTrace, Token


class Generation(Iterator[Token]):
    """The committed tokens of one request, as they come; `stats` and `finish_reason` grow with them."""

    def __init__(self, loop: GenerationLoop, manifest: Manifest, request: Request) -> None:
        """Start nothing yet: the first `next` processes the prompt."""
        self.request = request
        self.stats = GenerationStats()
        self.tokens: list[Token] = []
        self.finish_reason: FinishReason = "abandoned"
        self._loop = loop
        self._manifest = manifest
        self._source = loop.generate(request, self.stats)

    def __next__(self) -> Token:
        token = next(self._source)
        self.tokens.append(token)
        self.finish_reason = self._loop.finish_reason
        return token

    def close(self) -> None:
        """Stop here; the cache stays as if generation had ended with the last token."""
        self._source.close()

    def finish(self) -> GenerationTrace:
        """Run to the end and return the trace."""
        for _ in self:
            pass
        return self.trace()

    def trace(self) -> GenerationTrace:
        """Return what was generated so far."""
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


class Session:
    """One bundle, one cache, one generation at a time."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        """Take an opened bundle and backend, and close both at the end; `open` does it all."""
        self.bundle = bundle
        self.backend = backend
        self._loop = GenerationLoop(backend, bundle.manifest)
        self._tokenizer: Tokenizer | None = None
        self._closed = False

    @classmethod
    def open(cls, path: Path | str, *, threads: int = 2, verify: bool = True) -> Session:
        """Open the bundle at `path`, a folder or a `.litertlm`, on LiteRT with `threads` CPU threads.

        `verify` compares every file with its SHA-256.

        Raises:
            BundleError: the bundle is missing, damaged, of another kind or of a newer version.
            BackendError: LiteRT refuses its graphs.
        """
        # Imported here so that reading manifests, traces and reports does not load the library.
        from mtp_runtime.litert import LiteRTGraphs
        from mtp_runtime.static_backend import StaticBackend

        if threads < 1:
            raise UserError(f"threads is {threads}: give 1 or more")
        with contextlib.ExitStack() as opened:
            bundle = opened.enter_context(Bundle.open(path, verify=verify))
            graphs = LiteRTGraphs.open(bundle, threads=threads)
            opened.callback(graphs.close)
            session = cls(bundle, StaticBackend(graphs, bundle.manifest))
            opened.pop_all()
        return session

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer, loaded at the first use."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.open(self.bundle.path("tokenizer"), self.manifest.bos_token_id)
        return self._tokenizer

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of `text`, the beginning-of-sequence token first."""
        return self.tokenizer.encode(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids)

    def chat_prompt(self, messages: str | Sequence[Mapping[str, str]]) -> str:
        """Return the prompt that the bundle's chat template makes of a user's text or of a whole conversation.

        Raises:
            BundleError: the bundle has no chat template, or it does not work.
            UserError: the template refuses the conversation.
        """
        # Imported here: only a chat needs jinja2.
        from mtp_runtime.chat import render_chat

        path = self.bundle.path("chat_template")
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"cannot read the chat template {path}: {error}") from error
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return render_chat(template, messages, bos_token=self.tokenizer.bos_token)

    def text_pieces(self, ids: Iterable[int]) -> list[str]:
        """Return what each token adds to the text, one piece per token; joined they are the text of all."""
        stream = self.text_stream()
        pieces = [stream.push(token_id) for token_id in ids]
        if pieces:
            pieces[-1] += stream.finish()
        return pieces

    def text_stream(self) -> TextStream:
        """Return a stream that turns the tokens of one generation into text as they come."""
        return self.tokenizer.stream()

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        num_draft_tokens: int | Literal["auto"] | None = None,
        stop_token_ids: Collection[int] | None = None,
        keep_length: int = 0,
        with_margins: bool = False,
        sampling: Sampling | None = None,
        constraint: Constraint | None = None,
    ) -> Generation:
        """Return the continuation of `prompt` as an iterator of committed tokens, greedy without `sampling`.

        `num_draft_tokens` is 0 for plain decoding, "auto" for as many in each round as have paid so far, and the graph's
        own number by default; `stop_token_ids` are the manifest's by default. Without `max_new_tokens` it ends at a stop id or with the context. `keep_length` says
        that so many leading prompt tokens are in the cache from the generation before. `with_margins` records how far
        each greedy choice was from a tie. `constraint` is called with the output's tokens before each committed one
        and returns which tokens may follow, [V], or None for all.

        Raises (at the first token):
            UserError: the request contradicts the bundle or itself.
            ContextFullError: the prompt leaves no room for a token.
        """
        if self._closed:
            raise UserError("the session is closed: open the bundle again")
        manifest = self.manifest
        most_drafts = (
            manifest.num_draft_tokens if num_draft_tokens is None or num_draft_tokens == "auto" else num_draft_tokens
        )
        request = Request(
            prompt_ids=tuple(self.tokenize(prompt) if isinstance(prompt, str) else prompt),
            max_new_tokens=max_new_tokens,
            num_draft_tokens=most_drafts,
            adaptive=num_draft_tokens == "auto",
            stop_token_ids=frozenset(manifest.stop_token_ids if stop_token_ids is None else stop_token_ids),
            keep_length=keep_length,
            with_margins=with_margins,
            sampling=sampling,
            constraint=constraint,
        )
        return Generation(self._loop, manifest, request)

    def close(self) -> None:
        """Release the graphs and remove what was unpacked; closing twice is harmless."""
        self._closed = True
        self._loop.abandon()
        self.backend.close()
        self.bundle.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
