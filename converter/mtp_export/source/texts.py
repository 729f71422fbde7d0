"""What a bundle takes from the target checkpoint as text: the tokenizer, the chat template, where to stop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mtp_export.arch.gemma4 import token_ids
from mtp_export.arch.spec import TargetSpec
from mtp_export.errors import CheckpointError
from mtp_export.source.checkpoint import Checkpoint
from mtp_runtime.errors import BundleError
from mtp_runtime.tokenizer import Tokenizer

# Role in the bundle and file name, here as there.
_FILES = {
    "tokenizer": "tokenizer.json",
    "tokenizer_config": "tokenizer_config.json",
    "chat_template": "chat_template.jinja",
}
_GENERATION_CONFIG = "generation_config.json"


def read_texts(target: Checkpoint, spec: TargetSpec) -> dict[str, str]:
    """Read tokenizer, its config and the chat template, by role; all but the tokenizer may be absent.

    Raises:
        CheckpointError: there is no tokenizer, or something is not what it should be.
    """
    texts = {"tokenizer": target.read_text(_FILES["tokenizer"])}
    try:
        Tokenizer.open(target.folder / _FILES["tokenizer"], spec.bos_token_id)
    except BundleError as error:
        path = target.folder / _FILES["tokenizer"]
        raise CheckpointError(f"{path} is not a tokenizer ({error.__cause__}): download it again") from error
    return texts | _optional(target)


def text_sizes(target: Checkpoint) -> dict[str, int]:
    """Bytes of the texts that `read_texts` gives, by role; the tokenizer is not read.

    Raises:
        CheckpointError: there is no tokenizer, or another text is not what it should be.
    """
    path = target.folder / _FILES["tokenizer"]
    if not target.has(path.name):
        raise CheckpointError(f"{path} is missing: the target checkpoint is incomplete")
    return {"tokenizer": path.stat().st_size} | {role: len(t.encode()) for role, t in _optional(target).items()}


def file_name(role: str) -> str:
    """Name of the file of a text."""
    return _FILES[role]


def _optional(target: Checkpoint) -> dict[str, str]:
    """All texts but the tokenizer, as far as there are any."""
    names = {role: name for role, name in _FILES.items() if role != "tokenizer" and target.has(name)}
    texts = {role: target.read_text(name) for role, name in names.items()}
    if "chat_template" not in texts and "tokenizer_config" in texts:
        texts |= _template_of_old(target)
    return texts


def _template_of_old(target: Checkpoint) -> dict[str, str]:
    """Before chat_template.jinja existed, the template was a key of the tokenizer's config."""
    config = target.read_json(_FILES["tokenizer_config"])
    template = config.get("chat_template") if isinstance(config, dict) else None
    if not isinstance(template, str):
        return {}
    try:
        template.encode()
    except UnicodeEncodeError as error:
        path = target.folder / _FILES["tokenizer_config"]
        raise CheckpointError(f"{path}: chat_template is not Unicode ({error.reason}): download it again") from error
    return {"chat_template": template}


def write_texts(texts: Mapping[str, str], folder: Path) -> dict[str, Path]:
    """Write the texts under their names, byte for byte as they were read; returns them by role."""
    paths = {role: folder / _FILES[role] for role in texts}
    for role, path in paths.items():
        path.write_bytes(texts[role].encode())
    return paths


def stop_token_ids(target: Checkpoint, spec: TargetSpec) -> tuple[int, ...]:
    """Where generation stops: generation_config.json knows better than config.json.

    Raises:
        CheckpointError: it says what is no token id.
    """
    if not target.has(_GENERATION_CONFIG):
        return spec.eos_token_ids
    path, generation = target.folder / _GENERATION_CONFIG, target.read_json(_GENERATION_CONFIG)
    if not isinstance(generation, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(generation).__name__}: download it again")
    if generation.get("eos_token_id") is None:
        return spec.eos_token_ids
    return token_ids(generation["eos_token_id"], spec.vocab_size, f"{path}: eos_token_id")
