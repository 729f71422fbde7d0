"""Session: an opened bundle that generates. The runtime's front door."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

from mtp_runtime.backends.opening import check_threads, open_backend
from mtp_runtime.bundle.bundle import Bundle
from mtp_runtime.bundle.contract import Manifest
from mtp_runtime.errors import BundleError, MtpError, UserError
from mtp_runtime.generate.backend import Backend, Provider
from mtp_runtime.generate.generation import Generation
from mtp_runtime.generate.loop import GenerationLoop, Request
from mtp_runtime.generate.options import GenerationOptions, OptionChanges, with_changes
from mtp_runtime.generate.sampling import Method, Sampling
from mtp_runtime.generate.saved_session import SavedSession, read_session, write_session
from mtp_runtime.text.stop_strings import StoppingText, check_stop_strings
from mtp_runtime.text.tokenizer import TextStream, Tokenizer


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
        context_length: int | None = None,
    ) -> Session:
        """Open the bundle at `path`, a folder or a `.litertlm`, with `threads` CPU threads.

        `verify` compares every file with its SHA-256. Packed weights are kept in `cache_dir`, by default
        `~/.cache/mtp-export/packed`: they make the second start fast and are in memory once.
        `provider` is where the graphs of an ONNX bundle run: "webgpu" is a GPU, and takes `mtp-export[webgpu]`.
        `context_length` is how many tokens prompt and output may have together, from K + 2 up to the bundle's
        `longest_context_length`; it decides how much memory the caches take. Where a bundle's context is not chosen
        (ONNX, a bundle for a GPU), it has only its own.

        Raises:
            UserError: the provider is not there, or not for this bundle, or the bundle cannot have such a context.
            BundleError: the bundle is missing, damaged, of another kind or of a newer version.
            BackendError: the inference library refuses its graphs.
        """
        check_threads(threads)
        with contextlib.ExitStack() as opened:
            bundle = opened.enter_context(Bundle.open(path, verify=verify, context_length=context_length))
            backend = open_backend(bundle, threads, None if cache_dir is None else Path(cache_dir), provider)
            opened.callback(backend.close)
            session = cls(bundle, backend)
            opened.pop_all()
        return session

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest, for the context that was chosen."""
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

        `options` are `tools`, `add_generation_prompt` and other names that the template reads, such as enable_thinking;
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
        """Return the text that each token adds, one piece per token; joined they are the text of all."""
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
        options: GenerationOptions | None = None,
        **changes: Unpack[OptionChanges],
    ) -> Generation:
        """Return the continuation of `prompt` as an iterator of committed tokens.

        `changes` are fields of `GenerationOptions`, and stand in for those of `options`:

            session.generate("def add(a, b):", max_new_tokens=64, stop="\\n\\n")

        Tokens that the checkpoint suppresses are never chosen.

        Raises:
            UserError: the session is closed, or a stop text is empty; at the first token, the request contradicts the
                bundle or itself.
            ContextFullError: at the first token, the prompt leaves no room for a token.
        """
        self._check_open()
        chosen = with_changes(options, changes)
        manifest, depth = self.manifest, chosen.num_draft_tokens
        stop_token_ids = manifest.stop_token_ids if chosen.stop_token_ids is None else chosen.stop_token_ids
        request = Request(
            prompt_ids=tuple(self.tokenize(prompt) if isinstance(prompt, str) else prompt),
            max_new_tokens=chosen.max_new_tokens,
            num_draft_tokens=manifest.num_draft_tokens if depth is None or depth == "auto" else depth,
            adaptive=depth == "auto",
            stop_token_ids=frozenset(stop_token_ids),
            keep_length=chosen.keep_length,
            with_margins=chosen.with_margins,
            sampling=self.checkpoint_sampling() if chosen.sampling == "checkpoint" else chosen.sampling,
            constraint=chosen.constraint,
        )
        stops = check_stop_strings(chosen.stop)
        return Generation(
            self._loop,
            manifest,
            request,
            lambda: StoppingText(self.tokenizer.stream(), stops),
            stops=bool(stops),
        )

    def checkpoint_sampling(self, *, seed: int = 0, method: Method = "match") -> Sampling:
        """Return the sampling of the checkpoint's generation_config.json; without do_sample it is greedy.

        Raises:
            UserError: the bundle has no sampling of its checkpoint.
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
        """The tokens whose rows are in the cache: a prompt that begins with n of them may have keep_length n, if n is
        `keepable`."""
        return self._loop.processed_ids

    def keepable(self, count: int) -> int:
        """Return how many of the first `count` processed tokens a prompt may keep: all of them, or none where rows of
        sliding layers are lost, as they are far behind in caches that are rings."""
        return self.backend.kv_cache.keepable(count)

    def save(self, path: Path | str, *, note: Any = None) -> None:
        """Write the filled rows of the cache, `token_ids` and a `note` (JSON) to one file, for `restore`.

        A generation under way is saved as it would be if it ended here, and goes on.

        Raises:
            UserError: the session is closed, the file cannot be written, or the note is not JSON.
        """
        self._check_open()
        cache, filled = self.backend.kv_cache, len(self.processed_ids)
        rows = {name: cache.rows(name, filled) for name in cache.names}
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
        """Release the graphs and remove unpacked files; closing twice is harmless."""
        self._closed = True
        self._loop.abandon()
        self.backend.close()
        self.bundle.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
