"""The tokenizer.json of a bundle: the one that transformers makes of a checkpoint's files.

What a training script left in it, truncation and padding, is taken out: transformers sets both anew at each call, and
whoever reads the file with the tokenizers library would inherit them. Tokens that only other files name are added, and
GemmaTokenizer builds its own normalizer. Where nothing of that applies the file stays as it is, byte for byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Set
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from mtp_export.errors import CheckpointError
from mtp_export.source.checkpoint import Checkpoint
from mtp_export.source.tokenizer_settings import (
    ADDED_TOKENS,
    CONFIG,
    SPECIAL_TOKENS_MAP,
    TokenizerSettings,
    read_settings,
)

NAME = "tokenizer.json"
_CALL_SETTINGS = ("truncation", "padding")
# How GemmaTokenizer builds its model, but for the unknown token.
_BPE_OPTIONS: Mapping[str, Any] = {
    "dropout": None,
    "unk_token": None,
    "fuse_unk": True,
    "byte_fallback": True,
    "ignore_merges": False,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
}


def read_tokenizer(target: Checkpoint, vocab_size: int) -> str:
    """Return the text of the bundle's tokenizer.json.

    Raises:
        CheckpointError: there is no tokenizer, it is none, or it has an id that the model has no row for.
    """
    settings = read_settings(target)
    original = read_file(target)
    tokenizer = _load(target, original)
    _check_ids(tokenizer, vocab_size, f"{target.folder / NAME}", "take the base model's file, which fits these weights")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    text = without_call_settings(original)
    built = _as_built(target, tokenizer, text, settings, vocab_size)
    return text if built is None else built.to_str(pretty=text.startswith("{\n"))


def read_file(target: Checkpoint) -> str:
    """Return the checkpoint's own tokenizer.json.

    Raises:
        CheckpointError: it is missing, or no text.
    """
    if not os.path.lexists(target.folder / NAME):  # what is there and no file is told as that
        check_is_there(target)
    return target.read_text(NAME)


def is_hole(text: str) -> bool:
    """Return whether a plan has this in the place of a tokenizer.json that is not downloaded yet."""
    return text.startswith("\0")


def check_is_there(target: Checkpoint) -> None:
    """Raises:
    CheckpointError: the checkpoint has no tokenizer.json.
    """
    if target.has(NAME):
        return
    if target.has("tokenizer.model"):
        raise CheckpointError(
            f"{target.folder} has a tokenizer.model and no {NAME}, expected the latter: put the base model's beside it"
        )
    raise CheckpointError(f"{target.folder / NAME} is missing: the target checkpoint is incomplete")


def call_settings(text: str) -> dict[str, Any]:
    """Truncation and padding of a tokenizer.json that has been read before, those that are set."""
    return {key: value for key, value, _, _ in _call_settings(text) if value is not None}


def without_call_settings(text: str) -> str:
    """Return a tokenizer.json without truncation and padding, all else as it is."""
    for _, value, start, stop in reversed(list(_call_settings(text))):
        if value is not None:
            text = f"{text[:start]}null{text[stop:]}"
    return text


def token_id(text: str, token: str) -> int | None:
    """Return the id of a token in a tokenizer.json that has been read before, None if it has none."""
    number: int | None = HFTokenizer.from_str(text).token_to_id(token)
    return number


def special_tokens(target: Checkpoint) -> dict[str, str]:
    """Return the special tokens that a chat template sees, by name: transformers' `tokenizer.special_tokens_map`.
    The tokenizer.json has been read before.

    Raises:
        CheckpointError: a file that names them is not what it should be.
    """
    settings = read_settings(target)
    tokens = {name: str(token) for name, token in settings.named.items()}
    if not settings.states_pad and target.has(NAME):
        text = target.read_text(NAME)
        padding = None if is_hole(text) else call_settings(text).get("padding")
        if isinstance(padding, dict):
            tokens.setdefault("pad_token", padding["pad_token"])
    return tokens


def _call_settings(text: str) -> Iterator[tuple[str, Any, int, int]]:
    left = set(_CALL_SETTINGS)
    for key, value, start, stop in _members(text):
        if key in left:
            yield key, value, start, stop
            left.remove(key)
        if not left:
            return


def _members(text: str) -> Iterator[tuple[str, Any, int, int]]:
    """Yield key, value and the value's place of each member of a JSON object that has been parsed before."""
    decoder, at = json.JSONDecoder(), text.index("{") + 1
    while text[at := _after_space(text, at)] != "}":
        key, at = decoder.raw_decode(text, at)
        start = _after_space(text, text.index(":", at) + 1)
        value, at = decoder.raw_decode(text, start)
        yield key, value, start, at
        at = _after_space(text, at)
        at += text[at] == ","


