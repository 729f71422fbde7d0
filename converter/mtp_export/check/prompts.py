"""The prompts that bundles are measured on, with their provenance.

Two sets come with the package. `heldout_prompts` are texts by others, which nano's training never saw.
`calibration_prompts` were written for this project in four kinds: prose, code, rewriting, and structured output with
JSON and tool calls. A part of every set is kept apart by the hash of each text: settings are chosen on
`for_tuning`, and their effect is measured on `held_out`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import msgspec

from mtp_runtime import Session
from mtp_runtime.errors import UserError

Expectation = Literal["", "json", "tool_call"]  # of a prompt's answer: nothing, or a form that it should have

KINDS = ("prose", "code", "rewriting", "structured")
_HELD_OUT_DIGITS = "01234"  # of 16 first digits of a hash


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt, the kind of text it is, and where it comes from under which licence.

    Either `text`, or `messages` with `tools` for the bundle's chat template. `expects` says what its answer should be,
    and `opened` which part of that the text has written already. `sha256` is that of the text, or of the messages as
    JSON.
    """

    id: str
    kind: str
    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    expects: Expectation = ""
    opened: str = ""
    source: str = ""
    version: str = ""
    licence: str = ""
    sha256: str = ""

    @property
    def content(self) -> str:
        """Return the text that the hash is of."""
        return self.text or msgspec.json.encode(self.messages).decode()

    @property
    def is_held_out(self) -> bool:
        """Return whether it is in the part that no setting is chosen on."""
        return hashlib.sha256(self.content.encode()).hexdigest()[0] in _HELD_OUT_DIGITS


def heldout_prompts() -> list[Prompt]:
    """Return the prompts of the package: 16 of code and 16 of prose that nano's training never saw."""
    return _packaged("heldout.jsonl")


def calibration_prompts() -> list[Prompt]:
    """Eight prompts of each kind, written for this project and free for any use (CC0)."""
    return _packaged("calibration.jsonl")


def _packaged(name: str) -> list[Prompt]:
    return _parse(resources.files(__package__).joinpath(f"prompt_sets/{name}").read_text(encoding="utf-8"))


def read_prompts(path: Path) -> list[Prompt]:
    """Read a user's JSONL: an object a line, with `text` or `messages` and optionally the other fields.

    Raises:
        UserError: it cannot be read, or a line is no prompt.
    """
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path}: {error}") from error


def _parse(text: str) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                fields = {"id": f"line-{number}", "kind": "any"} | msgspec.json.decode(line, type=dict)
                prompts.append(msgspec.convert(fields, Prompt))
            except msgspec.DecodeError as error:
                raise UserError(f"prompts, line {number}: {error}") from error
            if bool(prompts[-1].text) == bool(prompts[-1].messages):
                raise UserError(f"prompts, line {number}: got text and messages, or none: give one of them")
    if not prompts:
        raise UserError("the prompts file is empty: give one JSON object with a text per line")
    return prompts


def in_turn(prompts: Sequence[Prompt], limit: int | None = None) -> list[Prompt]:
    """Return the first `limit` prompts of all kinds in turn, so that every kind is as frequent; all for None.

    Raises:
        UserError: the limit is below 1.
    """
    if limit is None:
        return list(prompts)
    if limit < 1:
        raise UserError(f"--limit is {limit}: give 1 or more")
    seen: dict[str, int] = {}
    ranked = []
    for prompt in prompts:
        seen[prompt.kind] = seen.get(prompt.kind, 0) + 1
        ranked.append((seen[prompt.kind], prompt))
    return [prompt for _, prompt in sorted(ranked, key=lambda item: item[0])][:limit]


def of_kind(prompts: Sequence[Prompt], kind: str) -> list[Prompt]:
    return [prompt for prompt in prompts if prompt.kind == kind]


def for_tuning(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the part of a set on which settings may be chosen."""
    return [prompt for prompt in prompts if not prompt.is_held_out]


def held_out(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the part of a set that is kept for measuring."""
    return [prompt for prompt in prompts if prompt.is_held_out]


def text_of(session: Session, prompt: Prompt) -> str:
    """Return the text of a prompt, its messages put into the bundle's chat template.

    Raises:
        BundleError: the bundle has no chat template, or it does not work.
        UserError: the template refuses the messages.
    """
    if not prompt.messages:
        return prompt.text
    return session.chat_prompt(prompt.messages, tools=list(prompt.tools) or None)
