"""The golden files: prompts, traces of nano, and cases of the near-tie rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from mtp_runtime.generate.acceptance import Origin
from mtp_runtime.generate.trace import FinishReason
from mtp_runtime.measure.parity import Comparison

FOLDER = Path(__file__).parent
PROMPTS = FOLDER / "prompts.jsonl"
TRACES = FOLDER / "traces.jsonl"
CASES = FOLDER / "parity_cases.jsonl"
LOG = FOLDER / "runtime_log.jsonl"
CHATS = FOLDER / "chats.jsonl"
RECIPES = ("int8", "int4")
MAX_NEW_TOKENS = 24


class GoldenTrace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A GenerationTrace without what changes from run to run, and with the text that each token adds."""

    prompt: str
    recipe: str
    num_draft_tokens: int
    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    origins: tuple[Origin, ...]
    margins: tuple[float, ...]
    pieces: tuple[str, ...]
    finish_reason: FinishReason


class GoldenTurn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an app hands to LiteRT-LM's Conversation, and what it gets."""

    message: dict[str, Any]
    reply: dict[str, Any]


class GoldenChat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A chat of parity's in the stock runtime."""

    name: str
    user_texts: tuple[str, ...] = msgspec.field(name="says")
    answers: dict[str, Any]
    turns: tuple[GoldenTurn, ...]


class ParityCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Arguments of `compare_tokens`, or of `compare_text` where there is a text, and what it must say."""

    name: str
    reference: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()
    text: str | None = None
    margins: tuple[float, ...]
    tolerance: float
    max_new_tokens: int
    expected: Comparison | None = None


def read_traces() -> list[GoldenTrace]:
    """Every golden trace."""
    return [msgspec.json.decode(line, type=GoldenTrace) for line in TRACES.read_text(encoding="utf-8").splitlines()]


def read_chats() -> list[GoldenChat]:
    """Every golden chat."""
    return [msgspec.json.decode(line, type=GoldenChat) for line in CHATS.read_text(encoding="utf-8").splitlines()]


def read_cases() -> list[ParityCase]:
    """Every case of the near-tie rule."""
    return [msgspec.json.decode(line, type=ParityCase) for line in CASES.read_text(encoding="utf-8").splitlines()]
