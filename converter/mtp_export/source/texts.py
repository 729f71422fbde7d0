"""What a bundle takes from the target checkpoint as text: the tokenizer, the chat template, and their settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mtp_export.arch.spec import TargetSpec
from mtp_export.source import tokenizer_file, tokenizer_settings
from mtp_export.source.checkpoint import Checkpoint
from mtp_export.source.generation import GenerationDefaults, read_generation
from mtp_export.source.templates import read_template
from mtp_export.source.tokenizer_file import special_tokens

__all__ = [
    "check_texts",
    "file_name",
    "generation",
    "left_aside",
    "notes",
    "read_texts",
    "special_tokens",
    "stop_token_ids",
    "text_sizes",
    "write_texts",
]

# Role in the bundle and file name there.
_FILES = {
    "tokenizer": tokenizer_file.NAME,
    "tokenizer_config": tokenizer_settings.CONFIG,
    "chat_template": "chat_template.jinja",
}
_END_OF_TURN = "<turn|>"


def read_texts(target: Checkpoint, spec: TargetSpec) -> dict[str, str]:
    """Read tokenizer, its config and the chat template, by role; all but the tokenizer may be absent.

    Raises:
        CheckpointError: there is no tokenizer, it does not fit the model, or something is not what it should be.
    """
    return {"tokenizer": tokenizer_file.read_tokenizer(target, spec.vocab_size)} | _optional(target)


def check_texts(target: Checkpoint, spec: TargetSpec) -> None:
    """Check what `read_texts` reads; of a tokenizer that a plan has not downloaded, only that it is there.

    Raises:
        CheckpointError: as `read_texts` does.
    """
    if _tokenizer_text(target) is None:
        _optional(target)
        special_tokens(target)
    else:
        read_texts(target, spec)


def text_sizes(target: Checkpoint) -> dict[str, int]:
    """Return bytes of the texts that `read_texts` gives, by role; the tokenizer is not read.

    Raises:
        CheckpointError: there is no tokenizer, or another text is not what it should be.
    """
    tokenizer_file.check_is_there(target)
    size = (target.folder / tokenizer_file.NAME).stat().st_size
    return {"tokenizer": size} | {role: len(text.encode()) for role, text in _optional(target).items()}


def file_name(role: str) -> str:
    """Name of the file of a text."""
    return _FILES[role]


def generation(target: Checkpoint, spec: TargetSpec) -> GenerationDefaults:
    """Return where generation stops, what is suppressed, and how tokens are drawn, as the checkpoint says.

    Raises:
        CheckpointError: it says what the library does not take.
    """
    return read_generation(target, spec.vocab_size)


def stop_token_ids(target: Checkpoint, spec: TargetSpec) -> tuple[int, ...]:
    """Return where generation stops, as the checkpoint says.

    Raises:
        CheckpointError: it says what the library does not take.
    """
    return generation(target, spec).stop_token_ids


def left_aside(target: Checkpoint, spec: TargetSpec) -> tuple[str, ...]:
    """Return what the files say of text and generation that a bundle does without, in short phrases; `check_texts` or
    `read_texts` comes first.

    Raises:
        CheckpointError: a file is not what it should be.
    """
    text = _tokenizer_text(target)
    cleared = sorted(tokenizer_file.call_settings(text), reverse=True) if text else []
    settings = [f"{' and '.join(cleared)} of {tokenizer_file.NAME}"] if cleared else []
    return (*settings, *read_template(target).left_aside, *generation(target, spec).left_aside)


def notes(target: Checkpoint, spec: TargetSpec) -> tuple[str, ...]:
    """Return what a user had better know of where generation stops; `check_texts` or `read_texts` comes first.

    Raises:
        CheckpointError: a file is not what it should be.
    """
    stops, text = stop_token_ids(target, spec), _tokenizer_text(target)
    if not stops:
        return ("no stop token: generation ends where the caller or the context ends it",)
    if text and _END_OF_TURN in (read_template(target).text or ""):
        end_of_turn = tokenizer_file.token_id(text, _END_OF_TURN)
        if end_of_turn is not None and end_of_turn not in stops:
            return (f"{_END_OF_TURN} ({end_of_turn}), with which the chat template ends a turn, is no stop token",)
    return ()


def _tokenizer_text(target: Checkpoint) -> str | None:
    """The tokenizer.json as it is; None in a plan that has a hole in the place of one that is not downloaded yet."""
    text = tokenizer_file.read_file(target)
    return None if tokenizer_file.is_hole(text) else text


def _optional(target: Checkpoint) -> dict[str, str]:
    """Return all texts but the tokenizer, as far as there are any."""
    texts = {}
    if target.has(tokenizer_settings.CONFIG):
        texts["tokenizer_config"] = target.read_text(tokenizer_settings.CONFIG)
    template = read_template(target).text
    return texts if template is None else texts | {"chat_template": template}


def write_texts(texts: Mapping[str, str], folder: Path) -> dict[str, Path]:
    """Write the texts under their names; returns them by role."""
    paths = {role: folder / _FILES[role] for role in texts}
    for role, path in paths.items():
        path.write_bytes(texts[role].encode())
    return paths
