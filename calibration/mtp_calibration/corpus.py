"""Prompts with their provenance."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import msgspec

from mtp_runtime.errors import UserError


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt, the kind of text it is, and where it comes from under which licence."""

    id: str
    kind: str
    text: str
    source: str = ""
    version: str = ""
    licence: str = ""
    sha256: str = ""


def heldout_prompts() -> list[Prompt]:
    """The prompts of the package: 16 of code and 16 of prose that nano's training never saw."""
    return _parse(resources.files("mtp_calibration").joinpath("prompts/heldout.jsonl").read_text(encoding="utf-8"))


def read_prompts(path: Path) -> list[Prompt]:
    """Read a user's JSONL: an object a line, with `text` and optionally the other fields.

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
    if not prompts:
        raise UserError("the prompts file is empty: give one JSON object with a text per line")
    return prompts


def in_turn(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """The first `limit` prompts of all kinds in turn, so that any number of them has all kinds alike; all for None.

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
