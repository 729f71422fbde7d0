"""Session: an opened bundle that generates. The runtime's front door."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from mtp_runtime.bundle.bundle import Bundle
from mtp_runtime.bundle.contract import Manifest
from mtp_runtime.errors import BundleError, MtpError, UserError
from mtp_runtime.generate.backend import Backend, Provider
from mtp_runtime.generate.loop import GenerationLoop, Request
from mtp_runtime.generate.sampling import Constraint, Method, Sampling
from mtp_runtime.generate.saved_session import SavedSession, read_session, write_session
from mtp_runtime.generate.stats import GenerationStats
from mtp_runtime.generate.trace import FinishReason, GenerationTrace, Token
from mtp_runtime.text.stop_strings import StoppingText, check_stop_strings
from mtp_runtime.text.tokenizer import TextStream, Tokenizer


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
        # A tokenizer is needed, and time spent, only where someone wants text.
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
        return None if self._text is None else self._text.found

    def with_text(self) -> Iterator[tuple[Token, str]]:
        """Yield each token with the text that is certain since the one before; joined it is `text` at the end."""
        self.read_text()
        for token in self:
            yield token, self.piece

    def read_text(self) -> StoppingText:
        """Return the text so far, and read what comes: `piece` is what the last token made certain."""
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
        if text.found is not None:
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
    def open(
        cls,
        path: Path | str,
        *,
        threads: int = 2,
        verify: bool = True,
        cache_dir: Path | str | None = None,
        provider: Provider = "cpu",
    ) -> Session:
        """Open the bundle at `path`, a folder or a `.litertlm`, with `threads` CPU threads.

        `verify` compares every file with its SHA-256. Packed weights are kept in `cache_dir`, by default
        `~/.cache/mtp-export/packed`: they make the second start fast and are in memory once.
        `provider` is where the graphs of an ONNX bundle run: "webgpu" is a GPU, and takes `mtp-export[webgpu]`.

        Raises:
            UserError: the provider is not there, or not for this bundle.
            BundleError: the bundle is missing, damaged, of another kind or of a newer version.
            BackendError: the inference library refuses its graphs.
        """
        if threads < 1:
            raise UserError(f"threads is {threads}: give 1 or more")
        with contextlib.ExitStack() as opened:
            bundle = opened.enter_context(Bundle.open(path, verify=verify))
            backend = _open_backend(bundle, threads, None if cache_dir is None else Path(cache_dir), provider)
            opened.callback(backend.close)
            session = cls(bundle, backend)
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

    def tokenize(self, text: str, *, bos: bool = True) -> list[int]:
        """Return the token ids of `text`, the beginning-of-sequence token first; without `bos` only if the text has
        it, as a chat template's text is tokenised."""
        return self.tokenizer.encode(text, bos=bos)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids)

    def chat_prompt(self, messages: str | Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Return the prompt that the bundle's chat template makes of a user's text or of a whole conversation.

        `options` are `tools`, `add_generation_prompt` and whatever else the template reads, such as enable_thinking;
        special tokens are the checkpoint's unless they are among them.

        Raises:
            BundleError: the bundle has no chat template, or it does not work.
            UserError: the template refuses the conversation.
        """
        # Imported here: only a chat needs jinja2.
        from mtp_runtime.text.chat import render_chat

        path = self.bundle.path("chat_template")
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"cannot read the chat template {path}: {error}") from error
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        special_tokens = self.manifest.special_tokens
        if special_tokens is None:
            special_tokens = {"bos_token": self.tokenizer.bos_token}
        return render_chat(template, messages, special_tokens=special_tokens, **options)

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
        stop: str | Sequence[str] = (),
        stop_token_ids: Collection[int] | None = None,
        keep_length: int = 0,
        with_margins: bool = False,
        sampling: Sampling | Literal["checkpoint"] | None = None,
        constraint: Constraint | None = None,
    ) -> Generation:
        """Return the continuation of `prompt` as an iterator of committed tokens, greedy without `sampling`.

        "checkpoint" draws them as the checkpoint's generation_config.json says. What that file suppresses is never
        said, however tokens are chosen.

        `num_draft_tokens` is 0 for plain decoding, "auto" for as many in each round as have paid so far, and the
        graph's own number by default; `stop_token_ids` are the manifest's by default. Without `max_new_tokens` it
        ends at a stop id or with the context. `stop` gives texts at which to end, as `Generation` says. `keep_length`
        says that so many leading prompt tokens are in the cache from the generation before. `with_margins` records
        how far each greedy choice was from a tie. `constraint` is called with the output's tokens before each
        committed one and returns which tokens may follow, [V], or None for all.

        Raises (at the first token):
            UserError: the request contradicts the bundle or itself.
            ContextFullError: the prompt leaves no room for a token.
        """
        self._check_open()
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
            sampling=self.checkpoint_sampling() if sampling == "checkpoint" else sampling,
            constraint=constraint,
        )
        stops = check_stop_strings(stop)
        return Generation(
            self._loop,
            manifest,
            request,
            lambda: StoppingText(self.tokenizer.stream(), stops),
            stops=bool(stops),
        )

    def checkpoint_sampling(self, *, seed: int = 0, method: Method = "match") -> Sampling:
        """Return the sampling that the checkpoint's generation_config.json asks for; without do_sample it is greedy.

        Raises:
            UserError: the bundle does not say.
        """
        sampler = self.manifest.sampler
        if sampler is None:
            raise UserError(
                "an older version exported this bundle, without the checkpoint's sampling: export it again, or give "
                "a Sampling"
            )
        return Sampling(
            temperature=sampler.temperature if sampler.do_sample else 0.0,
            top_k=sampler.top_k or None,
            top_p=sampler.top_p,
            repetition_penalty=sampler.repetition_penalty,
            seed=seed,
            method=method,
        )

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The prompt and the committed tokens of the generation that ran last; the last one is not processed yet."""
        return self._loop.token_ids

    @property
    def processed_ids(self) -> tuple[int, ...]:
        """The tokens whose rows are in the cache: a prompt that begins with n of them may have keep_length n."""
        return self._loop.processed_ids

    def save(self, path: Path | str, *, note: Any = None) -> None:
        """Write the filled rows of the cache, `token_ids` and a `note` (JSON) to one file, for `restore`.

        A generation under way is saved as it would be if it ended here, and goes on.

        Raises:
            UserError: the session is closed, the file cannot be written, or the note is not JSON.
        """
        self._check_open()
        cache, filled = self.backend.kv_cache, len(self.processed_ids)
        rows = {name: cache.rows(name)[:, :, :filled] for name in cache.names}
        write_session(Path(path), self.manifest, SavedSession(self.token_ids, rows, note))

    def restore(self, path: Path | str) -> Any:
        """Continue where the session was that `save` wrote to `path`, and return its note.

        Everything is checked first: on an error this session is as it was. `token_ids` are the saved ones, and
        `generate(token_ids, keep_length=len(token_ids) - 1)` continues bit by bit as the saved session would.

        Raises:
            UserError: this session is closed, or the file cannot be read or is no saved session.
            BundleError: it was saved with another bundle.
        """
        self._check_open()
        saved = read_session(Path(path), self.manifest)
        try:
            self._loop.restore(saved.token_ids, saved.rows)
        except MtpError as error:
            raise BundleError(f"{path} does not fit this bundle: {error}") from error
        return saved.note

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("the session is closed: open the bundle again")

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


def _open_backend(bundle: Bundle, threads: int, cache_dir: Path | None, provider: Provider) -> Backend:
    """The libraries are imported here, so that reading manifests, traces and reports loads none."""
    if bundle.manifest.export_format == "onnx":
        from mtp_runtime.backends.onnx.backend import OnnxBackend

        return OnnxBackend.open(bundle, threads=threads, cache_dir=cache_dir, provider=provider)
    if provider != "cpu":
        raise UserError(
            f"a {bundle.manifest.export_format} bundle runs on the cpu, not on {provider}: export it with --target onnx"
        )
    from mtp_runtime.backends.litert.backend import LiteRTGraphs
    from mtp_runtime.backends.litert.static import StaticBackend

    return StaticBackend(LiteRTGraphs.open(bundle, threads=threads, cache_dir=cache_dir), bundle.manifest)
