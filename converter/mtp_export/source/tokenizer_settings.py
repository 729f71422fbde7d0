"""What a checkpoint's files say of its tokenizer besides tokenizer.json: its class and its special tokens.

They are read in transformers' order (5.22.2, tokenization_utils_base.py, `_from_pretrained` and `__init__`): keys of
tokenizer_config.json; where it has no added_tokens_decoder, special_tokens_map.json over them, and added_tokens.json;
then what the class takes where nothing is said.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken

from mtp_export.arch.json_object import shortened
from mtp_export.errors import CheckpointError
from mtp_export.source.checkpoint import Checkpoint

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"

_STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OF_GEMMA = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_GEMMA_CLASS = "GemmaTokenizer"
# Classes that take tokenizer.json as it is. transformers gives the first one where none is named.
_PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizer", "PythonBackend")

_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_SPECIFIC = "model_specific_special_tokens"
_VERSIONED_FILES = "fast_tokenizer_files"
_VERSIONED = re.compile(r"tokenizer\.(.*)\.json")
_LIBRARY_VERSION = (5, 22, 2)  # of transformers
_MOST_LEVELS = 100  # of objects and lists in each other: more than any tool writes, and less than recursion takes
_MOST_DIGITS = 9  # of a token id

Token = str | AddedToken


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """`named` are the special tokens by name, `extra` those without one, `added` tokens by the id that a file gives
    them; `defaults` are the names that only the class gives. `of_gemma`: the class builds its own normalizer."""

    of_gemma: bool
    named: Mapping[str, Token]
    defaults: frozenset[str]
    extra: tuple[Token, ...]
    added: Mapping[int, AddedToken]
    lists_added: bool
    states_pad: bool


def read_settings(target: Checkpoint) -> TokenizerSettings:
    """Read what the target's files say of its tokenizer; each of them may be absent.

    Raises:
        CheckpointError: a file is not what it should be, or names a class that is not supported.
    """
    keys = read_object(target, CONFIG)
    _check_kinds(target, CONFIG, keys, _EXTRA[:1] if keys.get(_EXTRA[0]) else _EXTRA)
    _check_versioned_files(target, keys)
    of_gemma = _class_name(target, keys) == _GEMMA_CLASS
    _name_model_specific(keys)
    lists_added = "added_tokens_decoder" in keys
    if lists_added:
        added = _listed(target, keys["added_tokens_decoder"])
    else:
        _take_special_tokens_map(target, keys)
        added = _legacy_added(target, keys)
    keys = {key: _converted(target, key, value) for key, value in keys.items() if key != "added_tokens_decoder"}
    _check_kinds(target, CONFIG, keys, _taken(keys))
    defaults = {key: token for key, token in _OF_GEMMA.items() if of_gemma and key not in keys}
    standard = keys | defaults
    named = {key: standard[key] for key in _STANDARD if standard.get(key) is not None}
    extra = keys.get(_EXTRA[0], keys.get(_EXTRA[1])) or []
    specific = {**extra} if isinstance(extra, dict) else {}
    specific |= {
        key: value
        for key, value in keys.items()
        if key not in _STANDARD and key.endswith("_token") and isinstance(value, Token)
    }
    specific |= keys.get(_SPECIFIC) or {}
    for name, value in (named | specific).items():
        if not isinstance(value, Token):
            raise CheckpointError(
                f"{target.folder / CONFIG}: {name} is {shortened(value)}, expected a token as text: "
                "take the base model's file"
            )
    return TokenizerSettings(
        of_gemma=of_gemma,
        named=named | specific,
        defaults=frozenset(defaults) - specific.keys(),
        extra=() if isinstance(extra, dict) else _unnamed(target, extra),
        added=added,
        lists_added=lists_added,
        states_pad=of_gemma or "pad_token" in keys,
    )


def read_object(target: Checkpoint, name: str) -> dict[str, Any]:
    """Return a JSON file of the folder that must be an object; an empty one where there is no such file.

    Raises:
        CheckpointError: it is none, is nested too deep, or some text in it is not Unicode.
    """
    if not target.has(name):
        return {}
    value = target.read_json(name)
    if not isinstance(value, dict):
        path = target.folder / name
        raise CheckpointError(f"{path}: expected an object, got {type(value).__name__}: download it again")
    _check_values(target, name, value)
    return value


def _check_values(target: Checkpoint, name: str, value: Any, key: str = "", level: int = 0) -> None:
    """JSON can spell half a surrogate pair, which no other text can, and nest deeper than functions call each other."""
    if level > _MOST_LEVELS:
        raise CheckpointError(
            f"{target.folder / name}: {ascii(key)[1:-1]} holds lists or objects more than {_MOST_LEVELS} deep, "
            "expected fewer: download it again"
        )
    if isinstance(value, dict):
        for inner_key, inner in value.items():
            _check_values(target, name, inner_key, key or inner_key, level + 1)
            _check_values(target, name, inner, key or inner_key, level + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_values(target, name, inner, key, level + 1)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(
                f"{target.folder / name}: {ascii(key)[1:-1]} is not Unicode ({error.reason}): download it again"
            ) from error


def _taken(keys: Mapping[str, Any]) -> Sequence[str]:
    """Return the one of the two keys of extra tokens that the library takes."""
    return _EXTRA[:1] if _EXTRA[0] in keys else _EXTRA


def _check_kinds(target: Checkpoint, name: str, keys: Mapping[str, Any], extra: Sequence[str]) -> None:
    for key, kinds, expected in (
        *((key, (list, dict), "a list of tokens, or a map from names to tokens") for key in extra),
        (_SPECIFIC, (dict,), "a map from names to tokens"),
    ):
        value = keys.get(key)
        if value is not None and not isinstance(value, kinds):
            raise CheckpointError(
                f"{target.folder / name}: {key} is {shortened(value)}, expected {expected}: take the base model's file"
            )


def _check_versioned_files(target: Checkpoint, keys: Mapping[str, Any]) -> None:
    """Refuse a list of tokenizers for versions of transformers, of which it takes another than tokenizer.json: it goes
    through the versions as texts, sorted, up to the first one that is later than its own (`get_fast_tokenizer_file`).
    """
    names = keys.get(_VERSIONED_FILES)
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    versioned = {match[1]: name for name in names if (match := _VERSIONED.search(name))}
    taken = None
    for version in sorted(versioned):
        numbers = [int(number) for number in version.split(".") if number.isdecimal() and len(number) < 6]
        if tuple(numbers) > _LIBRARY_VERSION:
            break
        taken = versioned[version]
    if taken is not None:
        raise CheckpointError(
            f"{target.folder / CONFIG}: {_VERSIONED_FILES} names {taken!r}, which transformers takes in place of "
            f"tokenizer.json: give that file the name tokenizer.json, and remove {_VERSIONED_FILES}"
        )


def _class_name(target: Checkpoint, keys: Mapping[str, Any]) -> str:
    stated = keys.get("tokenizer_class") or target.config.get("tokenizer_class") or _PLAIN_CLASSES[0]
    name = stated.removesuffix("Fast") if isinstance(stated, str) else ""
    if name not in (_GEMMA_CLASS, *_PLAIN_CLASSES):
        raise CheckpointError(
            f"{target.folder / CONFIG}: tokenizer_class is {shortened(stated)}, expected {_GEMMA_CLASS} or "
            f"{_PLAIN_CLASSES[0]}: if tokenizer.json says all of the tokenizer, write {_PLAIN_CLASSES[0]} there"
        )
    return name


def _name_model_specific(keys: dict[str, Any]) -> None:
    """Gather tokens with names of the model's own, as image_token, under one key."""
    if "additional_special_tokens" in keys and not keys.get("extra_special_tokens"):
        keys["extra_special_tokens"] = keys.pop("additional_special_tokens")
    names = [k for k, v in keys.items() if k not in _STANDARD and k.endswith("_token") and isinstance(v, str)]
    specific = {name: keys.pop(name) for name in names}
    if isinstance(keys.get("extra_special_tokens"), dict):
        specific |= keys.pop("extra_special_tokens")
    if specific:
        keys[_SPECIFIC] = specific


