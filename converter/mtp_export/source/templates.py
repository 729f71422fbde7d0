"""The chat template of a checkpoint, found wherever transformers finds it.

In the order of transformers 5.22.2: chat_template.jinja and additional_chat_templates/*.jinja; without any of them the
key of tokenizer_config.json, a text or a list of named templates. Where the tokenizer has none, that of the processor:
a key of processor_config.json, or chat_template.json. Of several templates `tool_use` is the one for conversations
with tools, and `default` the one for all others; both become one text.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_export.errors import CheckpointError
from mtp_export.source.checkpoint import Checkpoint
from mtp_export.source.files import TextFile
from mtp_export.source.tokenizer_settings import CONFIG, read_object
from mtp_runtime.bundle.contract import ChatTemplateOrigin

NAME = "chat_template.jinja"
FOLDER = "additional_chat_templates"
_OF_PROCESSOR = ("processor_config.json", "chat_template.json")
_KEY = "chat_template"
_DEFAULT, _TOOLS = "default", "tool_use"
_MAX_BYTES = 1 << 20
# Google's templates by SHA-256: whose, and the day of their publication.
_PUBLISHED = {
    "3beb16a140a78c7bf71cd86609f58e56f1594e670e95fe58bd6022f941d1cb1e": (
        "google/gemma-4-E2B-it, google/gemma-4-E4B-it",
        "2026-07-09",
    ),
    "df269903ea2e27a6426bf65f34f530a571cc04bf9b92ad8928ffa909eb46ecc5": (
        "google/gemma-4-31B-it, google/gemma-4-26B-A4B-it",
        "2026-07-09",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """One text for all conversations, None where there is none; `left_aside` says which templates are not in it, and
    `source` where it was."""

    text: str | None
    left_aside: tuple[str, ...]
    source: str = ""

    def origin(self) -> ChatTemplateOrigin | None:
        """Return where the template of a bundle comes from, None without one."""
        if self.text is None:
            return None
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        of, published = _PUBLISHED.get(digest, ("", ""))
        return ChatTemplateOrigin(source=self.source, sha256=digest, of=of, published=published)


def read_template(target: Checkpoint) -> ChatTemplate:
    """Find the chat template of a checkpoint.

    Raises:
        CheckpointError: a file that holds it is not what it should be.
    """
    if target.chat_template is not None:
        path = target.chat_template
        return ChatTemplate(text=_read_option(path), left_aside=(), source=f"--chat-template {path.name}")
    named, source = _of_files(target), NAME
    if not named:
        named, source = _of_key(target, CONFIG), CONFIG
    left_aside = []
    for name in _OF_PROCESSOR:
        try:
            templates = _of_key(target, name)
        except CheckpointError:
            if not named:
                raise
            left_aside.append(f"{name}, in which no chat template can be read")
            continue
        if not named:
            named, source = templates, name
        elif templates and templates.get(_DEFAULT) != named.get(_DEFAULT):
            left_aside.append(f"the chat template of {name}")
    left_aside += [f"the chat template named {name!r}" for name in named if name not in (_DEFAULT, _TOOLS)]
    return ChatTemplate(text=joined(named), left_aside=tuple(left_aside), source=source)


def _read_option(path: Path) -> str:
    """Return the text of a file that a user names in place of the checkpoint's templates.

    Raises:
        CheckpointError: it cannot be read, is empty or no text, or its name is not Unicode.
    """
    if not _is_unicode(path.name):  # the bundle's manifest, which is JSON, names it
        raise CheckpointError(f"--chat-template: the name of the file {path.name!a} is not Unicode: rename it")
    file = TextFile(
        path=path, max_bytes=_MAX_BYTES, kind="template", missing="give an existing file", prefix="--chat-template: "
    )
    text = file.read()
    if not text.strip():
        raise CheckpointError(f"--chat-template: {path} is empty")
    return text


def _of_files(target: Checkpoint) -> dict[str, str]:
    named = {_DEFAULT: target.read_text(NAME)} if target.has(NAME) else {}
    for path in sorted((target.folder / FOLDER).glob("*.jinja")):
        if not _is_unicode(path.name):
            raise CheckpointError(
                f"{target.folder / FOLDER}: the name of the file {path.name!a} is not Unicode: rename or remove it"
            )
        named[path.name.removesuffix(".jinja")] = target.read_text(f"{FOLDER}/{path.name}")
    return named


def _is_unicode(name: str) -> bool:
    """Return whether a file name is UTF-8; other bytes come as halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _of_key(target: Checkpoint, name: str) -> dict[str, str]:
    """Templates by name, of a JSON file that may have a key for them."""
    value = read_object(target, name).get(_KEY)
    if value is None:
        return {}
    if isinstance(value, str):
        return {_DEFAULT: value}
    named = _by_name(value)
    if named is None or not all(isinstance(text, str) for text in named.values()):
        raise CheckpointError(
            f"{target.folder / name}: {_KEY} is a {type(value).__name__}, expected a text, or a list of "
            '{"name": …, "template": …}: take the base model\'s file'
        )
    return named


def _by_name(value: Any) -> dict[str, Any] | None:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list) and all(isinstance(v, dict) and isinstance(v.get("name"), str) for v in value):
        return {template["name"]: template.get("template") for template in value}
    return None


def joined(named: Mapping[str, str]) -> str | None:
    """Return one text that renders as the template that the library takes of several, None where it takes none."""
    default, tools = named.get(_DEFAULT), named.get(_TOOLS)
    if tools is None:
        return default
    if default is None:
        default = "{{ raise_exception('the template is for conversations with tools') }}"
    # The newline after a block is dropped, as jinja2 does with `trim_blocks`, and what follows begins a line, as it
    # does in a file of its own. Behind the empty text the last line is as it was.
    condition = "tools is defined and tools is not none"
    return f"{{% if {condition} %}}\n{_inner(tools)}{{% else %}}\n{_inner(default)}{{% endif %}}"


def _inner(template: str) -> str:
    """Return a template as part of another: a file's last newline is no part of what it renders."""
    for newline in ("\r\n", "\n", "\r"):
        if template.endswith(newline):
            return template.removesuffix(newline) + "{{ '' }}"
    return template + "{{ '' }}"
