"""What a user asks of an export."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from mtp_runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The options of `mtp-export export`; None stands for the model's default.

    target and drafter: local folders or Hugging Face ids. drafter_position_offset: 1 for transformers' position
    convention, 0 for vLLM's; it changes acceptance only.
    """

    model: str
    export_format: str
    target: str | None
    drafter: str | None
    recipe: str
    drafter_recipe: str | None
    cache_length: int | None
    num_draft_tokens: int
    drafter_position_offset: int
    output: Path
    force: bool
    workers: int


def one_of(name: str, value: str, allowed: Collection[str]) -> None:
    """Check that an option has one of its values.

    Raises:
        UserError: it has not.
    """
    if value not in allowed:
        raise UserError(f"{name} is {value!r}, expected one of: {', '.join(sorted(allowed))}")


def in_range(name: str, value: int, low: int, high: int) -> None:
    """Check that a number lies within low…high.

    Raises:
        UserError: it does not.
    """
    if not low <= value <= high:
        raise UserError(f"{name} is {value}, expected {low} to {high}")
