"""Text to token ids and back, and text that grows token by token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer

from mtp_runtime.errors import BundleError, UserError

_REPLACEMENT = "\ufffd"


class Tokenizer:
    """The bundle's tokenizer; every prompt begins with its beginning-of-sequence token."""

    def __init__(self, tokenizer: HFTokenizer, bos_token_id: int) -> None:
        """Take a loaded tokenizer; use `open`."""
        self._tokenizer = tokenizer
        self._bos_token_id = bos_token_id

    @classmethod
    def open(cls, path: Path, bos_token_id: int) -> Tokenizer:
        """Load a `tokenizer.json`.

        Raises:
            BundleError: it cannot be read or is no such file.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"cannot read the tokenizer {path}: {error}") from error
        return cls.parse(text, bos_token_id, str(path))

    @classmethod
    def parse(cls, text: str, bos_token_id: int, where: str) -> Tokenizer:
        """Read the text of a `tokenizer.json`; `where` names it in errors.

        Raises:
            BundleError: it is no such file's.
        """
        try:
            return cls(HFTokenizer.from_str(text), bos_token_id)
        except Exception as error:
            # The library raises bare Exception for whatever its parser dislikes; anything else is not ours to hide.
            if type(error) is not Exception:
                raise
            raise BundleError(f"{where} is not a tokenizer ({error}): export the bundle again") from error

    @property
    def bos_token(self) -> str:
        """The beginning-of-sequence token as text, as a chat template writes it; empty if the tokenizer has none."""
        return self._tokenizer.id_to_token(self._bos_token_id) or ""

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Return the token ids of `text`, the beginning-of-sequence token first, without `bos` only if the text has it;
        special tokens are recognised.

        Raises:
            UserError: the text is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt is not valid Unicode ({error.reason}): give UTF-8 text") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids if not bos or ids[:1] == [self._bos_token_id] else [self._bos_token_id, *ids]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """Return a fresh stream for the tokens of one generation."""
        return TextStream(self, skip_special_tokens=skip_special_tokens)


class TextStream:
    """Turns tokens into text as they come: the pieces joined are the text of all tokens at once.

    Text is held back while it ends in a character that is not complete (byte-fallback tokens spell one character in
    up to four tokens). Only the last few tokens are decoded again, so the cost per token does not grow.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        """Start with no tokens."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        # Tokens before `_start` are gone for good; those from `_start` to `_shown` are context, already shown.
        self._start = 0
        self._shown = 0

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that it completes, possibly none."""
        self._ids.append(token_id)
        return self._advance(final=False)

    def finish(self) -> str:
        """Return what is still held back, incomplete characters as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._text(self._ids[self._start : self._shown])
        after = self._text(self._ids[self._start :])
        if len(after) <= len(before) or (after.endswith(_REPLACEMENT) and not final):
            return ""
        # A word's first token may lose its leading space when decoded alone, so the last piece stays as context.
        self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
