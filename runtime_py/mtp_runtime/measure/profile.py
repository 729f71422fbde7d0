"""What a bundle takes on one machine: what `bench --json` and `device bench --json` both write, and a report reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mtp_runtime.bundle.contract import Manifest
from mtp_runtime.measure.timing import Rounds, Timing, round_ms


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """The times of one bundle on one machine. Reports of more than that extend it.

    `passes` are times by name: `decode`, and `draft` and `verify_{N}` where they were timed alone. `rounds` are whole
    rounds as they were measured. Both are empty where times say nothing about a device. `break_even` gives by K, the
    drafts of a round, the acceptance per position from which rounds are faster than plain decoding; None where none is
    high enough.
    """

    bundle: str
    model: str
    recipe: str
    drafter_recipe: str
    backend: str
    machine: str
    threads: int
    cache_length: int
    passes: Mapping[str, Timing]
    rounds: Sequence[Rounds]
    break_even: Mapping[int, float | None]

    @staticmethod
    def identity(bundle: Path, manifest: Manifest) -> dict[str, Any]:
        """Return the fields that say which bundle was measured."""
        return {
            "bundle": bundle.name,
            "model": manifest.model,
            "recipe": manifest.recipe,
            "drafter_recipe": manifest.drafter_recipe,
            "cache_length": manifest.cache_length,
        }

    @property
    def medians_ms(self) -> dict[str, float]:
        """The median of each pass, in ms."""
        return {name: timing.median_ms for name, timing in self.passes.items()}

    @property
    def rounds_ms(self) -> dict[int, float]:
        """What a round of K drafts takes, in ms, by K.

        It is the sum of the passes where those of drafts were timed, and otherwise the measured rounds with the
        drafter's own drafts.
        """
        medians = self.medians_ms
        if "draft" in medians:
            return {k: round_ms(medians, k) for k in self.break_even}
        drafted = [rounds for rounds in self.rounds if rounds.num_draft_tokens and rounds.alpha is None]
        return {rounds.num_draft_tokens: rounds.ms_per_token * rounds.committed_per_round for rounds in drafted}
