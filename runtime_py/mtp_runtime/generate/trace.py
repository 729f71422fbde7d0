"""GenerationTrace: the tokens and figures of one generation, as a value that goes to JSON and back."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from mtp_runtime.errors import UserError
from mtp_runtime.generate.acceptance import Origin
from mtp_runtime.generate.stats import GenerationStats

# The model chose a stop id, `max_new_tokens` were committed, the context is full, or the caller stopped listening.
FinishReason = Literal["stop", "max_tokens", "context", "abandoned"]


class Token(NamedTuple):
    """A committed token: its id, where it came from, and the target's top-1 minus top-2 logit or None."""

    id: int
    origin: Origin
    margin: float | None


class GenerationTrace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One generation: the prompt, the committed tokens with their origins and margins, and the statistics.

    `margins` is empty where margins are not recorded. `tokens` includes the stop id, if it ended with one.
    """

    model: str
    recipe: str
    num_draft_tokens: int
    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    origins: tuple[Origin, ...]
    margins: tuple[float, ...]
    finish_reason: FinishReason
    stats: GenerationStats

    def to_json(self) -> str:
        """Serialise, with the derived figures of the statistics under `summary`."""
        document = msgspec.to_builtins(self)
        document["summary"] = self.stats.summary()
        return msgspec.json.format(msgspec.json.encode(document), indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str) -> GenerationTrace:
        """Parse the JSON of `to_json`.

        Raises:
            UserError: the text is no such trace.
        """
        try:
            document = msgspec.json.decode(text)
            if isinstance(document, dict):
                document.pop("summary", None)
            return msgspec.convert(document, cls)
        except (msgspec.DecodeError, RecursionError) as error:
            raise UserError(f"not a generation trace ({error}): write it again with --json") from error