def _take_special_tokens_map(target: Checkpoint, keys: dict[str, Any]) -> None:
    """Write what special_tokens_map.json says over `keys`."""
    for key, value in read_object(target, SPECIAL_TOKENS_MAP).items():
        if key == "extra_special_tokens" and isinstance(value, list):
            tokens = [_special(target, token) if isinstance(token, dict) else token for token in value]
            known = list(keys.get("extra_special_tokens") or [])
            keys[key] = known + [token for token in tokens if token not in known]
        elif key != "extra_special_tokens" and isinstance(value, dict):
            keys[key] = _special(target, value)
        else:
            keys[key] = value
    _check_kinds(target, SPECIAL_TOKENS_MAP, keys, _taken(keys))
    if isinstance(keys.get("extra_special_tokens"), dict):
        keys[_SPECIFIC] = {**(keys.get(_SPECIFIC) or {}), **keys.pop("extra_special_tokens")}


def _special(target: Checkpoint, value: Mapping[str, Any]) -> AddedToken:
    return _added_token(target, SPECIAL_TOKENS_MAP, {**value, "special": True})


def _listed(target: Checkpoint, value: Any) -> dict[int, AddedToken]:
    """Return the added_tokens_decoder of tokenizer_config.json."""
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{target.folder / CONFIG}: added_tokens_decoder is no map from ids to tokens: take the base model's file"
        )
    for key, token in value.items():
        if not (key.isdecimal() and len(key) <= _MOST_DIGITS and isinstance(token, dict)):
            raise CheckpointError(
                f"{target.folder / CONFIG}: added_tokens_decoder is no map from ids to tokens: it has {shortened(key)} "
                f"with a {type(token).__name__}, expected an id with an object: take the base model's file"
            )
    return {int(key): _added_token(target, CONFIG, token) for key, token in value.items()}