def _after_space(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


def _load(target: Checkpoint, text: str) -> HFTokenizer:
    try:
        return HFTokenizer.from_str(text)
    except Exception as error:
        # The library raises bare Exception for whatever its parser dislikes; anything else is not ours to hide.
        if type(error) is not Exception:
            raise
        raise CheckpointError(f"{target.folder / NAME} is not a tokenizer ({error}): download it again") from error


def _as_built(
    target: Checkpoint, tokenizer: HFTokenizer, text: str, settings: TokenizerSettings, vocab_size: int
) -> HFTokenizer | None:
    """Return what transformers builds of the `tokenizer` that was loaded from `text`, None if that is all of it."""
    own = tokenizer.get_added_tokens_decoder()
    # GemmaTokenizer takes no added tokens of the file but by such a list.
    added = dict(settings.added) if settings.lists_added or not settings.of_gemma else {**own, **settings.added}
    before = [_parts(tokenizer), _spelled(own)]
    if settings.of_gemma:
        if _spelled(added)[: len(own)] != _spelled(own):
            tokenizer = _load(target, _with_member(text, "added_tokens", "[]"))
        _build_as_gemma(target, tokenizer, settings)
    tokenizer.add_tokens(list(_missing_tokens(tokenizer, settings, added, vocab_size)))
    new = [str(token) for i, token in tokenizer.get_added_tokens_decoder().items() if i >= vocab_size]
    if new:
        remedy = "name a token of the vocabulary there, or take the base model's file"
        _check_ids(tokenizer, vocab_size, f"{_naming(target, new[0])}, beside {NAME}", remedy)
    return tokenizer if [_parts(tokenizer), _spelled(tokenizer.get_added_tokens_decoder())] != before else None


def _spelled(added: Mapping[int, AddedToken]) -> list[tuple[int, str]]:
    return [(i, repr(token)) for i, token in sorted(added.items())]


def _parts(tokenizer: HFTokenizer) -> tuple[Any, ...]:
    """Return all that makes a tokenizer but its tokens and merges."""
    model = tokenizer.model
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
    states = [None if part is None else part.__getstate__() for part in parts]
    return (*states, *(getattr(model, name, None) for name in _BPE_OPTIONS))


def _missing_tokens(
    tokenizer: HFTokenizer, settings: TokenizerSettings, added: Mapping[int, AddedToken], vocab_size: int
) -> Iterator[AddedToken]:
    """What transformers adds to a tokenizer that it has loaded: tokens of a list, then special ones that are not there.

    A token that only a class's defaults name, and for which the model has no row, stays out: nobody writes it.
    """
    names = {str(token) for token in settings.named.values()}
    known = {str(token) for token in tokenizer.get_added_tokens_decoder().values()}
    room = vocab_size - tokenizer.get_vocab_size()
    for _, token in sorted(added.items()):
        room -= _is_new(tokenizer, str(token), known)
        known.add(str(token))
        token.special |= str(token) in names
        yield token
    for name, named in [*settings.named.items(), *(("", token) for token in settings.extra)]:
        text = str(named)
        is_new = _is_new(tokenizer, text, known)
        if text in known or (name in settings.defaults and is_new and room <= 0):
            continue
        room -= is_new
        known.add(text)
        token = AddedToken(named, special=True) if isinstance(named, str) else named
        token.special |= bool(name)
        yield token


def _is_new(tokenizer: HFTokenizer, text: str, known: Set[str]) -> bool:
    return text not in known and tokenizer.token_to_id(text) is None


def _build_as_gemma(target: Checkpoint, tokenizer: HFTokenizer, settings: TokenizerSettings) -> None:
    """Give a tokenizer what GemmaTokenizer builds whatever the file says (tokenization_gemma.py)."""
    model = tokenizer.model
    if not isinstance(model, models.BPE):
        raise CheckpointError(
            f"{target.folder / CONFIG}: tokenizer_class is GemmaTokenizer, which is BPE, and {NAME} has a "
            f"{type(model).__name__}: write TokenizersBackend there, or take the base model's {NAME}"
        )
    for name, value in {**_BPE_OPTIONS, "unk_token": str(settings.named.get("unk_token"))}.items():
        setattr(model, name, value)
    tokenizer.model = model
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _with_member(text: str, key: str, value: str) -> str:
    for name, _, start, stop in _members(text):
        if name == key:
            return text[:start] + value + text[stop:]
    return text


def _check_ids(tokenizer: HFTokenizer, vocab_size: int, where: str, remedy: str) -> None:
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= vocab_size}
    if beyond:
        token = min(beyond, key=lambda token: beyond[token])
        raise CheckpointError(
            f"{where}: token {token!r} has the id {beyond[token]}, and the model has rows for ids below vocab_size = "
            f"{vocab_size}: {remedy}"
        )


def _naming(target: Checkpoint, token: str) -> str:
    """Return the file that names a token which tokenizer.json has not."""
    spelled = json.dumps(token, ensure_ascii=False)
    names = (ADDED_TOKENS, SPECIAL_TOKENS_MAP, CONFIG)
    name = next((n for n in names if target.has(n) and spelled in target.read_text(n)), CONFIG)
    return str(target.folder / name)