def _legacy_added(target: Checkpoint, keys: Mapping[str, Any]) -> dict[int, AddedToken]:
    stated = read_object(target, ADDED_TOKENS)
    if not all(type(value) is int for value in stated.values()):
        raise CheckpointError(
            f"{target.folder / ADDED_TOKENS} is not a map from tokens to ids: take the base model's file"
        )
    special = {str(keys[name]) for name in _STANDARD if keys.get(name)}
    special |= {str(token) for token in keys.get("extra_special_tokens") or ()}
    return {
        value: AddedToken(text, normalized=text not in special, special=text in special)
        for text, value in stated.items()
    }


def _converted(target: Checkpoint, key: str, value: Any) -> Any:
    """Turn what was saved as an AddedToken into one, however deep it lies."""
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        return _added_token(target, CONFIG, {k: v for k, v in value.items() if k != "__type"})
    if isinstance(value, dict):
        return {inner: _converted(target, key, v) for inner, v in value.items()}
    return [_converted(target, key, v) for v in value] if isinstance(value, list) else value


def _added_token(target: Checkpoint, name: str, fields: Mapping[str, Any]) -> AddedToken:
    try:
        return AddedToken(**fields)
    except TypeError as error:
        raise CheckpointError(
            f"{target.folder / name}: {shortened(dict(fields))} is not a token ({error}): take the base model's file"
        ) from error


def _unnamed(target: Checkpoint, tokens: Any) -> tuple[Token, ...]:
    if not isinstance(tokens, list) or not all(isinstance(token, Token) for token in tokens):
        raise CheckpointError(
            f"{target.folder / CONFIG}: extra_special_tokens is {shortened(tokens)}, expected a list of tokens as "
            "text: take the base model's file"
        )
    return tuple(tokens)
